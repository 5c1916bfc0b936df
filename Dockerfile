# An image that holds what the scripts need, for Kubernetes or any container engine.
#   docker build --tag titan-ulysses .
#   docker run --gpus all --network host --ipc host -v /shared:/shared titan-ulysses \
#     bash scripts/multinode.sh 2 0 10.0.0.1 eth0 /shared/long.toml
# The wheels of torch bring CUDA's libraries; the host needs NVIDIA's driver and its container toolkit.
FROM python:3.12-slim

# A C++ compiler for torch.compile, numactl for the binding of ranks to cores, git for what a run records of itself.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git numactl \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /titan_ulysses
COPY pyproject.toml README.md LICENSE train.py ./
COPY titan_ulysses titan_ulysses
COPY scripts scripts
COPY configs configs

# The venv that the scripts look for. It is made here once, because pods may not write into the image.
RUN PIP_NO_CACHE_DIR=1 bash -c "source scripts/env.sh ''"
ENV PATH=/titan_ulysses/.venv/bin:$PATH

CMD ["bash", "scripts/train.sh", "--help"]

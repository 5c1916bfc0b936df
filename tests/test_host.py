"""Machines that a run may start on: no GPU, one, two, a MIG slice, a driver that torch cannot use.

nvidia-smi is a stand-in on PATH, and what CUDA itself would say is patched into torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import launch  # noqa: E402

from titan_ulysses.config.load import load_config  # noqa: E402
from titan_ulysses.distributed.errors import UserError  # noqa: E402
from titan_ulysses.setup.resolve import check_machine, resolve  # noqa: E402

TABLE = """| NVIDIA-SMI 535.104.05     Driver Version: 535.104.05   CUDA Version: 12.2     |"""
GPU = "GPU {}: NVIDIA H100 80GB HBM3 (UUID: GPU-{}a)"
SLICES = "  MIG 3g.40gb     Device  0: (UUID: MIG-1a)\n  MIG 3g.40gb     Device  1: (UUID: MIG-1b)"
TWO = f"{GPU.format(0, 0)}\n{GPU.format(1, 1)}"


def add_nvidia_smi(folder: Path, listed: str, table: str = TABLE) -> None:
    program = folder / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\nif [ \"$1\" = --list-gpus ]; then echo '{listed}'; else echo '{table}'; fi\n"
    )
    program.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def look_like(
        listed: str = "",
        *,
        usable: int = 0,
        visible: str | None = None,
        wheel: str | None = "13.0",
        table: str = TABLE,
        error: str = "CUDA driver error",
    ) -> None:
        """Make this a machine whose nvidia-smi lists `listed`, and of which CUDA can use `usable`
        GPUs.
        """

        def init() -> None:
            raise RuntimeError(error)

        if listed:
            add_nvidia_smi(tmp_path, listed, table)
            monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        # NVML counts whole GPUs, also those whose slices this process cannot have.
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: usable, raising=False)
        monkeypatch.setattr(torch.version, "cuda", wheel)
        monkeypatch.setattr(torch.cuda, "init", init)

    return look_like


MACHINES = [
    ("no GPU", {}, 2, ("cpu", 2)),
    ("one GPU", {"listed": GPU.format(0, 0), "usable": 1}, 1, ("cuda", 1)),
    ("two GPUs", {"listed": TWO, "usable": 2}, 2, ("cuda", 2)),
    ("one of two", {"listed": TWO, "usable": 1, "visible": "1"}, 1, ("cuda", 1)),
    ("MIG", {"listed": f"{GPU.format(0, 0)}\n{SLICES}", "usable": 1}, 1, ("cuda", 1)),
    ("hidden", {"listed": TWO, "visible": ""}, 2, ("cpu", 2)),
    ("hidden by -1", {"listed": TWO, "visible": "-1"}, 2, ("cpu", 2)),
]


@pytest.mark.parametrize(("name", "kind", "ranks", "run"), MACHINES, ids=[m[0] for m in MACHINES])
def test_ranks_of_the_quickstart(name, kind, ranks, run, machine, monkeypatch) -> None:
    machine(**kind)
    started = []
    monkeypatch.setattr(launch, "run", started.append)
    assert launch.main(["--standalone", "--nproc-per-node", "auto", "train.py"]) == 0
    assert started[0].nproc_per_node == str(ranks)
    device_type, degree = run
    config = load_config(str(ROOT / "configs" / "quickstart.toml"), [])
    spec = resolve(config, world_size=ranks, device_type=device_type)
    assert (spec.degrees.sequence, spec.degrees.data_parallel) == (degree, 1)
    assert spec.core.__name__ == "sdpa", "the quickstart computes in fp32"
    if device_type == "cpu":
        return check_machine(spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    config = load_config(
        str(ROOT / "configs" / "quickstart.toml"), [("training.param_dtype", "bfloat16")]
    )
    spec = resolve(config, world_size=ranks, device_type=device_type)
    assert spec.core.__name__ == "varlen", "it needs no package"


REFUSED = [
    (
        {"listed": TWO},
        "nvidia-smi sees 2 GPUs, but torch .* can use none: it was built for CUDA 13.0, and the "
        r"driver knows CUDA up to 12.2. Install a torch wheel for CUDA 12, whose version ends in "
        r"\+cu12 and a digit, or update the driver. To train on the CPU all the same, set "
        "CUDA_VISIBLE_DEVICES to nothing",
    ),
    (
        {"listed": GPU.format(0, 0), "wheel": None},
        r"sees 1 GPU, .*: it was built without CUDA. Install a torch wheel for CUDA 12, .*\+cu12",
    ),
    (
        {"listed": TWO, "visible": "7", "wheel": "12.8"},
        "CUDA_VISIBLE_DEVICES = 7 names none of them. Change it, or unset it",
    ),
    ({"listed": TWO, "wheel": "12.8"}, "can use none: CUDA driver error. Repair the driver"),
    ({"listed": TWO, "wheel": None, "table": "?"}, "a torch wheel for the CUDA version of the"),
]


@pytest.mark.parametrize(("kind", "message"), REFUSED)
def test_gpus_that_torch_cannot_use(kind, message, machine, monkeypatch, capsys) -> None:
    """Else a rank a GPU would train on the CPU."""
    machine(**kind)
    monkeypatch.setattr(launch, "run", lambda args: pytest.fail("it starts"))
    assert launch.main(["--standalone", "--nproc-per-node", "auto", "train.py"]) == 1
    config = load_config(str(ROOT / "configs" / "quickstart.toml"), [])
    with pytest.raises(UserError, match=message):
        check_machine(resolve(config, world_size=1, device_type="cpu"))
    assert capsys.readouterr().err.startswith("error: nvidia-smi sees ")


def test_more_ranks_than_gpus(machine, monkeypatch, capsys) -> None:
    machine(TWO, usable=2)
    assert launch.main(["--standalone", "--nproc-per-node", "3", "train.py"]) == 2
    assert (
        "3 ranks, and torch can use 2 GPUs here: each rank needs one of its own. Set NPROC=2"
        in (capsys.readouterr().err)
    )


def test_ranks_share_the_cores_and_run_beside_their_gpus(machine, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(launch, "run", started.append)
    monkeypatch.setattr(launch, "usable_cores", lambda: 48)
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    monkeypatch.setattr(launch, "memory_nodes", lambda: 2)
    monkeypatch.setattr(launch.shutil, "which", lambda program: f"/usr/bin/{program}")
    words = ["--standalone", "--nproc-per-node"]
    machine(TWO, usable=2)
    assert launch.main([*words, "auto", "train.py"]) == 0
    assert (os.environ["OMP_NUM_THREADS"], started[-1].numa_binding) == ("24", "node")
    launch.main([*words, "auto", "--numa-binding", "socket", "train.py"])
    assert started[-1].numa_binding == "socket"
    monkeypatch.setattr(launch, "usable_cores", lambda: 24)  # those of one node, maybe
    launch.main([*words, "auto", "train.py"])
    assert started[-1].numa_binding is None
    machine()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launch.main([*words, "64", "train.py"])
    assert (os.environ["OMP_NUM_THREADS"], started[-1].numa_binding) == ("5", None)


def test_train_sh_where_the_wheel_has_no_cuda(tmp_path: Path) -> None:
    """The whole command, where this machine's own torch is a wheel without CUDA."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    add_nvidia_smi(tmp_path, TWO)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    clone = tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    for name in ("scripts", "configs", "titan_ulysses", "train.py", "pyproject.toml"):
        (clone / name).symlink_to(ROOT / name)
    python = clone / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(clone / "scripts" / "train.sh")],
        env=environment | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "nvidia-smi sees 2 GPUs" in done.stderr and "it was built without CUDA" in done.stderr

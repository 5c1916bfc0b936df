#!/usr/bin/env bash
# The tests with the oldest versions that are supported and with the newest that can be had, each in a venv of its own.
# Minutes of downloading and testing: not part of CI. Arguments go to pytest.
#   bash scripts/test_versions.sh [oldest|newest] [pytest args]
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A VERSIONS=([oldest]="torch==2.11.* transformers==5.17.*" [newest]="torch transformers")
WHICH="oldest newest"
if [[ ${1:-} == oldest || ${1:-} == newest ]]; then
  WHICH=$1
  shift
fi
for name in $WHICH; do
  python=.venv-$name/bin/python
  [ -x "$python" ] || python3 -m venv ".venv-$name"
  # shellcheck disable=SC2086  # the versions are words
  $python -m pip install --quiet --disable-pip-version-check --upgrade ${VERSIONS[$name]} --editable ".[dev]"
  $python -c "import torch, transformers; print('$name: torch', torch.__version__, 'transformers', transformers.__version__)"
  $python -m pytest "$@"
  # The device of tests/cuda is built for each torch; one that was built for CUDA is refused, with the reason.
  if PYTHONPATH=tests/cuda/site $python -c \
    "import sys; from fakecuda import build; sys.exit(build.why_refused(build.torch_folder()) or 0)"; then
    $python -m pytest --cuda tests/cuda/test_device.py
  fi
done

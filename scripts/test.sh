#!/usr/bin/env bash
# Lint and check types, then test, on a machine with nothing but Python installed. Arguments go to pytest:
#   bash scripts/test.sh                      what CI runs: the tests, and some again on a device of type cuda
#   bash scripts/test.sh --slow               also the slow tests
#   bash scripts/test.sh --cuda --slow        all that run on that device, which needs no card: tests/cuda/README.md
#   bash scripts/test.sh tests/test_loss.py   one file
set -euo pipefail
source "$(dirname "$0")/env.sh" dev
cd "$ROOT"

if [ $# -eq 0 ]; then # while types are checked
  {
    PYTHONPATH=tests "$PYTHON" -c "import helpers.preload" # writes bytecode that each worker would write itself
    "$PYTHON" tests/cuda/site/fakecuda/build.py            # for --cuda, below
  } &
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two files of tests at a time: most tests leave a core idle or wait for a process that dies.
TESTS=("$PYTHON" -m pytest -n 2 --dist loadfile)
[ $# -eq 0 ] || exec "${TESTS[@]}" "$@"
failed=0
"${TESTS[@]}" || failed=$?
# In processes of their own: the device is loaded before torch. One file has most of the work: its tests are shared.
"${TESTS[@]}" --dist worksteal --cuda || failed=$?
exit "$failed"

#!/usr/bin/env bash
# Lint and check types, then test, on a machine with nothing but Python installed. Arguments go to pytest:
#   bash scripts/test.sh                      what CI runs
#   bash scripts/test.sh --slow               also the slow tests
#   bash scripts/test.sh tests/test_loss.py   one file
set -euo pipefail
source "$(dirname "$0")/env.sh" dev
cd "$ROOT"

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two files of tests at a time: most tests leave a core idle or wait for a process that dies.
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"

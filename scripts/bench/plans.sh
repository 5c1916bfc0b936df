#!/usr/bin/env bash
# Make every planned table and picture of the README and the docs: see plans.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" scripts/bench/plans.py "$@"

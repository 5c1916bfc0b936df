#!/usr/bin/env bash
# The wheel as its user has it: built, installed with its dependencies into a venv of its own, used in another folder.
# Two ranks train three steps in a loop of their own, save, and go on from a checkpoint. Minutes of installing: not part
# of CI.
#   bash scripts/check_wheel.sh
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/source"
cp -r titan_ulysses pyproject.toml README.md LICENSE "$folder/source"
cp scripts/check_wheel.py LICENSE "$folder"
cp -r scripts/examples "$folder/examples"
cd "$folder"
unset PYTHONPATH
python3 -m venv venv
venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir . ./source
rm -r source
venv/bin/python -m pip install --quiet --disable-pip-version-check "$(echo ./*.whl)[trl]"
venv/bin/python check_wheel.py

#!/usr/bin/env bash
# The wheel as its user has it: built, installed with its dependencies into a venv of its own, used in another folder.
# Two ranks train three steps in a loop of their own, save, and go on from a checkpoint. Minutes of installing: not part
# of CI.
#   bash scripts/check_wheel.sh                 all of it
#   bash scripts/check_wheel.sh --first-hour    what a new user does first: init, plan, two steps, an export, an own loop
#   PACKAGES=.venv/lib/python3.11/site-packages bash scripts/check_wheel.sh   what the wheel needs is taken from there
#   (several folders have a ':' between them)
set -euo pipefail
PACKAGES=${PACKAGES:+$(tr ':' '\n' <<< "$PACKAGES" | xargs -d '\n' realpath)}
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/source"
cp -r titan_ulysses pyproject.toml README.md LICENSE "$folder/source"
cp scripts/check_wheel.py LICENSE "$folder"
cp -r scripts/examples "$folder/examples"
cd "$folder"
unset PYTHONPATH
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir . ./source
rm -r source
if [[ -n ${PACKAGES:-} ]]; then
  # On the path of the environment. The wheel itself is installed here, also where those have another one.
  echo "$PACKAGES" > "$(echo venv/lib/python3*/site-packages)/packages.pth"
  venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed ./*.whl
else
  venv/bin/python -m pip install --quiet --disable-pip-version-check "$(echo ./*.whl)[trl]"
fi
venv/bin/python check_wheel.py "$@"

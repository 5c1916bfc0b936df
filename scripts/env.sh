# Sourced by the scripts beside it: makes .venv at the repository's root and installs the project, once.
# usage: source scripts/env.sh [extras, such as dev]    leaves $PYTHON and the root as working directory
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=.venv/bin/python
# Installed again when pyproject.toml changes or more extras are asked for.
_wanted="$(cksum < pyproject.toml) ${1:-}"
if ! grep -qxF "$_wanted" .venv/installed 2>/dev/null; then
  echo "Installing into .venv (once; a few minutes) ..." >&2
  [ -x $PYTHON ] || python3 -m venv .venv
  $PYTHON -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
  echo "$_wanted" >> .venv/installed
fi

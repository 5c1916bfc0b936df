# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv at the repository's root and installs the project, once.
# usage: source scripts/env.sh [extras, such as dev]    leaves $ROOT, $PYTHON, and the working directory as it is
#        with_config [CONFIG] [--section.key value ...]   leaves $ARGUMENTS, those of train.py
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$ROOT/.venv/bin/python
# Python compiles what is imported, and keeps it: pip would compile all files, which takes a minute of a core.
unset PYTHONDONTWRITEBYTECODE
# Installed again when pyproject.toml changes or extras are asked for that are not there.
_wanted="$(cksum < "$ROOT/pyproject.toml") ${1:-}"
if ! grep -q "^$_wanted${1:+\$}" "$ROOT/.venv/installed" 2>/dev/null; then
  echo "Installing into $ROOT/.venv (once; a few minutes) ..." >&2
  [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$ROOT${1:+[$1]}"
  echo "$_wanted" >> "$ROOT/.venv/installed"
fi

with_config() {
  ARGUMENTS=(--config "$ROOT/configs/quickstart.toml")
  if [[ $# -gt 0 && $1 != -* ]]; then
    ARGUMENTS=(--config "$1")
    shift
  fi
  ARGUMENTS+=("$@")
}

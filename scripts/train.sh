#!/usr/bin/env bash
# Train from one TOML file, on a machine with nothing but Python installed.
#   bash scripts/train.sh                                            the quickstart: two CPU ranks, or one a GPU; minutes
#   bash scripts/train.sh configs/X.toml --training.steps 100        any config, any setting
#   bash scripts/train.sh configs/X.toml --plan                      one process: so with --print-config and --help
#   NPROC=8 bash scripts/train.sh configs/X.toml                     eight ranks (default: one a GPU, else 2)
# Paths, also those in the config, count from where you stand.
set -euo pipefail
ALONE= # what one process does
for ARGUMENT in "$@"; do
  case $ARGUMENT in
    -h | --help) ALONE=1 && sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
    --plan | --print-config) ALONE=1 ;;
  esac
done
source "$(dirname "$0")/env.sh" "" # without an argument it would see those of this script

with_config "$@"
[[ -z $ALONE ]] || exec "$PYTHON" "$ROOT/train.py" "${ARGUMENTS[@]}"
exec "$PYTHON" "$ROOT/scripts/launch.py" --standalone --nproc-per-node "${NPROC:-auto}" \
  "$ROOT/train.py" "${ARGUMENTS[@]}"

#!/usr/bin/env bash
# Train from one TOML file, on a machine with nothing but Python installed.
#   bash scripts/train.sh                                            the quickstart: two CPU ranks, minutes
#   bash scripts/train.sh configs/X.toml --training.steps 100        any config, any setting
#   bash scripts/train.sh configs/X.toml --plan                      one process: so with --print-config and --help
#   NPROC=8 bash scripts/train.sh configs/X.toml                     eight ranks (default: 2, or one a GPU)
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

CONFIG=$ROOT/configs/quickstart.toml
if [[ $# -gt 0 && $1 != -* ]]; then
  CONFIG=$1
  shift
fi
[[ -z $ALONE ]] || exec "$PYTHON" "$ROOT/train.py" --config "$CONFIG" "$@"
if [[ -z ${NPROC:-} ]]; then
  GPUS=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
  NPROC=$((GPUS > 0 ? GPUS : 2))
fi
# Ranks that share cores: more threads than cores make all of them wait for each other.
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > NPROC ? CORES / NPROC : 1))}

exec "$PYTHON" "$ROOT/scripts/launch.py" --standalone --nproc-per-node "$NPROC" "$ROOT/train.py" --config "$CONFIG" "$@"

#!/usr/bin/env bash
# A tiny model learns to find what it has read, from nothing to its map, in some minutes on two CPU cores:
#   bash scripts/examples/needle.sh
# The first argument names another config beside this file; the others are settings of its second stage.
set -euo pipefail
source "$(dirname "$0")/../env.sh" plot
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LAUNCH="$PYTHON scripts/launch.py --standalone --nproc-per-node 2"
DATA=outputs/needle-data
NAME=${1:-needle}
shift || true

$PYTHON scripts/examples/needle_prepare.py $DATA
# Short sequences first, two at a time: the fact is near, and a step is quick.
$LAUNCH train.py --config "scripts/examples/$NAME.toml"
# Then sequences four times as long, of which each rank has half.
$LAUNCH train.py --config "scripts/examples/$NAME.toml" --job.name "$NAME-512" --model.config {} \
  --model.path "outputs/$NAME-128/export" --data.path $DATA/512/train.jsonl --validation.path $DATA/512/held_out.jsonl \
  --parallelism.sequence_parallel_degree 2 --training.seq_len 512 --training.steps 150 --optimizer.lr 2e-3 \
  --lr_scheduler.warmup_steps 10 --lr_scheduler.decay_type cosine "$@"
$LAUNCH -m titan_ulysses needle "outputs/$NAME-512/export" --lengths 128 256 512 1024 --output "outputs/$NAME-512/needle"
$PYTHON -m titan_ulysses plot "outputs/$NAME-128" "outputs/$NAME-512" --output "outputs/$NAME-512/plots"

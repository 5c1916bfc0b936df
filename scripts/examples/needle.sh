#!/usr/bin/env bash
# A tiny model learns to find what it has read, from nothing to its map; about six minutes on two CPU cores:
#   bash scripts/examples/needle.sh
set -euo pipefail
source "$(dirname "$0")/../env.sh" plot
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LAUNCH="$PYTHON scripts/launch.py --standalone --nproc-per-node 2"
DATA=outputs/needle-data

$PYTHON scripts/examples/needle_prepare.py $DATA
# Short sequences first, two at a time: the fact is near, and a step is quick.
$LAUNCH train.py --config scripts/examples/needle.toml
# Then sequences of which each rank has half.
$LAUNCH train.py --config scripts/examples/needle.toml --job.name needle-1024 --model.config {} \
  --model.path outputs/needle-256/export --data.path $DATA/1024/train.jsonl \
  --validation.path $DATA/1024/held_out.jsonl --parallelism.sequence_parallel_degree 2 --training.seq_len 1024 \
  --training.local_batch_size 8 --training.steps 120 --optimizer.lr 1e-3
$LAUNCH scripts/eval_needle.py outputs/needle-1024/export --lengths 256 512 1024 --output outputs/needle-1024/needle
$PYTHON scripts/plot.py outputs/needle-256 outputs/needle-1024 --output outputs/needle-1024/plots

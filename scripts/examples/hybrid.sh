#!/usr/bin/env bash
# A tiny hybrid of linear attention and attention learns to find what it has read, on two CPU cores, in minutes:
#   bash scripts/examples/hybrid.sh
set -euo pipefail
source "$(dirname "$0")/../env.sh" plot
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LAUNCH="$PYTHON scripts/launch.py --standalone --nproc-per-node 2"
DATA=outputs/needle-data

$PYTHON scripts/examples/needle_prepare.py $DATA
# Short sequences first, two at a time: the fact is near, and a step is quick.
$LAUNCH train.py --config scripts/examples/hybrid.toml
# Then sequences four times as long, of which each rank has half, layer by layer in two chunks.
$LAUNCH train.py --config scripts/examples/hybrid.toml --job.name hybrid-512 --model.config {} \
  --model.path outputs/hybrid-128/export --data.path $DATA/512/train.jsonl --validation.path $DATA/512/held_out.jsonl \
  --parallelism.sequence_parallel_degree 2 --training.seq_len 512 --training.steps 150 --optimizer.lr 2e-3 \
  --lr_scheduler.warmup_steps 10 --lr_scheduler.decay_type cosine \
  --activation_checkpoint.mode full --memory.stream_chunk_tokens 256
$LAUNCH scripts/eval_needle.py outputs/hybrid-512/export --lengths 128 256 512 1024 --output outputs/hybrid-512/needle
$PYTHON scripts/plot.py outputs/hybrid-128 outputs/hybrid-512 --output outputs/hybrid-512/plots

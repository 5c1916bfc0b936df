#!/usr/bin/env bash
# The chats of smollm2_chat.sh, learned by a LoRA adapter: exported alone, and merged into the model.
#   bash scripts/examples/smollm2_lora.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/env.sh plot,lora
source scripts/examples/smollm2_prepare.sh

NPROC=2 bash scripts/train.sh scripts/examples/smollm2_lora.toml "$@"
$PYTHON scripts/check_export.py outputs/smollm2_lora
$PYTHON scripts/examples/learned.py 0.05 outputs/smollm2_lora
$PYTHON -m titan_ulysses generate $FOLDER/model --adapter outputs/smollm2_lora/adapter --tokens 60 --chat "What dost thou want?"

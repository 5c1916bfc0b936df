#!/usr/bin/env bash
# SmolLM2-135M learns to speak as Shakespeare's leading parts: chats, of which it is trained on the assistant's turns.
#   bash scripts/examples/smollm2_chat.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/env.sh plot,lora
source scripts/examples/smollm2_prepare.sh

NPROC=2 bash scripts/train.sh scripts/examples/smollm2_chat.toml "$@"
$PYTHON scripts/check_export.py outputs/smollm2_chat
$PYTHON scripts/examples/learned.py 0.05 outputs/smollm2_chat
$PYTHON -m titan_ulysses generate outputs/smollm2_chat/export --tokens 60 --chat "What dost thou want?"

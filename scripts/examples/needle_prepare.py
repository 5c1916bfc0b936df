"""Data from which a tiny model learns to find a needle, for `titan-ulysses needle` to look for.

    python scripts/examples/needle_prepare.py FOLDER

Writes FOLDER/<bytes>/train.jsonl and held_out.jsonl for sequences of 128 and 512 bytes. A line's
prompt is text of Python's standard library in which a code stands anywhere; its completion, which
alone is trained on, is the question of needle with its answer.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from titan_ulysses.config.fields import expand_path
from titan_ulysses.data.files import find_files
from titan_ulysses.tools.long_texts import draw_codes, draw_key
from titan_ulysses.tools.needle import ANSWER, NEEDLE, QUESTION

LINES = {128: 40_000, 512: 4_000}
HELD_OUT = 200


def line(text: str, size: int, draw: random.Random) -> dict[str, str]:
    """A prompt and its completion, which with the end of the text are `size` bytes."""
    key, (code,) = draw_key(draw), draw_codes(draw, 1)
    needle, question = (
        template.format(key=key, code=code) for template in (NEEDLE, QUESTION + ANSWER + ".")
    )
    room = size - 1 - len(needle) - len(question)
    begin, depth = draw.randrange(len(text) - room), draw.randrange(room + 1)
    hay = text[begin : begin + room]
    return {"prompt": hay[:depth] + needle + hay[depth:], "completion": question}


def main() -> None:
    folder, draw = Path(sys.argv[1]), random.Random(0)
    files = find_files(expand_path("{stdlib}/*.py"), extensions=[])
    text = "\n".join(file.read_text("utf-8") for file in files.values())
    text = text.encode("ascii", "ignore").decode()  # a byte a character
    for size, count in LINES.items():
        (folder / str(size)).mkdir(parents=True, exist_ok=True)
        for name, lines in (("train", count), ("held_out", HELD_OUT)):
            with open(folder / str(size) / f"{name}.jsonl", "w") as file:
                file.writelines(json.dumps(line(text, size, draw)) + "\n" for _ in range(lines))


if __name__ == "__main__":
    main()

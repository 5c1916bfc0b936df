"""Data from which a tiny model learns to find a needle, for scripts/eval_needle.py to look for.

    python scripts/examples/needle_prepare.py FOLDER

Writes FOLDER/<tokens>/train.jsonl and held_out.jsonl for sequences of 128 and 1024 bytes. A line's prompt is text of
Python's standard library in which codes stand anywhere; its completion, which alone is trained on, asks for some of
them in any order, in the words of eval_needle.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_needle import ANSWER, NEEDLE, QUESTION, draw_codes, draw_key

from titan_ulysses.config import expand_path
from titan_ulysses.data.files import find_files

LINES = {128: 40_000, 1024: 6_000}
HELD_OUT = 200
_ASKED = QUESTION + ANSWER + "."


def line(text: str, size: int, draw: random.Random) -> dict[str, str]:
    """A prompt and its completion, which with the end of the text are `size` bytes."""
    needle, asked = (len(template.format(key="abcdef", code="12345")) for template in (NEEDLE, _ASKED))
    count = draw.randint(1, min(4, (size - 1 - asked) // needle))
    keys = sorted({draw_key(draw) for _ in range(count)})
    codes = dict(zip(keys, draw_codes(draw, len(keys)), strict=True))
    questions = draw.randint(1, min(8, (size - 1 - count * needle) // asked))
    completion = "".join(_ASKED.format(key=key, code=codes[key]) for key in draw.choices(keys, k=questions))
    needles = [NEEDLE.format(key=key, code=code) for key, code in codes.items()]
    draw.shuffle(needles)
    room = size - 1 - len(completion) - sum(map(len, needles))
    begin = draw.randrange(len(text) - room)
    hay = text[begin : begin + room]
    cuts = [0, *sorted(draw.randrange(room + 1) for _ in needles), room]
    pieces = [hay[first:last] for first, last in zip(cuts, cuts[1:], strict=False)]
    prompt = pieces[0] + "".join(needle + piece for needle, piece in zip(needles, pieces[1:], strict=True))
    return {"prompt": prompt, "completion": completion}


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

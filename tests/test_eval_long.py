"""`titan-ulysses eval-long`: what each task puts where; its scores against plain transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import write_byte_model
from helpers.ranks import run_on_ranks
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability.pictures import has_matplotlib
from titan_ulysses.tools import eval_long, long_texts

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = load_tokenizer("bytes")
TEXT = [*("the quick brown fox jumps over the lazy dog. " * 60).encode()]


def trial(task: str, text: list[int] = TEXT, **changes: Any) -> tuple[str, str]:
    """(prompt, answer) as text."""
    settings = {"length": 900, "depth": 0.5, "count": 3, "seed": "0 900 1"} | changes
    made = eval_long.make_trial(TOKENIZER, text, task=task, **settings)
    assert len(made.prompt) + len(made.answers[0]) == settings["length"]
    assert made == eval_long.make_trial(TOKENIZER, text, task=task, **settings)
    return bytes(made.prompt).decode(), bytes(made.answers[0]).decode()


@pytest.mark.parametrize("task", eval_long.TASKS)
def test_a_seed_has_one_answer_at_every_depth(task: str) -> None:
    answers = {trial(task, depth=depth)[1] for depth in (0, 0.3, 1)}
    assert len(answers) == 1
    assert trial(task, seed="0 900 2")[1] not in answers


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_needles(depth: float) -> None:
    text, answer = trial("needles", depth=depth)
    codes = dict(re.findall(r"The secret code of (\w+) is (\d+)\.", text))
    key = re.search(r"The secret code of (\w+) is$", text)[1]
    assert len(codes) == 3 and codes[key] == answer.strip()
    # The asked one is at the depth of the text around all; others may stand before it.
    before = text.index(f"of {key} is {codes[key]}") - 18
    others = sum(len(f"\nThe secret code of {k} is {c}.\n") for k, c in codes.items() if k != key)
    room = 900 - len(text[text.rindex("\n") :]) - len(answer) - others
    assert depth * room - 60 <= before <= depth * room + others + 60


def test_variables() -> None:
    text, answer = trial("variables", depth=0.25)
    value = re.search(r"with the value (\d+)", text)[1]
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n", text)
    chain = [name for name, _ in lines]
    assert answer == " " + ", ".join(chain) and len(chain) == 3
    assert [source for _, source in lines] == [value, *chain[:-1]]
    assert 0.15 < text.index(f"VAR {chain[0]} = {value}") / 900 < 0.3


def test_words() -> None:
    text, answer = trial("words", depth=0.5)
    listed = text[: text.index("\nThe word that")].split()
    assert listed.count(answer.strip()) == eval_long._OFTEN
    counts = {word: listed.count(word) for word in listed if word != answer.strip()}
    assert max(counts.values()) <= 2
    places = [m.start() / 900 for m in re.finditer(answer, text)]
    assert min(places) > 0.3 and max(places) < 0.7


def test_questions() -> None:
    text, answer = trial("questions", depth=1)
    who = re.search(r"where does (\w+) live", text)[1]
    lives = dict(re.findall(r"(\w+) lives in the town of (\w+)\.", text))
    assert lives[who] == answer.strip() and len(lives) > 10
    assert text.count(f"{who} lives") == 1


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match=r"--lengths 40: what variables needs alone are \d+ tokens"):
        trial("variables", length=40)
    with pytest.raises(UserError, match="--lengths 9000: --text has 2,700 tokens only"):
        trial("needles", length=9000)
    wrong = [["--count", "1"], ["--count", "100000"], ["--trials", "0"], ["--depths", "2"]]
    for arguments in wrong:
        with pytest.raises(UserError, match=arguments[0]) as error:
            eval_long.main(["m", *arguments])
        assert error.value.exit_code == 2


def test_no_name_is_there_twice() -> None:
    """Of two codes of one name, nobody knows which is asked for."""
    for task in ("needles", "variables"):
        text, _ = trial(task, length=200_000, count=1500, text=[*TEXT * 80])
        names = re.findall(r"\n(?:The secret code of|VAR) (\w+) (?:is|=) \w+", text)
        assert len({*names}) == len(names) == 1500, task


def test_a_folder_that_cannot_be_is_named_before_the_model_is_read(tmp_path: Path) -> None:
    write_byte_model(tmp_path / "model", max_position_embeddings=512)
    (tmp_path / "file").touch()
    (tmp_path / "text.txt").write_bytes(bytes(TEXT))
    (tmp_path / "model" / "model.safetensors").unlink()
    arguments = [str(tmp_path / "model"), "--lengths", "401", "--text", f"{tmp_path}/text.txt"]
    for message in run_on_ranks(2, long_main, [*arguments, "--output", f"{tmp_path}/file"]):
        assert message == f"--output {tmp_path}/file: File exists. Choose another folder."


def long_main(arguments: list[str]) -> str | None:
    """What is wrong, if anything."""
    try:
        return eval_long.main(arguments)
    except UserError as error:
        return str(error)


def test_the_scores_are_those_of_plain_transformers(tmp_path: Path) -> None:
    """Two ranks, of which the second has the answer; a length that they do not divide."""
    model = write_byte_model(tmp_path / "model", max_position_embeddings=512)
    # It says vowels alone, so that some tokens of the answers are the likeliest, and others not.
    vowels = torch.zeros(257, dtype=torch.bool)
    vowels[[*b"aeiouAEIOU"]] = True
    model.lm_head.weight.data[~vowels] = 0
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(TEXT))
    more = ["--lengths", "401", "--depths", "0", "1", "--seed", "5", "--text", str(text)]
    cells = compared_with_plain(tmp_path / "model", more, tmp_path / "out")
    assert [(c["task"], c["depth"]) for c in cells] == [
        (task, depth) for task in eval_long.TASKS for depth in (0, 1)
    ]
    assert len({cell["likeliest"] for cell in cells}) > 2


@pytest.mark.slow
def test_the_scores_of_the_needle_example(tmp_path: Path) -> None:
    """A trained model, on the default text."""
    folder = ROOT / "outputs" / "needle-512" / "export"
    if not folder.is_dir():
        pytest.skip("bash scripts/examples/needle.sh makes outputs/needle-512/export")
    cells = compared_with_plain(folder, ["--lengths", "512", "1023"], tmp_path)
    assert any(cell["likeliest"] > 0.2 for cell in cells)  # guessing: a tenth of the digits


def compared_with_plain(folder: Path, more: list[str], output: Path) -> list[dict[str, Any]]:
    """Return the cells of two ranks, which equal those of plain transformers in this process."""
    arguments = [str(folder), "--trials", "3", *more, "--output", str(output)]
    assert run_on_ranks(2, long_main, arguments) == [None, None]
    found = json.loads((output / "long.json").read_text())
    assert (output / "long.png").exists() == has_matplotlib()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size, seed = 4 * found["lengths"][-1], found["seed"]
    text = long_texts.read_haystack(TOKENIZER, found["text"], tokens=size, seed=seed)
    for cell in found["cells"]:
        cell_of = {key: cell[key] for key in ("task", "length", "depth")}
        seeds = [f"{seed} {cell['length']} {number}" for number in range(3)]
        losses, shares = zip(*(plain(model, text, **cell_of, seed=s) for s in seeds), strict=True)
        assert cell["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5, abs=1e-6), cell
        assert cell["likeliest"] == pytest.approx(sum(shares) / 3), cell
        assert cell["exact"] == pytest.approx(sum(share == 1 for share in shares) / 3), cell
    return found["cells"]


@torch.no_grad()
def plain(model: Any, text: list[int], **settings: Any) -> tuple[float, float]:
    """(loss, share of likeliest tokens) of a trial's answer."""
    made = eval_long.make_trial(TOKENIZER, text, count=4, **settings)
    answer = torch.tensor(made.answers[0])
    ids = torch.tensor([[*made.prompt, *made.answers[0]]])
    logits = model(input_ids=ids).logits[0, len(made.prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, answer).item()
    return loss, (logits.argmax(-1) == answer).double().mean().item()

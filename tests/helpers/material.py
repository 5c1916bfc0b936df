"""What whole runs are tried on: a tiny model, data of every kind, a tokenizer with a chat template,
an earlier run.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from helpers.pictures import asked, picture, tiny_processor, write_video
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, train, write_documents
from titan_ulysses.config.toml import to_toml

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
BASE: Settings = {
    "model.config": MODEL,
    "model.tokenizer": "bytes",
    "data.path": "$MATERIAL/texts",
    "training.seq_len": 32,
    "training.steps": 2,
    "training.param_dtype": "float32",
    "checkpoint.enable": False,
    "checkpoint.export": False,
    "metrics.enable_report": False,
}
"""Two steps in a fraction of a second. Other settings come over these; None leaves one out."""


def as_toml(settings: Settings) -> str:
    return "".join(
        f"{key} = {to_toml(value)}\n" for key, value in settings.items() if value is not None
    )


def write_material(folder: Path) -> None:
    """Everything but the earlier run."""
    write_documents(folder / "texts", documents=20, seed=0)
    for number in range(2):
        (folder / "texts" / f"{number}.md").write_text("# Notes that are no text\n")
    (folder / "latin").mkdir()
    for number in range(20):
        (folder / "latin" / f"{number}.txt").write_bytes("Äpfel und Öl für Ärzte".encode("latin-1"))
    _write_records(folder)
    _write_chats(folder)
    _write_datasets(folder)
    _write_tokenizer(folder / "pairs")
    if all(map(find_spec, ("PIL", "torchvision", "av"))):
        _write_pictures(folder / "pictures")


def write_earlier_run(folder: Path) -> None:
    """A run of two steps from another seed: its checkpoint and its export, with the tokenizer of
    `pairs`.
    """
    settings = BASE | {"training.seed": 5, "checkpoint.enable": True, "checkpoint.export": True}
    settings |= {"model.tokenizer": f"{folder}/pairs", "data.path": f"{folder}/texts"}
    settings |= {"job.dump_folder": f"{folder}/earlier"}
    (folder / "earlier.toml").write_text(as_toml(settings))
    run_on_ranks(1, train, folder / "earlier.toml", {}, timeout=300)


def _write_records(folder: Path) -> None:
    record = {"text": "the text", "body": "another text", "q": "what is it? ", "a": "1234"}
    lines = "".join(json.dumps(record) + "\n" for _ in range(12))
    pair = {"prompt": "what is it? ", "chosen": "a tale", "rejected": "no", "best": "a fable"}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 8)
    judged = {"prompt": "Count: ", "completion": "1 2 3", "label": True, "good": False}
    (folder / "judged.jsonl").write_text((json.dumps(judged) + "\n") * 8)
    ids = [*b"the text", 256]
    token_record = {"input_ids": ids, "labels": 5 * [-100] + ids[5:]}
    (folder / "tokens.jsonl").write_text(12 * (json.dumps(token_record) + "\n"))
    said = {"teacher_ids": [[x, 7] for x in ids], "teacher_log_probs": [[-0.5, -1.5]] * len(ids)}
    (folder / "taught.jsonl").write_text(12 * (json.dumps(token_record | said) + "\n"))
    (folder / "mixed").mkdir()
    (folder / "mixed" / "one.txt").write_text(
        "the only text of this folder, with more than 32 bytes"
    )
    for path, text in {
        "records.jsonl": lines,
        "mixed/records.jsonl": lines,
        "bad.jsonl": lines + "{broken\n",
    }.items():
        (folder / path).write_text(text)


def _write_chats(folder: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "a tale"},
    ]
    turns = [{"author": "user", "text": "what is it?"}, {"author": "agent", "text": "a tale"}]
    chat = {"messages": messages, "conversation": 2 * messages, "functions": tools, "turns": turns}
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for _ in range(6)))


def _write_datasets(folder: Path) -> None:
    """One with splits, as `save_to_disk` writes it, and one with subsets, as the hub has them."""
    import datasets

    rows = [{"text": f"row {number} of nine"} for number in range(9)]
    table = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": table, "rest": table.select(range(4))}).save_to_disk(
        folder / "dataset"
    )
    (folder / "subsets").mkdir()
    subsets = {"one": 3, "other": 5}
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in subsets)
    (folder / "subsets" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name, count in subsets.items():
        text = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (folder / "subsets" / f"{name}.jsonl").write_text(text)


def _write_pictures(folder: Path) -> None:
    """Chats with an image and a video, and the processor of a tiny model."""
    tiny_processor().save_pretrained(folder)
    picture(0, 24, 24).save(folder / "a.png")
    write_video(folder / "v.mp4", frames=30)
    image, video = {"type": "image", "image": "a.png"}, {"type": "video", "video": "v.mp4"}
    line = json.dumps({"messages": asked(image, video, "?")})
    (folder / "chats.jsonl").write_text(4 * (line + "\n"))


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE of at most 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "that thesis is these tastes, it is the taste of toast"
    backend.train_from_iterator([text] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role + ': ' + "
        "m.content + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% "
        "endif %}"
    )
    tokenizer.save_pretrained(folder)

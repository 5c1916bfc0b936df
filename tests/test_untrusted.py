"""What comes from elsewhere runs no code: checkpoints, and folders of models and tokenizers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, refusal, train, write_run
from titan_ulysses.checkpoint.convert import main as convert
from titan_ulysses.checkpoint.manifest import entry_of, read_json, write_json
from titan_ulysses.checkpoint.storage import CheckpointReader, open_checkpoint
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf

SETTINGS: Settings = {
    "training.steps": 1,
    "training.global_batch_size": 2,
    "lr_scheduler.warmup_steps": 0,
    "parallelism.sequence_parallel_degree": 2,
}

# --- checkpoints ----------------------------------------------------------------------------------


class Command:
    """What its pickle is read as: a call of a shell command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    config = write_run(tmp_path_factory.mktemp("untrusted"))
    run_on_ranks(2, train, config, SETTINGS)
    return config


def checkpoint_of(config: Path) -> Path:
    return config.parent / "outputs" / "run" / "checkpoints" / "step-1"


def forge(config: Path, run: Path, change: Callable[[Path, Metadata], Any]) -> Path:
    """A copy of the checkpoint, in a run of its own, of which change has made the table of contents
    another one.
    """
    checkpoint = run / "checkpoints" / "step-1"
    shutil.copytree(checkpoint_of(config), checkpoint)
    file = checkpoint / ".metadata"
    contents = change(checkpoint, pickle.loads(file.read_bytes()))
    file.write_bytes(contents if isinstance(contents, bytes) else pickle.dumps(contents))
    # Which agrees, as an attacker would have it.
    about = read_json(checkpoint / "run.json")
    about["files"][".metadata"] = entry_of(file)
    write_json(checkpoint / "run.json", about)
    shutil.copy(config.parent / "outputs" / "run" / "config.toml", run)
    return checkpoint


def opened(checkpoint: Path, where: str = "") -> CheckpointReader:
    return open_checkpoint(checkpoint, read_json(checkpoint / "run.json")["files"], where=where)


def test_a_pickle_that_runs_a_command_runs_nothing(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    """By none of the three ways in which a checkpoint is read."""
    made = config.parent / "made"

    def with_a_command(_, metadata: Metadata) -> Metadata:
        metadata.planner_data = Command(f"touch '{made}'")
        return metadata

    checkpoint = forge(config, config.parent / "outputs" / "forged", with_a_command)
    named = "is refused: its .metadata names posix.system, which no checkpoint of tensors needs"
    resumed = SETTINGS | {"job.name": "forged", "training.steps": 2}
    begun = SETTINGS | {"job.name": "begun", "checkpoint.initial_load_path": str(checkpoint)}
    for message in run_on_ranks(2, refusal, config, resumed):
        assert message.startswith(f"checkpoint.folder = {checkpoint.parent}: step-1 {named}"), (
            message
        )
    for message in run_on_ranks(2, refusal, config, begun):
        assert message.startswith(f"checkpoint.initial_load_path = {checkpoint} {named}"), message
    with pytest.raises(SystemExit, match="2"):
        convert([str(checkpoint), str(config.parent / "converted")])
    assert f"error: {checkpoint} {named}" in capsys.readouterr().err
    assert not made.exists() and not (config.parent / "converted").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert made.exists(), "the forgery does nothing"


def set_a_class_attribute(*_: Any) -> bytes:
    """(None, {"evil": 1}) as the state of a class."""
    return (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n"
        b"(N}X\x04\x00\x00\x00evilK\x01stb."
    )


def keep_bytes(_, metadata: Metadata) -> Metadata:
    """DCP reads such an entry with pickle."""
    metadata.state_dict_metadata["model.model.norm.weight"] = BytesStorageMetadata()
    return metadata


def move_file(path: str) -> Callable[[Path, Metadata], Metadata]:
    def change(checkpoint: Path, metadata: Metadata) -> Metadata:
        (checkpoint / "link").symlink_to(checkpoint.parent)
        for info in metadata.storage_data.values():
            info.relative_path = path.format(checkpoint=checkpoint) + info.relative_path
        return metadata

    return change


FORGERIES: dict[str, tuple[Callable[[Path, Metadata], Any], str]] = {
    "a name inside of a name": (
        lambda *_: b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
        "names torch.os.system, ",
    ),
    "bytes": (keep_bytes, "names torch.distributed.checkpoint.metadata.BytesStorageMetadata, "),
    "a class": (set_a_class_attribute, "changes the classes that it names"),
    "above": (move_file("../step-1/../"), "names the file ../step-1/../__0_0.distcp, "),
    "absolute": (
        move_file("/tmp/"),
        "names the file /tmp/__0_0.distcp, which is not in the checkpoint's folder",
    ),
    "link": (move_file("link/"), "names the file link/__0_0.distcp, "),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_what_a_checkpoint_may_not_ask_for(case: str, config: Path, tmp_path: Path) -> None:
    change, reason = FORGERIES[case]
    checkpoint = forge(config, tmp_path, change)
    with pytest.raises(UserError) as refused:
        opened(checkpoint, "HERE")
    assert str(refused.value).startswith(f"HERE is refused: its .metadata {reason}")
    if case == "a class":
        del Metadata.evil


def test_what_a_checkpoint_may_ask_for(config: Path, tmp_path: Path) -> None:
    """Files in folders of its own, written by Python 3.13, which calls paths otherwise; and no
    rank's own table.
    """
    inside = forge(config, tmp_path / "inside", move_file("./{checkpoint}/../step-1/"))
    entries = opened(inside).read_metadata().state_dict_metadata
    assert entries == opened(checkpoint_of(config)).read_metadata().state_dict_metadata

    def by_python_3_13(_, metadata: Metadata) -> bytes:
        return pickle.dumps(metadata, protocol=2).replace(b"cpathlib\n", b"cpathlib._local\n")

    newer = forge(config, tmp_path / "newer", by_python_3_13)
    assert b"pathlib._local" in (newer / ".metadata").read_bytes()
    assert opened(newer).read_metadata().state_dict_metadata == entries
    (newer / ".metadata").rename(newer / "__0.metadata")
    with pytest.raises(ValueError, match="No such file"):
        opened(newer)


# --- the network, and what is secret --------------------------------------------------------------


def train_and_hear(config: Path, settings: Settings) -> list[str]:
    """What a run connects to or asks the name service for, beyond this host.

    Python's own sockets: those of torch go to the other ranks.
    """
    found, listens = [], [True]

    def hook(event: str, arguments: tuple) -> None:
        if listens and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            address = arguments[1] if event != "socket.getaddrinfo" else arguments[0]
            host = address[0] if isinstance(address, tuple) else address
            if host not in ("127.0.0.1", "::1", "localhost", None):
                found.append(f"{event} {address}")

    sys.addaudithook(hook)  # which stays, but listens no longer than the run takes
    os.environ |= dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY"), SECRET)
    try:
        train(config, settings)
    finally:
        listens.clear()
        del os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]
    return found


SECRET = "hf_abcdefghijklmnop"


def test_a_local_run_asks_no_host_and_writes_no_token(config: Path) -> None:
    settings = SETTINGS | {"job.name": "alone", "parallelism.sequence_parallel_degree": 1}
    settings |= {"checkpoint.export": True, "validation.enable": True}
    assert run_on_ranks(1, train_and_hear, config, settings) == [[]]
    files = [file for file in (config.parent / "outputs" / "alone").rglob("*") if file.is_file()]
    assert len(files) > 8
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


# --- folders of models and tokenizers -------------------------------------------------------------

MODEL = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
NAMES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
OWN = dict(
    zip(
        NAMES,
        ("configuration_x.XConfig", "modeling_x.XModel", "modeling_x.XForCausalLM"),
        strict=True,
    )
)
ADOPTED = {name: reference.replace(".X", ".LLama_") for name, reference in OWN.items()}
"""As a folder names the code that its model had before transformers adopted it."""


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that were asked."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    return asked


def write_folder(
    folder: Path, made: Path, *, tokenizer: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """A model's config, a tokenizer, and code that makes the file `made` when it is imported."""
    load_tokenizer("bytes").save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text()) | (tokenizer or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps(MODEL | settings))
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(f"open({str(made)!r}, 'w')\nclass XConfig: pass\n")
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "of its own": (
        {"model_type": "x", "auto_map": OWN},
        "(AutoConfig = configuration_x.XConfig under auto_map in its config), which is not run. "
        'transformers has no class for "x".',
    ),
    "of a known name": (
        {"auto_map": {"AutoModelForCausalLM": "other/repository--modeling_x.XForCausalLM"}},
        "(AutoModelForCausalLM = other/repository--modeling_x.XForCausalLM under auto_map in its "
        'config), which is not run. transformers for "llama" has LlamaForCausalLM.',
    ),
    "without a head": (
        {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "modeling_x.ViTForCausalLM"}},
        'transformers has no class for "vit".',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_with_code_of_its_own(case: str, tmp_path: Path, nobody_answers: list[str]) -> None:
    settings, reason = REFUSED[case]
    folder = write_folder(tmp_path / "model", tmp_path / "made", **settings)
    config = write_run(tmp_path / "run")
    message = refusal(config, {"model.config": {}, "model.path": str(folder)})
    assert (
        message.startswith(f'model.path = "{folder}": the model comes with its own code (')
        and reason in message
    )
    if case != "of its own":  # of which [model.config] knows nothing
        message = refusal(config, {"model.config": MODEL | settings})
        assert (
            message.startswith("model.config: the model comes with its own code (")
            and reason in message
        )
    assert not nobody_answers and not (tmp_path / "made").exists()


def test_a_tokenizer_with_code_of_its_own(tmp_path: Path, nobody_answers: list[str]) -> None:
    config = write_run(tmp_path / "run")
    for number, auto_map in enumerate(
        ({"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, ["tokenization_x.X"])
    ):
        tokenizer = {"auto_map": auto_map, "tokenizer_class": "XTokenizer"}
        folder = write_folder(tmp_path / str(number), tmp_path / "made", tokenizer=tokenizer)
        message = refusal(config, {"model.tokenizer": str(folder)})
        assert message.startswith(
            f'model.tokenizer = "{folder}": the tokenizer comes with its own code (AutoTokenizer = '
        )
    known = {"auto_map": {"AutoTokenizer": ["tokenization_x.GPT2Tokenizer", None]}}
    folder = write_folder(tmp_path / "known", tmp_path / "made", tokenizer=known)
    ids = [load_tokenizer(name)("to be").input_ids for name in ("bytes", str(folder))]
    assert ids[0] == ids[1]
    assert not nobody_answers and not (tmp_path / "made").exists()


def train_and_listen(config: Path, settings: Settings) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config, settings)
    return said.getvalue()


def test_a_model_that_transformers_has_adopted(tmp_path: Path, nobody_answers: list[str]) -> None:
    """Its own class is used, and that is said; the export has the code, which it names."""
    config = write_run(tmp_path)
    folder = write_folder(tmp_path / "model", tmp_path / "made", auto_map=ADOPTED)
    model = AutoModelForCausalLM.from_config(hf.load_model_config("", MODEL))
    model.save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", folder)
    settings = SETTINGS | {"model.config": {}, "model.path": str(folder), "checkpoint.export": True}
    said, _ = run_on_ranks(2, train_and_listen, config, settings)
    assert (
        "LlamaForCausalLM" in said and f"not run: {', '.join(ADOPTED.values())}, named in" in said
    )
    export = json.loads((tmp_path / "outputs" / "run" / "export" / "config.json").read_text())
    assert export["model_type"] == "llama" and export["auto_map"] == ADOPTED
    assert "code that is not run: configuration_x.py, modeling_x.py, tokenization_x.py" in said
    assert (tmp_path / "outputs" / "run" / "export" / "modeling_x.py").exists()
    assert not (tmp_path / "made").exists()
    AutoConfig.from_pretrained(folder)  # as plain transformers has it
    assert not nobody_answers

"""What a config, a folder or a file of data may not be: each is refused by a message that names it,
before anything heavy is imported where that can be, and what can be gone on from is gone on from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig, LlamaForCausalLM

from titan_ulysses.__main__ import run
from titan_ulysses.checkpoint import folder as weights_folder
from titan_ulysses.checkpoint.disk import disk_needs
from titan_ulysses.checkpoint.safetensors import keep_generation_config
from titan_ulysses.checkpoint.step_folder import steps_in
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import Config, SourceSettings
from titan_ulysses.data.corpus import CorpusStats
from titan_ulysses.data.records import BadRow, Row
from titan_ulysses.data.sources import open_rows
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch import hub
from titan_ulysses.model.families import check_family
from titan_ulysses.model.hf import load_model_config
from titan_ulysses.model.rope_scaling import scale_rope
from titan_ulysses.observability.metrics import MetricsLogger
from titan_ulysses.setup.options import select_core

BASE = '[model]\ntokenizer = "bytes"\n[model.config]\nmodel_type = "llama"\n'
HUGE = 10**50


def refusal(act: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        act(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(BASE)
    return path


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(
            ("checkpoint.folder", n)
            for n in ("export", "Tensorboard", ".", "../x", "/tmp/x", "a//b")
        ),
        *(
            ("checkpoint.folder", n)
            for n in ("checkpoints/../export", ".export.old", "config.toml")
        ),
        ("checkpoint.folder", "profile_traces"),
        *(("job.name", n) for n in ("..", "/", "../run", "a/../b", "/tmp/run", "books/export")),
        ("job.name", "books/checkpoints"),
        ("profiling.save_traces_folder", "export/x"),
        ("profiling.save_memory_snapshot_folder", "checkpoints"),
        *((key, "x" * 256) for key in ("job.name", "job.dump_folder", "checkpoint.folder")),
        ("job.dump_folder", "a\0b"),
        ("data.path", "a\0b"),
        ("model.freeze", ["a\0b"]),
        ("job.name", "\udc80"),
        *((key, "a\x1b]0;b\x07") for key in ("job.name", "checkpoint.folder")),
        ("lora.alpha", 32.0),
        ("lora.quantize_base", "nf4"),
        ("lora.quantize_base", "fp4"),
        ("lora.target_modules", ["q_proj"]),
        ("model.attention", "os"),
        ("model.attention", ":x"),
        ("model.attention", "..a:b"),
        ("model.rope_scaling", {"rope_type": "yarn", "factor": float("nan")}),
    ],
)
def test_settings_that_cannot_be(toml: Path, setting: str, value: Any) -> None:
    assert setting in refusal(load_config, toml, [(setting, value)])


@pytest.mark.parametrize("value", ["checkpoints", "kept/here", "save points", "checkpoints-2"])
def test_folders_that_can_be(toml: Path, value: str) -> None:
    assert load_config(toml, [("checkpoint.folder", value)]).checkpoint.folder == value
    assert load_config(toml, [("job.name", value)]).job.name == value


def numbers() -> list[str]:
    unlimited = {"training.max_norm"}  # inf is no clipping
    return [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key, inner in field.annotation.model_fields.items()  # type: ignore[union-attr]
        if inner.annotation in (int, float) and f"{section}.{key}" not in unlimited
    ]


@pytest.mark.parametrize("setting", numbers())
def test_absurd_numbers_are_refused_with_their_limit(toml: Path, setting: str) -> None:
    message = refusal(load_config, toml, [(setting, HUGE)])
    assert message.startswith(f"{setting} = {HUGE}")
    assert "must be at most " in message or "must be less than " in message


def test_what_needs_no_model_is_said_before_torch_is_imported(toml: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom titan_ulysses.__main__ import run\n"
        "from titan_ulysses.distributed.errors import UserError\n"
        "for options in eval(sys.argv[2]):\n"
        "    try:\n        run(['--config', sys.argv[1], *options])\n"
        "    except UserError as error:\n        print(str(error).splitlines()[0])\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    cases = {
        "--parallelism.sequence_parallel_degree=3": "dp_replicate(1) x dp_shard(-1) x sp(3)",
        f"--data.path={tmp_path}/none": f'data.path = "{tmp_path}/none" does not exist',
        "--model.tokenizer=./none": 'model.tokenizer = "./none": no such folder',
    }
    command = [sys.executable, "-c", code, str(toml), repr([[option] for option in cases])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, expected in zip(done.stdout.splitlines(), cases.values(), strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize("base", ["a\\u0000b", "x" * 5000, "circle.toml"])
def test_a_base_file_that_is_no_path(tmp_path: Path, base: str) -> None:
    (tmp_path / "circle.toml").symlink_to(tmp_path / "circle.toml")
    (tmp_path / "run.toml").write_text(f'extends = "{base}"\n{BASE}')
    assert '"extends" of' in refusal(load_config, tmp_path / "run.toml")


def test_a_hub_that_does_not_answer_is_asked_once(
    toml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("HF_HUB_OFFLINE", "RANK", *hub._PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with monkeypatch.context() as patch:
        patch.setattr(hub.socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
        hub.look_for_hub(load_config(toml))  # no name on the hub
    assert "HF_HUB_OFFLINE" not in os.environ
    hub.look_for_hub(load_config(toml, [("model.tokenizer", "some/model")]))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "127.0.0.1 does not answer: some/model is looked for" in capsys.readouterr().err


def test_a_core_that_is_no_function(toml: Path) -> None:
    config = AutoConfig.for_model("llama")
    message = refusal(select_core, "os:sep", config, device_type="cpu", dtype=None)
    assert message.startswith('model.attention = "os:sep": cannot be used (TypeError: ')


def test_room_on_the_disk_is_computed_and_not_counted(tmp_path: Path) -> None:
    def checkpoints(last: int, done: int, interval: int) -> int:
        config = Config.model_validate(
            {
                "training": {"steps": last},
                "checkpoint": {"interval": interval, "keep_latest_k": 0},
            }
        )
        needs = disk_needs(config, tmp_path, model=1, optimizer=1, export=1, there=0, done=done)
        return needs.checkpoints

    for last, done, interval in [
        (10, 0, 4),
        (10, 4, 4),
        (8, 0, 4),
        (8, 8, 4),
        (3, 0, 9),
        (9, 8, 4),
    ]:
        steps = range(done + 1, last + 1)
        expected = sum(step % interval == 0 or step == last for step in steps)
        assert checkpoints(last, done, interval) == expected, (last, done, interval)
    assert checkpoints(10**9, 0, 1) == 10**9


def test_names_that_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-²", "step-9x", "step-", "step--1", "step-07", "step-" + "9" * 30, "Step-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-5").mkdir()
    assert steps_in(tmp_path) == [5]


# --- folders of models ----------------------------------------------------------------------------


def test_an_index_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / weights_folder.INDEX_FILE).write_bytes(b'{"weight_map": {"a\xff": "x"}}')
    message = refusal(weights_folder.find, str(tmp_path))
    assert f"{weights_folder.INDEX_FILE} is damaged (" in message


@pytest.mark.parametrize(
    "entry", ['{"a": 5}', '{"a": "../x.safetensors"}', '{"a": "/x"}', '{"a": "\\u0000"}', '["ab"]']
)
def test_an_index_that_names_no_file_of_its_folder(tmp_path: Path, entry: str) -> None:
    (tmp_path / weights_folder.INDEX_FILE).write_text(f'{{"weight_map": {entry}}}')
    message = refusal(weights_folder.find, str(tmp_path))
    assert f"{weights_folder.INDEX_FILE} is damaged (" in message


@pytest.mark.parametrize("text", ["[]", "{", '{"max_length": "x", "do_sample": 3}'])
def test_a_generation_config_that_is_none(tmp_path: Path, text: str) -> None:
    class Model(LlamaForCausalLM):
        def __init__(self) -> None:
            self.generation_config = None

    (tmp_path / "generation_config.json").write_text(text)
    try:
        keep_generation_config(Model(), str(tmp_path))
    except UserError as error:
        assert str(error).startswith(f"{tmp_path / 'generation_config.json'}: transformers refuses")
    else:
        assert text.startswith('{"max'), "what transformers takes is kept"
    (tmp_path / "generation_config.json").unlink()
    keep_generation_config(Model(), str(tmp_path))


def test_a_pipe_in_place_of_a_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    message = refusal(weights_folder.find, str(tmp_path))
    assert "model.safetensors is damaged (it is no file)" in message


def test_layers_without_end(tmp_path: Path) -> None:
    table = {"model_type": "llama", "num_hidden_layers": 10**9}
    expected = f"num_hidden_layers = {10**9} is more than 10000: correct it."
    assert refusal(load_model_config, "", table) == f"model.config: {expected}"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": table}))
    assert refusal(load_model_config, str(tmp_path), None).endswith(expected)


@pytest.mark.parametrize("quantization", [{}, {"bits": 4}, "gptq", ["x"], {"quant_method": "awq"}])
def test_quantized_weights_of_any_kind(quantization: Any) -> None:
    config = AutoConfig.for_model("llama")
    config.quantization_config = quantization
    message = refusal(check_family, config) if quantization else "quantized"
    assert "quantized" in message


def test_numbers_of_rope_that_are_none() -> None:
    config = AutoConfig.for_model("llama")
    config.rope_parameters = {"rope_type": "default", "rope_theta": float("nan")}
    assert "rope_parameters.rope_theta = nan" in refusal(check_family, config)
    plain = AutoConfig.for_model("llama")
    for factor in (float("inf"), 10**9, "2", True):
        assert "model.rope_scaling.factor = " in refusal(
            scale_rope, plain, {"rope_type": "linear", "factor": factor}
        )
    assert "rope_type = " in refusal(scale_rope, plain, {"rope_type": ["yarn"], "factor": 2})


# --- files of data, and of metrics ----------------------------------------------------------------


def rows_of(file: Path, **settings: Any) -> list[Row | BadRow]:
    return [*open_rows(SourceSettings(source="jsonl", path=str(file), **settings))]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "cp037"])
def test_lines_of_any_codec(tmp_path: Path, encoding: str) -> None:
    texts = ["one", "zwei \u0a0a\u0d0a" if encoding.startswith("utf") else "zwei"]
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_bytes("\n".join(lines).encode(encoding))
    assert [row.content for row in rows_of(file, encoding=encoding)] == texts
    if encoding == "utf-16":
        bad = rows_of(file)[0]
        assert isinstance(bad, BadRow)
        assert 'the file begins like UTF-16: set encoding = "utf-16"' in bad.reason


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_that_its_library_refuses(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "a\n" * 9 + "b,c,d\n")
    source = SourceSettings(source="hf", path=str(tmp_path), streaming=streaming)
    message = refusal(lambda: [*open_rows(source)])
    assert message.startswith(f'data.path = "{tmp_path}" cannot be ')


def test_a_tokenizer_that_its_library_refuses(tmp_path: Path) -> None:
    load_tokenizer("bytes").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"type": "BPE"', '"type": "BPF"'))
    message = refusal(load_tokenizer, str(tmp_path))
    assert message.startswith(f'model.tokenizer = "{tmp_path}" cannot be loaded (')


def test_half_a_character_in_a_key_can_be_skipped_and_printed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"\\ud800": 1}\n{"text": "a"}\n')
    tally = CorpusStats()
    bad = [row for row in rows_of(file) if isinstance(row, BadRow)]
    assert [*tally.keep(bad, setting="data.path", skip=True)] == []
    "".join(tally.notes()).encode()
    refusal(lambda: [*CorpusStats().keep(bad, setting="data.path", skip=False)]).encode()


def test_lines_that_are_no_metrics_are_dropped_and_said(tmp_path: Path) -> None:
    good = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    bad = ["\n", "{\n", "[1]\n", '{"loss": 1}\n', '{"step": "1"}\n', "\0\n", '{"step": 1, "lo']
    file = tmp_path / "metrics.jsonl"
    file.write_bytes("".join([good[0], *bad[:4], good[1], *bad[4:6], good[2], bad[6]]).encode())
    with open(file, "ab") as opened:
        opened.write(b"\xff\xfe\n")
    out = StringIO()
    console = Console(file=out, width=200)
    MetricsLogger(tmp_path, steps_done=2, total_steps=9, console=console).close()
    assert file.read_text() == good[0] + good[1]
    assert "metrics.jsonl: 7 line(s) that are not metrics were dropped." in out.getvalue()


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, full = StringIO(), OSError(28, "No space left on device")
    logger = MetricsLogger(tmp_path, steps_done=0, total_steps=9, console=Console(file=out))
    written, writes = logger._file, iter([False, False, True, True])

    class Full:
        def write(self, text: str) -> None:
            if not next(writes):
                raise full
            written.write(text)

        def flush(self) -> None:
            written.flush()

        def close(self) -> None:
            written.close()
            raise full

    def no_room(*_: Any) -> None:
        raise full

    assert logger._events is not None
    monkeypatch.setattr(logger, "_file", Full())
    monkeypatch.setattr(logger._events, "log", no_room)
    values = dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_gib"), 1.0)
    for step in range(1, 5):
        logger.log(step, values | {"mfu": None})
    logger.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4]
    said = "".join(out.getvalue().split())  # lines are cut anywhere in a path
    assert said.count("Nospaceleftondevice:stepswillbemissingfromit.") == 2
    assert said.count("metrics.jsonl") == said.count("tensorboard:") == 1


def test_the_command_line_takes_what_is_right(toml: Path, capsys: pytest.CaptureFixture) -> None:
    run(["--config", str(toml), "--print-config"])
    assert 'model_type = "llama"' in capsys.readouterr().out

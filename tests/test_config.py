from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_ulysses.config.cli import parse_command_line, usage
from titan_ulysses.config.fields import rules_of
from titan_ulysses.config.load import config_of, dump_toml, load_config
from titan_ulysses.config.rules import tables
from titan_ulysses.config.schema import KEYS, SECTIONS, Config
from titan_ulysses.config.validate import MeshDegrees, check
from titan_ulysses.distributed.errors import UserError

MODEL = {"model": {"config": {"model_type": "llama"}}}


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write(tmp_path, '[model]\npath = "gpt2"\n')


def error_of(path: Path, *overrides: tuple[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# The schema


def test_defaults(toml: Path) -> None:
    config = load_config(toml)
    assert (config.training.steps, config.training.param_dtype) == (1000, "bfloat16")
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.model.path == "gpt2" and config.model.config is None
    assert all(field.description and "\n" not in field.description for field in KEYS.values())


@pytest.mark.parametrize(
    "number", [k for k, field in KEYS.items() if field.annotation in (int, float)]
)
def test_every_number_is_bounded(toml: Path, number: str) -> None:
    assert error_of(toml, (number, -2)).startswith(f"{number} = -2: must be ")
    assert error_of(toml, (number, float("nan"))).startswith(f"{number} = nan: ")
    assert f"{number} = true: needs a number, not true or false" == error_of(toml, (number, True))


def test_the_import_is_light() -> None:
    code = (
        "import sys, titan_ulysses.config.schema; print(*({'torch', 'transformers', 'numpy'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("key", ["model.path", "data.path", "validation.path", "job.dump_folder"])
def test_paths_expand(toml: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPUS", "books")
    section, name = key.split(".")
    expanded = getattr(getattr(load_config(toml, [(key, "~/$CORPUS/${CORPUS}")]), section), name)
    assert expanded == "/home/me/books/books"


def test_stdlib_path(toml: Path) -> None:
    path = load_config(toml, [("data.path", "{stdlib}")]).data.path
    assert path == sysconfig.get_path("stdlib") and (Path(path) / "os.py").is_file()


def test_infinite_max_norm_is_allowed(toml: Path) -> None:
    assert load_config(toml, [("training.max_norm", float("inf"))]).training.max_norm == float(
        "inf"
    )


# Reading: one line for each mistake


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("training.steps", "many", 'training.steps = "many": needs an integer'),
        ("training.steps", 1.5, "training.steps = 1.5: needs an integer"),
        ("training.steps", 0, "training.steps = 0: must be at least 1"),
        (
            "training.seed",
            2**63,
            "training.seed = 9223372036854775808: must be at most 9223372036854775807",
        ),
        (
            "training.deterministic",
            "maybe",
            'training.deterministic = "maybe": needs true or false',
        ),
        (
            "training.param_dtype",
            "fp8",
            'training.param_dtype = "fp8": needs "float64", "float32" or "bfloat16"',
        ),
        (
            "training.global_batch_size",
            0,
            'training.global_batch_size = 0: must be at least 1, or "auto" (-1) to derive it',
        ),
        (
            "parallelism.sequence_parallel_degree",
            -2,
            "parallelism.sequence_parallel_degree = -2: must be at least",
        ),
        (
            "parallelism.sequence_parallel_degree",
            True,
            "parallelism.sequence_parallel_degree = true: needs a number",
        ),
        ("optimizer.lr", -1e-3, "optimizer.lr = -0.001: must be at least 0"),
        ("optimizer.lr", float("inf"), "optimizer.lr = inf: needs a finite number"),
        ("optimizer.lr", "fast", 'optimizer.lr = "fast": needs a number'),
        ("optimizer.eps", 0.0, "optimizer.eps = 0.0: must be greater than 0"),
        ("comm.timeout_s", 0.001, 'comm.timeout_s = 0.001: must be at least 3, or "auto"'),
        ("comm.timeout_s", -2.5, 'comm.timeout_s = -2.5: must be at least 3, or "auto"'),
        ("comm.startup_timeout_s", 0, "comm.startup_timeout_s = 0: must be at least 3"),
        ("optimizer.betas", 0.9, "optimizer.betas = 0.9: needs a list"),
        ("optimizer.betas", [0.9], "optimizer.betas[1] = [0.9]: a value is missing from the list"),
        (
            "optimizer.betas",
            [0.9, 0.9, 0.9],
            "optimizer.betas = [0.9, 0.9, 0.9]: needs no more than 2 values",
        ),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas[1] = 1.0: must be less than 1"),
        ("optimizer.betas", [0.9, False], "optimizer.betas[1] = false: needs a number"),
        ("lr_scheduler.min_lr_ratio", 1.5, "lr_scheduler.min_lr_ratio = 1.5: must be at most 1"),
        ("job.name", "", 'job.name = "": must not be empty'),
        ("job.name", ["a"], 'job.name = ["a"]: needs text'),
        ("metrics.log_interval", [], "metrics.log_interval = []: needs an integer"),
        ("data.extensions", [["txt"]], 'data.extensions[0] = ["txt"]: needs text'),
        ("data.extensions", ".txt", 'data.extensions = ".txt": needs a list'),
        (
            "data.encoding",
            "bytes",
            'data.encoding = "bytes" with model.tokenizer = "": raw bytes need model.tokenizer',
        ),
        (
            "data.source",
            "csv",
            'data.source = "csv": needs "text", "jsonl", "hf", "chat", "tokens", "preference" or '
            '"unpaired"',
        ),
        ("data.packing", "tight", 'data.packing = "tight": needs "none", "concat" or "best_fit"'),
        (
            "data.prompt_field",
            "q",
            "data.prompt_field is set and data.completion_field is not: a prompt needs its",
        ),
        (
            "data.completion_field",
            "a",
            "data.completion_field is set and data.prompt_field is not: a prompt needs its",
        ),
        (
            "data.streaming",
            True,
            'data.streaming = true with data.source = "text": set source = "hf"',
        ),
        (
            "data.mixture",
            [{}],
            "data.mixture[0].path is not set: every entry of data.mixture needs a path",
        ),
        (
            "data.mixture",
            [{"path": "a", "weight": 0}],
            "data.mixture[0].weight = 0: must be greater than 0",
        ),
        (
            "data.mixture",
            [{"path": "a", "weight": True}],
            "data.mixture[0].weight = true: needs a number",
        ),
        (
            "data.mixture",
            [{"pth": "a"}],
            "data.mixture[0].pth: no such key; did you mean data.path?",
        ),
        ("data.mixture", ["a"], 'data.mixture[0] = "a": needs a table'),
        ("data.mixture", {"path": "a"}, 'data.mixture = {path = "a"}: needs a list'),
        (
            "data.mixture",
            [{"path": "a", "encoding": "bytes"}],
            'data.mixture[0].encoding = "bytes" with model.tok',
        ),
        ("model.config", 3, "model.config = 3: needs a table"),
        (
            "model.config",
            {"hidden_size": 3},
            "model.config = {hidden_size = 3}: needs a model_type, as in ",
        ),
        (
            "model.config",
            {"model_type": "a"},
            'model.path = "gpt2" and [model.config] are both set: clear one',
        ),
        ("model.path", "", "model.path is empty and there is no [model.config]: set one of them"),
        ("training", 3, "training = 3: needs a table: write [training]"),
        (
            "training.steps.more",
            3,
            "training.steps.more: training.steps = 10 has no keys; set training.steps itself",
        ),
        (
            "training.steps",
            Path("x"),
            "training.steps = PosixPath('x'): needs an integer",
        ),  # from Python, not TOML
    ],
)
def test_bad_value(tmp_path: Path, setting: str, value: Any, message: str) -> None:
    path = write(tmp_path, '[model]\npath = "gpt2"\n[training]\nsteps = 10\n')
    error = error_of(path, (setting, value))
    assert error.startswith(message)
    assert "\n" not in error and "pydantic" not in error and "http" not in error


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "training.lr",
            1,
            "training.lr: no such key; did you mean optimizer.lr?",
        ),  # the wrong section
        ("training.seqlen", 1, "training.seqlen: no such key; did you mean training.seq_len?"),
        ("training.seq-len", 1, "training.seq-len: no such key; did you mean training.seq_len?"),
        (
            "validation.step",
            1,
            "validation.step: no such key; did you mean validation.steps?",
        ),  # not training.steps
        (
            "checkpoint.steps",
            1,
            "checkpoint.steps: no such key; did you mean training.steps or validation.steps?",
        ),
        ("metrics.zzz", 1, "metrics.zzz: no such key; [metrics] has log_interval"),
        ("trainning.steps", 1, "[trainning]: no such section; did you mean [training]?"),
        ("xyz.steps", 1, "[xyz]: no such section; the sections are job, model, lora, data, "),
        ("lr", 1, "lr: no such key; did you mean optimizer.lr?"),
        ("zzz", 1, "zzz: no such key; keys belong in a section"),
    ],
)
def test_unknown_key_suggests_the_nearest(
    toml: Path, setting: str, value: Any, message: str
) -> None:
    assert error_of(toml, (setting, value)).startswith(message)


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, '[training]\nlr = 1\nsteps = "many"\n[optimiser]\nlr = 1\n')
    assert set(error_of(path, ("training.seed", -1)).splitlines()) == {
        "training.lr: no such key; did you mean optimizer.lr?",
        'training.steps = "many": needs an integer',
        "training.seed = -1: must be at least 0",
        "[optimiser]: no such section; did you mean [optimizer]?",
    }
    both = error_of(write(tmp_path, '[data]\nencoding = "bytes"\n'))
    assert both.startswith("model.path is empty") and "\ndata.encoding" in both


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"path": "a", "mixture": [{"path": "b"}]},
            'data.path = "a" and [[data.mixture]] are both set: clear one',
        ),
        (
            {"source": "jsonl", "encoding": "bytes"},
            'data.encoding = "bytes" with data.source = "jsonl": JSON is text',
        ),
        (
            {"source": "hf", "streaming": True, "packing": "none"},
            'data.streaming = true: only data.packing = "concat"',
        ),
        (
            {
                "mixture": [{"path": "b", "source": "hf", "streaming": True}],
                "long_documents": "drop",
            },
            'data.mixture[0].streaming = true: only data.packing = "concat" with '
            'data.long_documents = "split" can',
        ),
        (
            {"source": "hf", "streaming": True},
            "data.streaming = true: no document can be held out of a stream; set",
        ),
        (
            {"prompt_field": "q", "completion_field": "a"},
            'data.prompt_field = "q" with data.source = "text": only jsonl, hf, chat, '
            "preference and unpaired read it. Set data.source",
        ),
        (
            {"mixture": [{"path": "b", "source": "jsonl", "subset": "de"}]},
            'data.mixture[0].subset = "de" with data.mixture[0].source = "jsonl": only hf, chat, '
            "preference, unpaired and tokens read it.",
        ),
        (
            {"mixture": [{"path": "b", "source": "chat"}], "train_on": "all"},
            'data.train_on = "all" with [[data.mixture]]: each entry has its own train_on. Set '
            "it there",
        ),
    ],
)
def test_data_settings_that_exclude_each_other(
    tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    path = write(
        tmp_path,
        '[model]\ntokenizer = "bytes"\nconfig.model_type = "llama"\n[validation]\nenable = true\n',
    )
    assert error_of(path, *((f"data.{key}", value) for key, value in data.items())).startswith(
        message
    )


def test_every_rule_names_settings_and_says_so() -> None:
    """What a rule needs or excludes exists, and so does all that its message shows."""
    config = Config.model_validate(
        MODEL | {"data": {"mixture": [{}]}, "validation": {"sets": [{}]}}
    )
    shown = dict.fromkeys(("this", "name", "default"), "here")
    shown |= dict.fromkeys(("other", "other_name", "other_value", "other_default"), "there")
    rules = [
        (table, rule)
        for _, table in tables(config)
        for field in type(table).model_fields.values()
        for rule in rules_of(field)
    ]
    assert len(rules) > 100
    for table, rule in rules:
        section, _, key = rule.other.rpartition(".")
        kind = SECTIONS[section] if section else type(table)
        assert key in kind.model_fields, rule.other
        assert "here" in rule.text.format(**shown)


def test_files_have_no_split_to_be_held_out(toml: Path) -> None:
    """They would be trained on and held out."""
    split, enable = ("validation.split", "test"), ("validation.enable", True)
    for source in ("text", "jsonl"):
        message = error_of(toml, split, enable, ("data.source", source))
        assert message.startswith(
            f'validation.split = "test" with data.source = "{source}": files have no splits. Set'
        )
    assert load_config(toml, [split, enable, ("data.source", "hf")]).validation.split == "test"


def test_data_says_how_held_out_data_is_read_beside_a_mixture(toml: Path) -> None:
    mixture = [
        ("data.mixture", [{"path": "b"}]),
        ("data.source", "chat"),
        ("validation.path", "held-out.jsonl"),
    ]
    assert load_config(toml, [*mixture, ("validation.enable", True)]).data.source == "chat"
    assert error_of(toml, *mixture).startswith('data.source = "chat" with [[data.mixture]]')


def test_a_mixture_reads_dumps_and_overrides(tmp_path: Path) -> None:
    text = (
        '[model]\npath = "gpt2"\n[[data.mixture]]\npath = "a"\nweight = '
        '2\n[[data.mixture]]\npath = "b"\n'
    )
    config = load_config(write(tmp_path, text + 'source = "chat"\n'))
    assert [(e.path, e.weight, e.source) for e in config.data.mixture] == [
        ("a", 2.0, "text"),
        ("b", 1.0, "chat"),
    ]
    dumped = dump_toml(config)
    assert (
        dumped.count("[[data.mixture]]\n") == 2 and load_config(write(tmp_path, dumped)) == config
    )
    line = parse_command_line(["--config", "x", "--data.mixture", '[{path = "c"}]'])
    assert load_config(tmp_path / "run.toml", line.overrides).data.mixture[0].path == "c"


def test_missing_file(tmp_path: Path) -> None:
    assert (
        error_of(tmp_path / "none.toml")
        == f"{tmp_path}/none.toml: no such file; correct the path in --config"
    )
    assert "needs a readable file" in error_of(tmp_path)


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, "[training]\nsteps = = 3\n"))
    assert error.startswith(f"{tmp_path}/run.toml: not valid TOML") and "line 2" in error
    (tmp_path / "latin.toml").write_bytes(b'[job]\nname = "\xe9"\n')
    assert "latin.toml: not valid TOML: 'utf-8'" in error_of(tmp_path / "latin.toml")


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"[model]\nfreeze = {DEEP}", "its tables or lists are nested too deep"),
        (f"[model]\nfreeze = {DEEP[4800:5200]}", "model.freeze: is nested deeper than 50 levels"),
        (f"[model.config]\nx{'.a' * 5000} = 1", "model.config: is nested deeper than 50 levels"),
        (f"[training]\nsteps = 0x{'f' * 5000}", "training.steps: holds a number of more than 100"),
        (f"[model]\nfreeze = [0x{'f' * 5000}]", "model.freeze: holds a number of more than 100"),
    ],
    ids=["list", "list that can be parsed", "keys", "number", "number in a list"],
)
def test_settings_without_end(lines: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, lines)
    assert error_of(path).startswith(f"{path}: {message}")
    base = write(tmp_path, 'extends = "run.toml"', "above.toml")
    assert error_of(base).startswith(f"{path}: {message}")


def test_options_without_end(toml: Path) -> None:
    for value in (DEEP, f'{{"a": {DEEP}}}'):
        # Python 3.13 reads deeper JSON than others.
        with pytest.raises(UserError, match=r"model\.freeze: (its value )?is nested (too )?deep"):
            arguments = ["--config", str(toml), f"--model.freeze={value}"]
            load_config(toml, parse_command_line(arguments).overrides)
    message = error_of(toml, (f"model.config{'.a' * 5000}", 1))
    assert message == "model.config: is nested deeper than 50 levels"
    assert len(error_of(toml, ("training.steps", "9" * 5000))) < 600


def test_extends_chain_merges_deeply(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = (
        'model_type = "llama"\nlayer_types = [1, 2]\n[model.config.rope]\ntheta = 1.0\nfactor '
        "= 2.0\n"
    )
    write(
        tmp_path / "base",
        f"[training]\nsteps = 1\nseed = 1\nseq_len = 1\n[model.config]\n{model}",
        "root.toml",
    )
    write(
        tmp_path / "base", 'extends = "root.toml"\n[training]\nsteps = 2\nseed = 2\n', "middle.toml"
    )
    top = (
        'extends = "base/middle.toml"\n[training]\nsteps = 3\n[model.config]\nlayer_types = '
        "[3]\nrope.theta = 5.0\n"
    )
    config = load_config(write(tmp_path, top), [("model.config.rope.kind", "yarn")])
    assert (config.training.steps, config.training.seed, config.training.seq_len) == (3, 2, 1)
    assert config.model.config == {
        "model_type": "llama",
        "layer_types": [3],
        "rope": {"theta": 5.0, "factor": 2.0, "kind": "yarn"},
    }


def test_extends_in_a_circle_is_refused_by_name(tmp_path: Path) -> None:
    a = write(tmp_path, 'extends = "b.toml"', "a.toml")
    b = write(tmp_path, 'extends = "./a.toml"', "b.toml")
    assert error_of(a).startswith(f"extends forms a cycle: {a} -> {b} -> {a}; ")
    itself = write(tmp_path, 'extends = "c.toml"', "c.toml")
    assert f"{itself} -> {itself};" in error_of(itself)
    entrance = write(tmp_path, 'extends = "a.toml"', "d.toml")
    assert f"cycle: {a} -> {b} -> {a};" in error_of(entrance)


def test_bad_extends(tmp_path: Path) -> None:
    path = write(tmp_path, 'extends = "none.toml"')
    assert (
        error_of(path)
        == f'{tmp_path}/none.toml: no such file; correct the path in "extends" of {path}'
    )
    assert "extends = [1]: needs one file" in error_of(write(tmp_path, "extends = [1]"))


def test_override_replaces_a_random_model_by_a_pretrained_one(tmp_path: Path) -> None:
    path = write(tmp_path, '[model.config]\nmodel_type = "llama"\n')
    overrides = parse_command_line(
        ["--config", "x", "--model.path", "gpt2", "--model.config", "{}"]
    ).overrides
    config = load_config(path, overrides)
    assert (config.model.path, config.model.config) == ("gpt2", None)


# The command line


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
    [
        (["--training.steps", "5"], "training.steps", 5),
        (["--training.steps=5"], "training.steps", 5),
        (
            ["--parallelism.data_parallel_shard_degree", "-1"],
            "parallelism.data_parallel_shard_degree",
            -1,
        ),
        (
            ["--parallelism.data_parallel_shard_degree=-1"],
            "parallelism.data_parallel_shard_degree",
            -1,
        ),
        (["--optimizer.lr", "1e-5"], "optimizer.lr", 1e-5),
        (["--optimizer.lr", "-.5"], "optimizer.lr", "-.5"),  # pydantic reads what TOML does not
        (["--optimizer.betas", "0.9,0.99"], "optimizer.betas", [0.9, 0.99]),
        (["--optimizer.betas", "[0.9, 0.99]"], "optimizer.betas", [0.9, 0.99]),
        (["--data.extensions", ".py"], "data.extensions", [".py"]),
        (["--data.extensions", ".py,.md"], "data.extensions", [".py", ".md"]),
        (["--data.extensions", '[".py", ".md"]'], "data.extensions", [".py", ".md"]),
        (["--data.extensions", "[.py,.md]"], "data.extensions", [".py", ".md"]),
        (["--training.deterministic"], "training.deterministic", True),
        (["--training.deterministic", "false"], "training.deterministic", False),
        (["--training.deterministic=False"], "training.deterministic", False),
        (["--job.name", "007"], "job.name", "007"),
        (["--job.name", "true"], "job.name", "true"),
        (["--job.name=a=b"], "job.name", "a=b"),
        (["--job.name", "a,b"], "job.name", "a,b"),
        (["--job.name="], "job.name", ""),
        (["--model.attention", "sdpa"], "model.attention", "sdpa"),
        (["--model.config.hidden_size", "256"], "model.config.hidden_size", 256),
        (["--model.config.model_type", "llama"], "model.config.model_type", "llama"),
        (["--model.config.tie_word_embeddings"], "model.config.tie_word_embeddings", True),
        (
            ["--model.config.tie_word_embeddings", "False"],
            "model.config.tie_word_embeddings",
            False,
        ),
        (["--model.config.layer_types", "[1, [2, 3]]"], "model.config.layer_types", [1, [2, 3]]),
        (
            ["--model.config.layer_types", "full,sliding"],
            "model.config.layer_types",
            ["full", "sliding"],
        ),
        (
            ["--model.config.rope", '{"type": "yarn", "factor": 2}'],
            "model.config.rope",
            {"type": "yarn", "factor": 2},
        ),
        (["--model.config.rope", 'type = "x"\ny = 1'], "model.config.rope", 'type = "x"\ny = 1'),
        (
            ["--model.config.x", "1\ny = 2"],
            "model.config.x",
            "1\ny = 2",
        ),  # no second key is smuggled in
        (["--model.config.rope.factor", "2.0"], "model.config.rope.factor", 2.0),
    ],
)
def test_override_values(arguments: list[str], setting: str, value: Any) -> None:
    for argv in (["--config", "x.toml", *arguments], [*arguments, "--config=x.toml"]):
        line = parse_command_line(argv)
        assert (line.config_path, line.overrides, line.print_config) == (
            Path("x.toml"),
            [(setting, value)],
            False,
        )
        assert type(line.overrides[0][1]) is type(value)


def test_print_config_and_the_last_override_counts(toml: Path) -> None:
    line = parse_command_line(
        ["--training.steps", "5", "--print-config", "--config", str(toml), "--training.steps=6"]
    )
    assert line.print_config
    assert load_config(line.config_path, line.overrides).training.steps == 6


def test_python_spellings_of_numbers_reach_the_config(toml: Path) -> None:
    line = parse_command_line(
        ["--config", str(toml), "--optimizer.lr", ".5", "--training.steps", "1e3"]
    )
    config = load_config(line.config_path, line.overrides)
    assert (config.optimizer.lr, config.training.steps) == (0.5, 1000)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing: say which TOML file to run, as in --config configs/X.toml"),
        (["--config"], "--config is missing"),
        (["--config="], "--config is missing"),
        (["--config", "--print-config"], "--config is missing"),
        (["configs/x.toml"], "configs/x.toml: unexpected; did you mean --config configs/x.toml?"),
        (
            ["--config", "x", "training.steps=5"],
            "training.steps=5: unexpected; settings are written --section.key",
        ),
        (["--config", "x", "--optimizer.betas", "0.9", "0.95"], "0.95: unexpected"),
        (
            ["--config", "x", "--print-confg"],
            "--print-confg: no such option; did you mean --print-config?",
        ),
        (["--config", "x", "--lr", "3"], "--lr: no such option; did you mean --optimizer.lr?"),
        (["--config", "x", "--zzz"], "--zzz: no such option; see --help"),
        (
            ["--config", "x", "--training.steps"],
            "--training.steps: needs a value, as in --training.steps 1000",
        ),
        (
            ["--config", "x", "--training.steps", "--job.name", "y"],
            "--training.steps: needs a value",
        ),
        (["--config", "x", "--job.name"], '--job.name: needs a value, as in --job.name "run"'),
    ],
)
def test_bad_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_command_line(argv)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_key_of_the_schema(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--config", "none.toml", flag])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text == usage() + "\n" and text.startswith("usage: ")
    keys = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    assert len(keys) > 30
    for key in keys:
        assert f"  --{key}  " in text
        assert f"      {KEYS[key].description}\n" in text
    assert '--model.attention  text  (default: "auto")' in text
    assert "--optimizer.betas  list of numbers  (default: [0.9, 0.95])" in text
    assert "--model.config  table  (default: unset)" in text


# Writing


# Lone surrogates are no text, and NUL is refused (test_bad_input.py).
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
# "/", "." and ".." lead out of a folder, and a terminal obeys control characters.
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).map(
    lambda text: "run " + text.translate({0: "-", ord("/"): "-", ord("\\"): "-"}) + "."
)
numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans())
nested = st.recursive(
    st.one_of(texts, numbers),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    models = st.dictionaries(texts, nested, max_size=4).map(
        lambda table: {**table, "model_type": "llama"}
    )
    return Config.model_validate(
        {
            "job": {"name": draw(names)},
            "model": {
                "config": draw(models),
                "tokenizer": draw(st.sampled_from(["", "bytes", 'a"b\\c'])),
            },
            "data": {"extensions": draw(st.lists(texts, min_size=1, max_size=3))},
            "training": {
                "steps": draw(st.integers(1, 10**9)),
                "max_norm": draw(st.floats(0, allow_nan=False)),
            },
            "parallelism": {"data_parallel_shard_degree": draw(st.sampled_from([-1, 1, 8]))},
            "optimizer": {
                "eps": draw(st.floats(1e-30, 1)),
                "betas": draw(st.tuples(*[st.floats(0, 0.999)] * 2)),
            },
            "checkpoint": {"enable": draw(st.booleans())},
        }
    )


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(config=configs())
def test_dump_reads_back_equal(tmp_path: Path, config: Config) -> None:
    assert load_config(write(tmp_path, dump_toml(config))) == config


def test_dump_of_awkward_values(tmp_path: Path) -> None:
    table = {
        "model_type": "llama",
        "dropped": None,
        "": 1,
        'quo"ted.key': {
            "a b": {"empty": {}, "lists": [[1, 2], [], [{"x": [1.0, "ü"]}]]},
            "dropped": None,
        },
        "inline": [{"kept": 1, "dropped": None}],
        "tiny": 1e-08,
        "infinite": [float("inf"), float("-inf")],
        "control": "\x00\x07\x1b\x7f\x85\u2028\r\n\t\\\"'",
    }
    text = dump_toml(Config.model_validate({"model": {"config": table}}))
    read = load_config(write(tmp_path, text)).model.config
    del table["dropped"], table['quo"ted.key']["dropped"], table["inline"][0]["dropped"]
    assert read == table
    assert (
        '[model.config."quo\\"ted.key"."a b".empty]' in text
        and "eps = 1e-08" in text
        and "dropped" not in text
    )


# Checks across settings


def checked(world_size: int = 8, num_token_ids: int = 10, **settings: Any) -> MeshDegrees:
    """`check` on a Config with `section__key=value` settings; `hf__key=value` go to the model's
    config.
    """
    tables: dict[str, dict[str, Any]] = {"hf": {}, **MODEL}
    for name, value in settings.items():
        section, key = name.split("__")
        tables[section] = {**tables.get(section, {}), key: value}
    model_config = SimpleNamespace(**tables.pop("hf"))
    return check(
        config_of(tables),
        world_size=world_size,
        model_config=model_config,
        num_token_ids=num_token_ids,
    )


REPLICATE, SHARD, SEQUENCE = (
    f"parallelism__{axis}_degree"
    for axis in ("data_parallel_replicate", "data_parallel_shard", "sequence_parallel")
)


@pytest.mark.parametrize(
    ("degrees", "batch", "expected", "global_batch_size"),
    [
        ((1, -1, 1), (1, -1), MeshDegrees(1, 8, 1, 1, 1), 8),
        ((2, -1, 2), (3, -1), MeshDegrees(2, 2, 2, 3, 1), 12),
        ((-1, 1, 2), (1, 8), MeshDegrees(4, 1, 2, 1, 2), 8),
        ((1, 2, -1), (2, 12), MeshDegrees(1, 2, 4, 2, 3), 12),
        ((2, 2, 2), (1, 4), MeshDegrees(2, 2, 2, 1, 1), 4),
    ],
)
def test_degrees_and_batches(
    degrees: tuple, batch: tuple, expected: MeshDegrees, global_batch_size: int
) -> None:
    parallelism = dict(zip((REPLICATE, SHARD, SEQUENCE), degrees, strict=True))
    mesh = checked(
        **parallelism, training__local_batch_size=batch[0], training__global_batch_size=batch[1]
    )
    assert mesh == expected
    assert mesh.data_parallel == expected.replicate * expected.shard
    assert mesh.global_batch_size == global_batch_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {REPLICATE: 2, SEQUENCE: 3, "training__seq_len": 3},
            "dp_replicate(2) x dp_shard(-1) x sp(3) does not divide WORLD_SIZE(8): start a "
            "multiple of 6 ranks, or ",
        ),
        (
            {REPLICATE: 2, SHARD: 2, SEQUENCE: 1},
            "dp_replicate(2) x dp_shard(2) x sp(1) = 4 is not WORLD_SIZE(8): start 4 ranks, or "
            "change [parallelism]",
        ),
        (
            {SEQUENCE: 16},
            "dp_replicate(1) x dp_shard(-1) x sp(16) does not divide WORLD_SIZE(8)",
        ),
        (
            {REPLICATE: -1},
            "parallelism.data_parallel_replicate_degree and parallelism.data_parallel_shard_degree "
            'are "auto": only one',
        ),
        (
            {SEQUENCE: 4, "training__seq_len": 10},
            "training.seq_len = 10 is not a multiple of parallelism.sequence_parallel_degree = 4: "
            "set training.seq_len = 12",
        ),
        (
            {SHARD: 1, SEQUENCE: -1, "training__seq_len": 7},  # a derived degree is checked as well
            "training.seq_len = 7 is not a multiple of parallelism.sequence_parallel_degree = 8",
        ),
        (
            {"training__local_batch_size": 2, "training__global_batch_size": 24},
            "training.global_batch_size = 24 is not a multiple of local_batch_size(2) x "
            'dp_replicate(1) x dp_shard(8) = 16: set it to 32, or to "auto" for 16',
        ),
        (
            {"training__global_batch_size": 4},
            "training.global_batch_size = 4 is not a multiple of local_batch_size(1) x "
            "dp_replicate(1) x dp_shard(8) = 8: set it to 8",
        ),
        (
            {"hf__max_position_embeddings": 2047},
            "training.seq_len = 2048 is longer than the model's max_position_embeddings = 2047: "
            "lower training.seq_len, or raise model.config.max_position_embeddings, or stretch "
            "RoPE with [model.rope_scaling]",
        ),
        (
            {
                "model__rope_scaling": {"rope_type": "yarn", "factor": 1.5},
                "hf__max_position_embeddings": 1536,
                "hf__rope_parameters": {"rope_type": "yarn", "factor": 1.5},
            },
            "training.seq_len = 2048 is longer than 1536, which model.rope_scaling.factor = 1.5 "
            "makes of the model's 1024: set the factor to 2, or lower training.seq_len",
        ),
        (
            {
                "hf__max_position_embeddings": 1000,
                "hf__rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            },
            "training.seq_len = 2048 is longer than the model's max_position_embeddings = 2000: "
            "lower ",
        ),
        (
            {"hf__vocab_size": 9, "model__path": "/m", "model__config": None},
            'model.tokenizer = "" emits ids up to 9, but the model\'s vocab_size is 9: set '
            "model.tokenizer to one that belongs to the model or set model.resize_embeddings = 1",
        ),
        (
            {"hf__vocab_size": 9},
            'model.tokenizer = "" emits ids up to 9, but the model\'s vocab_size is 9: set '
            "model.tokenizer to one that belongs to the model or set model.config.vocab_size = 10",
        ),
        (
            {"hf__attention_dropout": 0.1},
            "attention_dropout = 0.1: sequence-parallel attention has no dropout; set "
            "model.config.attention_dropout to 0",
        ),
        (
            {"hf__num_attention_heads": 9, "hf__num_key_value_heads": 2},
            "num_attention_heads = 9 is not a multiple of num_key_value_heads = 2",
        ),
        (
            {"training__param_dtype": "float64"},
            'training.reduce_dtype = "float32" would round the gradients of training.param_dtype = '
            '"float64": set ',
        ),
        (
            {"activation_checkpoint__every": 5, "hf__num_hidden_layers": 4},
            "activation_checkpoint.every = 5 is more than the model's 4 layers: set it to 4 or "
            "less",
        ),
        (
            {"activation_checkpoint__mode": "none", "activation_checkpoint__offload": "host"},
            'activation_checkpoint.offload = "host" moves checkpoints, and '
            'activation_checkpoint.mode = "none" makes none: set activation_checkpoint.mode = '
            '"full"',
        ),
        (
            {"hf__attention_dropout": 0.1, "model__path": "/m", "model__config": None},
            "attention_dropout = 0.1: sequence-parallel attention has no dropout; set "
            "attention_dropout in the config.json of /m to 0",
        ),
    ],
)
def test_check_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        checked(**settings)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},  # nothing known of the model
        {
            "hf__num_attention_heads": None,
            "hf__max_position_embeddings": None,
            "hf__vocab_size": None,
        },
        {
            SEQUENCE: 4,
            "hf__num_attention_heads": 9,
            "hf__num_key_value_heads": 3,
        },  # uneven heads, replicated KV heads
        {SEQUENCE: 8, "hf__num_attention_heads": 8, "hf__num_key_value_heads": 1},
        {
            "hf__max_position_embeddings": 2048,
            "hf__vocab_size": 10,
            "hf__attention_dropout": 0.0,
        },  # at the bounds
        {"training__param_dtype": "float64", "training__reduce_dtype": "float64"},
        {"training__steps": 10, "lr_scheduler__warmup_steps": 11},
    ],
)
def test_check_accepts(settings: dict[str, Any]) -> None:
    assert checked(**settings).data_parallel * settings.get(SEQUENCE, 1) == 8


def test_check_collects_every_problem() -> None:
    with pytest.raises(UserError) as caught:
        checked(
            **{REPLICATE: 3, SEQUENCE: 2},
            training__seq_len=3,
            hf__attention_dropout=0.1,
            hf__vocab_size=1,
        )
    starts = [
        "dp_replicate(3)",
        "training.seq_len = 3 is not a multiple",
        "model.tokenizer",
        "attention_dropout",
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts) and all(
        line.startswith(s) for line, s in zip(lines, starts, strict=True)
    )


def test_words_stand_for_numbers(tmp_path: Path) -> None:
    """ "auto" and "all" are read as numbers, and printed where a number has such a word."""
    (tmp_path / "run.toml").write_text(
        'model = { tokenizer = "bytes", config = { model_type = "llama" } }\n'
        'memory = { mlp_tile_tokens = "all", loss_tile_tokens = "auto" }\n'
        'parallelism = { data_parallel_shard_degree = 2, sequence_parallel_degree = "auto" }\n'
    )
    config = load_config(tmp_path / "run.toml", [("training.global_batch_size", -1)])
    assert (config.memory.mlp_tile_tokens, config.memory.loss_tile_tokens) == (-1, 0)
    assert config.parallelism.sequence_parallel_degree == -1
    printed = dump_toml(config)
    for line in (
        'mlp_tile_tokens = "all"',
        'loss_tile_tokens = "auto"',
        'sequence_parallel_degree = "auto"',
        'global_batch_size = "auto"',
        "data_parallel_shard_degree = 2",
    ):
        assert f"\n{line}\n" in printed
    (tmp_path / "printed.toml").write_text(printed)
    assert load_config(tmp_path / "printed.toml") == config
    with pytest.raises(UserError, match='mlp_tile_tokens = "most": needs an integer, or "auto" or'):
        load_config(tmp_path / "run.toml", [("memory.mlp_tile_tokens", "most")])

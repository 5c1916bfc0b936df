"""`train.py` and the launcher as a user meets them: killed and started again, stopped by a signal,
given bad input.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train as train_script
from helpers.forked import Started, start
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, logged, train, write_run
from titan_ulysses import __main__ as command_line
from titan_ulysses import __version__
from titan_ulysses.config.load import load_config
from titan_ulysses.distributed.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
SP2: Settings = {"parallelism.sequence_parallel_degree": 2}


def arguments(config: Path, settings: Settings) -> list[str]:
    return ["--config", str(config), *(f"--{key}={value}" for key, value in settings.items())]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


class Launch:
    """Two ranks started by scripts/launch.py, in a process group of their own."""

    def __init__(self, *command: str | Path, forks: Path | None = None) -> None:
        """forks: an absent folder, with which launcher and ranks are forks (see forked.py): that
        takes seconds less.
        """
        launcher = [REPOSITORY / "scripts" / "launch.py", "--standalone", "--nproc-per-node", "2"]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.process: Started | subprocess.Popen[str]
        if forks:
            self.process = start(forks, *launcher, *command, **environment)
            return
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *command],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> list[int]:
        listing = subprocess.run(
            ["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
        )
        rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
        return [
            int(pid)
            for pid, parent, command in rows
            if int(parent) == self.process.pid and ".py" in command
        ]

    def wait_for(self, run: Path, step: int, *, timeout: float = 120) -> None:
        """Until step is logged."""
        deadline = time.monotonic() + timeout
        while not ((run / "metrics.jsonl").exists() and learned(run)[-1:] >= [(step, 0.0, 0.0)]):
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, "no such step"
            time.sleep(0.01)

    def end(self, *, timeout: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, when it has ended."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def kill(self) -> None:
        for pid in self.ranks():  # torchrun gives each rank a session of its own
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def begin(*command: str | Path, forks: Path | None = None) -> Launch:
        started.append(Launch(*command, forks=forks))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.kill()


AS_NEW = """
import json, os, signal, sys
print(json.dumps([sys.argv[1:], os.environ["COLOUR"], os.getsid(0) == os.getpid(), os.getcwd()]))
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, os.listdir("/proc/self/fd")[:-1])
sys.exit("why")
"""


def test_a_fork_is_as_a_new_process(tmp_path: Path) -> None:
    """What forked.py promises: arguments, environment, session, folder, signals, open files."""
    (tmp_path / "script.py").write_text(AS_NEW)
    fork = start(tmp_path / "said", tmp_path / "script.py", "a b", cwd=tmp_path, COLOUR="blue")
    out, err = fork.communicate(timeout=60)
    told, rest = out.splitlines()
    assert json.loads(told) == [["a b"], "blue", True, str(tmp_path)]
    assert rest == "True ['0', '1', '2']"
    assert (fork.returncode, err) == (1, "why\n")
    assert "COLOUR" not in os.environ


# --- killed and stopped ---------------------------------------------------------------------------

# 14 steps of 4 x 32 tokens; the data are some 1,400 tokens, so that an epoch ends within the
# eleventh step.
LONG: Settings = SP2 | {"training.steps": 14, "checkpoint.interval": 4}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_on_ranks(2, train, write_run(folder), LONG)
    return learned(folder / "outputs" / "run")


@pytest.mark.slow  # test_chaos.py kills a run, too
def test_killed_and_run_again(
    tmp_path: Path, launch: Callable[..., Launch], undisturbed: list
) -> None:
    """The same command goes on where the last checkpoint was, bit for bit; then it is finished;
    then more steps.
    """
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    command = [REPOSITORY / "train.py", *arguments(config, LONG)]
    first = launch(*command)
    first.wait_for(run, 6)
    for rank in first.ranks():
        os.kill(rank, signal.SIGKILL)
    code, _, err = first.end(timeout=30)
    assert code == 1 and "SIGKILL" in err and len(err.splitlines()) == 1
    killed_at = learned(run)[-1][0]
    assert 6 <= killed_at < 14

    code, out, err = launch(*command).end()
    assert (code, err) == (0, "")
    assert (
        f"resumed from step {killed_at // 4 * 4}" in out
        or f"resumed from step {killed_at // 4 * 4 - 4}" in out
    )
    assert learned(run) == undisturbed  # each step once, with the same bits
    before = contents(run)
    code, out, err = launch(*command).end()
    assert (code, err) == (0, "")
    assert (
        out.splitlines()[-1] == f"Finished: {run} has all 14 steps. To go on, raise training.steps."
    )
    assert contents(run) == before
    run_on_ranks(2, train, config, LONG | {"training.steps": 16})
    assert [step for step, *_ in learned(run)] == list(range(1, 17))
    assert learned(run)[:14] == undisturbed


def sigterm_to_one_rank(launched: Launch) -> None:
    os.kill(launched.ranks()[1], signal.SIGTERM)


def sigterm_to_the_launcher(launched: Launch) -> None:
    launched.process.terminate()


def ctrl_c(launched: Launch) -> None:
    os.killpg(launched.process.pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        pytest.param(sigterm_to_one_rank, 0, marks=pytest.mark.slow),
        (sigterm_to_the_launcher, 143),
        pytest.param(ctrl_c, 130, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stopped_by_a_signal(
    stop: Callable, expected: int, tmp_path: Path, launch: Callable[..., Launch], undisturbed: list
) -> None:
    """The ranks finish the step, save it and leave; the same command goes on."""
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    settings = LONG | {"checkpoint.interval": 1000}
    # The one that always runs: its start would take 30 seconds of a core. scripts/train.sh, which
    # CI runs, and test_network.py have starts without forks.
    forks = tmp_path / "said" if stop is sigterm_to_the_launcher else None
    launched = launch(REPOSITORY / "train.py", *arguments(config, settings), forks=forks)
    launched.wait_for(run, 5)
    stop(launched)
    code, out, err = launched.end(timeout=60)
    assert err == ""
    assert code == expected
    step = learned(run)[-1][0]
    assert 5 <= step < 14
    assert (
        out.splitlines()[-1]
        == f"Stopped by a signal after step {step}. The same command goes on from there."
    )
    if stop is not sigterm_to_one_rank:  # it is the second rank, and the first one speaks
        name, again = (
            ("SIGINT", " Ctrl-C again ends at once, without one.")
            if stop is ctrl_c
            else ("SIGTERM", "")
        )
        # A signal that comes just as a step begins is answered with that step, which is not made.
        answers = {
            f"{name} received: stopping after step {number}, then saving a checkpoint.{again}"
            for number in (step, step + 1)
        }
        assert answers & {*out.splitlines()}
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{step}"]
    run_on_ranks(2, train, config, settings)
    assert learned(run) == undisturbed


LONG_STEP = """
import os, sys, time
from titan_ulysses.train import trainer
from titan_ulysses.__main__ import run
from titan_ulysses.launch.failure import exit_on_error

train_step, steps = trainer.train_step, []

def slow(*args, **options):
    steps.append(1)
    if len(steps) == 2:
        open(f"{sys.argv[1]}-{os.environ['RANK']}", "w").close()
        time.sleep(35)
    return train_step(*args, **options)

trainer.train_step = slow
with exit_on_error():
    run(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_step_may_take_longer_than_the_patience_of_torchrun(
    tmp_path: Path, launch: Callable[..., Launch], undisturbed: list
) -> None:
    """torchrun kills its ranks 30 s after a signal. The launcher waits for the step."""
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    (tmp_path / "driver.py").write_text(LONG_STEP)
    launched = launch(tmp_path / "driver.py", tmp_path / "in", *arguments(config, LONG))
    while not all((tmp_path / f"in-{rank}").exists() for rank in (0, 1)):
        assert launched.process.poll() is None, launched.end()
        time.sleep(0.01)
    since = time.monotonic()
    launched.process.terminate()
    code, out, err = launched.end()
    assert (code, err) == (143, "") and time.monotonic() - since > 30
    assert out.splitlines()[-1].startswith("Stopped by a signal after step 2.")
    run_on_ranks(2, train, config, LONG)
    assert learned(run) == undisturbed


def signal_handlers_around_a_run(config: Path, settings: Settings) -> bool:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    train(config, settings)
    return signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_signals_are_the_callers_again_after_a_run(tmp_path: Path) -> None:
    settings: Settings = {"training.steps": 3, "checkpoint.enable": False}
    assert run_on_ranks(1, signal_handlers_around_a_run, write_run(tmp_path), settings) == [True]


# --- bad input ------------------------------------------------------------------------------------


def refusal(argv: list[str]) -> tuple[int, str]:
    """(exit code, message) of a command that is refused."""
    try:
        train_script.main(argv)
    except UserError as error:
        return error.exit_code, str(error)
    raise AssertionError("nothing was wrong")


def keep(_: Path) -> None:
    pass


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "run.toml").read_text()
        assert old in text
        (folder / "run.toml").write_text(text.replace(old, new))

    return change


def not_utf8(folder: Path) -> None:
    (folder / "data" / "07.txt").write_bytes("grün".encode("latin-1"))


def empty_file(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    (folder / "data").touch()


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()


def no_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")


def little_data(folder: Path) -> None:
    empty_folder(folder)
    (folder / "data" / "a.txt").write_text("not much")


def lines(*records: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "data" / "a.jsonl").write_text("".join(record + "\n" for record in records))

    return write


def saved_data_set(folder: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(
        folder / "saved"
    )


def weightless_model(folder: Path) -> None:
    from transformers import LlamaConfig

    table = load_config(folder / "run.toml").model.config
    LlamaConfig(
        **{key: value for key, value in table.items() if key != "model_type"}
    ).save_pretrained(folder / "model")
    edit("[model]", f'[model]\npath = "{folder / "model"}"')(folder)


def output_is_a_file(folder: Path) -> None:
    (folder / "outputs").touch()


# (what is done to the folder, settings, ranks, exit code, what the message holds); {} stands for
# the folder.
BAD_INPUT: dict[str, tuple[Callable[[Path], None], Settings, int, int, list[str]]] = {
    "key": (
        keep,
        {"training.seq_length": 64},
        1,
        2,
        ["training.seq_length: no such key; did you mean training.seq"],
    ),
    "section": (
        edit("[optimizer]", "[optimiser]"),
        {},
        1,
        2,
        ["[optimiser]: no such section; did you mean [optim"],
    ),
    "type": (keep, {"training.steps": "many"}, 1, 2, ['training.steps = "many": needs an integer']),
    "syntax": (
        edit("seq_len = 32", "seq_len = = 32"),
        {},
        1,
        2,
        ["{}/run.toml: not valid TOML", "line 19"],
    ),
    "learning rate": (
        keep,
        {"optimizer.lr": -0.1},
        1,
        2,
        ["optimizer.lr = -0.1: must be at least 0"],
    ),
    "attention": (
        keep,
        {"model.attention": "magic"},
        1,
        2,
        ['model.attention = "magic": needs one of auto, varlen'],
    ),
    "no data.path": (
        keep,
        {"data.path": ""},
        1,
        2,
        ["data.path is not set: give a file or folder"],
    ),
    "no data": (no_data, {}, 1, 1, ['data.path = "{}/data" does not exist: give a']),
    "empty file": (
        empty_file,
        {},
        1,
        1,
        ['data.path = "{}/data" contains only empty files: give a file'],
    ),
    "empty folder": (
        empty_folder,
        {},
        1,
        1,
        ['data.path = "{}/data" has no file that ends in .txt', "change data."],
    ),
    "not UTF-8": (
        not_utf8,
        {},
        1,
        1,
        ["data.path: {}/data/07.txt is not utf-8 text at byte 2", "set data.encoding"],
    ),
    "little data": (
        little_data,
        {},
        1,
        1,
        [
            "training.seq_len = 32 is longer than all of data.path, 9 tokens",
            "lower training.seq_len or give more data",
        ],
    ),
    "not JSON": (
        lines('{"text": "a"}', "text: b"),
        {"data.source": "jsonl"},
        1,
        1,
        [
            "data.path: a.jsonl:2: not JSON (",
            'Correct it, or set data.bad_lines = "skip" to leave such lines out',
        ],
    ),
    "no field": (
        lines('{"body": "a"}'),
        {"data.source": "jsonl"},
        1,
        1,
        ['data.path: a.jsonl:1: no field "text" (it has body). Correct it, or set data.bad_lines'],
    ),
    "no chat template": (
        lines('{"messages": []}'),
        {"data.source": "chat"},
        1,
        1,
        [
            'has no chat template, which data.source = "chat" needs: take the tokenizer of the '
            "family's instruct model"
        ],
    ),
    "no split": (
        saved_data_set,
        {"data.source": "hf", "data.path": "{}/saved", "data.split": "dev"},
        1,
        1,
        ['data.path = "{}/saved" has no split "dev", only train: set data.split'],
    ),
    "empty source of a mixture": (
        lines('{"text": ""}'),
        {
            "data.path": "",
            "data.mixture": '[{path = "{}/data"}, {path = "{}/data", source = "jsonl"}]',
        },
        1,
        1,
        ['data.mixture[1].path = "{}/data" has no document to train on (1 empty one(s) left out)'],
    ),
    "sequence length": (
        keep,
        SP2 | {"training.seq_len": 33},
        2,
        2,
        [
            "training.seq_len = 33 is not a multiple of",
            "sequence_parallel_degree = 2: set training.seq_len = 34",
        ],
    ),
    "positions": (
        keep,
        {"training.seq_len": 256},
        1,
        2,
        [
            "training.seq_len = 256 is longer",
            "max_position_embeddings = 128: lower training.seq_len, or raise ",
        ],
    ),
    "degrees": (
        keep,
        SP2 | {"parallelism.data_parallel_shard_degree": 2},
        8,
        2,
        [
            "dp_replicate(1) x dp_shard(2) x sp(2) = 4 is not WORLD_SIZE(8): start 4 ranks, or "
            "change [parallelism]"
        ],
    ),
    "global batch": (
        keep,
        {"training.global_batch_size": 9},
        1,
        2,
        [
            "training.global_batch_size = 9 is not a multiple of local_batch_size(2)",
            'set it to 10, or to "auto"',
        ],
    ),
    "vocabulary": (
        keep,
        {"model.config.vocab_size": 256},
        1,
        2,
        [
            'model.tokenizer = "bytes" emits ids up to 256',
            "vocab_size is 256",
            "set model.config.vocab_size = 257",
        ],
    ),
    "no weights": (
        weightless_model,
        {"model.config": "{}"},
        1,
        1,
        ['model.path = "{}/model": the folder holds no *.safetensors. Save the model with'],
    ),
    "tiles": (
        keep,
        {"memory.mlp_tile_tokens": -2},
        1,
        2,
        ["memory.mlp_tile_tokens = -2: must be at least -1"],
    ),
    "offload folder": (
        keep,
        {
            "activation_checkpoint.offload": "disk",
            "activation_checkpoint.offload_folder": "{}/nowhere",
        },
        1,
        1,
        [
            "activation_checkpoint.offload_folder = {}/nowhere: not a writable folder. Create it, "
            "or name"
        ],
    ),
    "offload room": (
        keep,
        {
            "activation_checkpoint.offload": "host",
            "model.config.hidden_size": 2**14,
            "training.local_batch_size": 2**20,
            "training.global_batch_size": -1,
        },
        1,
        1,
        [
            'activation_checkpoint.offload = "host": checkpoints take',
            "on this node (1 ranks x 2 segments), and ",
        ],
    ),
    "family": (
        keep,
        {"model.config.model_type": "llama4_text", "model.config.output_router_logits": True},
        1,
        1,
        [
            'model: "llama4_text" needs router losses (output_router_logits)',
            "cannot do that exactly",
        ],
    ),
    "output": (
        output_is_a_file,
        {},
        1,
        1,
        [
            "job.dump_folder = {}/outputs: cannot write to {}/outputs/run ({}/outputs is not a "
            "folder). Choose a folder"
        ],
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, settings, ranks, code, parts = BAD_INPUT[case]
    config = write_run(tmp_path)
    prepare(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    settings = {key: str(value).replace("{}/", f"{tmp_path}/") for key, value in settings.items()}
    found, message = refusal(arguments(config, settings))
    for part in parts:
        assert part.replace("{}", str(tmp_path)) in message
    assert found == code
    assert contents(tmp_path) == before and not (tmp_path / "outputs").is_dir()


def test_a_config_that_is_not_there() -> None:
    code, message = refusal(["--config", "no-such.toml"])
    assert (
        code == 2
        and message
        == f"{Path('no-such.toml').resolve()}: no such file; correct the path in --config"
    )


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    settings: Settings = {"optimizer.lr": 1e30, "lr_scheduler.warmup_steps": 0}
    [(code, message)] = run_on_ranks(1, refusal, arguments(config, settings))
    last = logged(run)[-1]["step"]
    assert code == 1 and message.startswith("The loss is ")
    assert f" at step {last + 1} (first: the gradient of model." in message
    assert "). Nothing of it is saved. Lower optimizer.lr = 1e+30" in message
    assert "nan" in message or "inf" in message
    # Nothing that the same command would go on from.
    assert not list((run / "checkpoints").glob("*"))


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    """Another model's, and a damaged one: refused, and every file of the run stays what it was."""
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    run_on_ranks(1, train, config, {"training.steps": 4})
    before = contents(run)
    [(code, message)] = run_on_ranks(
        1, refusal, arguments(config, {"model.config.hidden_size": 64})
    )
    assert (
        code == 1
        and "step-4 holds a different model: model.embed_tokens.weight is [257, 32] there"
        in message
    )
    assert "Give this run another job.name" in message
    assert contents(run) == before

    [file] = (run / "checkpoints" / "step-4").glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)
    before = contents(run)
    [(code, message)] = run_on_ranks(1, refusal, arguments(config, {"training.steps": 9}))
    assert (
        code == 1
        and f"checkpoint.folder = {run / 'checkpoints'}: step-4 is damaged ({file.name} has"
        in message
    )
    assert message.endswith("Remove it to start from the beginning.")
    assert contents(run) == before


# --- what the process says, and its exit code -----------------------------------------------------


def python(*command: str | Path) -> tuple[int, str, str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")
    }
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_one_process_says_what_is_wrong_and_no_more(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    code, out, err = python(REPOSITORY / "train.py", *arguments(config, {"training.step": 3}))
    assert (code, out, err) == (
        2,
        "",
        "error: training.step: no such key; did you mean training.steps?\n",
    )
    no_data(tmp_path)
    code, out, err = python(REPOSITORY / "train.py", *arguments(config, {}))
    assert (code, out) == (1, "") and err.startswith(
        f'error: data.path = "{tmp_path / "data"}" does not exist: '
    )
    assert len(err.splitlines()) == 1 and not (tmp_path / "outputs").exists()


def test_the_installed_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """What train.py does, by a word. scripts/check_wheel.sh runs it from a wheel."""
    code, out, err = python("-m", "titan_ulysses", "plam", "--config", "run.toml")
    assert (code, out, err) == (
        2,
        "",
        "error: titan-ulysses plam: no such command; did you mean plan?\n",
    )
    assert python("-m", "titan_ulysses", "--version")[:2] == (0, f"titan-ulysses {__version__}\n")
    code, out, err = python("-m", "titan_ulysses", "plan", "--config", "absent.toml")
    assert (code, out) == (2, "") and "absent.toml: no such file" in err
    asked: list[list[str]] = []
    monkeypatch.setattr(command_line, "run", asked.append)
    for word in ("train", "plan", "evaluate"):
        command_line.main([word, "--config", "run.toml"])
    config = ["--config", "run.toml"]
    assert asked == [config, [*config, "--plan"], [*config, "--evaluate"]]


@pytest.mark.parametrize("tool", command_line._TOOLS)
def test_help_of_the_tools(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        command_line.main([tool, "--help"])
    except SystemExit as end:
        assert not end.code
    assert f"titan-ulysses {tool} " in capsys.readouterr().out


def test_ctrl_c_outside_the_loop() -> None:
    program = (
        "from titan_ulysses.launch.failure import exit_on_error\nwith exit_on_error(): raise "
        "KeyboardInterrupt"
    )
    assert python("-c", program) == (130, "", "Interrupted.\n")


def test_help_does_not_import_torch() -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    code, out, err = python("-c", program)
    assert (code, err) == (0, "") and out.startswith("usage: torchrun")


@pytest.mark.parametrize("flag", ["--help", "--plan", "--print-config"])
def test_what_needs_one_process_is_said_once(
    flag: str, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    """On the second of several ranks that somebody has started, nothing is."""
    monkeypatch.setenv("RANK", "1")
    train_script.main(["--config", "configs/quickstart.toml", flag])
    assert capsys.readouterr() == ("", "")


def test_print_config_reads_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    train_script.main(
        [*arguments(config, {"training.steps": 7, "optimizer.betas": "0.8,0.9"}), "--print-config"]
    )
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    printed = load_config(tmp_path / "printed.toml")
    assert printed == load_config(config, [("training.steps", 7), ("optimizer.betas", [0.8, 0.9])])
    assert not (tmp_path / "outputs").exists()


# A rank that fails in a way that no input brings about.
FAILING_RANK = """
import os, signal, sys
config, how = sys.argv[1:]
rank = int(os.environ["RANK"])
if rank == 1 and how == "killed at the start":
    os.kill(os.getpid(), signal.SIGKILL)

from titan_ulysses.train import trainer
from titan_ulysses.config.load import load_config
from titan_ulysses.launch.failure import exit_on_error

train_step = trainer.train_step
steps = 0

def fail(*args, **kwargs):
    global steps
    steps += 1
    if rank == 1 and steps == 3:
        if how == "raises":
            raise RuntimeError("boom")
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args, **kwargs)

trainer.train_step = fail
with exit_on_error():
    trainer.Trainer(load_config(config)).train()
"""


@pytest.fixture
def failing_rank(tmp_path: Path, launch: Callable[..., Launch]) -> Callable[[str], str]:
    """The stderr of a run of two ranks of which rank 1 fails; it has ended with exit code 1,
    promptly.
    """
    (tmp_path / "driver.py").write_text(FAILING_RANK)
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"

    def fail(how: str) -> str:
        launched = launch(tmp_path / "driver.py", config, how, forks=tmp_path / "said")
        if how != "killed at the start":
            launched.wait_for(run, 2)
        code, _, err = launched.end(timeout=30)
        assert code == 1
        return err

    return fail


def test_a_rank_that_raises(failing_rank: Callable[[str], str]) -> None:
    err = failing_rank("raises")
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1] == "RuntimeError: boom"


def test_a_rank_that_is_killed(failing_rank: Callable[[str], str]) -> None:
    """Its peer says so, or the launcher, where that is the first to see it."""
    by_its_peer = (
        "error: another rank died without a message (out of memory?). The same command goes on "
        "from the last checkpoint.\n"
    )
    by_the_launcher = "error: rank 1 was ended by SIGKILL (out of memory?).\n"
    assert failing_rank("killed") in (by_its_peer, by_the_launcher)


def test_a_rank_that_is_killed_at_the_start(failing_rank: Callable[[str], str]) -> None:
    """Nobody can tell, because no rank is far enough: the launcher does."""
    assert (
        failing_rank("killed at the start")
        == "error: rank 1 was ended by SIGKILL (out of memory?).\n"
    )


def test_two_ranks_say_once_what_is_wrong(tmp_path: Path, launch: Callable[..., Launch]) -> None:
    settings: Settings = SP2 | {"training.global_batch_size": 9}
    command = [REPOSITORY / "train.py", *arguments(write_run(tmp_path), settings)]
    code, out, err = launch(*command, forks=tmp_path / "said").end()
    assert (code, out) == (2, "")
    assert (
        err.startswith("error: training.global_batch_size = 9 is not a multiple")
        and len(err.splitlines()) == 1
    )
    assert not (tmp_path / "outputs").exists()


def test_two_ranks_that_fail_at_once_say_it_once(
    tmp_path: Path, launch: Callable[..., Launch]
) -> None:
    """Rank 0 is the first of the run that has failed, and rank 1 the first of its host."""
    (tmp_path / "driver.py").write_text(
        "import os, time\n"
        "from torch.distributed import TCPStore\n"
        "from titan_ulysses.launch import failure\n"
        "rank, add = int(os.environ['RANK']), TCPStore.add\n"
        "def count(store, key, amount):\n"
        "    ranks = add(store, key, amount)\n"
        "    if rank == 0 and amount and key.endswith('/failures'):\n"
        "        time.sleep(1)\n"
        "    return ranks\n"
        "TCPStore.add = count\n"
        "time.sleep(rank / 2)\n"
        "failure.end('error: both', 1)\n"
    )
    old = Path(tempfile.gettempdir()) / f"titan_ulysses-{tmp_path.name}-0.said"
    old.touch()
    os.utime(old, (0, 0))
    launched = launch(tmp_path / "driver.py", forks=tmp_path / "said")
    assert launched.end(timeout=30) == (1, "", "error: both\n")
    assert not old.exists()  # what runs leave there does not add up

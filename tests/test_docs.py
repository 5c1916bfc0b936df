"""README.md and docs/: every command runs, every path and setting exists, the first page stays one
page.

A command of a fenced bash block is run with a tiny model and tiny data where the page has the
reader's own, and with options after it that make it short. What takes long is run with --slow, as
the shell runs it, and otherwise parsed, so that a wrong option fails. What cannot run here is in
NOT_HERE, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.run import parse_args as parse_torchrun
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.meshes import mesh_of
from helpers.models import LLAMA
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.runs import working_in
from test_tokens import write_megatron
from titan_ulysses import parallelize, shard
from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.config.load import load_config
from titan_ulysses.config.model_cli import parse_model_command
from titan_ulysses.config.schema import KEYS, SECTIONS
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES, COLUMNS = 180, 100

NOT_HERE = {
    "bash scripts/test.sh": "it runs these tests",
    "scripts/gpu_check": "GPU: tests/test_gpu_check.py rehearses it",
    "hf download": "network: the Hugging Face hub",
    "roneneldan/TinyStories": "network: the Hugging Face hub",
    "--metrics.enable_wandb": "network: Weights & Biases, and a package that the tests do not "
    "install",
    "bash scripts/examples/smollm2": "network: packages of the package index",
    "scripts/bench/versus.py": "network: DeepSpeed from the package index",
    "bash scripts/train.sh long.toml": "GPU: eight of them",
    "export NCCL_SOCKET_IFNAME": "second host",
    "torchrun --nnodes 2": "second host",
    "bash scripts/multinode.sh": "second host",
    "sbatch": "second host: a SLURM cluster",
    "kubectl apply": "second host: a Kubernetes cluster",
    "--without-hashes": "it fails on purpose: tests/test_chaos.py runs it",
    "scripts/bench/plans.sh": "it writes pages: tests/test_plans.py compares them",
    "docker build": "network: Debian's and Python's packages",
}
"""Part of a command -> why it does not run here. It is parsed all the same."""
SHORTER = {
    # Other hybrids' plans: that of qwen3_next_80b.toml alone always runs.
    "configs/qwen3_next_80b.toml --plan --plan.world_size": "",
    "configs/olmo_hybrid_7b.toml --plan": "",
    "bash scripts/examples/needle.sh": "",
    "bash scripts/examples/hybrid.sh": "",
    "eval-long outputs/needle-512": "",
    "scripts/bench/data.py": "--steps 2 --repeats 1",
    "scripts/bench/images.py": "--images 2 8 --patches 128",
    "scripts/bench/exchange.py": "--ranks 2 --seq-lens 512 --repeats 1",
    "scripts/bench/hashing.py": "--mib 8 --rounds 1 --limit 9",
    "scripts/bench/loss_head.py --tiles": "--tokens 256 --vocabulary 128 --tiles 64 128",
    "scripts/bench/loss_head.py": "--tokens 64 --vocabulary 128 --rounds 1",
    "scripts/bench/losses.py": "--tokens 64 128 --vocabulary 99 --tile 32 --only z-loss DPO",
    "scripts/bench/plan_accuracy.py": "--only tied",
    "scripts/bench/linear.py": "--tokens 256 512 --chunk 128",
    "scripts/bench/sparse.py": "--ranks 1 --tokens 512 1024 --chunk 256",
    "scripts/bench/indexer.py": "--steps 2 1 1",
    "scripts/bench/step.py": "--seq-len 512 --repeats 1",
    "scripts/bench/ablation.py": "--seq-lens 256 512 --head-seq-lens 256 512 --longest-untiled 512 "
    "--layers-seq-lens 256 512 --layers-counts 1 2",
    "scripts/chaos.py damage": "--minutes 1",
    "scripts/chaos.py config": "--minutes 1",
    "scripts/chaos.py data": "--minutes 1",
    "scripts/chaos.py kill": "--minutes 1",
    "scripts/chaos.py flips": "--minutes 1",
    "scripts/chaos.py hang": "--minutes 1",
    "scripts/chaos.py publish": "--minutes 1",
    "scripts/chaos.py storage": "--minutes 1",
    "scripts/chaos.py reshape": "--minutes 1",
    "scripts/chaos.py soak": "--soak-seconds 12 --minutes 1",
    "scripts/bench/async_save.py": "--rounds 2",
    "scripts/bench/balance.py": "--steps 2",
    "scripts/bench/versus_megatron.py": "--seq-lens 512 --repeats 1",
    "scripts/bench/scaling.py": "--tokens 512 --repeats 1",
    "titan-ulysses plan": "--seq-len 512",
    "titan-ulysses init": "--seq-len 512",
    "--plan.search": "--model.config.num_hidden_layers 2 --plan.gpu_memory_gib 8 "
    "--training.seq_len 65536",
}
"""Part of a command that is run with --slow only -> options that make it shorter there."""
MAKERS = {
    "quickstart": "bash scripts/train.sh",
    "needle-512": "bash scripts/examples/needle.sh",
}
"""A folder of outputs/ -> the command that makes it, where that does not name it."""
TRAINING = shlex.split(
    "--training.steps 2 --training.seq_len 128 --training.param_dtype float32 "
    "--lr_scheduler.warmup_steps 1 --checkpoint.interval 1 --validation.interval 2 "
    "--validation.steps 1 --metrics.enable_report false"
)
OPTIONS = {  # the last that stands on a command line counts
    # A GPU too small for any length, so that no other lengths are planned to find the longest one:
    # tests/test_plan.py has the sentences about what fits.
    "--plan": ["--training.seq_len", "4096", "--plan.gpu_memory_gib", "1"],
    "--profiling.enable_profiling": [*TRAINING, "--profiling.profile_freq", "2"]
    + ["--profiling.profiler_warmup", "0"],
    "train.py": TRAINING,
    "needle": shlex.split("--lengths 200 --depths 0.5 --trials 1 --candidates 2"),
    "eval-long": shlex.split("--lengths 500 --depths 0.5 --trials 1"),
    "generate": ["--tokens", "4"],
}
TOY_8B = shlex.split(
    "--model.config.num_hidden_layers 2 --model.config.hidden_size 256 --model.config.vocab_size "
    "512"
)


# --- what the pages hold --------------------------------------------------------------------------


COMMAND = "titan_ulysses/__main__.py"


class Block(NamedTuple):
    page: Path
    line: int
    text: str


class Command(NamedTuple):
    place: str
    """page:line"""
    text: str
    """as the shell gets it, without a comment"""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    def listed_in(self, table: dict[str, str]) -> str | None:
        return next((table[part] for part in table if part in self.text), None)


class Call(NamedTuple):
    """A Python script and its arguments on `ranks` processes."""

    ranks: int
    script: str
    arguments: list[str]
    environment: dict[str, str]


@cache
def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        for match in re.finditer(
            rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL
        ):
            line = page.read_text().count("\n", 0, match.start(1)) + 1
            found.append(Block(page, line, match[1]))
    return found


@cache
def commands() -> list[Command]:
    """Each command of the bash blocks. Those that stand on several pages are there once."""
    found: dict[str, Command] = {}
    for block in blocks("bash"):
        text, start = "", block.line
        for number, line in enumerate(block.text.splitlines(), start=block.line):
            line = re.sub(r"(^|\s+)#( .*)?$", "", line)
            start = start if text else number
            text += line.removesuffix("\\")
            if text.strip() and not line.endswith("\\"):
                text = " ".join(text.split())
                found.setdefault(text, Command(f"{block.page.relative_to(ROOT)}:{start}", text))
                text = ""
    return [*found.values()]


def call_of(command: Command) -> Call | None:
    """The Python script that the command runs in the end; None where there is none."""
    words, environment = command.words, {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if words[:2] == ["bash", "scripts/train.sh"]:
        rest = words[2:]
        config = rest.pop(0) if rest and not rest[0].startswith("--") else "configs/quickstart.toml"
        return Call(
            int(environment.pop("NPROC", 2)), "train.py", ["--config", config, *rest], environment
        )
    if words[0] == "torchrun":
        options = parse_torchrun(words[1:])  # exits where an option is wrong
        arguments = options.training_script_args
        script = COMMAND if options.module else options.training_script
        return Call(int(options.nproc_per_node), script, arguments, environment)
    if words[0] == "titan-ulysses":
        return Call(1, COMMAND, words[1:], environment)
    return Call(1, words[1], words[2:], environment) if words[0] == "python" else None


def options_of(call: Call) -> list[str]:
    """What makes a call short."""
    for part, options in OPTIONS.items():
        if part in call.arguments or call.script.endswith(part):
            return options
    return []


# --- where they run -------------------------------------------------------------------------------


class Sandbox:
    """A checkout whose outputs and home folder are the test's own."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        for name in ("train.py", "scripts", "configs", "titan_ulysses", "pyproject.toml"):
            (root / name).symlink_to(ROOT / name)
        for block in blocks("toml"):
            name = re.match(r"# (\S+\.toml)\n", block.text)
            assert name, (
                f"{block.page.name}:{block.line}: the first line of a TOML block is its name, as "
                "in # my.toml"
            )
            (root / name[1]).write_text(block.text)
        self._write_home()
        self.done: set[str] = set()

    def _write_home(self) -> None:
        """The reader's own models and data, tiny."""
        table = LLAMA | {
            "vocab_size": 257,
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        }
        table |= {
            "intermediate_size": 256,
            "max_position_embeddings": 8192,
            "bos_token_id": 256,
            "eos_token_id": 256,
        }
        tokenizer = load_tokenizer("bytes")
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ "
            "m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        )
        for name in ("SmolLM2-135M", "Llama-3.1-8B"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**table), dtype=torch.float32
            )
            model.save_pretrained(self.home / "models" / name)
            tokenizer.save_pretrained(self.home / "models" / name)
        tokenizer.add_tokens(["<one>", "<two>"])
        tokenizer.save_pretrained(self.home / "with-new-tokens")
        words = [
            f"{number} bottles of water on the wall, take one down and pass it around. "
            for number in range(40)
        ]
        # Recipes of other trainers, for docs/migration.md.
        (self.root / "fsdp.yaml").write_text("distributed_type: FSDP\nnum_processes: 8\n")
        (self.root / "run-h100-sp8-llama-8b.yml").write_text(
            "model: {name_or_path: a/b}\nsequence_parallel_size: 8\n"
        )
        (self.home / "books").mkdir()
        for number in range(3):
            (self.home / "books" / f"{number}.txt").write_text("".join(words[number:]))
        turns = [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "All of them."},
        ]
        rows = {
            "notes": [{"text": text} for text in words],
            "bodies": [{"body": text} for text in words],
            "qa": [{"question": text, "answer": text} for text in words],
            "chats": [{"messages": turns}] * 40,
            "pairs": [
                {"prompt": text[:9], "chosen": text[9:40], "rejected": "no"} for text in words
            ],
            "taught": [
                {
                    "input_ids": [*text.encode()],
                    "teacher_ids": [[*range(8)]] * len(text),
                    "teacher_log_probs": [[-float(i) for i in range(8)]] * len(text),
                }
                for text in words
            ],
        }
        write_megatron(self.home / "text_document", [[*text.encode(), 256] for text in words])
        for name, lines in rows.items():
            (self.home / f"{name}.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )

    def run(self, command: Command) -> None:
        """Run it, once, in the processes that are there; what it reads of outputs/ is made
        first.
        """
        if command.text in self.done:
            return
        self.done.add(command.text)
        self.make_what_is_read(command, self.run)
        call = call_of(command)
        assert call, f"{command.place}: {command.text}: nothing here knows how to run it"
        arguments = [*call.arguments, *options_of(call)]
        arguments = [
            word.replace("~", str(self.home)) if word.startswith("~/") else word
            for word in arguments
        ]
        arguments = [word.replace("step-500", "step-2") for word in arguments]
        if call.script == "train.py" and not {"--plan", "--help"} & {*arguments}:
            arguments += ["--parallelism.sequence_parallel_degree", "2"]
        if "--plan" in arguments and any(word.startswith("configs/") for word in arguments):
            arguments += TOY_8B
            if any("olmo_hybrid" in word for word in arguments):  # its own is too large
                arguments += ["--model.config.pad_token_id", "0"]
        here = (str(self.root), call._replace(arguments=arguments))
        if call.ranks == 1:
            run_script(*here)
        else:
            run_on_ranks(2, run_script, *here)

    def make_what_is_read(self, command: Command, run: Any) -> None:
        """Run the command that makes outputs/X where `command` reads of it."""
        for job in re.findall(r"outputs/([\w-]+)", command.text):
            makes = MAKERS.get(job, f"--job.name {job}")
            for other in commands():
                if f"{other.text} ".endswith(f"{makes} ") or f"{makes} --" in other.text:
                    if other is not command and "--evaluate" not in other.text:
                        run(other)
                    break

    def run_as_the_shell_does(self, command: Command, shorter: str) -> None:
        """With scripts/train.sh, env.sh and torchrun, on as many ranks as it says."""
        if command.text in self.done:
            return
        self.done.add(command.text)
        self.make_what_is_read(command, lambda other: self.run_as_the_shell_does(other, ""))
        call = call_of(command)
        options = shorter.split() or (options_of(call) if call else [])
        text = " ".join([command.text.replace("step-500", "step-2"), *options])
        result = subprocess.run(
            ["bash", "-c", text],
            cwd=self.root,
            env=self._shell(),
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert result.returncode == 0, (
            f"{command.place}: {text}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        )

    def _shell(self) -> dict[str, str]:
        """PATH begins with this interpreter, also as .venv/bin/python, where nothing needs to be
        installed.
        """
        folder = self.root / ".venv" / "bin"
        if not folder.exists():
            folder.mkdir(parents=True)
            programs = {"torchrun": "torch.distributed.run", "titan-ulysses": "titan_ulysses"}
            starts = {name: f"-m {module} " for name, module in programs.items()}
            for name, first in ({"python": ""} | starts).items():
                skip = (
                    "if [[ $1 == -m && $2 == pip ]]; then exit 0; fi\n" if name == "python" else ""
                )
                (folder / name).write_text(
                    f'#!/bin/bash\n{skip}exec {shlex.quote(sys.executable)} {first}"$@"\n'
                )
                (folder / name).chmod(0o755)
        path = os.pathsep.join([str(folder), os.environ["PATH"]])
        return {
            **os.environ,
            "HOME": str(self.home),
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }


def run_script(root: str, call: Call) -> None:
    """Call main() of a script, in this process, as if it had been started in the folder `root`."""
    with started_in(root, call):
        main = runpy.run_path(call.script, run_name="called")["main"]
        try:
            main(call.arguments) if inspect.signature(main).parameters else main()
        except SystemExit as end:
            assert not end.code, f"{call.script} {call.arguments} ended with {end.code}"


@contextmanager
def started_in(root: str, call: Call) -> Iterator[None]:
    before = os.getcwd(), sys.argv, [*sys.path], dict(os.environ)
    os.chdir(root)
    os.environ |= call.environment | {"HOME": str(Path(root) / "home")}
    sys.argv = [call.script, *call.arguments]
    sys.path[:0] = [
        str(Path(call.script).resolve().parent),
        *call.environment.get("PYTHONPATH", "").split(":"),
    ]
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.argv, sys.path[:] = before[1], before[2]
        os.environ.clear()
        os.environ.update(before[3])


class _Parsed(Exception):
    """A script has accepted its arguments."""


def parse(root: Path, command: Command) -> None:
    """Whether the program accepts the options: train.py reads its config, another script gets past
    its parser.
    """
    call = call_of(command)
    if call is None:
        return parse_shell(root, command)
    arguments = [word for word in call.arguments]
    with (
        started_in(str(root), call._replace(arguments=arguments)),
        pytest.MonkeyPatch.context() as patch,
    ):
        if call.script == COMMAND and arguments[0] in ("plan", "init"):
            command, *rest = arguments
            parse_model_command(rest, writes=command == "init")
            return
        if call.script == "train.py":
            parsed = parse_command_line(arguments)
            load_config(parsed.config_path, parsed.overrides)
            return
        own = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
            own(parser, *args, **kwargs)
            raise _Parsed

        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Parsed):
            main = runpy.run_path(call.script, run_name="called")["main"]
            main(arguments) if inspect.signature(main).parameters else main()


def parse_shell(root: Path, command: Command) -> None:
    """A shell script is there and has no syntax error; other programs are not ours."""
    program, *rest = command.words
    assert program in ("bash", "hf", "export", "sbatch", "kubectl", "docker"), (
        f"{command.place}: {command.text}: what is {program}?"
    )
    if program == "bash":
        subprocess.run(["bash", "-n", str(root / rest[0])], check=True)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("shell"))


def each(found: list[Command]) -> Any:
    return pytest.mark.parametrize("command", found, ids=[command.place for command in found])


def runs_here(command: Command) -> bool:
    return command.listed_in(NOT_HERE) is None


def takes_long(command: Command) -> bool:
    return runs_here(command) and command.listed_in(SHORTER) is not None


# --- the tests ------------------------------------------------------------------------------------


@each([command for command in commands() if runs_here(command) and not takes_long(command)])
def test_a_command_runs(command: Command, sandbox: Sandbox) -> None:
    sandbox.run(command)


@each([command for command in commands() if not runs_here(command) or takes_long(command)])
def test_a_command_that_is_not_run_is_parsed(command: Command, sandbox: Sandbox) -> None:
    parse(sandbox.root, command)


@pytest.mark.slow
@each([command for command in commands() if runs_here(command)])
def test_a_command_runs_as_the_shell_runs_it(command: Command, shell: Sandbox) -> None:
    shell.run_as_the_shell_does(command, command.listed_in(SHORTER) or "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python scripts/bench/versus.py --whatever", "unrecognized arguments: --whatever"),
        ("titan-ulysses plot", "the following arguments are required: RUN"),
        ("bash scripts/train.sh my.toml --training.stepz 3", "training.stepz"),
        ("bash scripts/train.sh absent.toml", "absent.toml: no such file"),
        (
            "torchrun --node-rang 0 train.py --config my.toml",
            "unrecognized arguments|required: training_script",
        ),
        ("bash scripts/examples/absent.sh", "exit status 127"),
        ("pip install something", "what is pip"),
    ],
)
def test_what_is_wrong_does_not_parse(
    text: str, message: str, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        (SystemExit, UserError, subprocess.CalledProcessError, AssertionError)
    ) as error:
        parse(sandbox.root, Command("", text))
    assert re.search(message, f"{error.value}\n{capsys.readouterr().err}")


def test_the_tables_say_nothing_of_commands_that_are_gone() -> None:
    texts = [command.text for command in commands()]
    stale = [part for part in (*NOT_HERE, *SHORTER) if not any(part in text for text in texts)]
    assert not stale
    campaigns = [each for each in commands() if re.search(r"scripts/(bench|chaos)", each.text)]
    # A campaign takes minutes: it needs options that make it shorter, and --slow.
    assert not [each.text for each in campaigns if runs_here(each) and not takes_long(each)]
    kinds = {"network", "GPU", "second host", "it runs these tests", "it fails on purpose"}
    kinds |= {"it writes pages"}
    assert {reason.partition(":")[0] for reason in NOT_HERE.values()} <= kinds


def test_configs_of_the_pages_load(sandbox: Sandbox) -> None:
    for block in blocks("toml"):
        load_config(sandbox.root / block.text.splitlines()[0].removeprefix("# "))


def test_the_first_page_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            assert len(line) <= COLUMNS or line.startswith("|"), (
                f"{page.name}:{number}: {len(line)} columns"
            )


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert not broken
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in prose(PAGES[0])]


TOP = ("titan_ulysses/", "scripts/", "tests/", "configs/", "docs/", ".github/", ".ci/")


def test_paths_of_the_repository_exist() -> None:
    """Those in `code` of the prose and in the commands."""
    missing = set()
    for page in PAGES:
        spans = re.findall(r"`([^`\n]+)`", prose(page))
        code = "\n".join(
            block.text for kind in ("bash", "toml") for block in blocks(kind) if block.page == page
        )
        for word in re.split(r"[\s\"'=]+", "\n".join([*spans, code])):
            path = word.rstrip(".,:;)/")
            if path.startswith(TOP) and not (ROOT / path).exists():
                missing.add(f"{page.name}: {path}")
    assert not missing, "\n".join(sorted(missing))


def test_settings_that_are_named_exist() -> None:
    """`section.key` in code of the prose, also with a value or as an option. What is in blocks is
    run or parsed.
    """
    unknown = set()
    for page in PAGES:
        text = prose(page)
        if page.name == "migration.md":  # the first column has the keys of others
            text = re.sub(r"^\|(,? `[^`\n]+`)+ \|", "|", text, flags=re.MULTILINE)
        for span in re.findall(r"`([^`\n]+)`", text):
            for match in re.finditer(
                r"(?<![\w./~-])(?:--)?([a-z_0-9]+)\.([a-z_0-9]+)(?![\w(*]|\.\*)", span
            ):
                section, key = match.groups()
                is_file = key in ("py", "toml", "json", "jsonl", "png")
                if section in SECTIONS and not is_file and f"{section}.{key}" not in KEYS:
                    unknown.add(f"{page.name}: {match[0]}")
    assert not unknown


def test_functions_fit_a_screen() -> None:
    """At most 60 lines, with their docstrings."""
    files = [ROOT / "train.py", *(ROOT / "titan_ulysses").rglob("*.py")]
    for path in [*files, *(ROOT / "scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


# --- library.md -----------------------------------------------------------------------------------


def run_the_library_page(path: str) -> tuple[float, list[int]]:
    """Both blocks, one after the other, and what they leave: the last loss, the scores' shape."""
    found = [block.text for block in blocks("python") if block.page.name == "library.md"]
    assert len(found) == 2
    rows = make_rows([(23,)] * 6, masked="none", vocab_size=61, seed=0)
    ids = [
        torch.stack([document.tokens[:-1] for (document,) in rows[start : start + 2]])
        for start in (0, 4)
    ]
    names: dict[str, Any] = {
        "path": path,
        "loader": [{"input_ids": ids[0]}] * 8,
        "validation": [{"input_ids": ids[1]}],
    }
    names["tokenizer"] = load_tokenizer("bytes")
    mesh = mesh_of(1, 1, 2)
    first = parallelize(AutoModelForCausalLM.from_pretrained(path), mesh)
    before = [first(**batch).loss.item() for batch in shard(names["loader"][:1], first)]
    with working_in(Path(path)):
        for block in found:
            exec(compile(block, "library.md", "exec"), names)
    assert names["loss"] < before[0]
    assert (Path(path) / "trained" / "config.json").exists()
    assert names["losses"][0].item() == pytest.approx(
        -names["log_probabilities"].sum().item() / 44, rel=0.02
    )
    return names["loss"].item(), list(names["log_probabilities"].shape)


def test_the_loop_of_the_library_page(tmp_path: Path) -> None:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**LLAMA), dtype=torch.float32
    ).save_pretrained(tmp_path)
    found = run_on_ranks(2, run_the_library_page, str(tmp_path))
    assert found[0] == found[1] and found[0][1] == [2, 24]


# --- trainers.md ----------------------------------------------------------------------------------


def run_the_trainers_page(path: str) -> tuple[float, float]:
    """Both blocks; the first trains the model that the second begins with again."""
    trainer, losses = [b.text for b in blocks("python") if b.page.name == "trainers.md"]
    ids = [torch.randint(0, 61, (24,), generator=torch.manual_seed(i)).tolist() for i in range(4)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    whole = AutoModelForCausalLM.from_pretrained(path)
    names: dict[str, Any] = {"torch": torch, "folder": f"{path}/trained", "rows": rows}
    names |= {"model": whole, "on_cpu": True}
    exec(compile(trainer, "trainers.md", "exec"), names)
    again = AutoModelForCausalLM.from_pretrained(names["folder"])
    names["frozen"] = parallelize(AutoModelForCausalLM.from_pretrained(path), names["mesh"])
    batch = [{"input_ids": torch.tensor(ids)}]
    names |= {
        "model": again,
        "completions": batch,
        "pairs": 2 * batch,
        "advantages": torch.ones(4, 24),
    }
    exec(compile(losses, "trainers.md", "exec"), names)
    return names["trainer"].state.log_history[0]["loss"], names["loss"].item()


def test_the_blocks_of_the_trainers_page(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**LLAMA), dtype=torch.float32
    ).save_pretrained(tmp_path)
    first, last = run_on_ranks(2, run_the_trainers_page, str(tmp_path))
    assert first == last and math.isfinite(first[1]) and 3 < first[0] < 6


# --- the plan of the first page -------------------------------------------------------------------

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
"""The config.json of Llama-3.1-8B, as far as a plan looks at it."""


@pytest.mark.slow
def test_the_plan_that_is_quoted_is_what_the_planner_prints(shell: Sandbox) -> None:
    AutoConfig.for_model(**LLAMA_8B).save_pretrained(shell.home / "models" / "Llama-3.1-8B")
    command = "python train.py --config long.toml --plan"
    assert command in [one.text for one in commands()]
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=shell.root,
        env=shell._shell(),
        capture_output=True,
        text=True,
        check=True,
    )
    printed = " ".join(re.sub(r"[│┃]", " ", result.stdout).split())
    (quoted,) = blocks("text")
    for line in quoted.text.splitlines():
        assert line in printed, f"{line}\nis not in what it prints now:\n{result.stdout}"

"""The command line of the installed package: `titan-ulysses train --config X.toml`.

    titan-ulysses train --config X.toml       what `python train.py` does in a clone
    titan-ulysses plan --config X.toml        train.py --plan
    titan-ulysses plan MODEL --gpus 8xH100    the same of a model, without a TOML file
    titan-ulysses init MODEL --gpus 8xH100    writes a TOML file
    titan-ulysses evaluate --config X.toml    train.py --evaluate
    titan-ulysses TOOL ...                    generate, plot and others; see `_TOOLS`

On several ranks: `torchrun --nproc-per-node 8 -m titan_ulysses train --config X.toml`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module

from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.config.load import dump_toml, load_config
from titan_ulysses.config.model_cli import parse_model_command
from titan_ulysses.config.paths import check_model_path, path_problems
from titan_ulysses.config.validate import check
from titan_ulysses.distributed.errors import UsageError, UserError
from titan_ulysses.launch.failure import exit_on_error
from titan_ulysses.launch.hub import look_for_hub
from titan_ulysses.memory.allocator import expand_segments
from titan_ulysses.plan.status_line import shown

_EVALUATION = (
    ("validation.enable", True),
    # Only training needs these: room for checkpoints on the disk, the library of an optimizer.
    ("activation_checkpoint.offload", "none"),
    ("optimizer.name", "adamw"),
)
"""Settings that --evaluate changes."""

_ONE_PROCESS = {"-h", "--help", "--print-config", "--plan"}
"""Options that do their work in one process, without a process group."""

_TOOLS = {
    "convert": ("checkpoint.convert", "SOURCE TARGET", "a checkpoint to safetensors, or back"),
    "generate": ("tools.generate", "FOLDER --prompt TEXT", "text from an exported model"),
    "show-data": ("tools.show_data", "--config X.toml", "what a run would train on, in colour"),
    "plot": ("tools.plot", "RUN ...", "pictures of one or several runs"),
    "report": ("tools.report", "RUN ...", "a page of a run; of several, to compare"),
    "needle": ("tools.needle", "MODEL", "whether a model finds a fact in long texts"),
    "eval-long": ("tools.eval_long", "MODEL", "the same by several kinds of tasks"),
    "models": ("tools.models", "[NAME]", "which types of models train exactly"),
    "migrate": ("tools.migrate", "RECIPE", "another trainer's recipe as a TOML file"),
}
"""The other tools: a module whose `main` takes the arguments, and what --help says of it."""
_COMMANDS = ("train", "plan", "init", "evaluate", *_TOOLS)
_TOOL_LINES = "\n".join(
    f"  {f'{name} {arguments}':<31} {what}" for name, (_, arguments, what) in _TOOLS.items()
)

_USAGE = f"""usage: titan-ulysses COMMAND ...

  train --config X.toml           train it; options: --section.key value
  plan --config X.toml            does it fit these GPUs? What binds? Needs none
  plan MODEL --gpus 8xH100 --seq-len 1M     the same, without a TOML file
  init MODEL --gpus 8xH100 --seq-len 1M     writes a TOML file for them
  evaluate --config X.toml        validate the run's model alone
{_TOOL_LINES}

On several ranks:
  torchrun --nproc-per-node N -m titan_ulysses train --config X.toml
All settings: titan-ulysses train --help"""


def run(argv: list[str]) -> None:
    """Do what the arguments of train.py ask for: train, --evaluate, --plan or --print-config.

    UserError for what cannot be used.
    """
    if os.environ.get("RANK", "0") != "0" and _ONE_PROCESS & {*argv}:
        return  # printed once, also where several ranks are started
    command = parse_command_line(argv)
    config = load_config(
        command.config_path, [*command.overrides, *(_EVALUATION if command.evaluate else ())]
    )
    if command.print_config:
        print(dump_toml(config), end="")
        return
    if command.plan:
        if config.model.config is None:
            check_model_path(config.model.path)
        _hide_gpus()
        tokens = config.training.seq_len
        with shown(f"{config.job.name}: {tokens:,} tokens a sequence on {config.plan.gpu}"):
            with _large_imports(without=_NOT_FOR_PLANS):
                from titan_ulysses.plan.report import plan_and_report

            return plan_and_report(config)

    # What is wrong without a look at the model or the data is said at once.
    check(
        config,
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        model_config=None,
        num_token_ids=0,
    )
    if problems := path_problems(config):
        raise UserError("\n".join(problems))
    look_for_hub(config)
    expand_segments()
    # Torch and transformers are imported only now, so that --help is quick.
    with _large_imports():
        from titan_ulysses.train.trainer import Trainer

    if command.evaluate:
        return Trainer(config, eval_only=True, own_process=True).evaluate()
    Trainer(config, own_process=True).train()


_NOT_FOR_PLANS = ("accelerate", "torchao", "torchvision")
"""What transformers imports wherever it is installed, for weights and pictures: over a second."""


@contextmanager
def _large_imports(*, without: Sequence[str] = ()) -> Iterator[None]:
    """Keep the garbage collector from what is imported here, all of which stays.

    It would look through hundreds of thousands of objects again and again: while a rank starts, and
    later in the middle of a step. without: packages that count as not installed meanwhile.
    """
    hidden = [name for name in without if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for name in hidden:
            del sys.modules[name]


def _hide_gpus() -> None:
    """Hide this machine's GPUs from a plan. Called before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run_with_model(command: str, argv: list[str]) -> None:
    """Do what `plan MODEL` or `init MODEL` asks for. UserError for what cannot be used."""
    asked = parse_model_command(argv, writes=command == "init")
    check_model_path(asked.model)  # at once, before the large imports
    _hide_gpus()
    with shown(f"{asked.model} on {asked.gpus.count} x {asked.gpus.name}"):
        with _large_imports(without=_NOT_FOR_PLANS):
            from titan_ulysses.plan.init import init, plan_model

        init(asked) if command == "init" else plan_model(asked)


def main(argv: list[str] | None = None) -> None:
    """The `titan-ulysses` command: a subcommand and its arguments. UserError for no such one."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE)
    elif command == "--version":
        from titan_ulysses import __version__

        print(f"titan-ulysses {__version__}")
    elif command in _TOOLS:
        import_module(f"titan_ulysses.{_TOOLS[command][0]}").main(rest)
    elif command == "init" or (command == "plan" and _names_a_model(rest)):
        _run_with_model(command, rest)
    elif command in _COMMANDS:
        run(rest if command == "train" else [*rest, f"--{command}"])
    else:
        near = get_close_matches(command, _COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(_COMMANDS)}"
        raise UsageError(f"titan-ulysses {command}: no such command; {remedy}")


def _names_a_model(arguments: list[str]) -> bool:
    """Return whether arguments of `plan` are those of a model, and not of a TOML file."""
    first = arguments[0] if arguments else "--help"
    is_model = not first.startswith("-") and not first.endswith(".toml")
    options = {one.partition("=")[0] for one in arguments}
    return is_model or bool({"--gpus", "-h", "--help"} & options)


def console() -> None:
    """The entry point of the installed script: `main`, with errors for people."""
    with exit_on_error():
        main()


if __name__ == "__main__":
    console()

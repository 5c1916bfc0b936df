"""Convert a run's checkpoint to a folder that transformers opens, or such a folder to a checkpoint
that a run starts from.

    titan-ulysses convert outputs/books/checkpoints/step-500 ~/models/books-500
    titan-ulysses convert ~/models/SmolLM2-135M outputs/books/checkpoints/step-0

Runs in one process, without a GPU or a process group. One tensor at a time is in memory (of the
experts of a layer, those that belong together), and when safetensors are written, also the tensors
of one file of 4 GiB.
"""

from __future__ import annotations

import argparse
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.hosts import expect_all_hosts
from titan_ulysses.checkpoint.initial import base_weights, origin_of
from titan_ulysses.checkpoint.layout import Layout
from titan_ulysses.checkpoint.manifest import TABLE_FILE, Damage
from titan_ulysses.checkpoint.origin import Origin
from titan_ulysses.checkpoint.state import first_difference
from titan_ulysses.checkpoint.step_folder import publish, read_run_file, step_of
from titan_ulysses.checkpoint.storage import (
    HashingWriter,
    cause,
    errors_of_all_ranks,
    open_checkpoint,
)
from titan_ulysses.config.load import load_config
from titan_ulysses.config.validate import ranks_of
from titan_ulysses.distributed.atomic import partial_path, remove
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.setup.resolve import resolve, resolve_model
from titan_ulysses.ulysses.cores import sdpa

HELP = """\
SOURCE is a checkpoint (checkpoints/step-N of a run): TARGET is a folder to be made, with \
safetensors, config and
tokenizer, for AutoModelForCausalLM.from_pretrained. The model and the tokenizer are those of \
the run's config.toml.

SOURCE is a folder with config.json and *.safetensors: TARGET is a checkpoint to be made, named \
step-N (step-0 in the
checkpoints folder of a run that has not begun): the model alone, with an optimizer that begins \
afresh."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="titan-ulysses convert",
        description=__doc__.split("\n\n")[0],
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a checkpoint, or a folder with safetensors")
    parser.add_argument("target", type=Path, help="the folder to be made")
    parser.add_argument(
        "--config",
        type=Path,
        help="config.toml of the checkpoint's run, if it is not in a folder above",
    )
    arguments = parser.parse_args(argv)
    source, target = (path.expanduser().absolute() for path in (arguments.source, arguments.target))
    # DCP warns that there is no process group. There is none on purpose.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    to_folder = (source / TABLE_FILE).exists()
    try:
        if not source.is_dir():
            raise UserError(f"{source}: no such folder.")
        if target.exists():
            raise UserError(f"{target}: exists already. Remove it, or name another folder.")
        if to_folder:
            to_safetensors(source, target, arguments.config)
        else:
            to_checkpoint(source, target)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except (CheckpointException, Damage) as error:
        why = f"{target}: {cause(error)}"
        if to_folder:
            why = f"{source}: the checkpoint is damaged ({cause(error)}). Take another one."
        parser.exit(2, f"error: {why}\n")
    print(f"{target} is complete")


# --- to safetensors -------------------------------------------------------------------------------


def to_safetensors(source: Path, target: Path, config_path: Path | None) -> None:
    """Write the model of the checkpoint `source` to the folder `target`, in the form of a run's own
    export.
    """
    if config_path is None:
        above = [folder / "config.toml" for folder in source.parents]
        config_path = next((path for path in above if path.exists()), None)
    if config_path is None:
        raise UserError(
            f"{source}: no config.toml in the folders above: name that of its run with --config."
        )
    config = load_config(config_path)
    step_of(source)
    state = read_run_file(source)
    expect_all_hosts(state, str(source))
    reader = open_checkpoint(source, state["files"], where=str(source))
    entries = reader.read_metadata().state_dict_metadata
    saved = {n.removeprefix("model."): m for n, m in entries.items() if n.startswith("model.")}
    if state["frozen"]:
        raise UserError(
            f"{source}: a checkpoint does not hold the frozen weights. Use the export/ of that "
            "run, which has the whole model."
        )
    spec = resolve(
        config,
        world_size=ranks_of(config),
        device_type="cpu",
        with_tokenizer=True,
        # Nothing is computed, so that a run whose core needs a GPU can be converted anywhere.
        select=lambda *_, **__: (sdpa, "attention: none"),
    )
    parameter_dtype = next(
        meta.properties.dtype for meta in saved.values() if meta.properties.dtype.is_floating_point
    )
    plain = hf.build_on_meta(spec.whole_config, parameter_dtype, **spec.kind)
    if difference := first_difference(
        {n: list(m.size) for n, m in saved.items()},
        {n: list(t.shape) for n, t in hf.state_of(plain).items()},
    ):
        raise UserError(
            f"{source}: holds a different model than config.toml describes: {difference.text} by "
            "the config. Name the config.toml of its run with --config."
        )
    if base := base_weights(config):
        weights.keep_generation_config(plain, base.path)

    def fetch(name: str) -> Tensor:
        tensor = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
        with errors_of_all_ranks():
            dcp.load({"model": {name: tensor}}, storage_reader=reader, no_dist=True)
        return tensor

    origin = origin_of(config)
    weights.export(plain, spec.tokenizer, target, step=state["step"], fetch=fetch, origin=origin)


# --- to a checkpoint ------------------------------------------------------------------------------


class ReadWhenWritten(DefaultSavePlanner):
    """A DCP save planner for tensors without data, which reads each tensor when it is written."""

    def __init__(self, fetch: Any):
        super().__init__()
        self.fetch = fetch

    def lookup_object(self, index: Any) -> Tensor:
        return self.fetch(index.fqn.removeprefix("model."))


def to_checkpoint(source: Path, target: Path) -> None:
    """Write the safetensors of the folder `source` as the checkpoint `target`, without optimizer
    state.
    """
    step = step_of(target)
    plain = hf.build_on_meta(resolve_model(str(source)).whole_config, torch.float32)
    tensors, fetch = weights.open_folder(plain, str(source), setting="SOURCE")
    for line in Origin.of(str(source), Layout(plain)).describe().splitlines():
        print(f'SOURCE = "{source}": {line}')
    partial = partial_path(target)
    remove(partial)
    try:
        # DCP holds all tensors of a file in memory, so each tensor gets its own file.
        writer = HashingWriter(partial, single_file_per_rank=False)
        dcp.save(
            {"model": tensors}, storage_writer=writer, planner=ReadWhenWritten(fetch), no_dist=True
        )
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        state = {
            "step": step,
            "loader": {"sequences_consumed": 0},
            "rng": {"seed": None},  # no step has drawn from one
            "parameters": shapes,
            "frozen": 0,
            "optimizer": None,
        }
        publish(partial, target, state, writer.pieces, save_id=uuid.uuid4().hex)
    finally:
        remove(partial)

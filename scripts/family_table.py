"""A table of all families that transformers knows: exact, exact unstreamed, or refused and why.

    python scripts/family_table.py                      # those of images and text
    python scripts/family_table.py llava gemma3         # some of them

Each row is the verification that `parallelize` makes of an unchecked family: a tiny model of the
family's default config, sharded over two ranks with documents packed and images dealt to them, must
have the loss and every gradient of unmodified transformers. Whether the tests check it does not
count here. The ranks of a family are forks of this process, and are ended after --seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PreTrainedConfig

from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.distributed.mesh import build_mesh
from titan_ulysses.model.families import check_family
from titan_ulysses.model.hf import has_vision
from titan_ulysses.model.vision import takes_features
from titan_ulysses.setup.options import ParallelOptions
from titan_ulysses.setup.parallelize import verified_options
from titan_ulysses.ulysses.cores import sdpa

RANKS = 2


def vision_families() -> dict[str, PreTrainedConfig | str]:
    """Return the default config of each family of images and text that takes features, by type;
    or why there is none.
    """
    found: dict[str, PreTrainedConfig | str] = {}
    for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        if not takes_features(kind):
            continue
        try:
            config = AutoConfig.for_model(kind.model_type)
        except Exception as error:  # a family's own code raises whatever it likes
            found[kind.model_type] = f"its default config cannot be made ({one_line(error)})"
            continue
        found[kind.model_type] = config if has_vision(config) else "its config has no vision_config"
    return found


def result_of(config: PreTrainedConfig) -> str:
    """Return how a family trains on this rank's group: a cell of the table. Collective."""
    options = ParallelOptions(attention=sdpa).resolved(torch.float32)
    try:
        check_family(config)
        chosen = verified_options(config, build_mesh(sequence=RANKS), options)
    except UserError as error:
        return f"refused: {str(error).removeprefix('model: ')}"
    except Exception as error:
        return f"refused: {type(error).__name__}: {one_line(error)}"
    return "exact" if chosen.memory.stream_chunk_tokens != -1 else "exact, unstreamed"


def _rank(rank: int, config: PreTrainedConfig, folder: str, answer: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"}
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    answer.send(result_of(config))
    os._exit(0)  # without waiting for the other rank


def measure(config: PreTrainedConfig, seconds: float) -> str:
    """Return the result of a family, found by RANKS forks of this process."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=_rank, args=(rank, config, folder, theirs))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        theirs.close()
        try:
            return ours.recv() if wait([ours], seconds) else f"refused: not ready in {seconds} s"
        except EOFError:
            return f"refused: a rank ended ({[process.exitcode for process in ranks]})"
        finally:
            for process in ranks:
                process.kill()
                process.join()


def table(families: dict[str, PreTrainedConfig | str], seconds: float) -> Iterable[str]:
    """Yield the lines of a table in Markdown, with how many there are of each result."""
    yield "| type | result |"
    yield "| --- | --- |"
    counts: dict[str, int] = {}
    for name, config in families.items():
        text = f"refused: {config}" if isinstance(config, str) else measure(config, seconds)
        kind = text.partition(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
        yield f"| {name} | {' '.join(text.split()).replace('|', '/')} |"
    yield ""
    yield ", ".join(f"{kind}: {count}" for kind, count in counts.items())


def main() -> None:
    """Print the table of the families that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="types of models; none: all")
    parser.add_argument("--seconds", type=float, default=60, help="the most for one family")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = vision_families()
    if unknown := sorted({*arguments.types} - known.keys()):
        parser.error(f"no family of images and text that takes features: {', '.join(unknown)}")
    chosen = {name: known[name] for name in arguments.types} if arguments.types else known
    for line in table(chosen, arguments.seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""Try every type of transformers that is causal, or takes images and text, and write what trains
exactly.

    python scripts/check_models.py              all types: about 45 minutes of two cores
    python scripts/check_models.py falcon dory  only these; the rows of others stay as they are

Of each type, a tiny model (`verification.shrink` of the type's default config) is trained for one
step on two ranks, packed and sharded, streamed and not, and again with adapters on its linear
layers and experts. Its loss and all gradients must equal those of unmodified transformers, or peft,
on each document alone, with its images. The result goes to titan_ulysses/tools/models.json, from
which `titan-ulysses models` prints, and to docs/model-types.md.

Two processes try several types one after the other. If they die, or do not answer in time, that is
the result of the type, and two others go on with the next.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from titan_ulysses import build_mesh
from titan_ulysses.config.schema import LoRA
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.model import hf
from titan_ulysses.model.families import check_family, layer_types
from titan_ulysses.model.lora import add_adapters, initialize_adapters
from titan_ulysses.model.verification import shrink
from titan_ulysses.model.vision import takes_features
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.options import ParallelOptions
from titan_ulysses.setup.parallelize import verified_options
from titan_ulysses.tools.models import TABLE, as_markdown, line, versions
from titan_ulysses.ulysses.cores import sdpa
from titan_ulysses.ulysses.linear_attention import check_layers

RANKS = 2
SECONDS = 240
"""After which a type has no answer; most take two."""
UNSET = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
"""Sizes that the default configs of some types leave out."""
OWN: dict[str, dict[str, Any]] = {
    # 224 pixels are 7 patches, of which pairs are merged.
    **dict.fromkeys(("idefics3", "smolvlm"), {"vision_config": {"image_size": 256}}),
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "step3p7": {"text_config": {"sliding_window": 512}},
}
"""What a type must be told, because its default config cannot be built or run."""
PAGE = Path(__file__).parent.parent / "docs" / "model-types.md"


def all_types() -> list[str]:
    """Return the causal types, and those of images and text that take features."""
    of_images = {x.model_type for x in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if takes_features(x)}
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | of_images)


def adapters_for(model: PreTrainedModel) -> LoRA:
    """Return adapters for all linear layers and experts of a model's text; in mixtures whose shared
    experts peft does not take for linear layers, for those of attention and experts.
    """
    text = model.get_decoder() if hf.has_vision(model.config) else model
    modules = [x for x in text.modules() if not isinstance(x, torch.nn.Conv1d)]
    experts = any(p.ndim == 3 for x in modules for p in x.parameters(recurse=False))
    within = next(name for name, module in model.named_modules() if module is text)
    names = [f"{within}.*" if within else "*"] * experts
    everything = LoRA(rank=2, target_modules=names, target_parameters=names)
    try:
        add_adapters(hf.build_on_meta(model.config, torch.float64), everything)
    except UserError:
        if not experts:
            raise
        return everything.model_copy(update={"target_modules": ["*attn*"]})
    return everything


def adapt(model: PreTrainedModel) -> None:
    """Add adapters that are not zero."""
    add_adapters(model, adapters_for(model))
    initialize_adapters(model, seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(seed_of(0, name))
            shape, dtype = parameter.shape, parameter.dtype
            parameter.data = 0.1 * torch.randn(shape, generator=generator, dtype=dtype)


def config_of(kind: str) -> PreTrainedConfig:
    """Return the default config of a type, with sizes where it has none."""
    config = CONFIG_MAPPING[kind](**OWN.get(kind, {}))
    text, own = config.get_text_config(), dict(UNSET)
    if heads := getattr(text, "num_attention_heads", None):
        own |= {"head_dim": text.hidden_size // heads}
    for name, value in own.items():
        if vars(text).get(name, 0) is None:
            setattr(text, name, value)
    return config


def tried(kind: str, mesh: Mesh) -> dict[str, str]:
    """Return what a type does: its result, and where it is not exact, the reason."""
    of_images = {"takes": "images and text"}
    row = {} if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else of_images
    try:
        config = config_of(kind)
        row = of_images if hf.has_vision(config) else row
        check_family(config)
        try:
            tiny = shrink(config)
        except Exception as error:
            raise UserError(f"its config cannot be reduced to a tiny model ({error})") from error
        model = hf.build_on_meta(tiny, torch.float64)
        blocks, types = find_blocks(model)[1], layer_types(model.config.get_text_config())
        if types or model._is_stateful:
            check_layers(blocks, types, is_stateful=model._is_stateful, device_type="cpu")
        options = ParallelOptions(attention=sdpa).resolved(torch.float64)
        found = verified_options(config, mesh, options)
    except Exception as error:
        return row | {"result": "refused", "reason": _said(error)}
    streamed = found.memory.stream_chunk_tokens != -1
    row |= {"result": "exact" if streamed else "exact unstreamed"}
    try:
        only = (
            " (attention and experts)" if adapters_for(model).target_modules == ["*attn*"] else ""
        )
        with_adapters = verified_options(config, mesh, found, prepare=adapt)
        exact = (with_adapters.memory.stream_chunk_tokens != -1) == streamed
        return row | {"adapters": f"{'exact' if exact else 'exact unstreamed'}{only}"}
    except Exception as error:
        return row | {"adapters": _said(error)}


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("model: ")
    text = text if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
    text = text.rpartition("could not prove that it does: ")[2]
    text = text.removesuffix(" Choose another model.")
    # Adapters that are refused, in a message about the tiny model that should have got them.
    return text.removeprefix("a tiny one cannot be built and run (UserError: ")


def try_in_turn(kinds: list[str], rank: int, folder: str, results: Any) -> None:
    """Try types in this process, one of two; the first sends a row for each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    mesh = build_mesh(sequence=RANKS)
    for kind in kinds:
        row = tried(kind, mesh)
        if rank == 0:
            results.send((kind, row))
    results.close()
    os._exit(0)


def try_all(kinds: list[str]) -> dict[str, dict[str, str]]:
    """Return a row for each type."""
    rows: dict[str, dict[str, str]] = {}
    forks = multiprocessing.get_context("fork")
    while left := [kind for kind in kinds if kind not in rows]:
        with tempfile.TemporaryDirectory() as folder:
            receives, sends = forks.Pipe(duplex=False)
            arguments = [(left, rank, folder, sends) for rank in range(RANKS)]
            ranks = [forks.Process(target=try_in_turn, args=x, daemon=True) for x in arguments]
            for process in ranks:
                process.start()
            sends.close()
            why = f"no answer within {SECONDS} s"
            try:
                while receives.poll(SECONDS):
                    kind, row = receives.recv()
                    rows[kind] = row
                    print(line(kind, row), flush=True)
            except EOFError:
                why = "its process died"
            for process in ranks:
                process.kill()
                process.join()
        if stuck := [kind for kind in left if kind not in rows][:1]:
            rows[stuck[0]] = {"result": "refused", "reason": why}
            print(line(stuck[0], rows[stuck[0]]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="types; without any, all of them")
    args = parser.parse_args()
    started = time.monotonic()
    rows = try_all(args.kinds or all_types())
    print(f"{len(rows)} types in {time.monotonic() - started:.0f} s")
    if args.kinds:
        table = json.loads(TABLE.read_text())
        if table["versions"] != versions():
            raise SystemExit("The table is of other versions: make all of it.")
        rows = table["types"] | rows
    table = {"versions": versions(), "types": dict(sorted(rows.items()))}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    PAGE.write_text(as_markdown(table))


if __name__ == "__main__":
    main()

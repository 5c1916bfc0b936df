"""Images and videos under sequence parallelism, against unmodified transformers on one process:
loss, norm, every gradient and every parameter, over three steps, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from helpers.meshes import DP2_SP2, ONE, SP2, SP4, Degrees, mesh_of
from helpers.ranks import run_on_ranks
from helpers.training import Record, largest_difference
from helpers.vision import (
    VISION,
    Items,
    Step,
    batch_of,
    page,
    plain_vision_model,
    train_plain,
    train_sharded,
    vision_model_of,
)
from titan_ulysses import UserError, parallelize, save_pretrained, shard
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.model import vision
from titan_ulysses.model.hf import load_model_config
from titan_ulysses.model.pixels import ONE_PLACEHOLDER
from titan_ulysses.model.verification import shrink
from titan_ulysses.setup import parallelize as setup
from titan_ulysses.ulysses.cores import sdpa

SP3: Degrees = (1, 1, 3)
HARDEST = "qwen3_vl"  # levels of DeepStack, three axes, videos with times between their frames
IN_FP32 = dict.fromkeys(["qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v"], 1e-5)
IN_FP32 |= dict.fromkeys(["kimi_k25", "lfm2_vl"], 1e-5)
IN_FP32 |= {"qwen3_5": 1e-3, "qwen3_5_moe": 1e-3}  # recurrences, whose decays' gradients cancel
"""Families of which some step is in fp32 whatever the dtype, and what that may change."""


@cache
def steps_of(family: str) -> list[Step]:
    """Three steps: images across the borders of slices, more of them than ranks and fewer, of two
    sizes, a video, documents of words alone, masked labels, and a step without an image.
    """
    items = Items(family, seed=5)
    draw = items.generator

    def row(*documents: list[Any]) -> list[Any]:
        return [page(pieces, draw, masked=i == 1) for i, pieces in enumerate(documents)]

    def image(large: bool = False) -> Any:
        return items.image(large=large)

    video = items.video(2) if items.has_videos else image()
    mixes = family not in ONE_PLACEHOLDER
    many = [
        row([3, image(True), 5, image(), 2], [7], [2, video if mixes else image(), 4]),
        row([4, image(True), 3, image(), 3, image(), 2]),
    ]
    few = [row([2, video, 6], [9]), row([21])]
    words = [row([11], [6]), row([20])]
    return [[many], [few], [many[::-1]] if family != HARDEST else [words]]


@cache
def expected(family: str) -> Record:
    return train_plain(vision_model_of(family), steps_of(family), torch.float64)


def train_families(
    degrees: Degrees, families: list[str], steps: dict[str, list[Step]], **options: Any
) -> dict[str, Record | str]:
    """What each family's training shows on this rank of a mesh."""
    return {
        family: train_sharded(
            degrees, vision_model_of(family), steps[family], torch.float64, **options
        )
        for family in families
    }


def worst(found: Record, family: str) -> tuple[float, str]:
    differences = largest_difference(found, expected(family))
    for name in without_effect(expected(family)):
        assert name in without_effect(found)
        del differences[f"gradient of {name}"], differences[f"parameter {name}"]
    where = max(differences, key=lambda name: differences[name])
    return differences[where], where


def without_effect(record: Record) -> list[str]:
    """The biases of keys without RoPE: a softmax cancels them, so their gradients are rounding."""
    largest = max(x.abs().max() for step in record.gradients for x in step.values())
    return [
        name
        for name in record.gradients[0]
        if name.endswith("k_proj.bias")
        and all(step[name].abs().max() < 1e-12 * largest for step in record.gradients)
    ]


@pytest.mark.parametrize(
    ("degrees", "families", "options"),
    [
        (SP2, [HARDEST], {}),
        (SP3, [HARDEST], {}),
        (SP4, [HARDEST], {}),
        (DP2_SP2, [HARDEST], {}),
        (SP2, ["glm4v_moe"], {"stream_chunk_tokens": 8}),  # its blocks take positions of all axes
        # The hardest family runs on every mesh always, and streamed in test_streamed_and_frozen.
        *(pytest.param(SP2, [x], {}, marks=pytest.mark.slow) for x in VISION if x != HARDEST),
        *(
            pytest.param(degrees, [*VISION], options, marks=pytest.mark.slow)
            for degrees, options in (
                (ONE, {}),
                (SP3, {}),
                (SP4, {}),
                (DP2_SP2, {}),
                (SP2, {"stream_chunk_tokens": 8}),
            )
        ),
    ],
)
def test_equals_one_plain_process(
    degrees: Degrees, families: list[str], options: dict[str, Any]
) -> None:
    steps = {family: steps_of(family) for family in families}
    ranks = math.prod(degrees)
    found = run_on_ranks(ranks, train_families, degrees, families, steps, **options)[0]
    for family in families:
        difference, where = worst(found[family], family)
        assert difference < IN_FP32.get(family, 1e-12), (family, where, difference)


def _to_a_wrong_placeholder() -> Any:
    plan = vision._plan

    def wrong(*args: Any) -> Any:
        found = plan(*args)
        return vision._Plan(**vars(found) | {"place": found.place.roll(1)})

    return mock.patch.object(vision, "_plan", wrong)


def _tower_counted_by_rank() -> Any:
    exchange = vision._exchange

    def summed(rows: Tensor, plan: Any, mesh: Any) -> Tensor:
        if rows.requires_grad:
            rows.register_hook(lambda gradient: gradient * mesh.size())
        return exchange(rows, plan, mesh)

    return mock.patch.object(vision, "_exchange", summed)


def _positions_of_the_slice() -> Any:
    forward = setup.Sharding.forward

    def wrong(self: Any, model: Any, *others: Any, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        counted = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        return forward(self, model, *others, **inputs | {"position_ids": counted})

    return mock.patch.object(setup.Sharding, "forward", wrong)


MUTANTS: dict[str, Callable[[], Any]] = {
    "a row goes to a wrong placeholder": _to_a_wrong_placeholder,
    "positions are those of the slice": _positions_of_the_slice,
    "the tower's gradient is counted by every rank": _tower_counted_by_rank,
}


def train_mutant(name: str, steps: list[Step]) -> Record:
    with MUTANTS[name]():
        return train_sharded(SP2, vision_model_of(HARDEST), steps, torch.float64)


@pytest.mark.parametrize("name", MUTANTS)
def test_parity_fails_for_a_mutant(name: str) -> None:
    found = run_on_ranks(2, train_mutant, name, steps_of(HARDEST))[0]
    difference, where = worst(found, HARDEST)
    assert difference > 1e-3, (name, where, difference)
    assert "visual" in where or not name.startswith("the tower"), where


def frozen_tower(model: Any) -> None:
    vision.freeze_towers(model)


@pytest.mark.parametrize(
    "options",
    [
        {"stream_chunk_tokens": 8, "prepare": frozen_tower},
        {"stream_chunk_tokens": 8, "stream_offload": "host"},
        pytest.param({"checkpoint_every": 0}, marks=pytest.mark.slow),  # as the first, unstreamed
    ],
)
def test_streamed_and_frozen(options: dict[str, Any]) -> None:
    steps = steps_of(HARDEST)
    found = run_on_ranks(2, train_families, SP2, [HARDEST], {HARDEST: steps}, **options)[0]
    prepare = options.get("prepare")
    plain = train_plain(vision_model_of(HARDEST), steps, torch.float64, prepare=prepare)
    differences = largest_difference(found[HARDEST], plain)
    assert max(differences.values()) < 1e-12, max(differences.items(), key=lambda x: x[1])
    has_tower = "gradient of model.visual.patch_embed.proj.weight" in differences
    assert has_tower == (prepare is None)
    assert "gradient of model.visual.merger.linear_fc1.weight" in differences


def library_loop(folder: Path, rows: Any) -> dict[str, Any]:
    """A loop of one's own: load, shard, count collectives, save for transformers."""
    mesh = mesh_of(*SP2)
    model = AutoModelForImageTextToText.from_pretrained(folder / "whole", dtype=torch.float64)
    parallelize(model, mesh, param_dtype=torch.float64)
    counts = []
    for batch in shard(
        [batch_of(rows), {"input_ids": batch_of(rows)["labels"].clamp(3, 40)}], model
    ):
        with CollectiveCounter() as counter:
            model(**batch).loss.backward()
        counts.append(counter.counts["all_to_all"][0])
    save_pretrained(model, folder / "trained")
    messages = []
    broken = batch_of(rows)
    for change in (
        {"image_grid_thw": broken["image_grid_thw"][:-1]},
        {"pixel_values": broken["pixel_values"][:-1]},
        {"audio_values": broken["pixel_values"]},
    ):
        try:
            next(shard([broken | change], model))
        except UserError as error:
            messages.append(str(error))
    return {"counts": counts, "messages": messages}


def test_a_loop_of_ones_own_saves_what_transformers_opens(tmp_path: Path) -> None:
    whole = plain_vision_model(vision_model_of(HARDEST), torch.float64)
    whole.save_pretrained(tmp_path / "whole")
    found = run_on_ranks(2, library_loop, tmp_path, steps_of(HARDEST)[0][0])[0]
    # Two layers, two exchanges each, forward and backward (computed once more in between): with
    # images there is one more each way.
    with_images, without = found["counts"]
    assert with_images == without + 2, found["counts"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained", dtype=torch.float64)
    assert again.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    grids, pixels, unknown = found["messages"]
    assert "pixel_values" in grids and "need" in grids
    assert "pixel_values" in pixels and "need" in pixels
    assert "audio_values" in unknown


def verify(family: str) -> str:
    """How an unchecked family of this config would train: its message, or what is chosen."""
    mesh = mesh_of(*SP2)
    try:
        options = setup.ParallelOptions(attention=sdpa).resolved(torch.float32)
        config = load_model_config("", vision_model_of(family))
        options = setup.verified_options(config, mesh, options)
    except UserError as error:
        return str(error)
    return f"chunks {options.memory.stream_chunk_tokens}"


def test_an_unchecked_family_is_verified() -> None:
    assert run_on_ranks(2, verify, "qwen2_5_vl") == ["chunks 0"] * 2


def test_a_tiny_config_is_narrow_and_keeps_its_levels() -> None:
    tiny = shrink(load_model_config("", {"model_type": "qwen3_vl"}))
    assert tiny.vision_config.depth == 2
    assert tiny.vision_config.out_hidden_size == tiny.text_config.hidden_size == 64
    assert tiny.image_token_id < tiny.text_config.vocab_size
    narrow = shrink(load_model_config("", {"model_type": "glm4v"})).text_config
    assert narrow.rope_parameters["mrope_section"] == [2, 2, 4]

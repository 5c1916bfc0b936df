"""Router losses: over the mesh, over tiles and in recomputation what transformers' are of the whole
batch at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.models.mixtral import modeling_mixtral

from helpers.families import LACKING
from helpers.material import as_toml
from helpers.meshes import DP2_SP2, SP2, SP4, mesh_of
from helpers.options import sections
from helpers.precision import keep_fp64, kept_in_fp64
from helpers.ranks import RankFailure, run_on_ranks
from helpers.rows import Row, local_batch, make_rows
from helpers.runs import Settings, logged, train
from helpers.training import Record, largest_difference, router_loss, train_plain, train_sharded
from test_library import real_model
from titan_ulysses import parallelize, shard
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.families import check_family

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,  # so large that it is seen
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mixtral": {"num_local_experts": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_num_shared_experts": 1},
    "gpt_oss": {
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
    },
}


def model_of(family: str) -> dict[str, Any]:
    return {**SMALL, "model_type": family, **FAMILIES[family]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- against transformers -------------------------------------------------------------------------

LENGTHS = {
    "whole": [(24,), (24,)],
    "packed": [(10, 13, 1), (6, 6, 12)],
}


def steps_of(lengths: str, accumulate: int) -> list[list[list[Row]]]:
    """Two steps; labels are masked, and not equally many in the accumulated batches, but tokens
    route all the same.
    """
    return [
        [
            make_rows(
                LENGTHS[lengths],
                masked=("uneven", "none")[batch],
                vocab_size=61,
                seed=10 * step + batch,
            )
            for batch in range(accumulate)
        ]
        for step in range(2)
    ]


CASES = [
    ("qwen3_moe", SP2, "packed", 2),
    ("qwen3_moe", DP2_SP2, "packed", 1),
    ("qwen3_moe", (2, 1, 2), "whole", 2),
    ("mixtral", SP2, "packed", 1),
    *([("ernie4_5_moe", SP2, "packed", 1)] if "ernie4_5_moe" not in LACKING else []),
    ("gpt_oss", SP4, "packed", 2),
]
# Each of their families and each of their meshes is above.
SLOW_CASES = [
    ("qwen3_moe", SP4, "whole", 1),
    ("mixtral", DP2_SP2, "whole", 2),
    ("gpt_oss", DP2_SP2, "whole", 1),
]
CASES += [pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES]


def differences(
    family: str, degrees: tuple[int, int, int], lengths: str, accumulate: int
) -> dict[str, float]:
    model, steps = model_of(family), steps_of(lengths, accumulate)
    ranks = degrees[0] * degrees[1] * degrees[2]
    found = run_on_ranks(
        ranks,
        kept_in_fp64,
        train_sharded,
        degrees,
        model,
        steps,
        torch.float64,
        checkpoint_every=0,
        attention="sdpa",
    )
    assert all(other.losses == found[0].losses for other in found)
    return largest_difference(found[0], kept_in_fp64(train_plain, model, steps, torch.float64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_in_fp64(case: tuple) -> None:
    """Losses, gradients, two AdamW steps."""
    worst = differences(*case)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


def test_the_loss_is_seen() -> None:
    model, steps = model_of("qwen3_moe"), steps_of("packed", 1)
    without = train_plain({**model, "output_router_logits": False}, steps, torch.float64)
    worst = largest_difference(train_plain(model, steps, torch.float64), without)
    assert worst["loss"] > 0.1 and worst["gradient of model.layers.0.mlp.gate.weight"] > 0.1


# --- one forward, one backward --------------------------------------------------------------------

Outcome = tuple[list[float], dict[str, Tensor]]
"""Losses, and the sums of their gradients."""


def sharded_model(
    family: str, degrees: tuple[int, int, int], *, has_router_loss: bool = True, **options
) -> PreTrainedModel:
    table = {**model_of(family), "output_router_logits": has_router_loss}
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float64)
    mesh = mesh_of(*degrees)
    parallelize(model, mesh, attention="sdpa", **sections(**options))
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=3)
    return model


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of what is trained: a router's correction is not."""
    trained = [(name, p) for name, p in hf.named_parameters(model) if p.requires_grad]
    return {name: p.grad.full_tensor().cpu() for name, p in trained}


def batch_of(degrees: tuple[int, int, int], lengths: str, seed: int) -> dict[str, Any]:
    batch = local_batch(
        make_rows(LENGTHS[lengths], masked="uneven", vocab_size=61, seed=seed), mesh_of(*degrees)
    )
    present = batch.inputs()
    return present | {"num_items_in_batch": torch.tensor(17)}


def outcome(
    family: str,
    degrees: tuple[int, int, int],
    *,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
    order: str = "aAbB",
    mode: Callable = nullcontext,
    **options,
) -> Outcome:
    """order: forward of batch a, its backward A, and so on. Everything of b counts three times."""
    model = sharded_model(family, degrees, **options)
    prepare(model)
    losses = {}
    with mode():
        for what in order:
            if what.islower():
                batch = batch_of(degrees, {"a": "packed", "b": "whole"}[what], seed=ord(what))
                losses[what] = (1 if what == "a" else 3) * model(**batch).loss
            else:
                losses[what.lower()].backward()
    return [losses["a"].item(), losses["b"].item()], gradients_of(model)


@lru_cache
def kept(family: str, mode: Callable = nullcontext) -> Outcome:
    """On two ranks, without checkpoints and tiles."""
    return run_on_ranks(2, outcome, family, SP2, checkpoint_every=0, mode=mode)[0]


def check_same(found: Outcome, expected: Outcome, tolerance: float) -> None:
    worst = largest_difference(
        *(Record(losses, [1.0], [gradients]) for losses, gradients in (found, expected))
    )
    assert max(worst.values()) <= tolerance, {k: v for k, v in worst.items() if v > tolerance}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("aAbB", marks=pytest.mark.slow),
        pytest.param("abBA", marks=pytest.mark.slow),
        "abAB",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_change_no_bit(family: str, order: str) -> None:
    """Nothing is counted twice, no gradient is lost, and several forwards may wait for their
    backward.
    """
    options = {"checkpoint_every": 1, "mlp_tile_tokens": -1, "order": order}
    found = run_on_ranks(2, outcome, family, SP2, **options)[0]
    check_same(found, kept(family), 0 if order == "aAbB" else 1e-15)


class _Tiled(torch.autograd.Function):
    """A function of tokens [B, T, h] by tiles: without gradient in forward, and again with it in
    backward.
    """

    @staticmethod
    def forward(
        ctx, function: Callable, size: int, context, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.function, ctx.size, ctx.context = function, size, context
        ctx.save_for_backward(x, *parameters)
        rows = x.flatten(0, 1).split(size)
        return torch.cat([function(tile[None])[0] for tile in rows]).view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, *parameters = ctx.saved_tensors
        sums, grads = [torch.zeros_like(p) for p in parameters], []
        tiles = zip(
            x.flatten(0, 1).split(ctx.size), upstream.flatten(0, 1).split(ctx.size), strict=True
        )
        for tile, grad in tiles:
            with torch.enable_grad():
                tile = tile.detach().requires_grad_()
                output = ctx.context.run(ctx.function, tile[None])[0]
            of_tile, *of_parameters = torch.autograd.grad(output, [tile, *parameters], grad)
            grads.append(of_tile)
            for total, one in zip(sums, of_parameters, strict=True):
                total += one
        return None, None, None, torch.cat(grads).view_as(x), *sums


def tile_mlps(model: PreTrainedModel, *, context: Callable = copy_context) -> None:
    for block in model.model.layers:
        mlp, forward = block.mlp, block.mlp.forward

        def tiled(x: Tensor, mlp: nn.Module = mlp, forward: Callable = forward) -> Tensor:
            return _Tiled.apply(forward, 5, context(), x, *mlp.parameters())

        mlp.forward = tiled


@pytest.mark.parametrize("order", ["aAbB", "abAB"])
@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_tiles_count_once_and_get_their_gradient(checkpoint_every: int, order: str) -> None:
    options = {
        "checkpoint_every": checkpoint_every,
        "mlp_tile_tokens": -1,
        "prepare": tile_mlps,
        "order": order,
    }
    found = run_on_ranks(2, outcome, "qwen3_moe", SP2, **options)[0]
    check_same(found, kept("qwen3_moe"), 1e-12)


@pytest.mark.parametrize(
    "checkpoint_every", [*(pytest.param(every, marks=pytest.mark.slow) for every in (0, 1)), 2]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_tiles(family: str, checkpoint_every: int) -> None:
    options = {
        "checkpoint_every": checkpoint_every,
        "mlp_tile_tokens": 5,
        "order": "abBA",
        "mode": keep_fp64,
    }
    found = run_on_ranks(2, outcome, family, SP2, **options)[0]
    check_same(found, kept(family, keep_fp64), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_compiled(checkpoint_every: int) -> None:
    """To 1e-6: fused kernels round the fp32 steps of norms otherwise."""
    options = {"checkpoint_every": checkpoint_every, "mlp_tile_tokens": 5, "compile": True}
    found = run_on_ranks(2, outcome, "qwen3_moe", SP2, timeout=300, **options)[0]
    check_same(found, kept("qwen3_moe"), 1e-6)


class _NoContext:
    @staticmethod
    def run(function: Callable, *args):
        return function(*args)


def tile_without_context(model: PreTrainedModel) -> None:
    tile_mlps(model, context=_NoContext)


def test_tiles_that_lose_the_context_of_their_forward_are_noticed() -> None:
    with pytest.raises(RankFailure, match="outside of its forward's context variables"):
        run_on_ranks(2, outcome, "qwen3_moe", SP2, prepare=tile_without_context, checkpoint_every=0)


# --- padding --------------------------------------------------------------------------------------

PADDED = [(23, 0), (9, 14), (14, 9), (1, 22)]
"""Tokens and padding of rows of 23, which no degree divides."""


def padded_rows(*, left: bool) -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (4, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.stack(
        [(torch.arange(23) >= pad) if left else (torch.arange(23) < n) for n, pad in PADDED]
    ).long()
    if left:
        ids = torch.stack([row.roll(pad) for row, (_, pad) in zip(ids, PADDED, strict=True)])
    return {
        "input_ids": ids * mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "attention_mask": mask,
    }


def of_padded(degrees: tuple[int, int, int], left: bool, tiled: bool) -> Outcome:
    mesh = mesh_of(*degrees)
    count = 4 // mesh.batch.size()
    mine = slice(mesh.batch.get_local_rank() * count, (mesh.batch.get_local_rank() + 1) * count)
    model = sharded_model("qwen3_moe", degrees, checkpoint_every=0)
    if tiled:
        tile_mlps(model)
    (batch,) = shard([{key: value[mine] for key, value in padded_rows(left=left).items()}], model)
    with nullcontext() if tiled else keep_fp64():
        loss = model(**batch).loss
        loss.backward()
    return [loss.item()], gradients_of(model)


def of_padded_plain() -> tuple[Outcome, float]:
    """With transformers' own masked loss in fp32 as well."""
    rows = padded_rows(left=False)
    table = hf.load_model_config("", model_of("qwen3_moe"))
    model = AutoModelForCausalLM.from_config(
        table, dtype=torch.float64, experts_implementation="batched_mm"
    )
    hf.initialize(model, seed=3)
    as_it_is = model(**rows).loss.item()
    with keep_fp64():
        output = model.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        logits = model.lm_head(output.last_hidden_state)[:, :-1].flatten(0, 1)
        labels = rows["labels"][:, 1:].flatten()
        cross_entropy = F.cross_entropy(logits, labels, ignore_index=-100)
        real = rows["attention_mask"].flatten().bool()
        loss = cross_entropy + router_loss(
            model, [tuple(logits[real] for logits in output.router_logits)]
        )
        loss.backward()
    return ([loss.item()], {name: p.grad for name, p in model.named_parameters()}), as_it_is


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    "degrees",
    [SP2, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (SP4, DP2_SP2))],
    ids=str,
)
def test_padding_is_not_routed(degrees: tuple[int, int, int], left: bool) -> None:
    expected, as_it_is = of_padded_plain()
    assert expected[0][0] == pytest.approx(as_it_is, rel=1e-6)
    check_same(
        run_on_ranks(degrees[1] * degrees[2], of_padded, degrees, left, False)[0], expected, 1e-12
    )


def test_padding_in_tiles() -> None:
    check_same(run_on_ranks(2, of_padded, SP2, False, True)[0], of_padded_plain()[0], 1e-6)


@pytest.mark.parametrize("stream", [-1, 16], ids=["whole", "streamed"])
def test_a_run_does_not_route_padding(stream: int, tmp_path: Path) -> None:
    """By train.py, a document in each sequence: what transformers gives with an attention mask."""
    texts = ["a" * 31, "some words", "more words of another kind", "x"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    table = {**model_of("qwen3_moe"), "vocab_size": 257, "eos_token_id": 256}
    real_model(table, dtype=torch.float32).save_pretrained(tmp_path / "start")
    settings: Settings = {
        "job.dump_folder": str(tmp_path),
        "model.path": str(tmp_path / "start"),
        "model.tokenizer": "bytes",
        "data.source": "jsonl",
        "data.path": str(tmp_path / "texts.jsonl"),
        "data.packing": "none",
        "training.seq_len": 32,
        "training.steps": 1,
        "training.param_dtype": "float32",
        "training.global_batch_size": len(texts),
        "training.local_batch_size": len(texts),
        "parallelism.sequence_parallel_degree": 2,
        "memory.stream_chunk_tokens": stream,
        "checkpoint.enable": False,
        "checkpoint.export": False,
    }
    (tmp_path / "run.toml").write_text(as_toml(settings))
    run_on_ranks(2, train, tmp_path / "run.toml", {})
    (line,) = logged(tmp_path / "run")

    documents = [torch.tensor([*text.encode(), 256]) for text in texts]
    padded = pad_sequence(documents, batch_first=True, padding_value=-100)
    mask = padded != -100
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    output = model(input_ids=padded * mask, attention_mask=mask.long(), labels=padded)
    output.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    expected = [output.aux_loss.item(), norm.item()]
    assert [line["router_loss"], line["grad_norm"]] == pytest.approx(expected, rel=1e-4)


# --- what else a forward may be asked for ---------------------------------------------------------


def logits_and_scores() -> None:
    """Neither has a router loss; nor has what is evaluated between a forward and its backward any
    effect on it.
    """
    model = sharded_model("qwen3_moe", SP2, checkpoint_every=0)
    batch = batch_of(SP2, "packed", seed=1)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    gradients = []
    for visits in (False, True):
        loss = model(**batch).loss
        if visits:
            with torch.no_grad():
                model(**batch), model(**batch, reduction="none"), model(**inputs)
        loss.backward()
        gradients.append(gradients_of(model))
        model.zero_grad()
    assert all(torch.equal(gradients[1][name], expected) for name, expected in gradients[0].items())
    model(**inputs).logits.square().sum().backward()
    by_logits = gradients_of(model)
    without = sharded_model("qwen3_moe", SP2, has_router_loss=False, checkpoint_every=0)
    without(**inputs).logits.square().sum().backward()
    assert all(
        torch.equal(by_logits[name], expected) for name, expected in gradients_of(without).items()
    )


def test_logits_and_scores() -> None:
    run_on_ranks(2, logits_and_scores)


def collectives() -> list[dict[str, int]]:
    """Of a forward with backward: of a model without the loss, and of one with it."""
    counts = []
    for has_router_loss in (False, True):
        model = sharded_model("qwen3_moe", SP2, has_router_loss=has_router_loss, checkpoint_every=0)
        with CollectiveCounter() as counter:
            model(**batch_of(SP2, "packed", seed=1)).loss.backward()
        counts.append({kind: calls for kind, (calls, _) in counter.counts.items()})
    return counts


def test_one_all_reduce_a_forward() -> None:
    without, with_loss = run_on_ranks(2, collectives)[0]
    assert with_loss == without | {"all_reduce": without["all_reduce"] + 1}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", "of which transformers has none for it"),
        ("deepseek_v3", "of which transformers has none for it"),
        ("doge", "of its own kind"),
    ],
)
def test_other_router_losses_are_refused_by_name(family: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        check_family(hf.load_model_config("", {"model_type": family, "output_router_logits": True}))
    assert f'model: "{family}" needs router losses (output_router_logits)' in str(caught.value)
    assert reason in str(caught.value)


def verdict(table: dict[str, Any]) -> str | None:
    if table["model_type"] == "odd_mixtral":
        AutoConfig.register("odd_mixtral", OddConfig, exist_ok=True)
        AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)
    try:
        parallelize(hf.build_on_meta(hf.load_model_config("", table), torch.float32), mesh_of(*SP2))
    except UserError as error:
        return str(error)
    return None


class OddConfig(MixtralConfig):
    model_type = "odd_mixtral"


class OddForCausalLM(MixtralForCausalLM):
    """Weighs its router loss in another way than it says."""

    config_class = OddConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 0.1 * output.aux_loss
        return output


load_balancing_loss_func = modeling_mixtral.load_balancing_loss_func
"""Where it is looked for: beside the class."""


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "granitemoe"])
def test_families_prove_their_router_loss(family: str) -> None:
    if family == "granitemoe" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip(
            "transformers 5.17 does not record granitemoe's router logits, so it fails itself"
        )
    experts = {"num_experts": 4, "num_local_experts": 4, "decoder_sparse_step": 1}
    table = {**SMALL, "model_type": family, **experts, "head_dim": 6, "eos_token_id": 2}
    assert run_on_ranks(2, verdict, table) == [None] * 2


def test_families_whose_router_loss_is_another_are_refused() -> None:
    (message, other) = run_on_ranks(
        2, verdict, {**model_of("mixtral"), "model_type": "odd_mixtral"}
    )
    assert message == other and "with its router loss, sharded against both rows at once" in message
    (message, other) = run_on_ranks(2, verdict, {**SMALL, "model_type": "jetmoe", "kv_channels": 8})
    assert message == other and "jetmoe" in message


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("phimoe", "its layers draw random numbers in training"),
        ("dory", "the sharded model lacks lm_head.logit_scale: its head does more"),
    ],
)
def test_families_are_verified_as_they_will_train(family: str, reason: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    table = {**SMALL, "model_type": family, "num_local_experts": 4, "output_router_logits": False}
    del table["head_dim"]
    first, second = run_on_ranks(2, verdict, table)
    assert first == second and reason in first

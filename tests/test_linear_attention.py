"""Layers that carry a state: whole models, sequence-parallel, against unmodified transformers on
each document alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.families import HYBRIDS, model_of
from helpers.meshes import DP2_SP2, ONE, SP2, SP4, mesh_of
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.training import Record, largest_difference, train_plain, train_sharded
from test_lora import add, add_by_peft, fill
from titan_ulysses import parallelize
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import freeze
from titan_ulysses.streaming.chunks import crosses
from titan_ulysses.ulysses import gated_deltanet, mamba2, states
from titan_ulysses.ulysses.heads import plan_heads
from titan_ulysses.ulysses.linear_attention import linear_layers
from titan_ulysses.ulysses.mixer import Share
from titan_ulysses.ulysses.states import DocumentPiece, pieces_of_row

SP3 = (1, 1, 3)
MESHES = {"one": ONE, "sp2": SP2, "sp3": SP3, "sp4": SP4, "dp2 x sp2": DP2_SP2}
KINDS = {"Gated DeltaNet": "qwen3_next", "Mamba-2": "granitemoehybrid", "convolution": "lfm2"}
# Two rows for each of two data-parallel ranks: documents of one token, borders on those of ranks,
# next to them and across them.
PACKED = [(24,), (10, 13, 1), (6, 6, 12), (1, 1, 21, 1)]
STEPS = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_of(micro_batches: int = 1):
    masks = ("none", "uneven")
    return [
        [
            make_rows(PACKED, masked=masks[micro], vocab_size=61, seed=10 * step + micro)
            for micro in range(micro_batches)
        ]
        for step in range(STEPS)
    ]


def worst_of(
    table: dict[str, Any],
    degrees,
    dtype: torch.dtype = torch.float64,
    *,
    micro_batches: int = 1,
    prepare=None,
    by_peft=None,
    fill=None,
    plain_table: dict[str, Any] | None = None,
    **options,
) -> dict[str, float]:
    """The largest differences between sharded and plain training."""
    steps, more = steps_of(micro_batches), {"prepare": prepare, "fill": fill}
    found = run_on_ranks(
        prod(degrees), kept_in_fp64, train_sharded, degrees, table, steps, dtype, **more, **options
    )[0]
    more["prepare"] = by_peft or prepare
    expected = kept_in_fp64(train_plain, plain_table or table, steps, dtype, **more)
    return largest_difference(found, expected)


def check(*args, bound: float = 1e-12, **kwargs) -> None:
    worst = worst_of(*args, **kwargs)
    assert max(worst.values()) < bound, {k: v for k, v in worst.items() if v >= bound}


def slow_but(cases, kept) -> list:
    """The cases, of which only those in `kept` always run."""
    slow = pytest.mark.slow
    return [
        x if x in kept else pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=slow)
        for x in cases
    ]


# --- every kind on every mesh ---------------------------------------------------------------------


# Gated DeltaNet on dp2 x sp2: test_router_loss; it and Mamba-2 on sp3: test_every_family.
ALWAYS = [("convolution", "sp3"), ("Mamba-2", "dp2 x sp2")]


@pytest.mark.parametrize(("kind", "mesh"), slow_but([*product(KINDS, MESHES)], ALWAYS))
def test_equals_one_plain_process(kind: str, mesh: str) -> None:
    """Losses, norms, every gradient and parameter, two AdamW steps, in fp64."""
    check(model_of(KINDS[kind]), MESHES[mesh])


OTHERS = [family for family in HYBRIDS if family not in KINDS.values()]


# bamba: its frozen parameters and adapters, below.
@pytest.mark.parametrize("family", slow_but(OTHERS, ["qwen3_5_moe_text", "nemotron_h"]))
def test_every_family(family: str) -> None:
    """Segments of two blocks, the last of several tiles smaller, on three ranks."""
    check(model_of(family), SP3, checkpoint_every=2, mlp_tile_tokens=5)


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2"])
def test_in_fp32(family: str) -> None:
    """The first step, of which nothing is divided by itself yet."""
    steps = steps_of()[:1]
    found = run_on_ranks(2, train_sharded, SP2, model_of(family), steps, torch.float32)[0]
    expected = train_plain(model_of(family), steps, torch.float32)
    found, expected = (Record(r.losses, r.grad_norms, r.gradients) for r in (found, expected))
    found.parameters = expected.parameters = {}
    assert max(largest_difference(found, expected).values()) < 1e-5


HEADS = {
    "2 of 1": ("qwen3_next", {"linear_num_key_heads": 1, "linear_num_value_heads": 2}),
    "5 of 1": ("qwen3_next", {"linear_num_key_heads": 1, "linear_num_value_heads": 5}),
    "9 of 3": ("olmo_hybrid", {"linear_num_key_heads": 3, "linear_num_value_heads": 9}),
    "2 of 2 groups": ("granitemoehybrid", {"mamba_n_heads": 2, "mamba_n_groups": 2}),
    "8 of 2 groups": ("falcon_h1", {"mamba_n_heads": 8, "mamba_n_groups": 2}),
    "no norm": ("falcon_h1", {"mamba_rms_norm": False}),
    "norm before gate": ("falcon_h1", {"mamba_norm_before_gate": True}),
    "biases": ("granitemoehybrid", {"mamba_proj_bias": True, "mamba_conv_bias": False}),
    "kernel of 7": ("lfm2", {"conv_L_cache": 7, "conv_bias": True}),  # more than a rank's tokens
}


@pytest.mark.parametrize("case", slow_but(HEADS, ["9 of 3", "2 of 2 groups", "kernel of 7"]))
def test_any_heads(case: str) -> None:
    """Four ranks: idle ones, heads that several ranks read, groups that begin inside a rank."""
    family, more = HEADS[case]
    check(model_of(family) | more, SP4)


# --- streamed -------------------------------------------------------------------------------------

STREAMED = [
    ("qwen3_next", "sp2", 8),
    ("olmo_hybrid", "sp4", 8),
    ("granitemoehybrid", "sp3", 9),
    ("falcon_h1", "sp2", 5),
    ("bamba", "one", 7),
    ("nemotron_h", "dp2 x sp2", 10),
    ("lfm2", "sp4", 4),  # a token a rank and chunk, where the convolution sees two before it
    ("lfm2_moe", "sp3", 20),
]
EVERY = [(family, mesh, 9) for family in HYBRIDS for mesh in MESHES]


ALWAYS_STREAMED = "olmo_hybrid", "falcon_h1", "lfm2"


@pytest.mark.parametrize(
    ("family", "mesh", "chunk"),
    [
        case if case[0] in ALWAYS_STREAMED else pytest.param(*case, marks=pytest.mark.slow)
        for case in STREAMED
    ],
)
def test_streamed(family: str, mesh: str, chunk: int) -> None:
    """The state passes from chunk to chunk, and its gradient from the last to the first."""
    every = {"checkpoint_every": 2, "mlp_tile_tokens": 3}
    check(model_of(family), MESHES[mesh], stream_chunk_tokens=chunk, **every)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh", "chunk"), EVERY)
def test_streamed_in_full(family: str, mesh: str, chunk: int) -> None:
    check(model_of(family), MESHES[mesh], stream_chunk_tokens=chunk)


# --- with other settings --------------------------------------------------------------------------

FROZEN = {
    "inside": ["*.A_log", "*.dt_bias", "*.conv1d.*"],
    "below": ["model.embed_tokens.*", "model.layers.0.*"],
}
SETTINGS = [
    {"checkpoint_every": 0},
    {"mlp_tile_tokens": -1, "loss_tile_tokens": -1, "offload": "host"},
    {"stream_chunk_tokens": 8, "offload": "disk", "checkpoint_every": 2},
    {"stream_chunk_tokens": 8, "stream_offload": "disk"},
    {"stream_chunk_tokens": 8, "keep_attention": "all", "offload": "host"},
]


@pytest.mark.parametrize(
    "options", slow_but(SETTINGS, SETTINGS[3:]), ids=lambda x: "-".join(map(str, x.values()))
)
@pytest.mark.parametrize("family", slow_but(["qwen3_next", "falcon_h1", "lfm2"], ["falcon_h1"]))
def test_other_settings(family: str, options: dict[str, Any]) -> None:
    # Several micro-batches: with what is kept on the host, and with adapters.
    micro_batches = 1 if "stream_offload" in options else 2
    check(model_of(family), SP2, micro_batches=micro_batches, **options)


FROZEN_CASES = [*product(["olmo_hybrid", "bamba"], FROZEN, [-1, 8])]


@pytest.mark.parametrize(
    ("family", "where", "chunk"),
    slow_but(FROZEN_CASES, [("olmo_hybrid", "inside", 8), ("bamba", "below", 8)]),
)
def test_frozen_parameters(family: str, where: str, chunk: int) -> None:
    """The state's gradient still flows where hidden states and parameters need none."""
    prepare = partial(freeze, patterns=FROZEN[where])
    check(model_of(family), SP2, prepare=prepare, stream_chunk_tokens=chunk)


@pytest.mark.parametrize("family", slow_but(["qwen3_5_text", "bamba", "lfm2"], ["bamba"]))
def test_adapters(family: str) -> None:
    """LoRA on the projections of linear layers too."""
    pytest.importorskip("peft")
    more = {"prepare": add, "by_peft": add_by_peft, "fill": fill}
    check(model_of(family), SP2, micro_batches=2, stream_chunk_tokens=8, **more)


def test_router_loss() -> None:
    table = model_of("qwen3_next") | {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    check(table, DP2_SP2, mlp_tile_tokens=3)


# --- what must show in a test ---------------------------------------------------------------------


def broken(what: str, family: str) -> Record:
    """Training with a mistake in the code."""
    with pytest.MonkeyPatch.context() as patch:
        if what == "state":  # leaks over the borders of documents
            patch.setattr(states, "pieces_of_row", _one_piece)
        else:  # channels of the convolution are taken in another order
            for kind in (gated_deltanet.GatedDeltaNet, mamba2.Mamba2):
                patch.setattr(kind, "local", _reversed(kind.local))
        return kept_in_fp64(train_sharded, SP2, model_of(family), steps_of()[:1], torch.float64)


def _one_piece(row: tuple[int, ...], start: int, stop: int) -> tuple[DocumentPiece, ...]:
    return (DocumentPiece(slice(0, stop - start), start),)


def _reversed(local):
    def reversed_local(self, heads) -> Share:
        share = local(self, heads)
        return share._replace(weight=share.weight.flip(0))

    return reversed_local


@pytest.mark.parametrize("what", ["state", "channels"])
@pytest.mark.parametrize("family", ["qwen3_next", "granitemoehybrid"])
def test_a_mistake_shows(family: str, what: str) -> None:
    """Far above any bound of the tests above."""
    expected = kept_in_fp64(train_plain, model_of(family), steps_of()[:1], torch.float64)
    found = run_on_ranks(2, broken, what, family)[0]
    assert largest_difference(found, expected)["loss"] > 1e-4


# --- bf16 -----------------------------------------------------------------------------------------


def outputs_in_bf16(family: str) -> tuple[Tensor, Tensor]:
    """Of the first layer, for one document: sharded on this rank, and unmodified."""
    mesh, table = mesh_of(*SP2), model_of(family)
    model = hf.build_on_meta(hf.load_model_config("", table), torch.bfloat16)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=1)
    hidden = torch.randn(1, 24, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    layer = linear_layers(model.get_submodule("model.layers.0"))[0]
    with torch.no_grad():
        whole = layer(hidden)
        parallelize(model, mesh)
        batch = local_batch(make_rows([(24,)], masked="none", vocab_size=61, seed=0), mesh)
        caught = []
        layer.register_forward_hook(lambda *args: caught.append(args), with_kwargs=True)
        model(**batch.inputs() | {"labels": None})
        (_, _, kwargs, _) = caught[0]
        model.get_submodule("model.layers.0").unshard()
        ours = layer.forward(mesh.local_slice(hidden, chunk_tokens=None), ulysses=kwargs["ulysses"])
    return ours, mesh.local_slice(whole, chunk_tokens=None)


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid", "nemotron_h", "lfm2"])
def test_outputs_in_bf16_are_the_same_bits(family: str) -> None:
    for ours, whole in run_on_ranks(2, outputs_in_bf16, family):
        assert ours.dtype == torch.bfloat16 and ours.equal(whole)


# --- what is sent ---------------------------------------------------------------------------------


def counted(family: str, degree: int, heads: dict[str, int]) -> list[tuple[int, int]]:
    """(calls, bytes) of the all-to-alls of a forward and of a backward of one linear layer."""
    mesh, table = mesh_of(1, 1, degree), model_of(family) | heads
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    parallelize(model, mesh, activation_checkpoint={"mode": "none"})
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=1)
    layer = linear_layers(model.get_submodule("model.layers.0"))[0]
    counts = []

    def count(forward, **kwargs) -> Tensor:
        with CollectiveCounter() as counter:
            output = forward(**kwargs)
        counts.append(counter.counts["all_to_all"])
        return _Counted.apply(output, counts)

    layer.forward = partial(count, layer.forward)
    batch = local_batch(make_rows([(24,)], masked="none", vocab_size=61, seed=0), mesh)
    with CollectiveCounter() as counter:
        loss = model(**batch.inputs(), num_items_in_batch=torch.tensor(23)).loss
        forward = counter.counts["all_to_all"]
        loss.backward()
    total = counter.counts["all_to_all"]
    return [counts[0], (total[0] - forward[0], total[1] - forward[1])]


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, counts: list) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


BYTES = {
    "Gated DeltaNet": ("olmo_hybrid", {}, (8, 6), (2, 2)),
    "Mamba-2": ("bamba", {}, (5, 8), (2, 1)),
}


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("kind", BYTES)
def test_bytes_of_the_exchanges(kind: str, degree: int) -> None:
    """The closed form of linear_attention.py, with what stays on the rank."""
    family, heads, (of_key, of_value), (keys, scalars) = BYTES[kind]
    plan, tokens = plan_heads(6, 3, degree), 24 // degree
    for rank, ((calls, size), _) in enumerate(run_on_ranks(degree, counted, family, degree, heads)):
        widths = [
            keys * of_key * len(plan.key_value[r]) + (of_value + scalars) * len(plan.query[r])
            for r in range(degree)
        ]
        back = 24 * of_value * len(plan.query[rank])
        assert (calls, size) == (2, 4 * (tokens * sum(widths) + back))


def test_a_convolution_sends_only_the_tokens_before() -> None:
    """K - 1 = 2 tokens to the next rank, and their gradients back; nothing from the last rank."""
    found = run_on_ranks(4, counted, "lfm2", 4, {})
    hidden = 24 * 4  # bytes of a token
    assert [forward for forward, _ in found] == [(1, 2 * hidden)] * 3 + [(1, 2 * hidden)]


# --- documents ------------------------------------------------------------------------------------


def test_parts_of_documents() -> None:
    row = (4, 16, 4)
    assert pieces_of_row(row, 0, 24) == (
        DocumentPiece(slice(0, 4), 0),
        DocumentPiece(slice(4, 20), 0),
        DocumentPiece(slice(20, 24), 0),
    )
    assert pieces_of_row(row, 6, 20) == (DocumentPiece(slice(0, 14), 2),)
    assert pieces_of_row(row, 2, 5) == (
        DocumentPiece(slice(0, 2), 2),
        DocumentPiece(slice(2, 3), 0),
    )
    assert pieces_of_row((1, 0, 1), 0, 2) == (
        DocumentPiece(slice(0, 1), 0),
        DocumentPiece(slice(1, 2), 0),
    )
    borders = [place for place in range(25) if not crosses((row,), place)]
    assert borders == [0, 4, 20, 24]
    assert crosses((row, (24,)), 4)


# --- families that must prove themselves ----------------------------------------------------------


def proves_itself(family: str, keys: dict[str, Any]) -> int:
    """The chunks with which a family trains that nobody has checked."""
    table = model_of(family) | keys
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_ulysses.ulysses.linear_attention._TESTED", {})
        parallelize(model, mesh_of(*SP2), memory={"mlp_tile_tokens": 7})
    return model.sharding.stream_chunk_tokens


LARGE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"hidden_size": 128, "linear_num_key_heads": 8, "linear_num_value_heads": 16},
    "bamba": {"hidden_size": 128, "mamba_n_heads": 16, "num_hidden_layers": 6},
    "nemotron_h": {"hidden_size": 128, "mamba_num_heads": 16, "n_groups": 8},
    "lfm2": {"hidden_size": 128},
}
LARGE["bamba"] |= {"attn_layer_indices": [2, 5], "mamba_n_groups": 4}


@pytest.mark.parametrize("family", LARGE)
def test_layers_of_another_version_are_verified_first(family: str) -> None:
    """Sharded against whole, as a tiny model, and chunk by chunk."""
    for chunk_tokens in run_on_ranks(2, proves_itself, family, LARGE[family]):
        assert chunk_tokens == 0


def test_a_mistake_is_found_by_the_proof() -> None:
    for message in run_on_ranks(2, refusal_with_a_mistake):
        assert '"qwen3_next" is not a family that is known to train exactly' in message
        assert "is off by" in message


def refusal_with_a_mistake() -> str:
    model = hf.build_on_meta(hf.load_model_config("", model_of("qwen3_next")), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_ulysses.ulysses.linear_attention._TESTED", {})
        patch.setattr(states, "pieces_of_row", _one_piece)
        with pytest.raises(UserError) as caught:
            parallelize(model, mesh_of(*SP2))
    return str(caught.value)


# --- what is refused ------------------------------------------------------------------------------


def refusal_of(table: dict[str, Any]) -> str:
    built = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    with pytest.raises(UserError) as caught:
        parallelize(built, mesh_of(*ONE))
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "name"),
    [("mamba", "MambaBlock (MambaMixer)"), ("minimax", "MiniMaxDecoderLayer (MiniMaxLightning")],
)
def test_unknown_kinds_are_refused_by_name(family: str, name: str) -> None:
    (message,) = run_on_ranks(1, refusal_of, {"model_type": family, **_SMALL})
    assert f"model: {name}" in message and "linear_attention" in message
    assert "Gated DeltaNet, Mamba-2 and short convolutions" in message


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 64}
_SMALL |= {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2}


def refusal_without_keywords() -> str:
    """Of a decoder that does not hand its keywords to a layer, as lfm2's of transformers 5.17."""
    mesh = mesh_of(*ONE)
    model = hf.build_on_meta(hf.load_model_config("", model_of("lfm2")), torch.float32)
    parallelize(model, mesh, activation_checkpoint={"mode": "none"})
    hf.allocate(model, mesh.device)
    layer = linear_layers(model.get_submodule("model.layers.0"))[0]
    layer.forward = partial(_without_keywords, layer.forward)
    batch = local_batch(make_rows([(24,)], masked="none", vocab_size=61, seed=0), mesh)
    with pytest.raises(UserError) as caught:
        model(**batch.inputs(), num_items_in_batch=torch.tensor(23))
    return str(caught.value)


def _without_keywords(forward, hidden_states: Tensor, **_: Any) -> Tensor:
    return forward(hidden_states)


def test_a_decoder_that_keeps_its_keywords_is_refused() -> None:
    (message,) = run_on_ranks(1, refusal_without_keywords)
    assert message.startswith("model: Lfm2ShortConv does not receive the documents and ranks")
    assert "Install a newer one" in message

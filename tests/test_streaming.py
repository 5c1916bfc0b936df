"""Streaming: blocks that work through the sequence chunk by chunk train as one plain process does,
on every mesh, whatever the chunks, the documents, the family and the other settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from math import gcd, prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.families import FAMILIES, model_of
from helpers.material import BASE, MODEL
from helpers.meshes import DP2_SP2, ONE, SP2, SP4, mesh_of
from helpers.models import LLAMA, STARCODER2
from helpers.options import sections
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.training import (
    OPTIMIZER,
    Record,
    Run,
    largest_difference,
    train_plain,
    train_sharded,
)
from test_lora import add, add_by_peft, fill
from test_pieces import use_operators
from test_rope import BOUND as ROPE_BOUND
from test_rope import MODELS as ROPE_MODELS
from test_router import gradients_of, padded_rows, sharded_model
from test_router import model_of as router_model
from titan_ulysses import local_slice, parallelize, score, shard
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import (
    AUTOMATIC_CHUNK_TOKENS,
    chunk_length,
    chunks_of,
    join_slices,
)
from titan_ulysses.distributed.sequence import local_slice as slice_of
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import freeze
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.streaming.attention import visible_keys
from titan_ulysses.train.step import train_step
from titan_ulysses.ulysses import pieces
from titan_ulysses.ulysses.cores import sdpa
from titan_ulysses.ulysses.flash_cuda import CUDA_FLASH
from titan_ulysses.ulysses.pieces import pieces_of
from titan_ulysses.ulysses.scores import PieceKernels

pytestmark = pytest.mark.cuda(slow=True)
STANDINS = pytest.mark.cuda(never="its stand-ins of CUDA's operators are of the CPU")
SP3 = (1, 1, 3)
MESHES = {"one": ONE, "sp2": SP2, "sp3": SP3, "sp4": SP4, "dp2 x sp2": DP2_SP2}
# Two rows of 24 tokens for each of two data-parallel ranks. Chunks of 12 are exactly one document
# or two of them, with borders on theirs; others hold the end of one document, whole ones, and the
# beginning of the next.
PACKED = [(24,), (10, 13, 1), (6, 6, 12), (1, 1, 21, 1)]
DOCUMENTS = {"packed": PACKED, "whole": [(24,)] * 4, "exact": [(12, 12)] * 4, "one row": [(24,)]}
# The last chunk of 20 is smaller; 5 and 7 are rounded up to a multiple of P.
CHUNKS = (12, 20, 5, 7)
# The second one begins with what the first one has left: parameters, moments, stores.
STEPS = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_of(documents: str, micro_batches: int = 1):
    return [
        [
            make_rows(
                DOCUMENTS[documents],
                # Not the first batch: only labels show what later chunks compute.
                masked="uneven" if micro else "none",
                vocab_size=61,
                seed=10 * step + micro,
            )
            for micro in range(micro_batches)
        ]
        for step in range(STEPS)
    ]


def table_of(model: str | tuple) -> dict[str, Any]:
    """A family's name, or the heads of a starcoder2: (query heads, KV heads)."""
    if isinstance(model, str):
        return STARCODER2 if model == "starcoder2" else model_of(model)
    queries, keys = model
    return STARCODER2 | {
        "hidden_size": 8 * queries,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
    }


@lru_cache
def plain(model: str | tuple, documents: str, micro_batches: int = 1) -> Record:
    steps = steps_of(documents, micro_batches)
    return kept_in_fp64(train_plain, table_of(model), steps, torch.float64)


def check(
    model: str | tuple, degrees, documents: str, chunk: int, micro_batches: int = 1, **options
) -> None:
    """Streamed training equals plain training: losses, gradients, norms, parameters."""
    found = run_on_ranks(
        prod(degrees),
        kept_in_fp64,
        train_sharded,
        degrees,
        table_of(model),
        steps_of(documents, micro_batches),
        torch.float64,
        stream_chunk_tokens=chunk,
        **options,
    )[0]
    worst = largest_difference(found, plain(model, documents, micro_batches))
    bound = 5e-12 if model == "gemma4_text" else 1e-12
    assert max(worst.values()) < bound, {k: v for k, v in worst.items() if v >= bound}


# --- chunks, documents, meshes --------------------------------------------------------------------


def _cases() -> Iterator:
    """All on every mesh; in CI every mesh, kind of documents and chunk with each of the others."""
    for i, mesh in enumerate(MESHES):
        for j, documents in enumerate(("packed", "whole", "exact")):
            for n, chunk in enumerate(CHUNKS):
                marks = [] if n == (i + j) % 4 and (i < 4 or j < 2) else [pytest.mark.slow]
                yield pytest.param(
                    mesh, documents, chunk, marks=marks, id=f"{mesh}-{documents}-{chunk}"
                )


@pytest.mark.parametrize(("mesh", "documents", "chunk"), list(_cases()))
def test_equals_one_plain_process(mesh: str, documents: str, chunk: int) -> None:
    check("starcoder2", MESHES[mesh], documents, chunk)


# Heads that P does not divide: a rank computes parts of the queries of a head, and of each of them
# on its own where there are more ranks than heads.
# Fewer heads than ranks: through train.py, below. One KV head: the test after this one.
SLOW_HEADS = [(5, 1), (2, 2), (14, 2), (3, 1), (2, 1), (1, 1), (7, 7)]
HEADS = [(9, 3)] + [pytest.param(h, marks=pytest.mark.slow) for h in SLOW_HEADS]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]} of {heads[1]}")
def test_any_head_count(heads: tuple[int, int]) -> None:
    check(heads, SP4, "packed", 8)


@pytest.mark.parametrize("heads", [(3, 1), pytest.param((9, 3), marks=pytest.mark.slow)], ids=str)
def test_any_head_count_with_data_parallel_ranks(heads: tuple[int, int]) -> None:
    check(heads, DP2_SP2, "packed", 8, 2, keep_attention="all", checkpoint_every=2, offload="host")


# --- families -------------------------------------------------------------------------------------

# Those with something of their own: windows and soft-caps, sinks, chunks and temperatures, each of
# them by parts, of 6 query heads and 2 KV heads on 3 or 4 ranks; latent attention, an argument with
# gradients beside the hidden states, experts.
IN_CI = {
    "gemma2": "sp3",
    "gpt_oss": "sp4",
    "llama4_text": "sp3",
    "deepseek_v3": "one",
    "gemma4_text": "sp2",
    "qwen3_moe": "dp2 x sp2",
}
# tests/test_sparse.py streams those with indexers. Here two of their scores are equal, zero in all
# heads, and which key is then read is not defined.
WITHOUT_INDEXER = [name for name in FAMILIES if "index_topk" not in FAMILIES[name]]
SLOW_CASES = [(family, mesh) for family in WITHOUT_INDEXER for mesh in MESHES]


@pytest.mark.parametrize(("family", "mesh"), [x for x in IN_CI.items() if x[0] in FAMILIES])
def test_families_of_every_kind(family: str, mesh: str) -> None:
    check(family, MESHES[mesh], "packed", 9, checkpoint_every=2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), SLOW_CASES)
def test_families(family: str, mesh: str) -> None:
    check(family, MESHES[mesh], "packed", 9, checkpoint_every=2)


# --- windows by the operators of CUDA -------------------------------------------------------------


def train_by_operators(flash: str, *args, **options) -> Record:
    """With stand-ins for them, by the rules of one FlashAttention."""
    with pytest.MonkeyPatch.context() as patch:
        use_operators(flash, patch.setattr)
        patch.setattr(pieces, "_best", lambda q, softcap: CUDA_FLASH)
        return train_sharded(*args, **options)


@STANDINS
@pytest.mark.parametrize("flash", ["fa2", "fa3"])
def test_windows_of_packed_documents(flash: str) -> None:
    """Documents that begin a few keys before a chunk with many more queries."""
    table = STARCODER2 | {"sliding_window": 12}
    steps = [
        [make_rows([documents], masked="none", vocab_size=61, seed=step)]
        for step, documents in enumerate([(11, 53), (30, 34), (5, 24, 35)])
    ]
    arguments = ONE, table, steps, torch.float64
    found = run_on_ranks(1, train_by_operators, flash, *arguments, stream_chunk_tokens=16)[0]
    worst = largest_difference(found, train_plain(*arguments[1:]))
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


# --- other settings -------------------------------------------------------------------------------

Table = dict[str, Any]


def check_table(
    table: Table,
    degrees,
    *,
    prepare=None,
    fill=None,
    by_peft=None,
    micro_batches=1,
    documents="packed",
    **options,
) -> None:
    """The same of any model, each of whose micro-batches has other rows."""
    steps = steps_of(documents, micro_batches)
    more = {"prepare": prepare, "fill": fill}
    found = run_on_ranks(
        prod(degrees),
        kept_in_fp64,
        train_sharded,
        degrees,
        table,
        steps,
        torch.float64,
        **more,
        **options,
    )[0]
    expected = kept_in_fp64(
        train_plain, table, steps, torch.float64, **more | {"prepare": by_peft or prepare}
    )
    worst = largest_difference(found, expected)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


ROPES = [("dynamic", "none"), ("longrope", "host")]
ROPES += [pytest.param("dynamic", "host", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "offload"), ROPES)
@pytest.mark.parametrize("degrees", [pytest.param(SP2, marks=pytest.mark.slow), DP2_SP2], ids=str)
def test_rope_by_document_length(degrees, name: str, offload: str) -> None:
    """Longer and shorter documents than the bound, which begin and end inside of chunks."""
    table = ROPE_MODELS[name] | {"max_position_embeddings": ROPE_BOUND}
    check_table(table, degrees, stream_chunk_tokens=8, stream_offload=offload)


FROZEN = [["model.embed_tokens.*", "model.layers.0.*"], ["*.k_proj.*", "*.mlp.c_fc.*"]]


@pytest.mark.parametrize("patterns", FROZEN, ids=["below", "inside"])
def test_frozen_parameters(patterns: list[str]) -> None:
    untied = STARCODER2 | {"tie_word_embeddings": False}
    check_table(untied, SP2, prepare=partial(freeze, patterns=patterns), stream_chunk_tokens=8)


def test_lora_and_biases() -> None:
    pytest.importorskip("peft")
    more = {"checkpoint_every": 2, "offload": "host", "stream_chunk_tokens": 8}
    table = STARCODER2 | {"use_bias": True}
    check_table(table, SP2, prepare=add, by_peft=add_by_peft, fill=fill, micro_batches=2, **more)


PAIRS = [
    {"checkpoint_every": 2, "offload": "disk", "mlp_tile_tokens": 3},
    {"offload": "host", "mlp_tile_tokens": -1, "loss_tile_tokens": -1},
    {"keep_attention": "all", "checkpoint_every": 2, "offload": "host"},
    {"keep_attention": "auto", "offload": "disk", "mlp_tile_tokens": 3},
    {"stream_offload": "disk", "checkpoint_every": 2, "mlp_tile_tokens": -1},
    {"stream_offload": "host", "keep_attention": "all", "offload": "host", "mlp_tile_tokens": 3},
]
# Each of them is in a pair above.
SLOW_PAIRS = [
    {"checkpoint_every": 2, "mlp_tile_tokens": -1, "attention": "sdpa"},
    {"keep_attention": "all"},
    {"stream_offload": "disk"},
]
PAIRS += [pytest.param(options, marks=pytest.mark.slow) for options in SLOW_PAIRS]
BATCHES = [pytest.param(1, marks=pytest.mark.slow), 2]


@pytest.mark.parametrize("options", PAIRS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("micro_batches", BATCHES)
def test_other_settings(options: dict[str, Any], micro_batches: int) -> None:
    check("starcoder2", SP2, "packed", 8, micro_batches, **options)


@pytest.mark.slow
def test_compiled() -> None:
    check("starcoder2", SP2, "packed", 8, compile=True)


@pytest.mark.parametrize("degrees", [pytest.param(SP2, marks=pytest.mark.slow), DP2_SP2], ids=str)
def test_router_loss(degrees) -> None:
    """Over all tokens of a batch, which its routers see chunk by chunk."""
    check_table(router_model("qwen3_moe"), degrees, stream_chunk_tokens=8, mlp_tile_tokens=3)


def of_padded_rows(stream_chunk_tokens: int, left: bool) -> tuple[float, dict[str, Tensor]]:
    model = sharded_model("qwen3_moe", SP2, stream_chunk_tokens=stream_chunk_tokens)
    for batch in shard([padded_rows(left=left)], model):
        loss = model(**batch).loss
        loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_is_not_routed(left: bool) -> None:
    (loss, gradients), *_ = run_on_ranks(2, kept_in_fp64, of_padded_rows, 8, left)
    (whole, expected), *_ = run_on_ranks(2, kept_in_fp64, of_padded_rows, -1, left)
    assert loss == pytest.approx(whole, rel=1e-12)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name


# --- random numbers -------------------------------------------------------------------------------


def slope_of_dropout(every: int) -> tuple[float, float, float]:
    """Along a direction, with the same random numbers: the gradient's slope, the loss's; what
    dropout does to the loss.
    """
    table = STARCODER2 | {"residual_dropout": 0.2}
    wrap = {"stream_chunk_tokens": 8, "checkpoint_every": every, "mlp_tile_tokens": 3}
    run = Run(SP2, table, make_rows([(24,)], masked="none", vocab_size=61, seed=1), wrap=wrap)
    batch = local_batch(run.rows, run.mesh, 8).inputs()
    parameters = list(run.model.parameters())

    def loss() -> Tensor:
        torch.manual_seed(torch.distributed.get_rank())
        return run.model(**batch, num_items_in_batch=torch.tensor(23)).loss

    run.model.train()
    loss().backward()
    torch.manual_seed(0)
    steps = [torch.randn_like(p.to_local()) for p in parameters]
    pairs = zip(parameters, steps, strict=True)
    slope = sum((p.grad.to_local() * step).sum() for p, step in pairs)
    torch.distributed.all_reduce(slope)
    values = []
    with torch.no_grad():
        for size in (1e-5, -2e-5, 1e-5):
            for p, step in zip(parameters, steps, strict=True):
                p.to_local().add_(step, alpha=size)
            values.append(loss().item())
    run.model.eval()
    return slope.item(), (values[0] - values[1]) / 2e-5, loss().item() - values[2]


@pytest.mark.parametrize("every", [1, 2])
def test_random_numbers_are_replayed(every: int) -> None:
    slope, expected, effect = run_on_ranks(2, slope_of_dropout, every)[0]
    assert slope == pytest.approx(expected, rel=1e-6) and abs(effect) > 1e-3


# --- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "degree"), [(-1, 3), (0, 2), (5, 1), (5, 2), (7, 4), (99, 2)])
def test_slices_join_to_the_whole(setting: int, degree: int) -> None:
    whole = torch.arange(2 * 24).view(2, 24)
    chunk = chunk_length(setting, 24, degree)
    assert chunk == {(5, 1): 5, (5, 2): 6, (7, 4): 8}.get((setting, degree))
    slices = [slice_of(whole, rank=r, degree=degree, chunk_tokens=chunk) for r in range(degree)]
    assert join_slices(slices, chunk_tokens=chunk).equal(whole)
    if chunk is None:
        assert slices[-1].equal(whole[:, -24 // degree :])
        assert slices[-1].data_ptr() == whole[:, -24 // degree :].data_ptr()
    for of_chunk in chunks_of(24, degree, chunk):
        parts = [part[:, of_chunk.local] for part in slices]
        assert torch.cat(parts, dim=1).equal(whole[:, of_chunk.whole])


def test_the_automatic_choice_leaves_short_sequences_whole() -> None:
    most = AUTOMATIC_CHUNK_TOKENS
    assert chunk_length(0, 2 * most, 2) is None and chunk_length(0, 2 * most + 2, 2) == 2 * most


# --- what it costs --------------------------------------------------------------------------------


def counted(
    chunk: int, every: int, layers: int, keep: str, *, degrees=SP2, heads=(6, 2), rows=((24,),)
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Calls of the second step: of MLPs, attention forward and backward; and (calls, bytes) of
    collectives.
    """
    mesh, calls = mesh_of(*degrees), dict.fromkeys(("mlp", "forward", "backward"), 0)
    kernels = pieces_of(sdpa)

    def core(*_, **__) -> Tensor:
        raise AssertionError("the whole sequence at once")

    def counting(name: str):
        def run(*args, **options):
            calls[name] += 1
            return getattr(kernels, name)(*args, **options)

        return run

    core.pieces = PieceKernels(counting("forward"), counting("backward"))
    table = LLAMA | {"num_hidden_layers": layers, "tie_word_embeddings": False}
    table |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    table["hidden_size"] = 8 * heads[0]
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: calls.update(mlp=calls["mlp"] + 1))
    checkpoints = {"every": every, "keep_attention": keep}
    memory = {"mlp_tile_tokens": 1000, "stream_chunk_tokens": chunk}
    parallelize(model, mesh, attention=core, activation_checkpoint=checkpoints, memory=memory)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer = build_optimizer(model, OPTIMIZER)
    packed = make_rows([*rows], masked="none", vocab_size=61, seed=0)
    batch = local_batch(packed, mesh, chunk).to(mesh.device)
    for _ in range(2):
        calls.update(dict.fromkeys(calls, 0))
        with CollectiveCounter() as counter:
            train_step(model, optimizer, [batch], mesh, max_norm=1.0)
    return calls, dict(counter.counts)


SEGMENTS = [(1, 2, "none"), (2, 4, "all"), (3, 4, "none"), (3, 4, "all")]
OTHER_SEGMENTS = [(1, 2, "all"), (2, 4, "none")]


@pytest.mark.parametrize(
    ("every", "layers", "keep"),
    [*SEGMENTS, *(pytest.param(*x, marks=pytest.mark.slow) for x in OTHER_SEGMENTS)],
)
@pytest.mark.parametrize(
    ("chunk", "chunks"), [pytest.param(12, 2, marks=pytest.mark.slow), (10, 3)]
)
def test_how_often_things_run(chunk: int, chunks: int, every: int, layers: int, keep: str) -> None:
    """The closed forms of streaming/__init__.py, with n segments of L layers."""
    segments = -(-layers // every)
    calls, counts = run_on_ranks(2, counted, chunk, every, layers, keep)[0]
    collectives = {kind: number for kind, (number, _) in counts.items()}
    forwards = (3 * layers - segments) * chunks
    attended = layers * chunks if keep == "all" else forwards
    assert calls == {"mlp": forwards, "forward": attended, "backward": layers * chunks}
    assert collectives["all_to_all"] == 2 * forwards + layers * (2 * chunks + chunks - 1)
    # Besides the blocks: embedding and head are gathered once, and the root with the last norm.
    assert collectives["reduce_scatter"] == layers + 3
    assert collectives["all_gather"] == 2 * layers + 4


@pytest.mark.parametrize(
    ("degree", "heads"),
    [
        (2, (6, 2)),
        (4, (9, 3)),
        # On fewer heads than ranks (4, (9, 3)) has all terms of the closed form, too.
        *(pytest.param(4, heads, marks=pytest.mark.slow) for heads in [(2, 1), (5, 1)]),
    ],
    ids=str,
)
def test_what_travels(degree: int, heads: tuple[int, int]) -> None:
    """The closed form of streaming/attention.py, in bytes that a rank gives to all-to-alls."""
    length, chunk, size, rows = 24, 8, LLAMA["head_dim"], 2
    arguments = {"degrees": (1, 1, degree), "heads": heads, "rows": ((24,), (10, 13, 1))}
    ranks = run_on_ranks(degree, partial(counted, **arguments), chunk, 1, 2, "none")
    queries, keys = heads
    sent = degree + keys - gcd(degree, keys)  # KV heads, to all ranks together
    for rank, (_, counts) in enumerate(ranks):
        held = -(-(rank + 1) * keys // degree) - rank * keys // degree
        own, last = length // degree, chunk // degree  # tokens of this rank
        forward = own * (queries + 2 * sent) + own * queries
        again = (own - last) * 2 * sent + own * queries + last * 2 * sent + own * queries
        gradients = own * queries + (own * queries + length * 2 * held)
        numbers = 2 * rows * size * (forward + again + gradients)  # of two layers
        assert counts["all_to_all"] == (2 * (2 * 3 * 2 + 3 * 3 - 1), 4 * numbers)


class KeyTensors(TorchDispatchMode):
    """The most tokens of a tensor of these KV heads that was made, and the sum of those alive."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.heads, self.tokens = (heads, size), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2:] == self.heads:
                self.tokens = max(self.tokens, x.shape[1])
        return out


def held_tokens(window: int | None, rows: list[tuple[int, ...]]) -> int:
    """The most tokens whose keys a layer holds, in a whole step of chunks of 8 tokens."""
    # A head size that no other tensor has.
    table = {**model_of("mistral"), "sliding_window": window, "head_dim": 10}
    run = Run(
        SP2,
        table,
        make_rows(rows, masked="none", vocab_size=61, seed=0),
        wrap={"stream_chunk_tokens": 8, "mlp_tile_tokens": 8, "loss_tile_tokens": 8},
    )
    with KeyTensors(1, 10) as keys:
        run.train(1)
    return keys.tokens


@pytest.mark.parametrize("length", [32, pytest.param(192, marks=pytest.mark.slow)])
def test_keys_that_nothing_reads_any_more_are_not_held(length: int) -> None:
    """Behind a window, and of documents that are over: whole chunks of them are forgotten, forward
    and backward, whatever the length.
    """
    cases = {
        (None, (length,)): length,
        (5, (length,)): 16,  # a chunk, and the one that holds the 4 keys before it
        (9, (length,)): 16,
        (10, (length,)): 24,
        (None, (20,) * (length // 20) + (length % 20,)): 24,  # across up to three chunks
        (None, (8,) * (length // 8)): 8,
    }
    for (window, row), most in cases.items():
        assert run_on_ranks(2, held_tokens, window, [row]) == [most] * 2, (window, row)


# Smaller than a chunk: gemma2 and gpt_oss in test_families_of_every_kind.
WINDOWS = [
    pytest.param(3, id="window", marks=pytest.mark.slow),
    pytest.param(11, id="wide"),
    pytest.param(20, id="huge", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "mesh", ["sp4", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("sp2", "one"))]
)
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_across_chunks(mesh: str, window: int) -> None:
    """Smaller than a chunk, across two of them, and across most; documents are longer."""
    table = STARCODER2 | {"sliding_window": window}
    check_table(table, MESHES[mesh], stream_chunk_tokens=4, documents="one row")


def test_keys_that_a_window_hides_are_not_touched() -> None:
    documents = (4, 16, 4)
    assert visible_keys(documents, 12, 18, None) == (slice(4, 18), (6,), (14,))
    assert visible_keys(documents, 12, 18, 3) == (slice(10, 18), (6,), (8,))
    assert visible_keys(documents, 12, 18, 30) == (slice(4, 18), (6,), (14,))
    assert visible_keys(documents, 18, 24, 3) == (slice(16, 24), (2, 4), (4, 4))
    assert visible_keys(documents, 4, 20, 3) == (slice(4, 20), (16,), (16,))
    assert visible_keys((1, 0, 1, 22), 0, 6, None) == (slice(0, 6), (1, 0, 1, 4), (1, 0, 1, 4))


# --- train.py -------------------------------------------------------------------------------------


def test_more_ranks_than_heads_through_train_py(observe) -> None:
    """Two query heads and one KV head on four ranks train as on one, and none of them is idle.
    Each has no queries of one of the heads, of which nothing is kept.
    """
    model = MODEL | {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = BASE | {"model.config": model}
    settings = base | {"parallelism.sequence_parallel_degree": 4}
    one = observe(base | {"memory.stream_chunk_tokens": "off"})
    kept = {"activation_checkpoint.keep_attention": "all", "activation_checkpoint.offload": "disk"}
    streamed = observe(settings | kept | {"memory.stream_chunk_tokens": 8}, ranks=4)
    whole = observe(settings | {"memory.stream_chunk_tokens": "off"}, ranks=4)
    assert len(one.of_steps("loss")) > 1 and not streamed.refused
    for metric in ("loss", "grad_norm"):
        assert streamed.of_steps(metric) == pytest.approx(one.of_steps(metric), rel=1e-5)
    assert "streamed: 4 chunks of 8 tokens, 2 a rank" in streamed.said
    idle = "2 of 4 sequence-parallel ranks have no attention head"
    assert idle in whole.said and idle not in streamed.said


def test_a_chunk_that_rounds_up_to_the_whole_sequence_through_train_py(observe) -> None:
    settings = BASE | {"parallelism.sequence_parallel_degree": 2}
    whole = observe(settings | {"memory.stream_chunk_tokens": "off"}, ranks=2)
    rounded = observe(settings | {"memory.stream_chunk_tokens": 31}, ranks=2)
    assert not rounded.refused and rounded.of_steps("loss") == whole.of_steps("loss")
    assert "= 31, rounded up for 2 ranks, is not less than training.seq_len = 32" in rounded.said


def test_rope_by_document_length_through_train_py(observe, tmp_path) -> None:
    """A document longer than `max_position_embeddings`, and one that is not."""
    ids = [[(7 * i + n) % 256 for i in range(n)] for n in (400, 240)]
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in ids * 4))
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    model = MODEL | {"max_position_embeddings": 256, "rope_parameters": rope}
    data = {"data.source": "tokens", "data.path": str(path), "training.seq_len": 640}
    base = BASE | {"model.config": model} | data
    whole = observe(base | {"memory.stream_chunk_tokens": "off"})
    chunks = {"memory.stream_chunk_tokens": 160, "memory.stream_offload": "host"}
    streamed = observe(base | chunks)
    assert "streamed: 4 chunks of 160 tokens" in streamed.said
    for metric in ("loss", "grad_norm"):
        assert streamed.of_steps(metric) == pytest.approx(whole.of_steps(metric), rel=1e-5)


# --- loops of one's own, and what is refused ------------------------------------------------------


def scores(stream_chunk_tokens: int) -> Tensor:
    model = sharded_model("qwen3_moe", SP2, stream_chunk_tokens=stream_chunk_tokens)
    (batch,) = shard([padded_rows(left=False)], model)
    assert ("chunk_tokens" in batch) == (stream_chunk_tokens == 8)
    return score(model, batch).cpu()


def test_scores_are_in_the_order_of_the_sequence() -> None:
    streamed, whole = (run_on_ranks(2, scores, chunk)[0] for chunk in (8, -1))
    assert torch.allclose(streamed, whole, rtol=1e-6, atol=1e-6)


def cut_in_a_loop() -> None:
    model, mesh = sharded_model("qwen3_moe", SP2, stream_chunk_tokens=8), mesh_of(*SP2)
    ids = torch.arange(42, device=mesh.device).view(2, 21)
    (batch,) = shard([{"input_ids": ids}], model)
    assert local_slice(ids, model).equal(batch["input_ids"])
    deep = local_slice(ids[..., None].expand(-1, -1, 3), model)
    assert deep.equal(batch["input_ids"][..., None].expand(-1, -1, 3))
    losses = model(**batch, reduction="none").loss
    assert local_slice(score(model, batch), model).equal(-losses.detach())
    whole = sharded_model("qwen3_moe", SP2, stream_chunk_tokens=-1)
    shorter = ids[:, :19]
    [*shard([{"input_ids": shorter}], whole)]
    assert model.sharding.mesh is whole.sharding.mesh
    with pytest.raises(UserError, match="20 tokens were not cut as this model streams them"):
        local_slice(shorter, model)
    with pytest.raises(UserError, match="local_slice: Linear is not a model that `parallelize`"):
        local_slice(ids, torch.nn.Linear(1, 1))


def test_a_loop_cuts_as_the_model_streams() -> None:
    run_on_ranks(2, cut_in_a_loop)


def chunks_of_a_long_row() -> int:
    model = sharded_model("qwen3_moe", SP2)
    (batch,) = shard([{"input_ids": torch.zeros(1, 8 * AUTOMATIC_CHUNK_TOKENS)}], model)
    return batch["chunk_tokens"]


@pytest.mark.cuda(never="on a GPU, fp64 is streamed only where it is asked for")
def test_a_loop_streams_long_rows_by_default() -> None:
    assert run_on_ranks(2, chunks_of_a_long_row) == [2 * AUTOMATIC_CHUNK_TOKENS] * 2


def of_unequal_rows(stream_chunk_tokens: int) -> tuple[float, dict[str, Tensor]]:
    """Rows of 24 and of 46 tokens, on two ranks each."""
    model = sharded_model("qwen3_moe", DP2_SP2, stream_chunk_tokens=stream_chunk_tokens)
    place = mesh_of(*DP2_SP2).batch.get_local_rank()
    for batch in shard([{"input_ids": torch.arange(24 + 22 * place)[None]}], model):
        loss = model(**batch).loss
        loss.backward()
    return loss.item(), gradients_of(model)


def test_a_chunk_that_rounds_up_to_the_whole_sequence() -> None:
    (loss, gradients), *_ = run_on_ranks(4, kept_in_fp64, of_unequal_rows, 23)
    (whole, expected), *_ = run_on_ranks(4, kept_in_fp64, of_unequal_rows, -1)
    assert loss == pytest.approx(whole, rel=1e-12)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name


def refusals() -> dict[str, str]:
    found = {}

    def note(name: str, act) -> None:
        try:
            act()
        except UserError as error:
            found[name] = str(error)

    def own_core(q, k, v, *, documents, scale):
        return sdpa(q, k, v, documents=documents, scale=scale)

    def model(**options):
        built = hf.build_on_meta(hf.load_model_config("", STARCODER2), torch.float64)
        parallelize(built, mesh_of(*SP2), **sections(**options))
        hf.allocate(built, torch.device("cpu"))
        hf.initialize(built, seed=0)
        return built

    note("own core", lambda: model(attention=own_core, stream_chunk_tokens=8))
    note("no checkpoints", lambda: model(checkpoint_every=0, stream_chunk_tokens=8))
    rows = make_rows([(24,)], masked="none", vocab_size=61, seed=1)
    whole = model(attention=own_core)  # unstreamed, because nobody insists
    assert whole.sharding.stream_chunk_tokens == -1
    batch = local_batch(rows, mesh_of(*SP2), 8)
    note("batch", lambda: whole(**batch.inputs()))
    note("offload", lambda: model(stream_chunk_tokens=-1, stream_offload="host"))
    note("kept", lambda: model(stream_chunk_tokens=-1, keep_attention="all"))
    insists = model(stream_chunk_tokens=8)
    note("whole batch", lambda: insists(**local_batch(rows, mesh_of(*SP2)).inputs()))
    return found


def test_what_cannot_be_streamed_is_refused_by_name() -> None:
    found = run_on_ranks(2, refusals)[0]
    assert 'memory.stream_offload = "host" needs layers that are streamed' in found["offload"]
    assert 'keep_attention = "all" needs layers that are streamed' in found["kept"]
    assert "= 8: the batch is not cut into chunks. Give `shard`" in found["whole batch"]
    assert "the core own_core has no `pieces`" in found["own core"]
    assert "no activation checkpoints" in found["no checkpoints"]
    assert (
        "the batch is cut into chunks of 8 tokens, and this model does not stream" in found["batch"]
    )

"""Ulysses: the head plan, the exchange and the attention function, each against the computation
without sharding.

The exchange tests use small integers, whose sums are exact in every dtype and order: they compare
bit for bit.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain, combinations, islice, product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.families import SMALL
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.training import largest_difference, train_plain, train_sharded
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import Documents
from titan_ulysses.ulysses import attention, exchange
from titan_ulysses.ulysses.attention import Ulysses, ulysses_attention
from titan_ulysses.ulysses.cores import flash, sdpa, takes_any_size, varlen
from titan_ulysses.ulysses.exchange import (
    heads_to_sequence,
    keys_to_heads,
    sequence_to_heads,
)
from titan_ulysses.ulysses.heads import HeadPlan, RankGroup, deal_heads, plan_heads

HEAD_COUNTS = [(8, 8), (8, 2), (9, 3), (14, 2), (5, 1), (6, 6), (3, 1), (7, 7)]
TOKENS, HEAD_SIZE = 3, 2
VALUE_SIZES = (2, 1, 5)
"""Values have heads of the size of queries and keys, and smaller and larger ones, as latent
attention has.
"""
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

# ---------------------------------------------------------------- the plan


@st.composite
def head_counts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Hq (a multiple of Hkv, at most 1024), Hkv and P <= 1024, with small numbers as likely as
    large ones.
    """
    limit = draw(st.sampled_from([8, 64, 1024]))
    num_kv_heads = draw(st.integers(1, limit))
    num_query_heads = num_kv_heads * draw(st.integers(1, limit // num_kv_heads))
    return num_query_heads, num_kv_heads, draw(st.integers(1, limit))


@settings(max_examples=150, deadline=None)
@given(head_counts())
def test_plan_partitions_query_heads_and_names_the_kv_heads_they_read(
    counts: tuple[int, int, int],
) -> None:
    num_query_heads, num_kv_heads, degree = counts
    plan = plan_heads(*counts)
    assert plan.degree == degree
    assert plan.group_size * num_kv_heads == num_query_heads
    assert [head for heads in plan.query for head in heads] == list(range(num_query_heads))
    assert {len(heads) for heads in plan.query} <= {
        num_query_heads // degree,
        -(-num_query_heads // degree),
    }
    for queries, keys in zip(plan.query, plan.key_value, strict=True):
        assert list(keys) == sorted({head // plan.group_size for head in queries})
    assert all(len(parts) == 1 for parts in plan.parts)


def is_even(plan: HeadPlan) -> bool:
    """DTensor cuts by size alone: the query heads and the KV heads must both be multiples of P."""
    return not plan.query[-1].stop % plan.degree and not plan.key_value[-1].stop % plan.degree


@settings(max_examples=150, deadline=None)
@given(head_counts())
def test_runs_cover_each_query_head_once_with_its_kv_head(counts: tuple[int, int, int]) -> None:
    plan = plan_heads(*counts)
    even = is_even(plan)
    for rank, mine in enumerate(plan.query):
        runs = plan.runs(rank)
        assert len(runs) == 1 if even else bool(mine) <= len(runs) <= 3
        reads = []
        for queries, keys in runs:
            group, rest = divmod(queries.stop - queries.start, keys.stop - keys.start)
            assert rest == 0 and group > 0
            reads += [
                (queries.start + i, keys.start + i // group)
                for i in range(queries.stop - queries.start)
            ]
        expected = [head // plan.group_size - plan.key_value[rank].start for head in mine]
        assert reads == list(enumerate(expected))


def fewest_kv_heads_received(num_query_heads: int, group_size: int, degree: int) -> int:
    """Over every choice of which ranks have a larger range."""
    smaller, num_larger = divmod(num_query_heads, degree)
    totals = []
    for larger in combinations(range(degree), num_larger):
        heads = iter(range(num_query_heads))
        mine = [list(islice(heads, smaller + (rank in larger))) for rank in range(degree)]
        totals.append(sum(len({head // group_size for head in range_}) for range_ in mine))
    return min(totals)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12))
def test_no_balanced_plan_sends_fewer_kv_heads(
    num_kv_heads: int, group_size: int, degree: int
) -> None:
    plan = plan_heads(num_kv_heads * group_size, num_kv_heads, degree)
    fewest = fewest_kv_heads_received(num_kv_heads * group_size, group_size, degree)
    assert sum(map(len, plan.key_value)) == fewest


@settings(max_examples=150, deadline=None)
@given(head_counts())
def test_even_plans_are_copied_at_once(counts: tuple[int, int, int]) -> None:
    plan = plan_heads(*counts)
    for tensors in ("qkv", "q", "kv"):
        groups = plan.rank_groups(tensors, 0)
        assert [rank for group in groups for rank in group.ranks] == list(range(plan.degree))
        if is_even(plan):
            assert groups == (RankGroup(range(plan.degree), 1),)


def copied(plan: HeadPlan, tensors: str, source: int) -> int:
    """What source sends to heads and gathers from there, against loops over ranks; the number of
    copies.
    """
    sizes = tuple({"q": 2, "k": 2, "v": 3}[tensor] for tensor in tensors)
    load = exchange._Load(plan, tensors, sizes)
    heads, batch = plan.heads_of(tensors, source), 2
    whole = [
        integers(batch, TOKENS, ranges[-1].stop, size, seed=seed)
        for seed, (ranges, size) in enumerate(zip(heads, sizes, strict=True))
    ]
    blocks = [
        torch.cat(
            [
                x[:, :, of[rank].start : of[rank].stop].flatten(2)
                for x, of in zip(whole, heads, strict=True)
            ],
            dim=2,
        )
        for rank in range(plan.degree)
    ]
    expected = torch.cat([block.transpose(0, 1).flatten() for block in blocks])
    buffer = torch.full_like(expected, torch.nan)
    copies = 0
    for windows, places, _ in exchange._copies(whole, buffer, load, source):
        places.copy_(windows[:, None])
        copies += 1
    assert torch.equal(buffer, expected)

    gathered = [torch.full_like(x, torch.nan) for x in whole]
    for windows, places, shared in exchange._copies(gathered, buffer, load, source):
        exchange._accumulate(windows, places, shared=shared)
    for x, ours, ranges in zip(whole, gathered, heads, strict=True):
        times = Counter(head for of_rank in ranges for head in of_rank)
        assert torch.equal(ours, x * torch.tensor([times[i] for i in range(x.shape[2])])[:, None])
    return copies


@settings(max_examples=150, deadline=None)
@given(head_counts(), st.sampled_from([plan_heads, deal_heads]), st.integers(0, 63))
def test_copies_of_groups_are_those_of_ranks(
    counts: tuple[int, int, int], make_plan: Callable[..., HeadPlan], source: int
) -> None:
    num_query_heads, num_kv_heads, degree = counts
    plan = make_plan(num_query_heads, num_kv_heads, min(degree, 64))
    for tensors in ("qkv", "q", "kv", "kkqq"):
        copies = copied(plan, tensors, source % plan.degree)
        assert copies <= len(tensors) * sum(map(bool, plan.key_value))


@pytest.mark.parametrize(
    ("plan", "tensors", "copies"),
    [
        (plan_heads(32, 16, 8), "kkqqq", 5),  # Gated DeltaNet of Qwen3-Next
        (plan_heads(32, 16, 32), "kkqqq", 5),  # two ranks a key head
        (deal_heads(16, 2, 32), "qkv", 5),  # its attention: two ranks a query head
        (deal_heads(16, 2, 32), "q", 1),
        (deal_heads(64, 8, 1024), "qkv", 33),
        (deal_heads(40, 8, 32), "qkv", 12),
        (plan_heads(1024, 1, 1024), "qkv", 3),  # MQA: all ranks read the one KV head
        (plan_heads(1536, 512, 1024), "qkv", 6),  # two ranks a KV head: 2 queries and 1
        (plan_heads(3, 1, 5), "qkv", 3),  # two ranks without heads
    ],
)
def test_a_copy_serves_all_ranks_that_are_alike(plan: HeadPlan, tensors: str, copies: int) -> None:
    assert copied(plan, tensors, 0) == copies


def test_plan_of_14_query_and_2_kv_heads_on_4_ranks() -> None:
    plan = plan_heads(14, 2, 4)
    assert plan.query == (range(0, 4), range(4, 7), range(7, 11), range(11, 14))
    assert plan.key_value == (range(0, 1), range(0, 1), range(1, 2), range(1, 2))
    assert plan_heads(9, 3, 2).runs(1) == [(slice(0, 1), slice(0, 1)), (slice(1, 4), slice(1, 2))]


def test_plan_of_1024_ranks_takes_little_time() -> None:
    started = time.process_time()
    plan = plan_heads(1536, 512, 1024)  # two ranks a KV head: 2 queries and 1
    assert time.process_time() - started < 5
    assert sum(map(len, plan.key_value)) == 1024


def test_ranks_beyond_the_query_heads_are_idle() -> None:
    plan = plan_heads(3, 1, 5)
    assert [len(heads) for heads in plan.query] == [1, 1, 1, 0, 0]
    assert [len(heads) for heads in plan.key_value] == [1, 1, 1, 0, 0]
    assert plan.runs(4) == []


@settings(max_examples=100, deadline=None)
@given(head_counts())
def test_dealt_heads_are_the_same_number_of_queries_on_every_rank(
    counts: tuple[int, int, int],
) -> None:
    """A cell is one head and the tokens of one rank: each is dealt once, and Hq to every rank."""
    num_query_heads, num_kv_heads, degree = counts
    degree = min(degree, 64)
    plan = deal_heads(num_query_heads, num_kv_heads, degree)
    dealt = []
    for rank, (parts, query) in enumerate(zip(plan.parts, plan.query, strict=True)):
        assert len(parts) <= 3
        assert [source for part in parts for source in part.sources] == list(range(degree))
        mine = [(head, source) for sources, heads in parts for head in heads for source in sources]
        assert len(mine) == num_query_heads
        assert list(plan.key_value[rank]) == sorted({head // plan.group_size for head, _ in mine})
        assert list(query) == sorted({head for head, _ in mine})
        reads = [
            plan.key_value[rank].start + keys.start + i // ((q.stop - q.start) // len_of(keys))
            for part in range(len(parts))
            for q, keys in plan.runs(rank, part)
            for i in range(len_of(q))
        ]
        assert reads == [head // plan.group_size for _, heads in parts for head in heads]
        dealt += sorted(mine)
    assert dealt == [(head, source) for head in range(num_query_heads) for source in range(degree)]
    held = [len(heads) for heads in plan.key_value]
    assert sum(held) == degree + num_kv_heads - math.gcd(degree, num_kv_heads)
    assert max(held) < num_kv_heads / degree + 2
    if num_query_heads % degree == 0:
        assert plan == plan_heads(num_query_heads, num_kv_heads, degree)


def len_of(part: slice) -> int:
    return part.stop - part.start


@pytest.mark.parametrize("counts", [(9, 3, 4), (14, 2, 4), (2, 1, 3), (32, 8, 64), (5, 1, 64)])
def test_the_work_on_16_chunks_is_balanced(counts: tuple[int, int, int]) -> None:
    """Pairs of queries and keys of the busiest rank of each chunk, against a fair share."""
    chunks, plan, degree = 16, deal_heads(*counts), counts[2]
    tokens = 4
    slowest = 0
    for chunk in range(chunks):
        pairs = [0] * degree
        for rank, parts in enumerate(plan.parts):
            for sources, heads in parts:
                first = (chunk * degree + sources.start) * tokens
                last = (chunk * degree + sources.stop) * tokens
                pairs[rank] += len(heads) * sum(range(first + 1, last + 1))
        slowest += max(pairs)
    length = chunks * degree * tokens
    fair = counts[0] * length * (length + 1) / 2 / degree
    assert 1 <= slowest / fair < (chunks + 1) / chunks < 1.1


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(8, 3), (2, 4), (7, 2)])
def test_kv_heads_must_divide_query_heads(num_query_heads: int, num_kv_heads: int) -> None:
    with pytest.raises(
        ValueError,
        match=f"{num_kv_heads} key-value heads do not divide {num_query_heads} query heads",
    ):
        plan_heads(num_query_heads, num_kv_heads, 2)
    with pytest.raises(ValueError, match="do not divide"):
        deal_heads(num_query_heads, num_kv_heads, 2)


# ---------------------------------------------------------------- the exchange


def sp_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("sp",))


def integers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same on every rank that passes the same seed; |x| <= 8."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads_and_sizes(plan: HeadPlan, value_size: int) -> list[tuple[int, int]]:
    """Of q, k and v."""
    keys = plan.key_value[-1].stop
    return [(plan.query[-1].stop, HEAD_SIZE), (keys, HEAD_SIZE), (keys, value_size)]


def whole_qkv(plan: HeadPlan, batch: int, dtype: torch.dtype, value_size: int) -> list[Tensor]:
    """q, k and v of the whole sequence, [B, S, H, D], with gradients: what the sharded computation
    is compared with.
    """
    return [
        integers(batch, plan.degree * TOKENS, heads, size, seed=seed, dtype=dtype).requires_grad_()
        for seed, (heads, size) in enumerate(heads_and_sizes(plan, value_size))
    ]


def tokens_of(rank: int, tokens: int = TOKENS) -> slice:
    return slice(rank * tokens, (rank + 1) * tokens)


def own_tokens(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of the sequence, a leaf with its own gradient."""
    rank = mesh.get_local_rank()
    return (
        whole.detach()[:, tokens_of(rank, whole.shape[1] // mesh.size())]
        .clone()
        .requires_grad_(whole.requires_grad)
    )


def place(local: Tensor, mesh: DeviceMesh, dim: int = 1) -> DTensor:
    return DTensor.from_local(local, mesh, (Shard(dim),), run_check=False)


def seen_by(rank: int, plan: HeadPlan, whole: list[Tensor]) -> list[Tensor]:
    """What of whole q, k and v a rank computes with: a tensor for each part, then k and v."""
    q, *others = whole
    tokens = q.shape[1] // plan.degree
    queries = [
        q[:, sources.start * tokens : sources.stop * tokens, heads.start : heads.stop]
        for sources, heads in plan.parts[rank]
    ]
    keys = plan.key_value[rank]
    return [*queries, *(x[:, :, keys.start : keys.stop] for x in others)]


def weighed(tensors: list[Tensor], rank: int) -> Tensor:
    """A sum with weights of this rank's own, so that a KV head that several ranks hold gets a
    gradient from each.
    """
    return sum(
        (x * integers(*x.shape, seed=10 * rank + i, dtype=x.dtype)).sum()
        for i, x in enumerate(tensors)
    )


def check_sequence_to_heads(mesh: DeviceMesh, plan: HeadPlan, *case) -> None:
    rank, whole = mesh.get_local_rank(), whole_qkv(plan, *case)
    own = [own_tokens(x, mesh) for x in whole]
    queries, *keys = sequence_to_heads(*(place(x, mesh) for x in own), plan)
    received, expected = [*queries, *keys], seen_by(rank, plan, whole)
    for x, full in zip(received, expected, strict=True):
        torch.testing.assert_close(x, full.detach(), **EXACT)
    if is_even(plan):
        for x, full in zip(received, whole, strict=True):
            here = place(own_tokens(full, mesh).detach(), mesh)
            by_dtensor = here.redistribute(placements=(Shard(2),)).to_local()
            torch.testing.assert_close(x.detach(), by_dtensor, **EXACT)
    alone = keys_to_heads(*(place(x, mesh) for x in own[1:]), plan)
    known = tuple(x.clone() for x in alone)
    again, *kept = sequence_to_heads(*(place(x, mesh) for x in own), plan, known=known)
    for x, full in zip([*again, *kept], expected, strict=True):
        torch.testing.assert_close(x, full.detach(), **EXACT)
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(kept, known, strict=True))

    others = [seen_by(p, plan, whole) for p in range(plan.degree)]
    sum(weighed(tensors, p) for p, tensors in enumerate(others)).backward()
    for results in (received, [*again, *kept]):
        gradients = torch.autograd.grad(weighed(results, rank), own)
        for gradient, full in zip(gradients, whole, strict=True):
            torch.testing.assert_close(gradient, full.grad[:, tokens_of(rank)], **EXACT)


def check_heads_to_sequence(
    mesh: DeviceMesh, plan: HeadPlan, batch: int, dtype: torch.dtype, _: int
) -> None:
    rank, (whole, _, _) = mesh.get_local_rank(), whole_qkv(plan, batch, dtype, HEAD_SIZE)
    weights = integers(*whole.shape, seed=9, dtype=dtype)
    kernels_write = {
        "[B, S, h, D]": lambda x: x.clone(),
        "[S, B, h, D]": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "[B, h, S, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    for layout in kernels_write.values():
        own = [layout(x).requires_grad_() for x in seen_by(rank, plan, [whole.detach()])]
        output = heads_to_sequence(own, plan, mesh)
        assert output.placements == (Shard(1),)
        assert output.shape == whole.shape
        torch.testing.assert_close(output.to_local(), whole[:, tokens_of(rank)], **EXACT)
        (output.to_local() * weights[:, tokens_of(rank)]).sum().backward()
        for x, weight in zip(own, seen_by(rank, plan, [weights]), strict=True):
            torch.testing.assert_close(x.grad, weight, **EXACT)


def check_round_trip(
    mesh: DeviceMesh, plan: HeadPlan, batch: int, dtype: torch.dtype, value_size: int
) -> None:
    torch.manual_seed(dist.get_rank())
    shapes = heads_and_sizes(plan, value_size)
    q, k, v = (torch.randn(batch, TOKENS, heads, size).to(dtype) for heads, size in shapes)
    queries, _, _ = sequence_to_heads(*(place(x, mesh) for x in (q, k, v)), plan)
    torch.testing.assert_close(heads_to_sequence(queries, plan, mesh).to_local(), q, **EXACT)


def check_exchange(mesh: DeviceMesh) -> int:
    """All cases on this mesh; the number of them."""
    cases = [
        (plan(*counts, mesh.size()), batch, dtype, value_size)
        for counts in HEAD_COUNTS
        for plan in (plan_heads, deal_heads)
        for (batch, dtype), value_size in zip(
            ((1, torch.float64), (2, torch.float64), (2, torch.bfloat16)), VALUE_SIZES, strict=True
        )
    ]
    for case in cases:
        for check in (check_sequence_to_heads, check_heads_to_sequence, check_round_trip):
            try:
                check(mesh, *case)
            except AssertionError as error:
                raise AssertionError(f"{check.__name__}{case}") from error
    return len(cases)


def exchange_over_all_ranks() -> int:
    return check_exchange(sp_mesh())


def exchange_over_pairs_of_ranks() -> int:
    return check_exchange(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"])


# Two ranks: as pairs of four, below. Three: attention as a whole, below.
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [*(pytest.param(size, 48, marks=pytest.mark.slow) for size in (2, 3)), (4, 48)],
)
def test_exchange_equals_indexing_of_whole_tensors(world_size: int, cases: int) -> None:
    assert run_on_ranks(world_size, exchange_over_all_ranks) == [cases] * world_size


def test_exchange_within_pairs_of_four_ranks() -> None:
    assert run_on_ranks(4, exchange_over_pairs_of_ranks) == [48] * 4


def placement_errors() -> dict[str, str]:
    """What wrong placements raise, by the name of the mistake."""
    mesh = sp_mesh()
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "sp"))
    plan = plan_heads(2, 2, 2)
    local = torch.zeros(1, TOKENS, 2, HEAD_SIZE)
    good = place(local, mesh)
    wrong = {
        "replicated": DTensor.from_local(local, mesh, (Replicate(),), run_check=False),
        "heads": place(local, mesh, 2),
        "rows": place(local, mesh, 0),
        "2-D mesh": DTensor.from_local(local, grid, (Replicate(), Shard(1)), run_check=False),
        "plain tensor": local,
    }
    calls = {
        f"q {name}": lambda x=x: sequence_to_heads(x, good, good, plan) for name, x in wrong.items()
    }
    calls["k heads"] = lambda: sequence_to_heads(good, wrong["heads"], good, plan)
    calls["v replicated"] = lambda: sequence_to_heads(good, good, wrong["replicated"], plan)
    calls["v alone"] = lambda: keys_to_heads(good, local, plan)
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
        else:
            messages[name] = "nothing raised"
    return messages


def test_wrong_placements_are_refused_by_name() -> None:
    for messages in run_on_ranks(2, placement_errors):
        assert len(messages) == 8
        for mistake, message in messages.items():
            assert message.startswith(f"{mistake.split()[0]} must be "), f"{mistake}: {message}"
        assert "but has (Replicate(),)" in messages["v replicated"]


# ---------------------------------------------------------------- the attention function

SEQUENCE_LENGTH = 24
DOCUMENTS: list[Documents] = [
    ((24,), (24,)),  # one document as long as the sequence
    ((12, 12), (6, 6, 6, 6)),  # borders at the borders of 2 and of 4 ranks
    ((5, 8, 11), (2, 3, 1, 16, 2)),  # borders inside a rank, documents across one and several
    ((7, 10, 7), (7, 10, 7)),  # rows cut alike
    ((1, 1, 10, 1, 5, 1, 5), (1,) * 24),  # documents of one token, also first and last of a rank
]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """[B, H, S, D] each -> [B, S, Hq, D]: softmax of masked scores, with a mask of the whole
    sequence.
    """
    ids = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents]
    )
    mask = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=3) @ v).transpose(1, 2)


def random_qkv(
    num_query_heads: int, num_kv_heads: int, *, value_size: int = HEAD_SIZE, seed: int = 0
) -> list[Tensor]:
    """What an attention layer computes for the whole sequence: [2, H, S, D] in fp64; the same on
    every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, heads, SEQUENCE_LENGTH, size, generator=generator, dtype=torch.float64)
        for heads, size in (
            (num_query_heads, HEAD_SIZE),
            (num_kv_heads, HEAD_SIZE),
            (num_kv_heads, value_size),
        )
    ]


def attend(mesh: DeviceMesh, qkv: list[Tensor], documents: Documents, **kwargs) -> Tensor:
    ulysses = Ulysses(mesh=mesh, core=sdpa, documents=documents, position_ids=None)
    output, weights = ulysses_attention(nn.Identity(), *qkv, None, ulysses=ulysses, **kwargs)
    assert weights is None
    return output


# Sizes take turns: each meets every pair of head counts, and every set of documents.
ATTENTION_CASES = [
    (counts, documents, VALUE_SIZES[turn % 3])
    for turn, (counts, documents) in enumerate(product(HEAD_COUNTS, DOCUMENTS))
]


def attention_of_own_tokens(cases: list[tuple], scaling: float | None) -> list[list[Tensor]]:
    """Per case, this rank's part of the output [B, T, Hq, Dv] and of the gradients of q, k and v
    [B, H, T, D].
    """
    mesh = sp_mesh()
    tokens = tokens_of(mesh.get_local_rank(), SEQUENCE_LENGTH // mesh.size())
    results = []
    for counts, documents, value_size in cases:
        own = [
            x[:, :, tokens].clone().requires_grad_()
            for x in random_qkv(*counts, value_size=value_size)
        ]
        output = attend(
            mesh, own, documents, scaling=scaling, sliding_window=SEQUENCE_LENGTH, dropout=0.0
        )
        (output * torch.linspace(-1, 2, SEQUENCE_LENGTH)[tokens, None, None]).sum().backward()
        results.append([output.detach(), *(x.grad for x in own)])
    return results


@pytest.mark.parametrize(("world_size", "scaling"), [(2, None), (3, 0.3), (4, None)])
def test_attention_equals_eager_attention_of_each_document(
    world_size: int, scaling: float | None
) -> None:
    ranks = run_on_ranks(world_size, attention_of_own_tokens, ATTENTION_CASES, scaling)
    for (counts, documents, value_size), *parts in zip(ATTENTION_CASES, *ranks, strict=True):
        whole = [x.requires_grad_() for x in random_qkv(*counts, value_size=value_size)]
        expected = eager_attention(
            *whole, documents, HEAD_SIZE**-0.5 if scaling is None else scaling
        )
        (expected * torch.linspace(-1, 2, SEQUENCE_LENGTH)[:, None, None]).sum().backward()
        outputs, *gradients = zip(*parts, strict=True)
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected.detach(), **CLOSE)
        for gradient, x in zip(gradients, whole, strict=True):
            torch.testing.assert_close(torch.cat(gradient, dim=2), x.grad, **CLOSE)


def attention_with_sinks(counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """This rank's part of the output, and of the gradient of the sinks."""
    mesh, sinks = sp_mesh(), torch.linspace(-1, 1, counts[0], dtype=torch.float64).requires_grad_()
    tokens = tokens_of(mesh.get_local_rank(), SEQUENCE_LENGTH // mesh.size())
    output = attend(mesh, [x[:, :, tokens] for x in random_qkv(*counts)], DOCUMENTS[2], s_aux=sinks)
    output.sum().backward()
    return output.detach(), sinks.grad


def test_an_idle_rank_gives_a_gradient_of_zero_to_a_parameter_of_the_layer() -> None:
    outputs, gradients = zip(*run_on_ranks(4, attention_with_sinks, (3, 1)), strict=True)
    sinks = torch.linspace(-1, 1, 3, dtype=torch.float64).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in random_qkv(3, 1))
    expected = sdpa(q, k, v, documents=DOCUMENTS[2], scale=HEAD_SIZE**-0.5, sinks=sinks)
    expected.sum().backward()
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected.detach(), **CLOSE)
    torch.testing.assert_close(sum(gradients), sinks.grad, **CLOSE)
    assert not gradients[3].any() and gradients[2].any()


def changed_tokens(documents: Documents, counts: tuple[int, int]) -> Tensor:
    """[S, B, T]: which of this rank's outputs change in any bit when token s of row 0 gets another
    q, k and v.
    """
    mesh = sp_mesh()
    tokens = tokens_of(mesh.get_local_rank(), SEQUENCE_LENGTH // mesh.size())
    whole, others = random_qkv(*counts), random_qkv(*counts, seed=1)
    before = attend(mesh, [x[:, :, tokens] for x in whole], documents)
    changed = []
    for token in range(SEQUENCE_LENGTH):
        spoilt = [x.clone() for x in whole]
        for x, other in zip(spoilt, others, strict=True):
            x[0, :, token] = other[0, :, token]
        after = attend(mesh, [x[:, :, tokens] for x in spoilt], documents)
        changed.append((before != after).any(dim=3).any(dim=2))
    return torch.stack(changed)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("documents", DOCUMENTS[1:4])
def test_a_token_reaches_its_own_document_and_no_bit_of_another(
    world_size: int, documents: Documents
) -> None:
    changed = torch.cat(run_on_ranks(world_size, changed_tokens, documents, (6, 2)), dim=2)
    ids = torch.arange(len(documents[0])).repeat_interleave(torch.tensor(documents[0]))
    later_in_the_document = (ids[:, None] == ids[None, :]).triu()
    assert torch.equal(changed[:, 0], later_in_the_document)
    assert not changed[:, 1].any()


def test_attention_on_one_rank_needs_no_exchange() -> None:
    qkv = random_qkv(6, 2)
    output = attend(SimpleNamespace(size=lambda: 1), qkv, DOCUMENTS[2], scaling=0.3)
    torch.testing.assert_close(output, eager_attention(*qkv, DOCUMENTS[2], 0.3), **CLOSE)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dropout": 0.1}, "Identity drops attention weights"),
        ({"ulysses": None}, "Identity does not receive the documents and ranks"),
        ({"attention_mask": torch.zeros(1)}, "Identity gets its own attention mask"),
    ],
)
def test_attention_refuses_what_it_cannot_do(keywords: dict, message: str) -> None:
    ulysses = Ulysses(SimpleNamespace(size=lambda: 1), sdpa, DOCUMENTS[0], position_ids=None)
    with pytest.raises(UserError, match=message):
        ulysses_attention(
            nn.Identity(),
            *random_qkv(6, 2),
            **{"attention_mask": None, "ulysses": ulysses} | keywords,
        )


@pytest.mark.parametrize(("size", "value_size"), [(2**9, 2**10), (2**10, 2**9)])
def test_no_call_sees_2_to_the_31_elements(size: int, value_size: int) -> None:
    """Of three heads with 2^30 numbers in q or v a core sees one at a time."""
    length, calls = 2**20, []

    def core(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        calls.append([q.numel(), k.numel(), v.numel()])
        return q.new_empty(*q.shape[:3], v.shape[3])

    sizes = (size, size, value_size)
    qkv = [torch.empty(1, 3, length, n, device="meta") for n in sizes]
    ulysses = Ulysses(SimpleNamespace(size=lambda: 1), core, ((length,),), position_ids=None)
    output, _ = ulysses_attention(nn.Identity(), *qkv, None, ulysses=ulysses)
    assert output.shape == (1, length, 3, value_size)
    assert len(calls) == 3 and max(map(max, calls)) < 2**31


def test_a_kernel_with_64_bit_indices_is_called_once() -> None:
    calls = []

    def core(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        calls.append(q.numel())
        return torch.empty_like(q)

    core.any_size = True
    qkv = [torch.empty(1, heads, 2**20, 2**10, device="meta") for heads in (6, 2, 2)]
    ulysses = Ulysses(SimpleNamespace(size=lambda: 1), core, ((2**20,),), position_ids=None)
    ulysses_attention(nn.Identity(), *qkv, None, ulysses=ulysses)
    assert calls == [6 * 2**30]
    assert takes_any_size(varlen) and takes_any_size(flash) and not takes_any_size(sdpa)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 100])
def test_calls_cut_inside_a_group_compute_the_same(monkeypatch, most: int) -> None:
    """3 query heads on each of 2 KV heads, at most `most` query heads a call. The gradients are
    assembled in one tensor each.
    """
    qkv = [x.requires_grad_() for x in random_qkv(6, 2)]
    call = SimpleNamespace(size=lambda: 1), qkv, DOCUMENTS[2]
    expected = attend(*call, scaling=0.3)
    wanted = torch.autograd.grad(expected.square().sum(), qkv)
    sizes, exact = [], sdpa

    def core(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        sizes.append(q.shape[2])
        return exact(q, k, v, **options)

    monkeypatch.setattr(attention, "_MOST_ELEMENTS", most * qkv[0][:, 0].numel())
    monkeypatch.setattr(sys.modules[__name__], "sdpa", core)
    found = attend(*call, scaling=0.3)
    assert max(sizes) <= most and sum(sizes) == 6
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), qkv)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


class Whole(TorchDispatchMode):
    """How many tensors of a shape were made."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.made = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(result)
        mutable = func._schema.is_mutable or func.is_view
        self.made += sum(isinstance(x, Tensor) and x.shape == self.shape for x in leaves) * (
            not mutable
        )
        return result


def test_gradients_of_parts_are_not_copied_once_more() -> None:
    x = torch.randn(1, 8, 4, 2, requires_grad=True)
    parts = attention._parts(x, [slice(0, 2), slice(2, 3), slice(3, 4)])
    loss = sum(part.square().sum() for part in parts)
    for _ in range(2):  # the graph can be used again
        with Whole(x.shape) as whole:
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(gradient, 2 * x) and whole.made == 1


# Dense, as the first layers of deepseek are: this is about attention. 5 heads leave no rank like
# another.
LATENT = {k: v for k, v in SMALL.items() if k != "head_dim"} | {
    "model_type": "deepseek_v3",
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "first_k_dense_replace": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
}


@pytest.mark.parametrize(("degree", "value_size"), [(2, 12), (3, 4)])
def test_latent_attention_trains_as_unmodified_transformers(degree: int, value_size: int) -> None:
    model = LATENT | {"v_head_dim": value_size}
    steps = [[make_rows([(10, 13, 1), (6, 6, 12)], masked="none", vocab_size=61, seed=0)]]
    arguments = (1, 1, degree), model, steps, torch.float64
    found = run_on_ranks(degree, kept_in_fp64, train_sharded, *arguments, attention="sdpa")[0]
    worst = largest_difference(found, kept_in_fp64(train_plain, model, steps, torch.float64))
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


# ---------------------------------------------------------------- what travels


class Wire(TorchDispatchMode):
    """Every collective of this rank, in order: its name and, of an all-to-all, the bytes that go to
    other ranks.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls = rank, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:  # it goes first: the operators that it is made of come back here
            return NotImplemented
        name = func.overloadpacket.__name__
        if name == "all_to_all_single":
            tensor, _, split, _ = args
            self.calls.append((name, (sum(split) - split[self.rank]) * tensor.element_size()))
        elif "c10d" in func.namespace and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.calls.append((name, None))
        return func(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Elements that each copying operator writes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in (
            "copy_",
            "clone",
            "cat",
            "_to_copy",
            "index",
            "index_select",
            "add_",
        ):
            self.calls.append(result.numel())
        return result


def copies_of_the_exchange(
    head_counts: list[tuple[int, int]], batch: int, value_size: int
) -> list[list[list[int]]]:
    """Per head count: the copies in q, k, v to the heads, its backward, the output's way back, its
    backward.
    """
    mesh, results = sp_mesh(), []
    for counts in head_counts:
        plan, rank = plan_heads(*counts, mesh.size()), mesh.get_local_rank()
        own = [own_tokens(x, mesh) for x in whole_qkv(plan, batch, torch.float32, value_size)]
        shape = (mesh.size() * TOKENS, batch, len(plan.query[rank]), value_size)
        # As a kernel writes it: [S, B, h, D].
        output = torch.ones(shape).transpose(0, 1).requires_grad_()
        with Copies() as there:
            (query,), *keys = sequence_to_heads(*(place(x, mesh) for x in own), plan)
        received = [query, *keys]
        grads = [torch.ones_like(x) for x in received]
        with Copies() as there_backward:
            torch.autograd.grad(received, own, grads)
        with Copies() as back:
            returned = heads_to_sequence((output,), plan, mesh).to_local()
        grad = torch.ones_like(returned)
        with Copies() as back_backward:
            torch.autograd.grad(returned, output, grad)
        results.append([mode.calls for mode in (there, there_backward, back, back_backward)])
    return results


def numbers_of_qkv(plan: HeadPlan, value_size: int) -> list[int]:
    """How many numbers a token of q, k and v each rank computes with."""
    heads = zip(plan.query, plan.key_value, strict=True)
    return [HEAD_SIZE * (len(q) + len(kv)) + value_size * len(kv) for q, kv in heads]


@pytest.mark.parametrize(("batch", "value_size"), [(1, 2), (2, 3)])
def test_the_exchange_copies_once_on_each_side_at_most(batch: int, value_size: int) -> None:
    for rank, layers in enumerate(
        run_on_ranks(2, copies_of_the_exchange, HEAD_COUNTS, batch, value_size)
    ):
        for counts, (there, there_backward, back, back_backward) in zip(
            HEAD_COUNTS, layers, strict=True
        ):
            plan, tokens = plan_heads(*counts, 2), batch * TOKENS
            numbers = numbers_of_qkv(plan, value_size)
            assert sum(there) == tokens * sum(numbers)  # packed; received as it lies
            assert sum(there_backward[:3]) == 2 * tokens * numbers[rank]  # packed
            # A KV head of two ranks is written and added to.
            assert sum(there_backward[3:]) == tokens * sum(numbers)
            # Sent as it lies; packed.
            assert sum(back) == sum(back_backward) == tokens * value_size * counts[0]
            if is_even(plan):
                assert [len(there), len(there_backward), len(back), len(back_backward)] == [
                    3,
                    6,
                    1,
                    1,
                ]


@pytest.mark.parametrize(
    ("counts", "degree"), [((8, 2), 2), ((14, 2), 4), ((3, 1), 4), ((64, 8), 1024)]
)
def test_attention_under_fake_tensors_has_the_shapes_of_real_ones(
    counts: tuple[int, int], degree: int
) -> None:
    for rank in (0, degree - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degree)
        try:
            mesh = sp_mesh()
            with FakeTensorMode():
                shapes = heads_and_sizes(plan_heads(*counts, degree), VALUE_SIZES[1])
                own = [
                    torch.empty(2, heads, TOKENS, size, requires_grad=True)
                    for heads, size in shapes
                ]
                output = attend(mesh, own, ((TOKENS * degree,),) * 2)
                output.sum().backward()
            assert output.shape == (2, TOKENS, counts[0], VALUE_SIZES[1])
            assert all(isinstance(x.grad, FakeTensor) and x.grad.shape == x.shape for x in own)
        finally:
            dist.destroy_process_group()


def compiled_and_not(cases: list[tuple[int, int, int]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Output and gradients of a function around attention as it is, and compiled into a single
    graph.
    """
    mesh, results = sp_mesh(), []
    tokens = tokens_of(mesh.get_local_rank(), SEQUENCE_LENGTH // mesh.size())

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(mesh, (2 * q, k, v), DOCUMENTS[2]) + 1

    for *counts, value_size in cases:
        pair = []
        for function in (
            block,
            torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False),
        ):
            whole = random_qkv(*counts, value_size=value_size)
            own = [x[:, :, tokens].clone().requires_grad_() for x in whole]
            output = function(*own)
            output.sum().backward()
            pair.append([output.detach(), *(x.grad for x in own)])
        results.append(tuple(pair))
    return results


@pytest.mark.parametrize(
    "case", [(9, 3, 3), *(pytest.param(x, marks=pytest.mark.slow) for x in [(8, 4, 2), (1, 1, 2)])]
)
def test_attention_compiles_to_one_graph_with_the_same_results(case: tuple[int, int, int]) -> None:
    """Heads that go to two ranks, of two sizes; even ones and an idle rank take parts of that."""
    for eager, compiled in chain(*run_on_ranks(2, compiled_and_not, [case])):
        for expected, found in zip(eager, compiled, strict=True):
            torch.testing.assert_close(found, expected, **EXACT)


def collectives_of_a_layer(
    head_counts: list[tuple[int, int]], dtype: torch.dtype, value_size: int
) -> list[tuple[list, list]]:
    """Per head count, the collectives of attention's forward and of its backward."""
    mesh = sp_mesh()
    tokens = tokens_of(mesh.get_local_rank(), SEQUENCE_LENGTH // mesh.size())
    results = []
    for counts in head_counts:
        whole = random_qkv(*counts, value_size=value_size)
        own = [x[:, :, tokens].to(dtype).requires_grad_() for x in whole]
        with Wire(mesh.get_local_rank()) as forward:
            loss = attend(mesh, own, DOCUMENTS[2]).sum()
        with Wire(mesh.get_local_rank()) as backward:
            loss.backward()
        results.append((forward.calls, backward.calls))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "value_size"), [(torch.float64, 2), (torch.float64, 3), (torch.bfloat16, 1)]
)
def test_two_all_to_alls_each_way_send_what_the_formula_says(
    world_size: int, dtype: torch.dtype, value_size: int
) -> None:
    ranks = run_on_ranks(world_size, collectives_of_a_layer, HEAD_COUNTS, dtype, value_size)
    for rank, layers in enumerate(ranks):
        for counts, (forward, backward) in zip(HEAD_COUNTS, layers, strict=True):
            plan = plan_heads(*counts, world_size)
            tokens = 2 * SEQUENCE_LENGTH // world_size * dtype.itemsize  # B * T * itemsize
            output = [value_size * len(heads) for heads in plan.query]
            qkv = numbers_of_qkv(plan, value_size)

            def to_heads(
                numbers: list[int], rank: int = rank, tokens: int = tokens
            ) -> tuple[str, int]:
                return "all_to_all_single", tokens * (sum(numbers) - numbers[rank])

            def to_sequence(
                numbers: list[int], rank: int = rank, tokens: int = tokens
            ) -> tuple[str, int]:
                return "all_to_all_single", tokens * (world_size - 1) * numbers[rank]

            assert forward == [to_heads(qkv), to_sequence(output)]
            assert backward == [to_heads(output), to_sequence(qkv)]
            if is_even(plan):
                a_token = HEAD_SIZE * (counts[0] + counts[1]) + value_size * counts[1]
                assert (
                    to_heads(qkv)[1]
                    == to_sequence(qkv)[1]
                    == (world_size - 1) * tokens * a_token // world_size
                )

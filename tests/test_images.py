"""The images of a micro-batch: how they are dealt to ranks, and what a rank keeps of a batch."""

from __future__ import annotations

import random

import torch

from titan_ulysses.data.images import Visual, Visuals, cost_of, deal
from titan_ulysses.data.loader import Batch


def _least_largest_share(costs: tuple[int, ...], ranks: int) -> int:
    """Return the largest share of the best assignment there is, by trying all."""
    ordered, best = sorted(costs, reverse=True), sum(costs)
    least = max(-(-sum(costs) // ranks), ordered[0])

    def place(i: int, shares: list[int]) -> None:
        nonlocal best
        if best == least or max(shares) >= best:
            return
        if i == len(ordered):
            best = max(shares)
            return
        for share in {*shares}:  # ranks with equal shares are the same
            rank = shares.index(share)
            shares[rank] += ordered[i]
            place(i + 1, shares)
            shares[rank] -= ordered[i]

    place(0, [0] * ranks)
    return best


def test_dealing_is_close_to_the_best_there_is() -> None:
    rng, worst = random.Random(0), 0.0
    for number in range(200):
        ranks, count = rng.randint(2, 5), rng.randint(1, 12)
        if number % 2:  # sizes of all orders, and such as leave LPT the furthest behind
            costs = tuple(int(10 ** rng.uniform(1, 3)) for _ in range(count))
        else:
            costs = tuple(rng.randint(3, 12) for _ in range(count))
        owners = deal(costs, ranks)
        shares = [
            sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)
        ]
        worst = max(worst, max(shares) / _least_largest_share(costs, ranks))
    assert worst <= 1.1, worst


def test_a_frame_costs_its_square() -> None:
    assert cost_of([100], 1) == 100 * (6 + 100)
    assert cost_of([50, 50], 1) == 2 * 50 * (6 + 50)


def test_a_rank_keeps_its_tokens_of_all_axes_and_its_own_pixels() -> None:
    items = tuple(
        Visual("image", ((4 * i, 4 * i + 2),), cost=cost) for i, cost in enumerate((5, 1, 3))
    )
    rows = Batch(
        input_ids=torch.arange(12)[None],
        labels=torch.arange(12)[None],
        position_ids=torch.arange(3 * 12).view(3, 1, 12),
        documents=((12,),),
        visuals=Visuals(items),
        pixels=tuple({"pixel_values": torch.full((1, 2), i)} for i in range(3)),
    )
    seen, positions = [], []
    for rank in range(5):  # 12 tokens and padding to 15
        local = rows.local(rank=rank, degree=5, stream_chunk_tokens=-1)
        assert local.visuals is rows.visuals
        seen += [int(x["pixel_values"][0, 0]) for x in local.pixels]
        positions.append(local.position_ids)
    assert sorted(seen) == [0, 1, 2]
    whole = torch.cat(positions, dim=-1)
    assert torch.equal(whole[..., :12], rows.position_ids)
    assert torch.equal(whole[..., 12:], torch.arange(3).expand(3, 1, -1))
    assert items[1].at(10, row=2).spans == ((14, 16),)

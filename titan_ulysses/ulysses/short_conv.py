"""Gated short convolutions: lfm2, lfm2_moe."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_ulysses.ulysses.attention import Ulysses
from titan_ulysses.ulysses.states import (
    DocumentPiece,
    State,
    StatefulLayer,
    convolve,
    last_inputs,
    run_by_documents,
)


class ShortConv(StatefulLayer):
    """The forward of a layer y = C * convolution(B * x), by channels, with a kernel of K tokens.

    All channels of this rank's tokens are computed here. Of the tokens before them, the last K - 1
    are needed, and they are all that ranks exchange.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        parts = ("conv", "in_proj", "out_proj", "conv_kernel_size")
        return type(module).__name__.endswith("ShortConv") and all(
            hasattr(module, name) for name in parts
        )

    def compute(self, hidden: Tensor, ulysses: Ulysses) -> Tensor:
        m, mesh, extent = self.module, ulysses.mesh, ulysses.extent
        b, c, x = m.in_proj(hidden).chunk(3, dim=-1)
        x = b * x
        state = extent.state_before(m, [x])
        before = inputs_before(x, m.conv_kernel_size - 1, state and state[0], mesh)
        weight, bias = m.conv.weight.squeeze(1), m.conv.bias

        def run(inputs: list[Tensor], state: State | None, piece: DocumentPiece):
            tail = None
            if state is not None:  # only what its document has
                tail = state[0][:, -piece.before :].transpose(1, 2)
                tail = F.pad(tail, (m.conv_kernel_size - 1 - tail.shape[2], 0))
            return convolve(m, inputs[0].transpose(1, 2), weight, bias, tail).transpose(1, 2), None

        first = extent.start + mesh.get_local_rank() * x.shape[1]
        y = run_by_documents(run, [x], ulysses.documents, first, (before,))[0]
        last = last_inputs(x.mT, before.mT, m.conv_kernel_size - 1).mT
        return m.out_proj(extent.state_after(m, c * _Joined.apply(y, before), (last,)))


class _Joined(torch.autograd.Function):
    """y, which depends on `before` too: its exchange has a backward, which every rank must join."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, before: Tensor) -> Tensor:
        ctx.shape = before.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(ctx.shape)


def inputs_before(x: Tensor, count: int, earlier: Tensor | None, mesh: DeviceMesh) -> Tensor:
    """Return the `count` tokens before this rank's x [B, n, h] -> [B, count, h], after zeros.

    earlier [B, count, h] are those before the first rank's, which the last rank knows; None: zeros.
    If n < count, they come from several ranks. One all-to-all carries them, and one their
    gradients.
    """
    degree, rank, n = mesh.size(), mesh.get_local_rank(), x.shape[1]
    if earlier is None:
        earlier = x.new_zeros(len(x), count, x.shape[2])
    if degree == 1:
        return earlier
    sent = []
    for receiver in range(degree):
        old, new = _known(rank, receiver, n, count, degree)
        sent.append(torch.cat([earlier[:, old], x[:, new]], dim=1))
    received = [
        sum(part.stop - part.start for part in _known(sender, rank, n, count, degree))
        for sender in range(degree)
    ]
    flat = torch.cat(sent, dim=1).transpose(0, 1).flatten(1).contiguous()
    flat = funcol.all_to_all_single_autograd(
        flat, received, [part.shape[1] for part in sent], mesh.get_group()
    )
    got = funcol.wait_tensor(flat).unflatten(1, (len(x), x.shape[2])).transpose(0, 1)
    *of_ranks, oldest = got.split(received, dim=1)
    return torch.cat([oldest, *of_ranks], dim=1)


def _known(sender: int, receiver: int, n: int, count: int, degree: int) -> tuple[slice, slice]:
    """Return what a rank knows of the `count` tokens before another's slice: of the tokens before
    all slices, which only the last rank knows, and of its own.
    """
    first, last = receiver * n - count, receiver * n  # counted from the first rank's slice
    old = new = slice(0, 0)
    if sender == degree - 1 and first < 0:
        old = slice(first + count, min(last, 0) + count)
    if sender < receiver and first < (sender + 1) * n:
        new = slice(max(first - sender * n, 0), n)
    return old, new

"""The layers with heads (gated_deltanet.py, mamba2.py): their exchange, and the convolution before
their recurrence.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from titan_ulysses.ulysses.attention import Ulysses
from titan_ulysses.ulysses.exchange import send_to_heads, send_to_sequence
from titan_ulysses.ulysses.heads import HeadPlan, LocalHeads, plan_heads
from titan_ulysses.ulysses.states import (
    DocumentPiece,
    State,
    StatefulLayer,
    convolve,
    last_inputs,
    run_by_documents,
)


class Channels(NamedTuple):
    """The channels of a tensor [B, T, heads, size] that passes the convolution."""

    heads: int
    size: int


class Share(NamedTuple):
    """What a rank has of a layer: some heads, and what belongs to them of the parameters."""

    heads: LocalHeads
    weight: Tensor
    """[C, K], of the convolution"""
    bias: Tensor | None
    """[C]"""
    of_heads: list[Tensor]
    """the parameters `Mixer.of_heads`"""

    @property
    def parameters(self) -> list[Tensor | None]:
        return [self.weight, self.bias, *self.of_heads]


class Mixer(StatefulLayer):
    """A kind of layer whose heads are divided among the ranks.

    The first three tensors that `project` returns pass a causal convolution by channels, in whose
    weight they are ordered in the same way. The recurrence takes them and the others.
    """

    of_keys: tuple[bool, ...]
    """Which of the tensors that `project` returns have key heads."""
    of_heads: tuple[str, ...]
    """The names of parameters that have a number for each (value) head."""

    @property
    @abstractmethod
    def channels(self) -> tuple[Channels, Channels, Channels]:
        """Heads and sizes of the tensors that pass the convolution."""

    @abstractmethod
    def project(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the tensors [B, T, H_i, D_i] that go to the ranks of their heads, and the gate,
        which stays.
        """

    @abstractmethod
    def recur(
        self, inputs: list[Tensor], mine: Share, state: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the recurrence: inputs as from `project`, convolved -> output [B, n, h, D], and the
        state after it if wanted.
        """

    @abstractmethod
    def finish(self, output: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Norm and gate the recurrence's output [B, T, H, D], and project it in dtype: -> the
        layer's output [B, T, hidden size].
        """

    def compute(self, hidden: Tensor, ulysses: Ulysses) -> Tensor:
        mesh, plan = ulysses.mesh, self.plan(ulysses.mesh.size())
        tensors, gate = self.project(hidden)
        if mesh.size() > 1:
            tensors = list(send_to_heads(tensors, self.of_keys, plan, mesh))
        mine = self.local(plan.local(mesh.get_local_rank()))
        if mine.heads.query:
            output = self._on_heads(tensors, mine, ulysses)
        else:
            output = self._without_heads(tensors, mine)
        if mesh.size() > 1:
            output = send_to_sequence(output, plan, mesh)
        return self.finish(output, gate, hidden.dtype)

    def _on_heads(self, tensors: list[Tensor], mine: Share, ulysses: Ulysses) -> Tensor:
        """Run convolution and recurrence on this rank's heads of a chunk or of all tokens."""
        extent = ulysses.extent
        state = extent.state_before(self.module, [*tensors, *mine.parameters])

        def run(inputs: list[Tensor], state: State | None, _: DocumentPiece):
            return self.run(inputs, mine, state, extent.hands_state_on)

        output, last = run_by_documents(run, tensors, ulysses.documents, extent.start, state)
        return extent.state_after(self.module, output, last)

    def _without_heads(self, tensors: list[Tensor], mine: Share) -> Tensor:
        """Return the output [B, S, 0, D] of a rank without heads.

        It stays connected to all inputs and parameters: their gradients are collectives, which
        every rank must join. Its dtype is that of the other ranks' outputs, for the exchange.
        """
        with torch.no_grad():
            one = LocalHeads(range(1), range(1), [(slice(0, 1), slice(0, 1))])
            token = [x.new_zeros(1, 1, 1, x.shape[3]) for x in tensors]
            probe, _ = self.run(token, self.local(one), None, False)
        nothing = sum(x.sum() for x in (*tensors, *mine.parameters) if x is not None)
        return (tensors[self.of_keys.index(False)] + nothing).to(probe.dtype)

    def plan(self, degree: int) -> HeadPlan:
        """Return the heads of each of `degree` ranks; key heads are shared as KV heads are."""
        heads = {of_keys: x.heads for of_keys, x in zip(self.of_keys, self.channels, strict=False)}
        return plan_heads(heads[False], heads[True], degree)

    def local(self, heads: LocalHeads) -> Share:
        """Return what a rank with these heads has."""
        spans = [heads.key_value if of_key else heads.query for of_key in self.of_keys[:3]]

        def of_channels(x: Tensor) -> Tensor:
            parts = x.split([of.heads * of.size for of in self.channels])
            return torch.cat(
                [
                    part[span.start * of.size : span.stop * of.size]
                    for part, span, of in zip(parts, spans, self.channels, strict=True)
                ]
            )

        m, own = self.module, slice(heads.query.start, heads.query.stop)
        weight, bias = of_channels(m.conv1d.weight).squeeze(1), m.conv1d.bias
        of_heads = [getattr(m, name)[own] for name in self.of_heads]
        return Share(heads, weight, None if bias is None else of_channels(bias), of_heads)

    def run(
        self, inputs: list[Tensor], mine: Share, state: State | None, wanted: bool
    ) -> tuple[Tensor, State | None]:
        """Run a piece of a document: -> output [B, n, h, D], and the state after it if wanted."""
        m, (tail, before) = self.module, state or (None, None)
        passing, others = inputs[:3], inputs[3:]
        mixed = torch.cat([x.flatten(2) for x in passing], dim=-1).transpose(1, 2)
        convolved = convolve(m, mixed, mine.weight, mine.bias, tail, m.activation).transpose(1, 2)
        parts = convolved.split([x.shape[2] * x.shape[3] for x in passing], dim=-1)
        passed = [x.unflatten(-1, like.shape[2:]) for x, like in zip(parts, passing, strict=True)]
        output, last = self.recur([*passed, *others], mine, before, wanted)
        if not wanted:
            return output, None
        return output, (last_inputs(mixed, tail, m.conv_kernel_size - 1), last)

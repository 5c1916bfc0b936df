"""What the layers with heads share (gated_deltanet.py, mamba2.py): channels of a convolution by
heads, and its call before the recurrence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titan_ulysses.ulysses.heads import HeadPlan, LocalHeads, plan_heads
from titan_ulysses.ulysses.states import State, convolve, last_inputs


class Channels(NamedTuple):
    """The channels of a tensor [B, T, heads, size] that passes the convolution."""

    heads: int
    size: int


class Mixer(ABC):
    """A kind of layer whose heads are divided among ranks, around a module of transformers.

    The first three tensors that `project` returns pass a causal convolution by channels, in whose
    weight they are ordered in the same way. The recurrence takes them and the others.
    """

    of_keys: tuple[bool, ...]
    """Which of the tensors that `project` returns have key heads."""
    of_heads: tuple[str, ...]
    """The names of parameters that have a number for each (value) head."""

    function: str
    """The name of the function of the recurrence in the file of the module's class."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    @abstractmethod
    def channels(self) -> tuple[Channels, Channels, Channels]:
        """Heads and sizes of the tensors that pass the convolution."""

    @property
    @abstractmethod
    def recurrence_flops(self) -> int:
        """FLOPs of a token's recurrence in forward."""

    @abstractmethod
    def project(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the tensors [B, T, H_i, D_i] that go to the ranks of their heads, and the gate,
        which stays.
        """

    @abstractmethod
    def recur(
        self,
        inputs: list[Tensor],
        of_heads: list[Tensor],
        heads: LocalHeads,
        state: Tensor | None,
        wanted: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the recurrence: inputs as from `project`, convolved -> output [B, n, h, D], and the
        state after it if wanted.
        """

    @abstractmethod
    def gated(self, output: Tensor, gate: Tensor) -> Tensor:
        """Norm and gate output [B, T, H, D]: -> [B, T, H * D]."""

    @abstractmethod
    def project_back(self, gated: Tensor) -> Tensor:
        """Return the layer's output [B, T, hidden size]."""

    def plan(self, degree: int) -> HeadPlan:
        """Return the heads of each of `degree` ranks; key heads are shared as KV heads are."""
        heads = {of_keys: x.heads for of_keys, x in zip(self.of_keys, self.channels, strict=False)}
        return plan_heads(heads[False], heads[True], degree)

    def local(self, heads: LocalHeads) -> list[Tensor | None]:
        """Return what heads need of the parameters: weight [C, K] and bias [C] of the convolution's
        channels, and the parameters `of_heads`.
        """
        spans = [heads.key_value if of_key else heads.query for of_key in self.of_keys[:3]]

        def of_channels(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            parts = x.split([of.heads * of.size for of in self.channels])
            return torch.cat(
                [
                    part[span.start * of.size : span.stop * of.size]
                    for part, span, of in zip(parts, spans, self.channels, strict=True)
                ]
            )

        convolution = self.module.conv1d
        weight, bias = of_channels(convolution.weight), of_channels(convolution.bias)
        own = slice(heads.query.start, heads.query.stop)
        return [
            weight.squeeze(1),
            bias,
            *(getattr(self.module, name)[own] for name in self.of_heads),
        ]

    def run(
        self,
        inputs: list[Tensor],
        local: list[Tensor | None],
        heads: LocalHeads,
        state: State | None,
        wanted: bool,
    ) -> tuple[Tensor, State | None]:
        """Run a piece of a document: -> output [B, n, h, D], and the state after it if wanted."""
        m, (weight, bias, *of_heads) = self.module, local
        tail, before = state or (None, None)
        passing, others = inputs[:3], inputs[3:]
        mixed = torch.cat([x.flatten(2) for x in passing], dim=-1).transpose(1, 2)
        convolved = convolve(m, mixed, weight, bias, tail, m.activation).transpose(1, 2)
        parts = convolved.split([x.shape[2] * x.shape[3] for x in passing], dim=-1)
        passed = [x.unflatten(-1, like.shape[2:]) for x, like in zip(parts, passing, strict=True)]
        output, last = self.recur([*passed, *others], of_heads, heads, before, wanted)
        if not wanted:
            return output, None
        return output, (last_inputs(mixed, tail, m.conv_kernel_size - 1), last)

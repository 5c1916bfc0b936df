"""Mamba-2 (arXiv 2405.21060): granitemoehybrid, bamba, falcon_h1, nemotron_h."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_ulysses.ulysses.heads import HeadPlan, LocalHeads, plan_heads
from titan_ulysses.ulysses.states import State, convolve, function_of, last_inputs

_PARTS = ("A_log", "D", "dt_bias", "conv1d", "in_proj", "out_proj", "n_groups", "ssm_state_size")


class Mamba2:
    """Per head, S <- exp(dt * A) * S + dt * x B^T, and the output is S C + D * x.

    Groups of heads share B and C, as query heads share a KV head. x, B and C pass a causal
    convolution by channels, which are ordered [x, B, C]. Where mamba-ssm is installed, training
    takes one kernel of everything from the convolution to the output projection. Here convolution
    and scan are called apart.
    """

    of_keys: tuple[bool, ...] = (False, True, True, False)

    def __init__(self, module: nn.Module):
        self.module = module

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module is such a layer, by the names of its parts."""
        return all(hasattr(module, name) for name in _PARTS)

    @property
    def recurrence_flops(self) -> int:
        m = self.module
        return 2 * 2 * m.num_heads * m.head_dim * m.ssm_state_size

    def plan(self, degree: int) -> HeadPlan:
        return plan_heads(self.module.num_heads, self.module.n_groups, degree)

    def project(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return x [B, T, H, D], B and C [B, T, groups, N], dt [B, T, H, 1], gate [B, T, H * D]."""
        m = self.module
        # falcon_h1 has multipliers.
        projected = m.in_proj(hidden * getattr(m, "ssm_in_multiplier", 1.0))
        if (multipliers := getattr(m, "mup_vector", None)) is not None:
            # Computing in bf16 with parameters in fp32, it would make everything fp32.
            projected = projected * multipliers.to(projected.dtype)
        states = m.n_groups * m.ssm_state_size
        gate, x, b, c, dt = projected.split(
            [m.intermediate_size, m.intermediate_size, states, states, m.num_heads], dim=-1
        )
        b, c = (y.unflatten(-1, (m.n_groups, m.ssm_state_size)) for y in (b, c))
        return [x.unflatten(-1, (m.num_heads, m.head_dim)), b, c, dt[..., None]], gate

    def local(self, heads: LocalHeads) -> list[Tensor | None]:
        """Return weight and bias of the convolution, A_log, D and dt_bias."""
        m = self.module
        size, states = m.ssm_state_size, m.n_groups * m.ssm_state_size
        values = slice(heads.query.start * m.head_dim, heads.query.stop * m.head_dim)
        groups = slice(heads.key_value.start * size, heads.key_value.stop * size)

        def channels(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            of_x, of_b, of_c = x.split([m.intermediate_size, states, states])
            return torch.cat([of_x[values], of_b[groups], of_c[groups]])

        own = slice(heads.query.start, heads.query.stop)
        weight, bias = channels(m.conv1d.weight), channels(m.conv1d.bias)
        return [weight.squeeze(1), bias, m.A_log[own], m.D[own], m.dt_bias[own]]

    def run(
        self,
        inputs: list[Tensor],
        local: list[Tensor | None],
        heads: LocalHeads,
        state: State | None,
        wanted: bool,
    ) -> tuple[Tensor, State | None]:
        m, (weight, bias, a_log, d, dt_bias) = self.module, local
        tail, recurrent = state or (None, None)
        x, b, c, dt = inputs
        mixed = torch.cat([y.flatten(2) for y in (x, b, c)], dim=-1).transpose(1, 2)
        convolved = convolve(m, mixed, weight, bias, tail, m.activation).transpose(1, 2)
        widths = [y.shape[2] * y.shape[3] for y in (x, b, c)]
        x, b, c = (
            y.unflatten(-1, like.shape[2:])
            for y, like in zip(convolved.split(widths, dim=-1), (x, b, c), strict=True)
        )
        if len(heads.runs) > 1:  # the scan wants equally many heads in each group
            b, c = heads.repeat(b), heads.repeat(c)
        result = function_of(m, "mamba2_chunk_scan")(
            x,
            dt.squeeze(-1),
            -torch.exp(a_log.float()),
            b,
            c,
            chunk_size=m.chunk_size,
            D=d,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_states=recurrent,
            dt_limit=m.time_step_limit,
            return_final_states=wanted,
        )
        if not wanted:
            return result, None
        output, last = result
        return output, (last_inputs(mixed, tail, m.conv_kernel_size - 1), last)

    def gated(self, output: Tensor, gate: Tensor) -> Tensor:
        flat = output.flatten(2)
        if getattr(self.module, "mamba_rms_norm", True):
            return self.module.norm(flat, gate)
        return flat * F.silu(gate)  # falcon_h1 may gate without a norm

    def project_back(self, gated: Tensor) -> Tensor:
        return self.module.out_proj(gated)

"""Mamba-2 (arXiv 2405.21060): granitemoehybrid, bamba, falcon_h1, nemotron_h."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_ulysses.ulysses.mixer import Channels, Mixer, Share
from titan_ulysses.ulysses.states import function_of

_PARTS = ("A_log", "D", "dt_bias", "conv1d", "in_proj", "out_proj", "n_groups", "ssm_state_size")


class Mamba2(Mixer):
    """Per head, S <- exp(dt * A) * S + dt * x B^T, and the output is S C + D * x.

    Groups of heads share B and C, as query heads share a KV head. x, B and C pass a causal
    convolution by channels, which are ordered [x, B, C]. Where mamba-ssm is installed, training
    takes one kernel of everything from the convolution to the output projection. Here convolution
    and scan are called apart.
    """

    of_keys = (False, True, True, False)
    recurrence = "mamba2_chunk_scan"
    of_heads = ("A_log", "D", "dt_bias")

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in _PARTS)

    @property
    def channels(self) -> tuple[Channels, Channels, Channels]:
        m = self.module
        groups = Channels(m.n_groups, m.ssm_state_size)
        return Channels(m.num_heads, m.head_dim), groups, groups

    @property
    def recurrence_flops(self) -> int:
        m = self.module
        return 2 * 2 * m.num_heads * m.head_dim * m.ssm_state_size

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

    def recur(
        self, inputs: list[Tensor], mine: Share, state: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        m, (x, b, c, dt), (a_log, d, dt_bias) = self.module, inputs, mine.of_heads
        if len(mine.heads.runs) > 1:  # the scan wants equally many heads in each group
            b, c = mine.heads.repeat(b), mine.heads.repeat(c)
        result = function_of(m, self.recurrence, x.device)(
            x,
            dt.squeeze(-1),
            -torch.exp(a_log.float()),
            b,
            c,
            chunk_size=m.chunk_size,
            D=d,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_states=state,
            dt_limit=m.time_step_limit,
            return_final_states=wanted,
        )
        return result if wanted else (result, None)

    def finish(self, output: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        m, flat = self.module, output.flatten(2)
        # falcon_h1 may gate without a norm.
        has_norm = getattr(m, "mamba_rms_norm", True)
        return m.out_proj((m.norm(flat, gate) if has_norm else flat * F.silu(gate)).to(dtype))

"""Gated DeltaNet (arXiv 2412.06464): qwen3_next, qwen3_5, olmo_hybrid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_ulysses.ulysses.mixer import Channels, Mixer, Share
from titan_ulysses.ulysses.states import function_of

_PROJECTIONS = (
    ("in_proj_qkvz", "in_proj_ba", "fix_query_key_value_ordering"),  # qwen3_next
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # qwen3_5
    ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj"),  # olmo_hybrid
)


class GatedDeltaNet(Mixer):
    """Per head, S <- exp(g) * S + k (beta * (v - (exp(g) * S)^T k))^T, and the output is S^T q.

    q and k have fewer heads than v, or as many. Before it, q, k and v pass a causal convolution by
    channels. The weights of its channels are ordered [q, k, v].
    """

    of_keys = (True, True, False, False, False)
    recurrence = "torch_chunk_gated_delta_rule"
    of_heads = ("A_log", "dt_bias")

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return all(
            hasattr(module, name) for name in ("A_log", "dt_bias", "conv1d", "head_k_dim")
        ) and any(all(hasattr(module, name) for name in names) for names in _PROJECTIONS)

    @property
    def channels(self) -> tuple[Channels, Channels, Channels]:
        m = self.module
        keys = Channels(m.num_k_heads, m.head_k_dim)
        return keys, keys, Channels(m.num_v_heads, m.head_v_dim)

    @property
    def recurrence_flops(self) -> int:
        m = self.module
        return 3 * 2 * m.num_v_heads * m.head_k_dim * m.head_v_dim

    def project(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], b, a [B, T, Hv, 1], gate [B, T, Hv * Dv].

        qwen3_next orders its projections by key heads, which only its own function undoes.
        """
        m = self.module
        if hasattr(m, "in_proj_qkvz"):
            q, k, v, gate, b, a = m.fix_query_key_value_ordering(
                m.in_proj_qkvz(hidden), m.in_proj_ba(hidden)
            )
            return [q, k, v, b[..., None], a[..., None]], gate
        if hasattr(m, "in_proj_qkv"):
            q, k, v = m.in_proj_qkv(hidden).split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
            gate, b, a = m.in_proj_z(hidden), m.in_proj_b(hidden), m.in_proj_a(hidden)
        else:
            q, k, v, gate, b, a = (
                getattr(m, name)(hidden)
                for name in ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
            )
        q, k = (x.unflatten(-1, (m.num_k_heads, m.head_k_dim)) for x in (q, k))
        return [q, k, v.unflatten(-1, (m.num_v_heads, m.head_v_dim)), b[..., None], a[..., None]], (
            gate
        )

    def recur(
        self, inputs: list[Tensor], mine: Share, state: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        m, (q, k, v, b, a), (a_log, dt_bias) = self.module, inputs, mine.of_heads
        beta = b.squeeze(-1).sigmoid()
        if getattr(m, "allow_neg_eigval", False):
            beta = beta * 2.0
        decay = -a_log.float().exp() * F.softplus(a.squeeze(-1).float() + dt_bias)
        return function_of(m, self.recurrence, v.device)(
            mine.heads.repeat(q),
            mine.heads.repeat(k),
            v,
            g=decay,
            beta=beta,
            initial_state=state,
            output_final_state=wanted,
            use_qk_l2norm_in_kernel=True,
        )

    def finish(self, output: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        m = self.module
        norm = m.o_norm if hasattr(m, "o_norm") else m.norm
        flat = norm(output.reshape(-1, m.head_v_dim), gate.reshape(-1, m.head_v_dim))
        project = m.o_proj if hasattr(m, "o_proj") else m.out_proj
        return project(flat.view(*output.shape[:2], m.value_dim).to(dtype))

"""Router losses (`output_router_logits = true`): load balancing over all tokens of a micro-batch.

The loss is that of transformers (Switch Transformer, arXiv 2101.03961, equations 4 to 6), over the
tokens of all ranks. There are N rows of logits: those that the routers of all layers make of a
micro-batch's tokens, without padding. With p the softmax over the E experts:

    aux = E * sum_e F_e * P_e / N^2
    F_e: rows that have expert e among their top k; P_e: sum of the rows' p_e

A micro-batch is what all ranks, data-parallel ones too, train on in one forward, so aux does not
depend on how many ranks share it. In a step of several micro-batches, each adds (its labels / the
step's labels) * (its mean cross-entropy + coefficient * aux). This is the mean of what transformers
returns for each of them, weighted by labels as cross-entropy is.

F and P are sums over all ranks, so no rank can differentiate its own part of the product alone. But
F and N are counts. Once they are known, d aux / d p_e is E * F_e / N^2 in every row, and gradients
add up over rows, tiles, layers and ranks. So the routers count during forward. One all-reduce at
its end sums F, P and N over the ranks, and there is none on the layer path. In backward, each
router's logits get their gradient where they were made. Under activation checkpointing no logits
are kept for this.

A layer may be computed again in backward, as a whole (torch's checkpoint) or tile by tile. A
context variable says which forward it belongs to. Code that computes a layer again and
differentiates this second computation must run in the `contextvars.copy_context()` of its forward,
with tiles in the same order. torch's checkpoint does not need this, because it differentiates the
first graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import current_chunk

_LOSS_FUNCTION = "load_balancing_loss_func"
_LOSS_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""Arguments of the function above, of which every family's file has a copy.

A function with other arguments computes another loss.
"""


@dataclass(frozen=True)
class RouterLoss:
    """The router loss of one model."""

    coefficient: float
    top_k: int

    @contextmanager
    def forward_pass(self, *, count: bool, mask: Tensor | None) -> Iterator[RouterLossPass]:
        """Make the routers that run in this context belong to a new pass.

        `count` says whether their logits are counted. `mask` [B, T] is 0 at padding.
        """
        current = RouterLossPass(self.top_k, counting=count, mask=mask)
        token = _current.set(current)
        try:
            yield current
        finally:
            _current.reset(token)
            current.counting = False


class RouterLossPass:
    """One forward: first the counts of its routers, then what its backward needs."""

    def __init__(self, top_k: int, *, counting: bool, mask: Tensor | None) -> None:
        self.top_k, self.counting = top_k, counting
        self._mask = mask
        self._next_row: dict[tuple[nn.Module, int | None], int] = {}
        self._sums: Tensor | None = None
        self.slope: Tensor | None = None
        """[E]: the derivative of the differentiated scalar by each p_e, the same in all rows.

        It is set before backward reaches the layers.
        """

    def rows_of(self, router: nn.Module, logits: Tensor) -> Tensor | None:
        """Return [n, 1], 0 at padding, for the next n rows that a router sees; None without a mask.

        The first row follows the last, because a layer that is computed again starts over. A block
        that is streamed sees the rows of one chunk at a time.
        """
        if self._mask is None:
            return None
        chunk = current_chunk()
        mask = (self._mask if chunk is None else self._mask[:, chunk.local]).flatten()
        key = router, None if chunk is None else chunk.index
        start, count = self._next_row.get(key, 0), len(logits)
        assert start + count <= len(mask), (
            "a router did not see all tokens, in order, before the first came again"
        )
        self._next_row[key] = (start + count) % len(mask)
        return mask[start : start + count, None]

    @torch.no_grad()
    def count(self, logits: Tensor, rows: Tensor | None) -> None:
        """Add the contribution of logits [n, E] to F, P and N.

        The sums are in fp64, so that their number of parts does not affect the result in fp32.
        """
        probabilities = _probabilities(logits)
        chosen = torch.zeros_like(probabilities).scatter_(
            1, probabilities.topk(self.top_k).indices, 1
        )
        number = probabilities.new_full((1,), len(logits))
        if rows is not None:
            chosen, probabilities, number = chosen * rows, probabilities * rows, rows.sum(0)
        sums = torch.cat([chosen.sum(0), probabilities.sum(0, dtype=torch.float64), number])
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(
        self, hidden: Tensor, labels: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden unchanged, the router loss and the number of labels, both over all ranks.

        `hidden` is the decoder's output, and `labels` is this rank's number of labels. The loss is
        in fp32 or wider, and its gradient is that of this rank's tokens. All computations on the
        decoder's output must use the returned tensor: backward then knows the gradient of the loss
        before it reaches a router. Collective.
        """
        assert self._sums is not None, "no router has run"
        return _ReduceCounts.apply(self, self._sums, hidden, labels, group)


_current: ContextVar[RouterLossPass | None] = ContextVar(
    "the forward pass that routers belong to", default=None
)


def router_loss_of(model: PreTrainedModel, decoder: nn.Module) -> RouterLoss | None:
    """Return the router loss that model's config asks for, or None if it asks for none.

    Hooks are added to the routers. UserError if the routers or the coefficient cannot be found.
    """
    if not getattr(model.config, "output_router_logits", False):
        return None
    coefficient, top_k = (
        getattr(model, name, None) for name in ("router_aux_loss_coef", "num_experts_per_tok")
    )
    # transformers declares here which modules are routers, and which of their outputs are logits.
    recorder = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits")
    target, place = getattr(recorder, "target_class", None), getattr(recorder, "layer_name", None)
    routers = [
        module
        for name, module in decoder.named_modules()
        if target is not None
        and isinstance(module, target)
        and (place is None or f".{place}." in f".{name}.")
    ]
    if not routers or coefficient is None or top_k is None:
        raise UserError(
            f'model: "{model.config.model_type}" has output_router_logits = true, but '
            f"{'its routers' if not routers else 'the weight of its router loss'} cannot be found. "
            "Set output_router_logits = false to train without a router loss."
        )
    for router in routers:
        router.register_forward_hook(partial(_attach, recorder.index))
    return RouterLoss(coefficient, top_k)


def unknown_router_loss(config: PreTrainedConfig) -> str | None:
    """Describe how the router loss that config asks for differs from the one above.

    The result is None if it does not differ, or if config asks for none.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None or not getattr(config, "output_router_logits", False):
        return None
    function = getattr(sys.modules[family.__module__], _LOSS_FUNCTION, None)
    if function is None:
        return "router losses (output_router_logits), of which transformers has none for it"
    if list(signature(function).parameters) != _LOSS_ARGUMENTS:
        return "router losses (output_router_logits) of its own kind"
    return None


@torch.compiler.disable
def _attach(index: int, router: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """Count the logits of a router that has run, and attach the loss's gradient to its outputs.

    Most families use the weights that a router makes of its logits, not the logits. So all its
    outputs pass through one autograd node, which adds to the gradient of the logits. The node is
    made in recomputations too, because they must save the same tensors.
    """
    outputs = list(output) if isinstance(output, tuple) else [output]
    logits, current = outputs[index], _current.get()
    rows = current.rows_of(router, logits) if current is not None else None
    if current is not None and current.counting:
        current.count(logits, rows)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return output
    others = [
        i for i, x in enumerate(outputs) if i != index and isinstance(x, Tensor) and x.requires_grad
    ]
    passed = _AddRouterGradient.apply(current, rows, logits, *(outputs[i] for i in others))
    for i, x in zip((index, *others), passed, strict=True):
        outputs[i] = x
    return tuple(outputs) if isinstance(output, tuple) else outputs[0]


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)


class _AddRouterGradient(torch.autograd.Function):
    """The identity on a router's outputs; backward adds the loss's gradient to the logits' own."""

    @staticmethod
    def forward(
        ctx, current: RouterLossPass | None, rows: Tensor | None, logits: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits)
        ctx.current, ctx.rows = current, rows
        return logits, *others

    @staticmethod
    def backward(ctx, grad: Tensor | None, *others: Tensor | None):
        assert ctx.current is not None, (
            "a router was computed again outside of its forward's context variables"
        )
        if ctx.current.slope is not None:  # None: only the model's logits are differentiated
            (logits,) = ctx.saved_tensors
            probabilities = _probabilities(logits)
            weighted = probabilities * ctx.current.slope.to(probabilities.dtype)
            own = weighted - probabilities * weighted.sum(-1, keepdim=True)
            own = (own if ctx.rows is None else own * ctx.rows).to(logits.dtype)
            grad = own if grad is None else grad + own
        return None, None, grad, *others


class _ReduceCounts(torch.autograd.Function):
    """Sums the ranks' counts in forward.

    Backward sets the slope from the loss's gradient, and then goes on to the last layer.
    """

    @staticmethod
    def forward(
        ctx,
        current: RouterLossPass,
        sums: Tensor,
        hidden: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup,
    ):
        totals = torch.cat([sums, labels[None].to(sums.dtype)])
        dist.all_reduce(totals, group=group)
        chosen, probabilities = totals[:-2].chunk(2)
        ctx.current, ctx.slope = current, len(chosen) * chosen / totals[-2].clamp(min=1) ** 2
        labels = totals[-1].to(labels.dtype)
        ctx.mark_non_differentiable(labels)
        loss = (
            (ctx.slope * probabilities).sum().to(torch.promote_types(hidden.dtype, torch.float32))
        )
        return hidden, loss, labels

    @staticmethod
    def backward(ctx, grad_hidden: Tensor, upstream: Tensor, _):
        ctx.current.slope = ctx.slope * upstream
        return None, None, grad_hidden, None, None

"""The loss head: an `lm_head` that computes the cross-entropy one tile of tokens at a time.

The logits of all tokens never exist at once. This is ALST's "tiled loss" (arXiv 2506.13996, section
3.1). Here the forward of a tile also computes its gradient, because both need the same logits: the
logits are computed only once, and the memory they take does not grow with the sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_ulysses.distributed.errors import UserError, of_all_ranks, one_line
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.memory.losses import (
    LossFunction,
    TokenStatistics,
    check_is_sum,
    cross_entropies,
    name_of,
    shape_scores,
    token_statistics,
)
from titan_ulysses.memory.sequences import ON_DEVICE, Sequences
from titan_ulysses.memory.tiled import tiled, tiles, tiles_with_next

_TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Bytes of the fp32 logits of a tile, by device type.

Products of a few hundred rows do not fill a GPU, and each tile reads the whole weight and adds to
the whole gradient of it.
"""
_CUDA_ROWS = 256
"""Tiles on CUDA have a multiple of so many rows: the kernels of products compute blocks of rows."""

_CHECKED_ROWS = 256
"""Tokens with labels with which a loss function is tried before its first use."""


def automatic_tile(vocabulary: int, device_type: str) -> int:
    """Return the tokens of a tile of logits of so many entries a token."""
    tokens = _TILE_BYTES.get(device_type, _TILE_BYTES["cpu"]) // (4 * vocabulary)
    return max(1, tokens) if device_type == "cpu" else max(1, tokens // _CUDA_ROWS) * _CUDA_ROWS


class LossHead(nn.Linear):
    """An `lm_head` with the same parameters and names, whose forward also computes the loss.

    It owns the weight, so FSDP shards this module, and one all-gather and one reduce-scatter serve
    all tiles. `tile_tokens` = 0 takes as many tokens per tile as give 64 MiB of fp32 logits, or 1
    GiB if device_type is "cuda"; -1 takes all tokens at once. For model families that scale or cap
    their logits, the logits become softcap * tanh(scale * logits / softcap). While gradients are
    computed, z_loss * (log of the sum of exp(logits))^2 is added to the loss of each label (PaLM,
    arXiv 2204.02311, section 5), and label_smoothing (e) makes of its cross-entropy (1 - e) times
    that, plus e times the mean over the vocabulary (arXiv 1512.00567, section 7).
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        tile_tokens: int = 0,
        scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        device_type: str = "cpu",
    ):
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.softcap, self.z_loss = scale, softcap, z_loss
        self.label_smoothing = label_smoothing
        self.sequences = ON_DEVICE
        """How hidden is read (see `sequences.py`)."""
        self.tile_tokens = tile_tokens or automatic_tile(linear.out_features, device_type)
        self.adds_wide = device_type == "cuda" and can_add_wide()
        self.checked: LossFunction | None = None
        """The last loss function that was found to be a sum over tokens."""
        self.row_losses: Tensor | None = None
        """[B] fp64: the summed losses of each row of the last batch, on this rank; None if a loss
        function has returned sums.
        """

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
        *,
        reduction: Literal["sum", "none", "statistics", "hidden"] = "sum",
        temperature: float = 1.0,
        loss_function: LossFunction | None = None,
        loss_inputs: dict[str, Tensor] | None = None,
    ) -> Tensor | TokenStatistics:
        """Return this rank's part of the loss, a scalar, from hidden [B, T, h] and labels [B, T].

        Labels are already shifted. The part is the sum of the cross-entropies of this rank's valid
        labels (those that are not -100), divided by `num_items`, the number of valid labels in the
        whole step, on all ranks and in all accumulated batches. The parts of all ranks and batches
        add up to the loss, and so do their gradients. Each cross-entropy is computed in fp32 or
        wider. Sums, and therefore the part, are in fp64, so that the number of tiles and ranks has
        no visible effect on the loss.

        `row_losses` then has the sums of each row [B], in fp64 and without gradient, also with a
        loss function that returns the loss of each label.

        Without labels, return the logits [B, T, V]. With reduction = "none", return the
        cross-entropy of each label [B, T], with 0 for labels of -100, or what a loss function
        returns for each. With reduction = "hidden", return hidden: on the device, unless gradients
        are computed and it is off it.

        With reduction = "statistics", return the TokenStatistics [B, T] of the labels at this
        temperature. With a loss function (see `losses.py`), its sum takes the place of that of the
        cross-entropies; `loss_inputs` are [B, T, ...]. These, and reduction = "none", have
        gradients, whose backward computes the logits again and needs the weight: under FSDP, it
        must be gathered then.
        """
        sequences = self.sequences.in_use()
        if reduction == "hidden":
            if not torch.is_grad_enabled():
                return sequences.fetch(hidden)
            sequences.finish()  # gradients come back to where hidden is, so the host computes on
            return hidden
        by_logits = loss_function is not None or reduction != "sum"
        if sequences is not ON_DEVICE and by_logits and torch.is_grad_enabled():
            raise UserError(
                "memory.stream_offload: a loss_function and log_probs need the hidden states on "
                'the device in backward. Set it to "none".'
            )
        if labels is None or by_logits:
            hidden = sequences.fetch(hidden)
        if labels is None:
            return shape_scores(super().forward(hidden), self.scale, self.softcap)
        if reduction == "statistics":
            statistics = partial(token_statistics, temperature=temperature)
            return self._tiled(statistics, hidden, labels)
        if reduction == "none":
            return self._each(hidden, labels, loss_function, loss_inputs)
        if loss_function is not None:
            self._check(loss_function, hidden, labels, loss_inputs or {})
            return self._own(loss_function, hidden, labels, loss_inputs) / num_items.clamp(min=1)
        return self._sum(hidden, labels, sequences) / num_items.clamp(min=1)

    def _sum(self, hidden: Tensor, labels: Tensor, sequences: Sequences) -> Tensor:
        """Return the sum of the cross-entropies of this rank's labels, with its gradients."""
        parameters = sequences.inputs_for([self.weight, self.bias])
        # Passed as an argument: inside an autograd function is_grad_enabled() is always False, and
        # needs_input_grad ignores no_grad.
        differentiate = torch.is_grad_enabled()
        total, self.row_losses = _TiledCrossEntropy.apply(
            hidden.flatten(0, -2), *parameters, _by_row(labels), self, differentiate, sequences
        )
        return total

    def _own(
        self,
        function: LossFunction,
        hidden: Tensor,
        labels: Tensor,
        inputs: dict[str, Tensor] | None,
    ) -> Tensor:
        """Return the sum of a loss function over this rank's labels, in fp64."""
        found = self._tiled(function, hidden, labels, inputs)
        self.row_losses = None
        if found.ndim:  # the loss of each label
            self.row_losses = _by_row(found.detach()).sum(dim=1, dtype=torch.float64)
            found = found.sum(dtype=torch.float64)
        return found

    def tile_of(self, labels: Tensor) -> int:
        """Return the tokens of a tile of these labels."""
        return self.tile_tokens if self.tile_tokens != -1 else max(1, labels.numel())

    def _each(
        self,
        hidden: Tensor,
        labels: Tensor,
        function: LossFunction | None,
        inputs: dict[str, Tensor] | None,
    ) -> Tensor:
        """Return the loss of each label [B, T], the cross-entropy or that of a function."""
        if function is not None or torch.is_grad_enabled():
            function = function or cross_entropies
            each = self._tiled(function, hidden, labels, inputs)
            if each.shape != labels.shape:
                raise UserError(
                    f"loss_function {name_of(function)} returned a tensor of shape "
                    f"{list(each.shape)} for labels of shape {list(labels.shape)}: with "
                    'reduction = "none", return the loss of each token.'
                )
            return each
        rows, flat = hidden.flatten(0, -2), labels.flatten()
        wide = torch.promote_types(rows.dtype, torch.float32)
        each = torch.empty(len(rows), dtype=wide, device=rows.device)
        for tile in tiles(len(rows), self.tile_of(labels)):
            scores = _scores(rows[tile], self.weight, self.bias, self)
            each[tile] = _cross_entropy(scores, flat[tile], flat[tile] != IGNORE_INDEX)[0]
        return each.view(labels.shape)

    def _logits(self, rows: Tensor) -> Tensor:
        """Return the scaled and capped logits [n, V] of rows [n, h], in fp32 or wider."""
        logits = F.linear(rows, self.weight, self.bias)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return shape_scores(logits.to(wide), self.scale, self.softcap)

    def _tiled(
        self,
        function: Callable[..., Any],
        hidden: Tensor,
        labels: Tensor,
        tokens: dict[str, Tensor] | None = None,
    ) -> Any:
        """Return function(logits, labels, **tokens), computed by tiles (see `tiled`)."""

        def of_rows(rows: Tensor, labels: Tensor, **tokens: Tensor) -> Any:
            # `where`, because a row without a label may hold anything, also inf.
            rows = rows.where((labels != IGNORE_INDEX).unsqueeze(-1), 0)
            return function(self._logits(rows), labels, **tokens)

        tokens = {"labels": labels} | (tokens or {})
        return tiled(of_rows, hidden, tile_tokens=self.tile_of(labels), parameters=self, **tokens)

    def _check(
        self, function: LossFunction, hidden: Tensor, labels: Tensor, tokens: dict[str, Tensor]
    ) -> None:
        """Raise UserError, on every rank, if the function is not a sum over tokens on one of them.

        It is tried once there are labels, and is not tried again. Collective until then.
        """
        if function is self.checked:
            return
        reason, tried = None, False
        failed: Exception | None = None
        try:
            tried = self._is_sum(function, hidden, labels, tokens)
        except UserError as error:
            reason, failed = str(error), error
        except Exception as error:  # a function of the user's own raises whatever it likes
            reason, failed = f"loss_function: {type(error).__name__}: {one_line(error)}", error
        reasons, were_tried = zip(*of_all_ranks((reason, tried)), strict=True)
        if reason := next(filter(None, reasons), None):
            raise failed or UserError(reason)
        if any(were_tried):
            self.checked = function

    @torch.no_grad()
    def _is_sum(
        self, function: LossFunction, hidden: Tensor, labels: Tensor, tokens: dict[str, Tensor]
    ) -> bool:
        """Return whether rows were there that prove it; UserError if they prove that it is none."""
        lead, flat = labels.shape, labels.flatten()
        few = (flat != IGNORE_INDEX).nonzero().flatten()[:_CHECKED_ROWS]
        logits = self._logits(hidden.flatten(0, -2)[few])
        if not len(few) or not logits.isfinite().all():
            return False
        if len(few) == 1:  # of one token, a mean is the sum
            few, logits = few.repeat(2), logits.repeat(2, 1)
        some = {key: x.reshape(-1, *x.shape[len(lead) :])[few] for key, x in tokens.items()}
        check_is_sum(function, logits, flat[few], **some)
        return True


class _TiledCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropy over rows [B * T, h] with labels [B, T], and the sums [B] of the B
    sequences that they are of, in fp64.

    Gradients of the first are computed in forward and scaled in backward. The second has none.
    Off the device, weight and bias are stand-ins of the parameters of `head`.
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: LossHead,
        differentiate: bool,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        tile_tokens, tokens_of_row = head.tile_of(labels), labels.shape[1]
        # Gradients of parameters are accumulated over the tiles in this dtype.
        wide = torch.promote_types(rows.dtype, torch.float32)
        needs = [differentiate and needed for needed in ctx.needs_input_grad[:3]]
        needs_rows, needs_weight, needs_bias = needs
        totals = torch.zeros(len(labels), dtype=torch.float64, device=weight.device)
        labels = labels.flatten()
        grad_rows = sequences.empty(rows) if needs_rows else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for tile, then in tiles_with_next(len(rows), tile_tokens):
            valid = labels[tile] != IGNORE_INDEX
            x = sequences.read(rows, tile, then, dim=0)
            # Rows without a label are zeroed here and in grad_rows, and not in the logits, which
            # are much larger. `where` is used because a product with 0 is not 0 for inf or nan.
            x = x.where(valid.unsqueeze(1), 0)
            each, grad_logits = _tile_loss(x, weight, bias, labels[tile], valid, head, any(needs))
            for row, part in _parts_of_rows(tile, tokens_of_row):
                totals[row] += each[part].sum(dtype=torch.float64)
            if needs_bias:
                grad_bias += valid.to(wide) @ grad_logits
            if grad_logits is not None:
                grad_logits = grad_logits.to(rows.dtype)
            if needs_rows:
                into = grad_rows[tile] if sequences is ON_DEVICE else torch.empty_like(x)
                torch.mm(grad_logits, weight, out=into).masked_fill_(~valid.unsqueeze(1), 0)
                if sequences is not ON_DEVICE:
                    sequences.write(grad_rows, tile, into, dim=0)
            if needs_weight:
                add_product(grad_weight, grad_logits.t(), x, adds_wide=head.adds_wide)
        ctx.tile_tokens, ctx.sequences = tile_tokens, sequences
        ctx.parameters = [head.weight, head.bias]
        ctx.grads = [grad_rows, grad_weight, grad_bias]
        ctx.dtypes = [x.dtype if x is not None else None for x in (rows, weight, bias)]
        ctx.mark_non_differentiable(totals)
        return totals.sum(), totals

    @staticmethod
    def backward(ctx, upstream: Tensor, _: Tensor):
        assert ctx.grads is not None, (
            "the loss head keeps its gradients for one backward: it cannot run twice"
        )
        grads, ctx.grads = ctx.grads, None
        rows, sequences = grads[0], ctx.sequences
        if rows is not None and sequences is not ON_DEVICE:
            for tile, then in tiles_with_next(len(rows), ctx.tile_tokens):
                part = sequences.read(rows, tile, then, dim=0)
                sequences.write(rows, tile, part * upstream.to(rows.dtype), dim=0)
        # In place: these are the largest buffers of the head, and nothing else refers to them.
        for grad in grads[0 if sequences is ON_DEVICE else 1 :]:
            if grad is not None:
                grad.mul_(upstream)
        sequences.add_gradients(ctx.parameters, grads)
        scaled = [
            grad.to(dtype) if grad is not None else None
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def _parts_of_rows(tile: slice, tokens: int) -> Iterator[tuple[int, slice]]:
    """Yield the sequences of so many tokens that a tile has tokens of, with the part of each."""
    first = tile.start
    while first < tile.stop:
        row = first // tokens
        last = min(tile.stop, (row + 1) * tokens)
        yield row, slice(first - tile.start, last - tile.start)
        first = last


def _by_row(x: Tensor) -> Tensor:
    """Return what belongs to tokens, [B, T] or [T], by sequence: [B, T]."""
    return x if x.ndim == 2 else x[None]


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None, head: LossHead) -> Tensor:
    """Return the scaled and capped logits [n, V] of rows x [n, h].

    They are in fp32 or wider if there is a scale or cap. Otherwise they keep their dtype, and
    `_cross_entropy` converts them as it reads them.
    """
    logits = F.linear(x, weight, bias)
    if head.scale != 1 or head.softcap is not None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return shape_scores(logits, head.scale, head.softcap)


def _cross_entropy(scores: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cross-entropy of scores [n, V], and two tensors that its gradient needs.

    The cross-entropy [n] is 0 for rows that are not valid. The other two are the index [n, 1] of
    the labels (0 for rows that are not valid) and the log-probabilities [n, V], in fp32 or wider.
    """
    index = labels.where(valid, 0).unsqueeze(1)
    # log_softmax is one kernel, which reads the scores once. logsumexp is five kernels, with a
    # buffer of their own.
    log_probabilities = scores.log_softmax(
        dim=1, dtype=torch.promote_types(scores.dtype, torch.float32)
    )
    return (
        (-log_probabilities.gather(1, index)).squeeze(1).where(valid, 0),
        index,
        log_probabilities,
    )


def _tile_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    head: LossHead,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the losses [n] of rows x [n, h], 0 where not valid, and the gradient of their sum by
    the logits.

    The logits here are those before scale and cap. The gradient [n, V] is in fp32 or wider, and
    None if needs_grad is False. It is softmax - one_hot, times the derivative of scale and cap,
    scale * (1 - (scores / softcap)^2). It is not 0 in rows that are not valid; the caller leaves
    those rows out. The z-loss, whose gradient adds 2 * z_loss * log_normalizer * softmax before
    that factor, and label smoothing e, with (1 - e) * one_hot + e / V in place of one_hot, are
    included only if needs_grad is True.
    """
    scale, softcap, z_loss = head.scale, head.softcap, head.z_loss
    smoothing, scores = head.label_smoothing, _scores(x, weight, bias, head)
    slope = scale if softcap is None else scale * (1 - (scores / softcap) ** 2)
    each, index, log_probabilities = _cross_entropy(scores, labels, valid)
    if not needs_grad:
        return each, None
    if smoothing:
        spread = log_probabilities.mean(dim=1).where(valid, 0)
        each = (1 - smoothing) * each - smoothing * spread
    if z_loss:
        log_normalizer = scores.gather(1, index) - log_probabilities.gather(1, index)
        each = each + (z_loss * log_normalizer.squeeze(1) ** 2).where(valid, 0)
    grad = log_probabilities.exp_()
    if z_loss:
        grad.mul_(1 + 2 * z_loss * log_normalizer)
    grad.scatter_add_(1, index, grad.new_full(index.shape, smoothing - 1))
    if smoothing:
        grad.sub_(smoothing / grad.shape[1])
    if scale != 1 or softcap is not None:
        grad.mul_(slope)
    return each, grad


def add_product(total: Tensor, left: Tensor, right: Tensor, *, adds_wide: bool) -> None:
    """Compute total += left @ right, accumulated in total's dtype, which may be wider.

    Accumulating 64 tiles in bf16 would have six times the error. adds_wide: see `can_add_wide`.
    Otherwise the product is a tensor of its own, as large as total, rounded to the dtype of left.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif adds_wide:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


@cache
def can_add_wide() -> bool:
    """Return whether CUDA's products of bf16 can add to fp32 without a tensor between.

    torch's `addmm` takes `out_dtype` on CUDA, but not in every version with an fp32 summand. True
    where there is no GPU to ask: the planner plans for one.
    """
    if not torch.cuda.is_available():
        return True
    total, ones = torch.zeros(16, 16, device="cuda"), torch.ones(16, 16, device="cuda").bfloat16()
    try:
        add_product(total, ones, ones, adds_wide=True)
        add_product(total, ones, ones, adds_wide=True)
    except RuntimeError:
        return False
    return bool((total == 32).all())

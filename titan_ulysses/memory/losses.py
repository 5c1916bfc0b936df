"""Losses other than cross-entropy, as functions of the logits of a tile of tokens.

A sharded model computes them in its loss head, where the logits of one tile exist at a time:

    loss = model(**batch, loss_function=partial(clipped_policy_loss, clip=0.2), loss_inputs={...})

A loss function takes the logits [n, V] (scaled and capped as the model's family does, in fp32 or
wider), the shifted labels [n], and the tensors of `loss_inputs`, of which it gets the same tokens.
It returns the *sum* of the losses of the tokens whose label is not -100. It may also return the
loss of each token [n], 0 without a label: then the head knows the sums of each row too. Any
function of that kind will do, also the user's own; `check_is_sum` finds one that is not a sum over
tokens. The functions here are such functions, and what else these losses need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX

LossFunction = Callable[..., Tensor]
"""(logits [n, V], labels [n], **tensors of these tokens) -> the sum of their losses, a scalar; or
the loss of each [n], 0 where there is no label.
"""


class TokenStatistics(NamedTuple):
    """What the distribution of the next token says of each label; all are 0 without a label."""

    log_probs: Tensor
    """the log-probability of the label"""
    entropy: Tensor
    """the entropy of the distribution, in nats (this and log_probs have a gradient)"""
    is_top1: Tensor
    """whether the label is the most likely token (bool)"""
    mean_logits: Tensor
    """the mean of the logits over the vocabulary, without gradient"""
    log_sum_sq_probs: Tensor
    """the logarithm of the sum of the squared probabilities, without gradient"""


def token_statistics(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> TokenStatistics:
    """Return the statistics [n] of logits [n, V] / temperature."""
    valid = labels != IGNORE_INDEX
    scores = logits / temperature
    log_p = scores.log_softmax(dim=-1)
    index = labels.where(valid, 0).unsqueeze(-1)
    with torch.no_grad():
        is_top1 = (scores.argmax(dim=-1) == labels) & valid
        mean_logits = scores.mean(dim=-1)
        squares = (2 * log_p).logsumexp(dim=-1)
    return TokenStatistics(
        log_p.gather(-1, index).squeeze(-1).where(valid, 0),
        -(log_p.exp() * log_p).sum(dim=-1).where(valid, 0),
        is_top1,
        mean_logits.where(valid, 0),
        squares.where(valid, 0),
    )


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each label [n], 0 where there is none."""
    return -_log_probs(logits, labels, labels != IGNORE_INDEX)


def smoothed_cross_entropies(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Return (1 - smoothing) of the cross-entropy of each label plus smoothing of the mean.

    [n], 0 where there is no label. The mean is that over the vocabulary, as transformers' Trainer
    has it (arXiv 1512.00567, section 7).
    """
    valid = labels != IGNORE_INDEX
    log_p = logits.log_softmax(dim=-1)
    of_labels = log_p.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    each = -(1 - smoothing) * of_labels - smoothing * log_p.mean(dim=-1)
    return each.where(valid, 0)


def clipped_policy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    old_log_probs: Tensor,
    advantages: Tensor,
    reference_log_probs: Tensor | None = None,
    clip: float | tuple[float, float] = 0.2,
    kl: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return the sum of the clipped policy-gradient losses, with a KL penalty.

    With the ratio r = exp(log_prob - old_log_prob) and the advantage A, all [n], a token's loss is
    -min(r A, clamp(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347, equation 7) + kl * k3. Here
    k3 = exp(d) - d - 1 with d = reference_log_prob - log_prob is the estimate of the KL divergence
    from the reference that GRPO uses (arXiv 2402.03300, equation 4). clip is (low, high), or both.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    valid = labels != IGNORE_INDEX
    log_probs = _log_probs(logits, labels, valid, temperature)
    ratio = (log_probs - old_log_probs.where(valid, 0)).exp()
    advantages = advantages.where(valid, 0)
    each = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if kl:
        if reference_log_probs is None:
            raise UserError(f"kl = {kl}: the penalty needs reference_log_probs.")
        difference = reference_log_probs.where(valid, 0) - log_probs
        each = each + kl * (difference.exp() - difference - 1)
    return each.where(valid, 0).sum()


def distillation_loss(logits: Tensor, labels: Tensor, **given: Any) -> Tensor:
    """Return the sum of the `distillation_losses` of the tokens, a scalar."""
    return distillation_losses(logits, labels, **given).sum()


def distillation_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    temperature: float = 1.0,
    teacher_shape: tuple[float, float | None] = (1.0, None),
    cross_entropy: float = 0.0,
) -> Tensor:
    """Return temperature^2 KL(teacher || student) of each token [n], 0 where there is no label.

    That is Hinton's distillation (arXiv 1503.02531), with both distributions at the temperature.
    The teacher is given by its hidden states [n, h'] and its whole head weight [V, h'], which is
    bound with functools.partial, with the scale and the soft-cap of its logits as teacher_shape; or
    by its largest logits [n, k] and the ids [n, k] of their tokens, whose probabilities are then
    taken to sum to 1. cross_entropy is the share c of the labels' cross-entropy: the loss is
    (1 - c) times the above, plus c times that.
    """
    valid = labels != IGNORE_INDEX
    log_student = (logits / temperature).log_softmax(dim=-1)
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = F.linear(teacher_hidden, teacher_weight)
        # In fp32 or wider, as the student's.
        teacher = shape_scores(teacher.to(log_student.dtype), *teacher_shape)
    elif teacher_logits is not None and teacher_ids is not None:
        teacher = teacher_logits
        log_student = log_student.gather(-1, teacher_ids)
    else:
        raise UserError(
            "distillation_loss: give the teacher's hidden states and head weight (teacher_hidden, "
            "teacher_weight), or its largest logits and their ids (teacher_logits, teacher_ids)."
        )
    log_teacher = (teacher.to(log_student.dtype) / temperature).log_softmax(dim=-1)
    each = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    each = temperature**2 * each.where(valid, 0)
    if cross_entropy:
        each = (1 - cross_entropy) * each + cross_entropy * cross_entropies(logits, labels)
    return each


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the sigmoid DPO loss of each pair [B] (arXiv 2305.18290, equation 7).

    The four are log-probabilities of whole completions, sums over their tokens [B]: of the policy,
    with gradient (see `log_probs`), and of the reference. label_smoothing is the probability that
    a pair is the wrong way round (conservative DPO).
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return _of_margin(beta * margin, label_smoothing)


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Return the IPO loss of each pair [B] (arXiv 2310.12036, equation 17).

    The four are as in `dpo_loss`, but means over the tokens of a completion, as TRL 1.16 has it.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (margin - 1 / (2 * beta)) ** 2


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the SimPO loss of each pair [B] (arXiv 2405.14734, equation 6).

    Both are mean log-probabilities of the tokens of a completion; gamma is the margin wanted.
    """
    return _of_margin(beta * (chosen - rejected) - gamma, label_smoothing)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return beta times the odds-ratio loss of each pair [B] (ORPO, arXiv 2403.07691, equation 7).

    Both are mean log-probabilities of the tokens of a completion, and below 0.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds)


def kto_loss(
    rewards: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Return the KTO loss of each completion [B] (arXiv 2402.01306, equation 7).

    rewards [B] are log-probabilities of whole completions less those of the reference; desirable
    [B] is bool; kl, a scalar of at least 0 without gradient, estimates the divergence from the
    reference; weights are those of desirable and undesirable completions.
    """
    each = 1 - torch.sigmoid(beta * torch.where(desirable, rewards - kl, kl - rewards))
    return torch.where(desirable, weights[0] * each, weights[1] * each)


def _of_margin(margin: Tensor, label_smoothing: float) -> Tensor:
    flipped = label_smoothing * F.logsigmoid(-margin) if label_smoothing else 0
    return -(1 - label_smoothing) * F.logsigmoid(margin) - flipped


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of x < 0, by the formula that is exact where x is."""
    near_zero = x > -0.6931471805599453  # log 2
    close = x.where(near_zero, -0.5)  # so that no branch that is not taken has a NaN gradient
    far = x.where(~near_zero, -1.0)
    return torch.where(near_zero, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def shape_scores(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return softcap * tanh(scale * logits / softcap), as gemma, granite and cohere need it."""
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _log_probs(logits: Tensor, labels: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities [n] of the labels, 0 where there is none."""
    index = labels.where(valid, 0).unsqueeze(-1)
    log_p = (logits / temperature).log_softmax(dim=-1)
    return log_p.gather(-1, index).squeeze(-1).where(valid, 0)


def name_of(function: LossFunction) -> str:
    """Return the name of a loss function, for messages; of a partial one that of what it calls."""
    return getattr(getattr(function, "func", function), "__name__", repr(function))


@torch.no_grad()
def check_is_sum(function: LossFunction, logits: Tensor, labels: Tensor, **tokens: Tensor) -> None:
    """Raise UserError if the loss of these tokens is not the sum of that of two halves of them.

    There are two or more, all with labels: without labels a mean is 0, as a sum is, or a NaN. A
    mean, for example, would depend on the size of tiles and on the number of ranks.
    """
    half = (len(labels) + 1) // 2
    count, whole = len(labels), function(logits, labels, **tokens)
    name = name_of(function)
    if not isinstance(whole, Tensor) or whole.shape not in ((), (count,)):
        raise UserError(
            f"loss_function {name} returned {type(whole).__name__} of shape "
            f"{list(getattr(whole, 'shape', []))} for {count} tokens: return the sum of the "
            "tokens' losses, a scalar, or the loss of each."
        )
    whole = whole.sum()
    if not whole.isfinite():
        raise UserError(
            f"loss_function {name} gives {whole.item()} for {count} tokens that have labels and "
            "finite logits: check what it divides by, and its loss_inputs for non-finite values."
        )
    parts = [
        function(logits[part], labels[part], **{key: x[part] for key, x in tokens.items()}).sum()
        for part in (slice(0, half), slice(half, None))
    ]
    difference = (whole - sum(parts)).abs()
    # This way around, because no comparison with a NaN is true.
    if not difference <= 1e-3 * sum(part.abs() for part in parts):
        raise UserError(
            f"loss_function {name} is not a sum over tokens: it is {whole.item():.6g} for "
            f"{len(labels)} tokens together, and {sum(parts).item():.6g} for two halves of them. "
            "Return the sum of the losses of the tokens; it is divided by their number in the "
            "whole step for you."
        )

"""Losses that learn a teacher's scores of documents, such as those of a reranker.

``scores`` are NaN where the teacher gave none. Each function returns the sum of the losses over the
queries, and its gradient by the logits: the student's scores divided by the temperature of InfoNCE.
"""

from math import inf
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_NOTHING: Final = -1e30  # in place of minus infinity, whose differences are NaN


def group_distillation(
    logits: Float[Tensor, "rows docs"],
    scores: Float[Tensor, "rows docs"],
    candidates: Bool[Tensor, "rows docs"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows docs"]]:
    """Return the cross entropy between both softmaxes over the documents that the teacher scored.

    FlagEmbedding's ``kl_div``: the teacher's softmax has no temperature.
    """
    judged = ~scores.isnan() & candidates
    some = judged.any(1, keepdim=True)
    masked = ~judged & some  # a row without scores has no softmax, and its loss is zero
    target = scores.nan_to_num().masked_fill(masked, -inf).softmax(1) * some
    known = logits.masked_fill(masked, -inf).log_softmax(1)
    return -(target * known.masked_fill(masked, 0)).sum(), known.exp() * some - target


def listwise(
    logits: Float[Tensor, "rows docs"],
    scores: Float[Tensor, "rows docs"],
    candidates: Bool[Tensor, "rows docs"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows docs"]]:
    """Return a loss by which each scored document beats those scored lower and all unscored ones.

    With T the softmax of the teacher's scores, from the best document of a query to its worst:

        sum over i of T_i * -log( e^x_i / (sum over j >= i of e^x_j + sum over unscored of e^x) )

    FlagEmbedding's ``m3_kd_loss``, which expects documents in the teacher's order; here they are
    sorted, so that the order in a file does not matter.
    """
    judged = ~scores.isnan() & candidates
    most = int(judged.sum(1).max()) if len(judged) else 0
    if most == 0:
        return logits.new_zeros(()), torch.zeros_like(logits)
    order = scores.masked_fill(~judged, -inf).argsort(dim=1, descending=True, stable=True)[:, :most]
    ranked = judged.gather(1, order)
    some = ranked.any(1, keepdim=True)
    target = scores.gather(1, order).masked_fill(~ranked & some, -inf).nan_to_num(neginf=-inf)
    target = target.softmax(1) * some
    with torch.enable_grad():
        learned = logits.detach().requires_grad_()
        others = learned.masked_fill(judged | ~candidates, _NOTHING).logsumexp(1, keepdim=True)
        own = learned.gather(1, order).masked_fill(~ranked, _NOTHING)
        from_here_on = own.flip(1).logcumsumexp(1).flip(1)
        gaps = (torch.logaddexp(others, from_here_on) - own).masked_fill(~ranked, 0)
        loss = (target * gaps).sum()
        (slope,) = torch.autograd.grad(loss, learned)
    return loss.detach(), slope


def margin_mse(
    logits: Float[Tensor, "rows docs"],
    scores: Float[Tensor, "rows docs"],
    positives: Bool[Tensor, "rows docs"],
    candidates: Bool[Tensor, "rows docs"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows docs"]]:
    """Return the squared difference between the student's and the teacher's margins.

    MarginMSE (arXiv 2010.02666, sec. 3), with x the logits and T the teacher's scores:

        mean over scored positives p and scored negatives n of ((x_p - x_n) - (T_p - T_n))^2

    Both sides have to be on one scale. There the student's scores are dot products without bounds;
    cosines are at most 2 apart, and logits of rerankers 10 or more, so the logits are compared. A
    query without a scored positive and a scored negative has a loss of zero.
    """
    judged = ~scores.isnan() & candidates
    right, wrong = judged & positives, judged & ~positives
    both = right.any(1, keepdim=True) & wrong.any(1, keepdim=True)
    right, wrong = right & both, wrong & both

    def mean(values: Tensor, of: Tensor) -> Tensor:
        return (values * of).sum(1, keepdim=True) / of.sum(1, keepdim=True).clamp_min(1)

    # With d = x - T, the mean of (d_p - d_n)^2 is the variance of d_p plus the mean square of d_n
    # around the mean of d_p. So no matrix of positives and negatives is needed.
    gap = (logits - scores.nan_to_num()).masked_fill(~(right | wrong), 0)
    gap = gap - mean(gap, right)
    loss = mean(gap.square(), right) + mean(gap.square(), wrong)
    of_right = (gap - mean(gap, wrong)) * right / right.sum(1, keepdim=True).clamp_min(1)
    of_wrong = gap * wrong / wrong.sum(1, keepdim=True).clamp_min(1)
    return loss.sum(), 2 * (of_right + of_wrong)

"""CoSENT: pairs of texts with a higher similarity score get a higher cosine."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tercet.errors import RecipeError
from tercet.segments import moved


def cosent(
    cosines: Float[Tensor, "pairs"],
    scores: Float[Tensor, "pairs"],
    scales: Int[Tensor, "pairs"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the loss of pairs of texts in the wrong order.

    With c the cosines, y the scores and t the temperature:

        loss = log(1 + sum over i and j with y_i > y_j of e^((c_j - c_i) / t))

    (Su Jianlin 2022, kexue.fm/archives/8847; sentence-transformers' ``CoSENTLoss`` with a scale of
    1 / t). Scores count by their order only. Pairs are compared with those of the same number in
    ``scales``: two data sets may score from 0 to 1 and from 0 to 5. Equal scores are not compared;
    where nothing is, the loss is zero.

    Pairs are sorted by score, so that the sum over all j below an i is a cumulative one: memory and
    time grow with n log n, not with the square of the pairs. Computed in at least float32;
    ``scores`` and ``scales`` stay on the host.

    Raises:
        RecipeError: for a temperature that is not above zero.
    """
    if temperature <= 0:
        raise RecipeError(f"temperature is {temperature}; it must be above zero")
    wide = torch.promote_types(cosines.dtype, torch.float32)
    with torch.autocast(cosines.device.type, enabled=False):
        logits = cosines.to(wide) / temperature
        terms = [logits[:0].sum()[None]]  # the 1: it depends on nothing, and has a gradient of zero
        for places, below in _ranked(scores, scales):
            ascending = logits[moved(places, logits.device)]
            above = below > 0
            last = moved(below[above] - 1, logits.device)
            terms.append(ascending.logcumsumexp(0)[last] - ascending[moved(above, logits.device)])
        return torch.cat(terms).logsumexp(0)


def _ranked(
    scores: Float[Tensor, "pairs"], scales: Int[Tensor, "pairs"]
) -> list[tuple[Shaped[Tensor, "some"], Shaped[Tensor, "some"]]]:
    """Return for each scale its pairs by rising score, and how many of them score lower than each.

    A scale on which no two scores differ is left out.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for scale in scales.unique().tolist():
        places = (scales == scale).nonzero().squeeze(1)
        ascending, order = scores[places].sort(stable=True)
        below = torch.searchsorted(ascending, ascending)
        if bool((below > 0).any()):
            found.append((places[order], below))
    return found

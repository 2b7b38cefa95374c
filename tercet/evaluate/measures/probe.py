"""What vectors know of labels: a linear classifier learned from them alone, and its mean F1."""

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float32, Float64

from tercet.errors import MissingExtraError

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

# Weights are drawn to zero so that the scores of a standardised vector vary by about this much
# at any width. Chosen once, on training sentences of the example data that were kept apart.
SCORE_VARIANCE: Final = 6.0
MAX_STEPS: Final = 300  # of its solver

log = logging.getLogger("tercet")


def regression(what: str, hidden: int = 1) -> "LogisticRegression":
    """A logistic regression for standardised vectors of this width; ``what`` is it that needs it.

    Raises:
        MissingExtraError: when scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError(what, "probe") from error
    return LogisticRegression(C=SCORE_VARIANCE / hidden, max_iter=MAX_STEPS, tol=1e-3)


def settle(model: "LogisticRegression", features: Any, labels: np.ndarray) -> None:
    """Fit the regression; that it was stopped early is said in our words."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    if max(model.n_iter_) >= MAX_STEPS:
        log.warning("the probe was stopped after %d steps, before it settled", MAX_STEPS)


def vector_probe(
    model: "LogisticRegression", vectors: Float32[np.ndarray, "rows hidden"], labels: np.ndarray
) -> Callable[[Float32[np.ndarray, "_ hidden"]], np.ndarray]:
    """A function from vectors to labels, learned from these; each coordinate is standardised."""
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    features = vectors - mean
    deviation = np.sqrt(np.einsum("wh,wh->h", features, features) / len(features))
    deviation[deviation == 0] = 1
    features /= deviation
    settle(model, features, labels)

    def classify(others: Float32[np.ndarray, "_ hidden"]) -> np.ndarray:
        if not len(others):
            return labels[:0]
        return np.asarray(model.predict((others - mean) / deviation))

    return classify


def mean_f1(tallies: Float64[np.ndarray, "*rest labels 3"]) -> Float64[np.ndarray, "*rest"]:
    """2 right / (there + told), averaged over labels; NaN where nothing is there or told.

    Of each label, a tally holds how many were told right, are there in truth, were told at all.
    """
    right, there, told = np.moveaxis(tallies, -1, 0)
    defined = there + told > 0
    f1 = np.divide(2 * right, there + told, out=np.zeros_like(right), where=defined)
    labels = defined.sum(axis=-1)
    nothing = np.full(labels.shape, np.nan)
    return np.divide(f1.sum(axis=-1), labels, out=nothing, where=labels > 0)

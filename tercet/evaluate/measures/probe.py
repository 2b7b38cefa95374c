"""A linear classifier of vectors, to see what they know about labels, and its mean F1."""

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float32, Float64

from tercet.errors import MissingExtraError

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

# The regularisation keeps the variance of the scores of a standardised vector near this value at
# any width. Chosen once, on held-out training sentences of the example data.
SCORE_VARIANCE: Final = 6.0
MAX_STEPS: Final = 300  # of the solver

log = logging.getLogger("tercet")


def regression(what: str, hidden: int = 1) -> "LogisticRegression":
    """Return a logistic regression for standardised vectors; ``what`` names its user in an error.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError(what, "probe") from error
    return LogisticRegression(C=SCORE_VARIANCE / hidden, max_iter=MAX_STEPS, tol=1e-3)


def settle(model: "LogisticRegression", features: Any, labels: np.ndarray) -> None:
    """Fit the regression, and log if it was stopped early."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    if max(model.n_iter_) >= MAX_STEPS:
        log.warning("the probe was stopped after %d steps, before it converged", MAX_STEPS)


def vector_probe(
    model: "LogisticRegression", vectors: Float32[np.ndarray, "rows hidden"], labels: np.ndarray
) -> Callable[[Float32[np.ndarray, "_ hidden"]], np.ndarray]:
    """Return a function from vectors to labels, learned from these vectors, standardised."""
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
    """Return 2 correct / (true + predicted), averaged over labels; NaN if there are none.

    For each label, a tally holds how often it was predicted correctly, is true, was predicted.
    """
    correct, true, predicted = np.moveaxis(tallies, -1, 0)
    defined = true + predicted > 0
    f1 = np.divide(2 * correct, true + predicted, out=np.zeros_like(correct), where=defined)
    labels = defined.sum(axis=-1)
    nothing = np.full(labels.shape, np.nan)
    return np.divide(f1.sum(axis=-1), labels, out=nothing, where=labels > 0)

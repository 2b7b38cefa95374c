"""Masking: which tokens a language model has to predict, and what replaces them."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, Integer

from tercet.errors import ModelError, RecipeError

MaskToken: TypeAlias = Literal["blank", "eos", "new"]
NEW: str = "<mask>"


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How many tokens are masked, and how (arXiv 2404.05961, sec. 3.1).

    ``default`` is BERT's: of the chosen tokens 80 % become the mask token, 10 % a random token,
    10 % stay. ``all`` replaces every chosen one.
    """

    probability: float = 0.2
    kind: Literal["default", "all"] = "default"

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise RecipeError(
                f"the masking probability must be between 0 and 1, got {self.probability}"
            )

    def __call__(
        self,
        ids: Integer[np.ndarray, "tokens"],
        allowed: Bool[np.ndarray, "tokens"],
        rng: np.random.Generator,
        *,
        mask: int,
        vocabulary: int,
        words: Int[np.ndarray, "tokens"] | None = None,
    ) -> tuple[Integer[np.ndarray, "tokens"], Bool[np.ndarray, "tokens"]]:
        """Return the masked tokens, and which were chosen among the ``allowed`` ones.

        With ``words``, the number of the word that each token is part of, in order from zero, the
        tokens of a word are chosen together; the replacement of each is drawn separately.
        """
        if words is None:
            draws = rng.random(len(ids))
        else:
            draws = rng.random(int(words[-1]) + 1)[words]
        chosen = allowed & (draws < self.probability)
        fate = rng.random(len(ids))
        drawn = rng.integers(vocabulary, size=len(ids))
        if self.kind == "all":
            return np.where(chosen, mask, ids).astype(ids.dtype), chosen
        gaps = np.where(chosen & (fate < 0.8), mask, ids)
        gaps = np.where(chosen & (fate >= 0.8) & (fate < 0.9), drawn, gaps)
        return gaps.astype(ids.dtype), chosen


def mask_id(tokenizer: Any, token: MaskToken) -> int:
    """Return the id that replaces masked tokens: the tokenizer's mask token if it has one.

    Otherwise, ``blank`` is the bare piece "_" of the vocabulary, which is not registered as a
    special token, or ``snake_case`` would be tokenized differently. ``eos`` is the end-of-text
    token, ``new`` a token that :func:`add_mask_token` has added.

    Raises:
        ModelError: if the tokenizer has no such token.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    found = tokenizer.get_vocab().get("_") if token == "blank" else tokenizer.eos_token_id
    if token == "new" or found is None:
        what = {"blank": 'the piece "_"', "eos": "an end-of-text token", "new": "a mask token"}
        others = ", ".join(other for other in ("blank", "eos", "new") if other != token)
        raise ModelError(
            f"the tokenizer has neither a mask token nor {what[token]}; "
            f"choose another mask token: {others}"
        )
    return found


def add_mask_token(tokenizer: Any) -> bool:
    """Add the token ``<mask>`` to a tokenizer without a mask token; return whether it was added."""
    if tokenizer.mask_token_id is not None:
        return False
    tokenizer.add_special_tokens({"mask_token": NEW})
    return True

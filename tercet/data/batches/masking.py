"""Which tokens a language model has to guess, and what stands in their place."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, Integer

from tercet.errors import ModelError, RecipeError

MaskToken: TypeAlias = Literal["blank", "eos", "new"]
NEW: str = "<mask>"


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How many tokens are chosen, and what becomes of them (arXiv 2404.05961, sec. 3.1).

    ``default`` is BERT's: of the chosen tokens 80 % become the mask token, 10 % a token drawn at
    random, 10 % stay. ``all`` replaces every chosen one.
    """

    probability: float = 0.2
    kind: Literal["default", "all"] = "default"

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise RecipeError(
                f"the masking probability is {self.probability}; give a share between 0 and 1"
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
        """The tokens with gaps, and which of them were chosen; only among ``allowed`` ones.

        With ``words``, the number of the word that each token is part of, in order from zero, the
        tokens of a word are chosen together, and what becomes of each is drawn for itself.
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
    """The id that stands in a gap. A mask token that the tokenizer has already comes first.

    ``blank`` is the bare piece "_", looked up in the vocabulary: encoding "_" may give a piece
    with a space before it. It is not registered as a special token: then every "_" of a text would
    be one, and ``snake_case`` read differently. ``eos`` is the end-of-text token. ``new`` is a
    token that :func:`add_mask_token` has added.

    Raises:
        ModelError: when the tokenizer has no such token.
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
    """Give a tokenizer without a mask token the new token ``<mask>``; whether it got one."""
    if tokenizer.mask_token_id is not None:
        return False
    tokenizer.add_special_tokens({"mask_token": NEW})
    return True

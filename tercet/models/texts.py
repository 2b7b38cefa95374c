"""Checks of what users pass to encode: texts, one by one, and the role they have."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Final

import numpy as np

from tercet.errors import RecipeError, TextError
from tercet.types import Role

ROLES: Final[dict[str, Role]] = {
    "query": "query",
    "queries": "query",
    "question": "query",
    "document": "document",
    "documents": "document",
    "doc": "document",
    "docs": "document",
    "passage": "document",
    "passages": "document",
    "corpus": "document",
}
_UNNAMED: Final = "default"  # stands for no role


def role_of(name: object) -> Role:
    """Return the role of a name: query or document, or a usual synonym such as passage.

    Texts of the role "default" have the model's default prompt, and are documents otherwise.

    Raises:
        RecipeError: for any other name.
    """
    if name == _UNNAMED:
        return "document"
    if isinstance(name, str) and name in ROLES:
        return ROLES[name]
    near = get_close_matches(name.lower(), ROLES, n=1) if isinstance(name, str) else []
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise RecipeError(f'role must be "query" or "document"; got {name!r}{hint}')


def checked_texts(texts: object, what: str = "text") -> list[str]:
    """Return a list, tuple, array, series or other collection of strings as a list.

    ``what`` is one of them, in words, for messages.

    Raises:
        TextError: for a single string, and for an element that is no string of valid Unicode, with
            its row.
    """
    plural = "queries" if what == "query" else f"{what}s"
    if isinstance(texts, str | bytes):
        raise TextError(
            f"{plural} must be a list of strings; got a single {type(texts).__name__}; "
            "put it into a list"
        )
    if isinstance(texts, np.ndarray) and texts.ndim != 1:
        raise TextError(f"{plural} must be an array of one dimension; got {texts.ndim}")
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping | set | frozenset):
        raise TextError(f"{plural} must be a list of strings; got {type(texts).__name__}")
    # An array and a series of pandas convert their elements to Python's types.
    convert: Any = getattr(texts, "tolist", None)
    found: list[Any] = list(texts if convert is None else convert())
    for row, text in enumerate(found, start=1):
        if not isinstance(text, str):
            raise TextError(f"{what} {row} of {len(found)} must be a string; got {_shown(text)}")
        if not text.isascii() and (problem := surrogate_in(text)):
            raise TextError(f"{what} {row} of {len(found)} {problem}")
    return found


def checked_sentences(sentences: object) -> list[list[str]]:
    """Return sentences, each a list of words.

    Raises:
        TextError: if they are one string, one of them is a string, or a word is not a string of
            valid Unicode.
    """
    if isinstance(sentences, str | bytes) or not isinstance(sentences, Iterable):
        raise TextError(
            f"sentences must be a list of lists of words; got {type(sentences).__name__}"
        )
    found = []
    for row, sentence in enumerate(sentences, start=1):
        if isinstance(sentence, str | bytes):
            raise TextError(
                f"sentence {row} must be a list of words; got a {type(sentence).__name__}; split it"
            )
        found.append(checked_texts(sentence, f"sentence {row}: word"))
    return found


def surrogate_in(text: str) -> str | None:
    """Return what is wrong with a text that is not valid Unicode, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return (
            f"must be valid Unicode; character {error.start + 1} is half of a surrogate pair "
            f"(\\u{code:04x}); decode the text again, or remove it"
        )
    return None


def _shown(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) < 60 else shown[:57] + '...'}"

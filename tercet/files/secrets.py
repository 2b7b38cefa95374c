"""Keeps keys out of messages, answers and files, also where a server repeats them."""

import base64
import json
import os
import re
from collections.abc import Iterator
from typing import Final
from urllib.parse import parse_qsl, quote, urlsplit

from tercet.errors import RecipeError

HIDDEN: Final = "***"
_SHORTEST: Final = 6  # characters; a shorter one is no key, but "EMPTY" or "none"
_NAMED: Final = re.compile(r"(key|token|secret|password|passwd|sig|signature|auth|code)$", re.I)
_VARIABLE: Final = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD)$")
_USER: Final = re.compile(r"(?<=://)[^\s'\"<>]*@")

_known: set[str] = set()


def hide(secret: str) -> None:
    """Have :func:`redacted` replace this key from now on."""
    if len(secret) >= _SHORTEST:
        _known.add(secret)


def redacted(text: str) -> str:
    """Return a text without keys: those of :func:`hide`, of the environment, and before an @.

    A key is found in upper and lower case, and as JSON, URLs and base64 write it.
    """
    from_environment = {
        value.strip() for name, value in os.environ.items() if _VARIABLE.search(name)
    }
    secrets = {each for each in _known | from_environment if len(each) >= _SHORTEST}
    forms = sorted({form for each in secrets for form in _forms(each)}, key=len, reverse=True)
    if forms:
        text = re.sub("|".join(map(re.escape, forms)), HIDDEN, text, flags=re.IGNORECASE)
    return _USER.sub(f"{HIDDEN}@", text)


def redacted_bytes(content: bytes) -> bytes:
    """Return bytes without keys, whatever their encoding, as long as ASCII is a part of it."""
    return redacted(content.decode("latin-1")).encode("latin-1")


def check_address(url: str, remedy: str, *, keeps_query: bool = False) -> None:
    """Refuse an address with a user or password, which would be kept in a file.

    Keys in its query are hidden, or refused as well where the whole address is kept.

    Raises:
        RecipeError: without a word of what is secret.
    """
    parts = urlsplit(url)
    keys = [value for name, value in parse_qsl(parts.query) if _NAMED.search(name)]
    if "@" in parts.netloc or (keys and keeps_query):
        what = "a user or password" if "@" in parts.netloc else "a key"
        raise RecipeError(f"the address contains {what}; {remedy}")
    for value in keys:
        hide(value)


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield quote(secret, safe="")
    yield json.dumps(secret)[1:-1]
    yield base64.b64encode(secret.encode()).decode().rstrip("=")

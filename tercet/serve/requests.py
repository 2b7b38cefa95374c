"""Requests: the fields of their bodies, checked one by one, and errors that say what to do."""

import json
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, TypeVar

from tercet.errors import TercetError
from tercet.models.texts import surrogate_in

Choice = TypeVar("Choice", bound=str)

NAMES: Final[Mapping[int, str]] = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "unprocessable",
    429: "overloaded",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
"""Names of the statuses of errors, for programs."""


class RequestError(TercetError):
    """A request that is refused; the message says what to do.

    Attributes:
        status: of HTTP, one of ``NAMES``.
        field: of the body that is wrong.
        code: for programs, where the name of the status does not say enough.
        retry_after: seconds after which the same request may succeed.
        too_long: whether a text has more tokens than the model reads; each protocol has a status
            for that.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        too_long: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code
        self.retry_after, self.too_long = retry_after, too_long

    @property
    def name(self) -> str:
        """The code of the error or the name of its status, for programs."""
        return self.code or NAMES[self.status]


class Fields:
    """The fields of a JSON body. ``null`` is as good as an absent field.

    With ``known`` all others are refused, so that a misspelt one is noticed; bodies of other
    protocols carry fields that have no meaning here.
    """

    def __init__(self, body: object, known: Collection[str] | None = None) -> None:
        if not isinstance(body, Mapping):
            raise RequestError(400, f"the body must be a JSON object; got {shown(body)}")
        self._body: Mapping[str, Any] = body
        for name in body if known is not None else ():
            if name not in (known or ()):
                near = get_close_matches(str(name), known or (), n=1)
                hint = f'; did you mean "{near[0]}"?' if near else ""
                expected = ", ".join(known or ())
                raise RequestError(
                    400,
                    f"unknown field {shown(name)}{hint or f'; use {expected}'}",
                    field=str(name),
                )

    def __contains__(self, name: str) -> bool:
        return self._body.get(name) is not None

    def raw(self, name: str) -> Any:
        """Return a value of any type; None if it is absent."""
        return self._body.get(name)

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return a string."""
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong(name, "a string", value)
        return valid(value, name)

    def required_text(self, name: str) -> str:
        """Return a string that must be there."""
        found = self.text(name)
        if found is None:
            raise RequestError(400, f'"{name}" is missing; it must be a string', field=name)
        return found

    def texts(self, name: str, most: int | None = None, *, single: bool = False) -> list[str]:
        """Return a list of at least one and at most ``most`` strings; a ``single`` one too."""
        value = self._body.get(name)
        if single and isinstance(value, str):
            value = [value]
        what = "a string or a list of strings" if single else "a list of strings"
        if value is None:
            raise RequestError(400, f'"{name}" is missing; it must be {what}', field=name)
        if not isinstance(value, list):
            raise wrong(name, what, value)
        require_count(name, len(value), most)
        for place, each in enumerate(value):
            if not isinstance(each, str):
                raise wrong(f"{name}[{place}]", "a string", each)
            valid(each, f"{name}[{place}]")
        return value

    def whole(self, name: str, *, lowest: int, highest: int | None = None) -> int | None:
        """Return a whole number inside bounds; None if it is absent."""
        value = self._body.get(name)
        if value is None:
            return None
        bounds = f"{lowest} or more" if highest is None else f"from {lowest} to {highest}"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, f"a whole number, {bounds}", value)
        if value < lowest or (highest is not None and value > highest):
            raise wrong(name, bounds, value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(name, "true or false", value)
        return value

    def choice(self, name: str, choices: Sequence[Choice], default: Choice) -> Choice:
        """Return one of some strings."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, str) and value in choices:
            return choices[choices.index(value)]  # pyright: ignore[reportArgumentType]
        raise wrong(name, _one_of(choices), value)

    def choices(self, name: str, choices: Sequence[Choice]) -> list[Choice] | None:
        """Return a list of some strings, each once; None if it is absent."""
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise wrong(name, f"a list of {_one_of(choices)}", value)
        for place, each in enumerate(value):
            if not isinstance(each, str) or each not in choices:
                raise wrong(f"{name}[{place}]", _one_of(choices), each)
        return [each for each in choices if each in value]


def valid(text: str, name: str) -> str:
    """Return a text, or raise if it is not valid Unicode."""
    if not text.isascii() and (problem := surrogate_in(text)):
        raise RequestError(400, f'"{name}" {problem}', field=name)
    return text


def require_count(name: str, count: int, most: int | None) -> None:
    """Check the number of elements of a list: at least one, at most ``most``."""
    if not count:
        raise RequestError(400, f'"{name}" must not be empty', field=name)
    if most is not None and count > most:
        raise RequestError(
            413,
            f'"{name}" must have at most {most:,} elements; got {count:,}; send several requests',
            field=name,
        )


def _one_of(choices: Sequence[str]) -> str:
    *most, last = (f'"{each}"' for each in choices)
    return f"{', '.join(most)} or {last}" if most else last


def wrong(name: str, wanted: str, value: object) -> RequestError:
    """Return the error of a value that is not what was wanted."""
    return RequestError(400, f'"{name}" must be {wanted}; got {shown(value)}', field=name)


def shown(value: object) -> str:
    """Return a value of JSON in few words, without a text in full."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}" if value else "an empty list"
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 40 else f"a string of {len(value):,} characters"
    return json.dumps(value)

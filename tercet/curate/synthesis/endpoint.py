"""A generator behind an HTTP endpoint that speaks the chat-completions protocol of OpenAI."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from email.message import Message
from http.client import HTTPException
from threading import Event
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from tercet.curate.synthesis.generators import Answer, Answers, Drawing, Prompt
from tercet.data.files.examples import shown
from tercet.errors import ModelError, RecipeError

_LONGEST_PAUSE: Final = 60.0  # seconds
_MOST_BYTES: Final = 1 << 24  # of a reply
_HOPELESS: Final = (401, 403, 404, 405)  # a wrong key, address or model: no other call would differ
_BUSY: Final = (408, 409, 425, 429)  # and 500 or more: another time it may work


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How an endpoint is called.

    Raises:
        RecipeError: for numbers that call nothing.
    """

    workers: int = 4  # calls at the same time
    timeout_seconds: float | int = 60  # without a sign of life
    retries: int = 4  # of a call that failed and may work another time
    pause_seconds: float | int = 1  # before the first retry; doubles each time

    def __post_init__(self) -> None:
        if self.workers < 1 or self.timeout_seconds <= 0 or self.retries < 0:
            raise RecipeError(
                f"{self.workers} workers with a timeout of {self.timeout_seconds:g} seconds and "
                f"{self.retries} retries call nothing; use at least one worker, a timeout above 0, "
                "and 0 or more retries"
            )


class EndpointGenerator:
    """A model behind a URL, asked by several threads.

    The key is read from an environment variable, so that it stands in no command and no file. It
    is sent to the URL's own host only: redirections are not followed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        drawing: Drawing | None = None,
        *,
        key_variable: str | None = None,
        calls: Calls | None = None,
    ) -> None:
        """Take the address up to ``/v1``, or all of it, as in ``.../chat/completions``.

        Raises:
            RecipeError: for an address that is none, or a variable without a key.
        """
        self.url = _address(url)
        self.drawing, self.calls = drawing or Drawing(), calls or Calls()
        self._model = model
        key = None if key_variable is None else os.environ.get(key_variable, "").strip()
        if key == "":
            raise RecipeError(
                f"the environment variable {key_variable} holds no key; set it, as in: "
                f"export {key_variable}=..."
            )
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            if not key.isprintable() or not key.isascii():
                raise RecipeError(f"the key in {key_variable} has characters that no key has")
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirection())
        self._stopped = Event()

    @property
    def about(self) -> Mapping[str, Any]:
        """The address, the model, and how tokens are drawn."""
        return {"model": self._model, "url": self.url, **asdict(self.drawing)}

    def answers(self, prompts: Iterable[Prompt]) -> Answers:
        """An answer for each prompt, in the order in which they come.

        Raises:
            ModelError: when no call can work: a wrong key, address or model.
        """
        self._stopped.clear()
        waiting: dict[Future[Answer], int] = {}
        pool = ThreadPoolExecutor(self.calls.workers)
        try:
            for number, prompt in enumerate(prompts):
                waiting[pool.submit(self._ask, prompt)] = number
                while len(waiting) >= 2 * self.calls.workers:
                    yield from _finished(waiting)
            while waiting:
                yield from _finished(waiting)
        finally:
            self._stopped.set()  # nobody waits for another try any more
            pool.shutdown(cancel_futures=True)

    def _ask(self, prompt: Prompt) -> Answer:
        """The answer to a prompt, after as many tries as it takes."""
        pause, problem = self.calls.pause_seconds, ""
        for attempt in range(self.calls.retries + 1):
            try:
                return _answer_in(self._reply(prompt))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_said(error)}"
                if error.code in _HOPELESS or 300 <= error.code < 400:
                    raise ModelError(f"{self.url}: {problem}; {_remedy(error.code)}") from None
                if error.code not in _BUSY and error.code < 500:
                    return Answer(failure=problem)
                asked = _retry_after(error.headers)
            except (OSError, HTTPException) as error:  # no connection, none in time, or cut off
                problem = str(getattr(error, "reason", None) or error) or type(error).__name__
                asked = None
            if attempt == self.calls.retries:
                break
            if self._stopped.wait(min(asked if asked is not None else pause, _LONGEST_PAUSE)):
                break
            pause *= 2
        return Answer(failure=problem)

    def _reply(self, prompt: Prompt) -> bytes:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt.text}],
            "seed": prompt.seed % (1 << 31),
            **asdict(self.drawing),
        }
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), self._headers, method="POST"
        )
        with self._opener.open(request, timeout=self.calls.timeout_seconds) as reply:
            return reply.read(_MOST_BYTES)


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Leaves a redirection to be an error: the key would go along to wherever it leads."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        """Nothing is asked instead."""


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("no address that can be called")
    except ValueError:  # also of a port that is no number, and of half an IPv6 address
        raise RecipeError(
            f"{url!r} is no address; give one such as http://localhost:8000/v1"
        ) from None
    if parts.username is not None or parts.password is not None:
        raise RecipeError("the address holds a user or password; put the key into a variable")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit(parts._replace(path=path, fragment=""))


def _finished(waiting: dict[Future[Answer], int]) -> Iterator[tuple[int, Answer]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=lambda each: waiting[each]):
        yield waiting.pop(future), future.result()


def _answer_in(reply: bytes) -> Answer:
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return Answer(failure=f"no chat completion: {shown(reply[:200])}")
    if not isinstance(text, str):
        return Answer(failure=f"a chat completion without a text: {shown(text)}")
    return Answer(text.encode(errors="replace").decode())  # half a character is none


def _said(error: urllib.error.HTTPError) -> str:
    """The endpoint's own words, in a line."""
    try:
        content = error.read(1 << 16)
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        found: Any = json.loads(content)["error"]
        found = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError, RecursionError):
        found = content.decode(errors="replace")
    return shown(" ".join(str(found).split())) if str(found).strip() else str(error.reason)


def _remedy(code: int) -> str:
    if code in (401, 403):
        return "check the key, and the name of the variable that holds it"
    if code in (404, 405):
        return "check the address and the name of the model"
    return "give the address that it leads to"


def _retry_after(headers: Mapping[str, str] | Message | None) -> float | None:
    """The pause in seconds that the endpoint asks for; a date is not read."""
    value = (headers.get("Retry-After") if headers is not None else None) or ""
    return float(value) if value.strip().isdecimal() else None

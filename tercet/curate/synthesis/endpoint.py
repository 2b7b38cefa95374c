"""A generator behind an HTTP endpoint with OpenAI's chat-completions protocol."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR, socket
from threading import Event, Timer
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from tercet.curate.synthesis.generators import Answer, Answers, Prompt, TokenSampling
from tercet.data.files.examples import shown
from tercet.errors import ModelError, RecipeError
from tercet.files.secrets import check_address, hide, redacted, redacted_bytes

_LONGEST_PAUSE: Final = 60.0  # seconds
_MOST_BYTES: Final = 1 << 24  # of a reply
_MOST_TIMEOUTS: Final = 5  # that a whole reply may take, however steadily it comes
_HOPELESS: Final = (401, 403, 404, 405)  # a wrong key, address or model: all calls would fail
_BUSY: Final = (408, 409, 425, 429)  # like 500 and above: a retry may succeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How an endpoint is called.

    Raises:
        RecipeError: for numbers out of range.
    """

    workers: int = 4  # concurrent calls
    timeout_seconds: float | int = 60  # without any data
    retries: int = 4  # of a failed call that may succeed later
    pause_seconds: float | int = 1  # before the first retry; doubles each time

    def __post_init__(self) -> None:
        if self.workers < 1 or self.timeout_seconds <= 0 or self.retries < 0:
            raise RecipeError(
                "workers must be at least 1, the timeout above 0 and retries at least 0; got "
                f"{self.workers}, {self.timeout_seconds:g} seconds and {self.retries}"
            )


class EndpointGenerator:
    """A model behind a URL, called by several threads.

    The key is read from an environment variable, so that no command or file contains it. It is
    sent only to the host of the URL: redirects are not followed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: TokenSampling | None = None,
        *,
        key_variable: str | None = None,
        calls: Calls | None = None,
    ) -> None:
        """Take the address up to ``/v1``, or the full one, as in ``.../chat/completions``.

        Raises:
            RecipeError: for an invalid address, or a variable without a key.
        """
        self.url = _address(url)
        self._shown_url = redacted(self.url)  # in messages and files
        self.sampling, self.calls = sampling or TokenSampling(), calls or Calls()
        self._model = model
        key = None if key_variable is None else os.environ.get(key_variable, "").strip()
        if key == "":
            raise RecipeError(
                f"the environment variable {key_variable} has no key; set it, as in: "
                f"export {key_variable}=..."
            )
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            if not key.isprintable() or not key.isascii():
                raise RecipeError(f"the key in {key_variable} must be printable ASCII")
            hide(key)
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirection(), _Http(), _Https())
        self._stopped = Event()
        self._answered = False  # at least once

    @property
    def about(self) -> Mapping[str, Any]:
        """The address, the model, and how tokens are sampled."""
        return {"model": self._model, "url": self._shown_url, **asdict(self.sampling)}

    def answers(self, prompts: Iterable[Prompt]) -> Answers:
        """Yield an answer for each prompt, in the order of arrival.

        Raises:
            ModelError: if no call can succeed: a wrong key, address or model.
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
            self._stopped.set()  # ends the pauses before retries
            pool.shutdown(wait=False, cancel_futures=True)  # after a signal nobody waits for calls

    def _ask(self, prompt: Prompt) -> Answer:
        """Return the answer to a prompt, with retries."""
        pause, problem = self.calls.pause_seconds, ""
        for attempt in range(self.calls.retries + 1):
            watch = _Watch(_MOST_TIMEOUTS * self.calls.timeout_seconds)
            try:
                answer = _answer_in(self._reply(prompt, watch))
                self._answered = True
                return answer
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_message_of(error)}"
                self._answered = True
                if error.code in _HOPELESS or 300 <= error.code < 400:
                    raise ModelError(
                        f"{self._shown_url}: {problem}; {_remedy(error.code)}"
                    ) from None
                if error.code not in _BUSY and error.code < 500:
                    return Answer(failure=problem)
                asked = _retry_after(error.headers)
            except (OSError, HTTPException) as error:  # no connection, none in time, or cut off
                problem = str(getattr(error, "reason", None) or error) or type(error).__name__
                problem = redacted(problem)
                asked = None
                if watch.expired:
                    problem = f"a reply did not end within {watch.seconds:g} seconds"
                    if self._answered:
                        return Answer(failure=problem)
                    remedy = "is it an endpoint with OpenAI's protocol? Give a longer timeout if so"
                    raise ModelError(f"{self._shown_url}: {problem}; {remedy}") from None
            finally:
                watch.end()
            seconds = min(pause if asked is None else asked, _LONGEST_PAUSE)
            if attempt == self.calls.retries or self._stopped.wait(seconds):
                break
            pause *= 2
        return Answer(failure=problem)

    def _reply(self, prompt: Prompt, watch: "_Watch") -> bytes:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt.text}],
            "seed": prompt.seed % (1 << 31),
            **asdict(self.sampling),
        }
        request = _Request(self.url, json.dumps(body).encode(), self._headers, method="POST")
        request.watch = watch
        with self._opener.open(request, timeout=self.calls.timeout_seconds) as reply:
            content = reply.read(_MOST_BYTES + 1)
        if watch.expired:  # what was cut off may look whole
            raise TimeoutError
        return redacted_bytes(content)


class _Watch:
    """Ends a connection after some seconds: a timeout alone starts again with every byte."""

    def __init__(self, seconds: float | int) -> None:
        self.seconds, self.expired = seconds, False
        self._copy: socket | None = None  # of the connection, which may be wrapped for TLS
        self._timer = Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def over(self, connection: socket) -> socket:
        """Watch this connection."""
        self._copy = connection.dup()
        if self.expired:
            self._expire()
        return connection

    def end(self) -> None:
        """Stop watching."""
        self._timer.cancel()
        if self._copy is not None:
            self._copy.close()

    def _expire(self) -> None:
        self.expired = True
        if self._copy is not None:
            with suppress(OSError):  # closed meanwhile
                self._copy.shutdown(SHUT_RDWR)


class _Request(urllib.request.Request):
    """A request whose connection is watched."""

    watch: _Watch

    def connection(self, kind: type[HTTPConnection]) -> Callable[..., HTTPConnection]:
        """Return a function that makes such a connection."""

        def made(*args: Any, **kwargs: Any) -> HTTPConnection:
            found: Any = kind(*args, **kwargs)
            create = found._create_connection
            found._create_connection = lambda *a, **k: self.watch.over(create(*a, **k))
            return found

        return made


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(req.connection(HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(req.connection(HTTPSConnection), req)


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Makes redirects an error: the key would be sent to the new address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return no new request."""


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("not an address that can be called")
    except ValueError:  # also raised for an invalid port or IPv6 address
        raise RecipeError(
            f"{redacted(repr(url))} is not an address; give one such as http://localhost:8000/v1"
        ) from None
    check_address(url, "put the key into a variable")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit(parts._replace(path=path, fragment=""))


def _finished(waiting: dict[Future[Answer], int]) -> Iterator[tuple[int, Answer]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=waiting.__getitem__):
        yield waiting.pop(future), future.result()


def _answer_in(reply: bytes) -> Answer:
    if len(reply) > _MOST_BYTES:
        return Answer(failure=f"a reply of more than {_MOST_BYTES:,} bytes")
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return Answer(failure=f"not a chat completion: {shown(reply[:200])}")
    if not isinstance(text, str):
        return Answer(failure=f"a chat completion without a text: {shown(text)}")
    return Answer(redacted(text).encode(errors="replace").decode())  # without lone surrogates


def _message_of(error: urllib.error.HTTPError) -> str:
    """Return the endpoint's error message in one line."""
    reason = redacted(str(error.reason))
    try:
        content = redacted_bytes(error.read(1 << 16))
    except (OSError, HTTPException):
        return reason
    try:
        found: Any = json.loads(content)["error"]
        found = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError, RecursionError):
        found = content.decode(errors="replace")
    return shown(redacted(" ".join(str(found).split()))) if str(found).strip() else reason


def _remedy(code: int) -> str:
    if code in (401, 403):
        return "check the key, and the name of the variable that holds it"
    if code in (404, 405):
        return "check the address and the name of the model"
    return "give the address that it leads to"


def _retry_after(headers: Mapping[str, str] | Message | None) -> float | None:
    """Return the pause in seconds that the endpoint asks for; dates are ignored."""
    value = (headers.get("Retry-After") if headers is not None else None) or ""
    return float(value) if value.strip().isdecimal() else None

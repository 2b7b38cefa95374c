"""What clients do wrong: they get the right status, and nobody else is disturbed."""

import http.client
import json
import logging
import random
import re
import socket
import string
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from threading import Event, Thread
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.routing import Route

from tercet.serve import connection
from tercet.serve.endpoint import Limits, Service
from tercet.serve.server import application
from tests.serve.indexed import make_index
from tests.serving import Running, serving
from tests.toy import SENTENCES

PATIENCE = 3.0  # seconds that somebody else may wait on a busy machine
BODY = 200_000  # bytes
ASKED = {"texts": list(SENTENCES[:2]), "kinds": ["dense"]}


@pytest.fixture(scope="module")
def strict(hybrid_folder, encoder_folder) -> Iterator[Running]:
    """A server with low limits."""
    limits = Limits(body_bytes=BODY, texts=50, queue_tokens=3_000, body_seconds=0.5, seconds=30.0)
    models = {"hybrid": hybrid_folder, "plain": encoder_folder}
    with serving(models, limits=limits) as running:
        yield running


@contextmanager
def undisturbed(running: Running, model: str = "plain") -> Iterator[None]:
    """Let another client ask all the time: each answer must be right and come soon."""
    text = SENTENCES[3]
    true = running.embedder(model).encode([text])
    ended, waited, problems = Event(), [], []

    def ask() -> None:
        asked = {"model": model, "texts": [text], "kinds": ["dense"]}
        with httpx2.Client(base_url=running.url, timeout=60, trust_env=False) as client:
            while not ended.is_set() or len(waited) < 5:
                began = time.monotonic()
                answer = client.post("/v1/vectors", json=asked)
                waited.append(time.monotonic() - began)
                if answer.status_code != 200:
                    problems.append(answer.text)
                elif not np.allclose(answer.json()["texts"][0]["dense"], true, atol=1e-6):
                    problems.append("another vector")
                time.sleep(0.02)

    asking = Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join(60)
    assert not asking.is_alive() and not problems, problems
    assert max(waited) < PATIENCE, f"an answer took {max(waited):.1f} s"


@contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    """Open a bare connection."""
    host, port = running.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), 20)) as opened:
        yield opened


def request(body: bytes, *headers: str, path: str = "/v1/vectors", length: int | None = None):
    """Return a request as bytes."""
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answered(opened: socket.socket) -> bytes:
    """Return all that arrives until the other side closes, or the first answer is complete."""
    found = b""
    while True:
        head, blank, body = found.partition(b"\r\n\r\n")
        if blank and b"content-length: " in head.lower():
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            if len(body) >= length:
                return found
        try:
            part = opened.recv(65_536)
        except ConnectionResetError:
            return found
        if not part:
            return found
        found += part


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer.split(b" ", 2)[1])


def message(answer: httpx2.Response) -> str:
    return answer.json()["error"]["message"]


# ---- bodies ----------------------------------------------------------------------------------

LONG = json.dumps({"texts": ["x" * BODY]}).encode()
DEEP = b"[" * 50_000 + b"]" * 50_000


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"", 400, "the body must be JSON"),
        (b"{", 400, "the body must be JSON"),
        (b'{"texts": ["\xff\xfe"]}', 400, "the body must be JSON"),
        (b'{"texts": ["\\ud800"]}', 400, "the body must be JSON"),
        (b'{"texts": [NaN]}', 400, "the body must be JSON"),
        (DEEP, 400, "the body must be JSON"),
        (b"[]", 400, "the body must be a JSON object; got an empty list"),
        (b"null", 400, "the body must be a JSON object; got null"),
        (b'{"texts": "a"}', 400, '"texts" must be a list of strings; got "a"'),
        (b'{"texts": []}', 400, '"texts" must not be empty'),
        (b'{"texts": ["a", 1]}', 400, '"texts[1]" must be a string; got 1'),
        (json.dumps({"texts": ["a"] * 51}).encode(), 413, "at most 50 elements; got 51"),
        (json.dumps({"texts": ["word " * 20] * 50}).encode(), 413, "at most 3,000 tokens; got"),
        (LONG, 413, f"at most 200,000 bytes; got {len(LONG):,}"),
    ],
)
def test_a_body_that_is_wrong_is_refused_with_what_is_wrong(strict, body, code, says):
    with undisturbed(strict):
        answer = strict.http.post(
            "/v1/vectors", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == code and says in message(answer)


def test_a_body_of_another_type_is_refused(strict):
    given = {"content": json.dumps(ASKED), "headers": {"content-type": "text/plain"}}
    answer = strict.http.post("/v1/vectors", **given)
    assert answer.status_code == 415
    assert message(answer) == 'Content-Type must be application/json; got "text/plain"'


def test_a_huge_body_is_refused_before_it_arrives(strict):
    with undisturbed(strict), connected(strict) as opened:
        began = time.monotonic()
        opened.sendall(request(b"", length=10**12))
        answer = answered(opened)
    assert status(answer) == 413 and b"got 1,000,000,000,000" in answer
    assert time.monotonic() - began < PATIENCE


def test_a_huge_body_in_chunks_of_unknown_number_is_refused_at_the_limit(strict):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with undisturbed(strict), connected(strict) as opened:
        opened.sendall(
            b"POST /v1/vectors HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        opened.sendall(chunk * 4)  # above the limit, and no end
        answer = answered(opened)
    assert status(answer) == 413 and b"at most 200,000 bytes; got more" in answer


# ---- slow and lost clients ---------------------------------------------------------------------


def test_a_body_that_does_not_arrive_times_out(strict):
    whole = json.dumps(ASKED).encode()
    with undisturbed(strict), connected(strict) as opened:
        opened.sendall(request(whole[:20], length=len(whole)))
        answer = answered(opened)
    assert status(answer) == 408 and b"must arrive within 0.5 seconds" in answer


def test_a_body_that_arrives_byte_by_byte_times_out(strict):
    whole = json.dumps(ASKED).encode()
    with undisturbed(strict), connected(strict) as opened:
        opened.sendall(request(b"", length=len(whole)))
        began = time.monotonic()
        opened.settimeout(0.02)
        answer = b""
        for each in whole:
            try:
                opened.sendall(bytes([each]))
                answer += opened.recv(4096)
            except TimeoutError:
                continue
            if answer:
                break
    assert status(answer) == 408
    assert 0.4 < time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("sent", [b"", b"POST /v1/vec", b"POST /v1/vectors HTTP/1.1\r\nHost: h"])
def test_headers_that_do_not_arrive_close_the_connection(strict, monkeypatch, sent):
    monkeypatch.setattr(connection, "SECONDS", 0.4)
    with undisturbed(strict), connected(strict) as opened:
        opened.sendall(sent)
        assert answered(opened) == b""


def test_hundreds_of_idle_connections_hold_up_nobody(strict):
    with undisturbed(strict):
        opened = []
        try:
            for _ in range(300):
                host, port = strict.url.removeprefix("http://").split(":")
                opened.append(socket.create_connection((host, int(port)), 20))
                opened[-1].sendall(b"POST /v1/vectors HTTP/1.1\r\n")
            answer = strict.post("/v1/vectors", ASKED)
        finally:
            for each in opened:
                each.close()
    assert answer.status_code == 200


@contextmanager
def held(running: Running, name: str) -> Iterator[Event]:
    """Let no batch of a model begin to be read until the event is set."""
    embedder, opened, began = running.embedder(name), Event(), Event()
    whole = embedder.encode_packed

    def waiting(texts: Any, kinds: Any) -> Any:
        began.set()
        assert opened.wait(30)
        return whole(texts, kinds)

    embedder.encode_packed = waiting
    first = Thread(target=running.post, args=("/v1/vectors", {"model": name, "texts": ["a"]}))
    first.start()
    try:
        assert began.wait(20)
        yield opened
    finally:
        opened.set()
        del embedder.encode_packed
        first.join(30)


def test_a_client_that_vanishes_leaves_the_queue(strict):
    asked = json.dumps({"model": "hybrid", "texts": list(SENTENCES)}).encode()
    queue = strict.service.models.by_name["hybrid"].queue
    before = len(strict.lines)
    with undisturbed(strict, "plain"), held(strict, "hybrid"):
        with connected(strict) as opened:
            opened.sendall(request(asked))
            until = time.monotonic() + PATIENCE
            while not queue.tokens and time.monotonic() < until:
                time.sleep(0.01)
            assert queue.tokens > 50
            # A reset at once, as when a machine goes down.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until = time.monotonic() + PATIENCE
        while queue.tokens and time.monotonic() < until:
            time.sleep(0.01)
        assert queue.tokens == 0
    assert 499 in {line["status"] for line in strict.lines[before:]}


def test_a_client_that_does_not_read_its_answers_holds_up_nobody(server):
    asked = json.dumps({"texts": [" ".join(SENTENCES)] * 1_000, "kinds": ["multi"]}).encode()
    with undisturbed(server), socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        opened.connect((host, int(port)))
        opened.sendall(request(asked))
        time.sleep(1)
        assert opened.recv(12) == b"HTTP/1.1 200"  # the head of several megabytes


def test_requests_sent_without_waiting_are_answered_in_their_order(strict):
    bodies = [json.dumps({"texts": [text], "kinds": ["dense"]}).encode() for text in SENTENCES[:4]]
    last = request(bodies[-1], "Connection: close")
    with undisturbed(strict), connected(strict) as opened:
        opened.sendall(b"".join(map(request, bodies[:-1])) + last)
        found = b""
        while part := opened.recv(65_536):
            found += part
    rows = [json.loads(each.split(b"\r\n\r\n")[1]) for each in found.split(b"HTTP/1.1 200 OK")[1:]]
    true = strict.embedder("hybrid").encode(SENTENCES[:4])
    np.testing.assert_allclose([row["texts"][0]["dense"] for row in rows], true, atol=1e-6)


def test_a_client_that_vanishes_is_not_answered_though_it_asked_several_times(strict, caplog):
    asked = request(json.dumps({"model": "hybrid", "texts": list(SENTENCES)}).encode())
    queue = strict.service.models.by_name["hybrid"].queue
    with undisturbed(strict, "plain"), caplog.at_level(logging.ERROR):
        with held(strict, "hybrid"):
            with connected(strict) as opened:
                opened.sendall(asked * 3)
                until = time.monotonic() + PATIENCE
                while not queue.tokens and time.monotonic() < until:
                    time.sleep(0.01)
                assert queue.tokens > 50
            until = time.monotonic() + PATIENCE
            while queue.tokens and time.monotonic() < until:
                time.sleep(0.01)
            assert queue.tokens == 0
        time.sleep(0.1)
    assert not caplog.records, [each.getMessage() for each in caplog.records]


# ---- keys and queues ---------------------------------------------------------------------------


def test_wrong_keys_are_refused_and_the_right_one_is_served_meanwhile(hybrid_folder):
    key = "sé cret-1"
    right = {"authorization": "Bearer sé cret-1".encode()}
    wrong: list[dict[str, bytes]] = [
        {},
        {"authorization": b""},
        {"authorization": b"Bearer"},
        {"authorization": b"Bearer s"},
        {"authorization": b"Basic c2VjcmV0"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": b"secret-2"},
        {"authorization": b"Bearer " + b"k" * 10_000},
    ]
    with serving({"hybrid": hybrid_folder}, key=key) as running:
        for headers in wrong:
            for path in ("/v1/vectors", "/v1/embeddings"):
                answer = running.post(path, ASKED, headers=headers)
                assert answer.status_code == 401, (headers, answer.text)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "; send it as: Authorization: Bearer KEY" in message(answer)
            assert running.post("/v1/vectors", ASKED, headers=right).status_code == 200
        assert running.get("/health").status_code == 200


def test_a_full_queue_refuses_with_the_time_to_wait_and_answers_what_it_took(strict):
    texts = [" ".join(SENTENCES)] * 20
    answers: list[httpx2.Response] = []

    def ask() -> None:
        asked = {"model": "hybrid", "texts": texts, "kinds": ["dense"]}
        with httpx2.Client(base_url=strict.url, timeout=60, trust_env=False) as client:
            answers.append(client.post("/v1/vectors", json=asked))

    with undisturbed(strict, "plain"), held(strict, "hybrid") as opened:
        asking = [Thread(target=ask) for _ in range(5)]
        for each in asking:
            each.start()
        until = time.monotonic() + PATIENCE
        while len(answers) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert [each.status_code for each in answers] == [429] * 3
        for each in answers:
            assert int(each.headers["retry-after"]) >= 1
            assert "tokens wait for the model, and at most 3,000 may; this request" in message(each)
        alone = {"model": "hybrid", "texts": texts[:1] * 1, "kinds": ["dense"]}
        assert strict.post("/v1/vectors", alone | {"texts": texts}).status_code == 429
        openai = strict.post("/v1/embeddings", {"model": "hybrid", "input": SENTENCES * 4})
        assert openai.status_code in (200, 429)
        opened.set()
        for each in asking:
            each.join(30)
    assert sorted(each.status_code for each in answers) == [200, 200, 429, 429, 429]
    true = strict.embedder("hybrid").encode(texts)
    for each in answers[3:]:
        found = [row["dense"] for row in each.json()["texts"]]
        np.testing.assert_allclose(found, true, atol=1e-6)


# ---- fuzzing -----------------------------------------------------------------------------------

VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/vectors": [
        {"texts": ["read mail", ""], "role": "query", "kinds": ["dense", "multi"], "dims": 16},
        {"model": "plain", "texts": ["a"], "truncate": "start", "format": "safetensors"},
    ],
    "/v1/embeddings": [
        {"model": "hybrid-query", "input": "read mail", "dimensions": 16},
        {"model": "plain", "input": ["a", "b c"], "encoding_format": "base64"},
        {"model": "plain", "input": [[7, 8, 9]], "truncate": "end", "user": "me"},
    ],
    "/v2/embed": [
        {
            "model": "hybrid",
            "texts": ["a", "b"],
            "input_type": "search_query",
            "embedding_types": ["float", "int8", "ubinary"],
            "truncate": "END",
        },
        {"inputs": [{"content": [{"type": "text", "text": "a"}]}], "input_type": "clustering"},
    ],
    "/": [{"inputs": "read mail"}],
    "/embed": [{"inputs": ["a", "b"], "normalize": False, "truncate": True, "dimensions": 8}],
    "/embed_sparse": [{"inputs": "read mail", "truncation_direction": "Left"}],
    "/embed_all": [{"inputs": ["read mail"], "prompt_name": "query"}],
    "/similarity": [{"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}],
    "/rerank": [{"query": "a", "texts": ["b", "c"], "return_text": True, "raw_scores": True}],
    "/v1/search": [
        {"query": "read mail", "k": 3, "weights": {"sparse": 0.5}, "where": {"lang": "en"}},
        {"queries": ["a", "b"], "fusion": "rerank", "candidates": 3, "highlight": True},
        {"queries": ["a"], "fusion": "rrf", "where": {"year": [2001, 2002], "lang": "de"}},
    ],
    "/v1/documents": [
        {
            "documents": [
                {"id": "new", "text": "read mail", "title": "Mail", "fields": {"lang": "en"}},
                {"id": 7, "text": "play music", "fields": {"year": 2001, "of": ["a", 1, True]}},
            ]
        }
    ],
    "/v1/documents/delete": [{"ids": ["new", "d1", "never"], "index": "texts"}],
    "/tokenize": [{"inputs": ["read mail"], "add_special_tokens": False}],
    "/decode": [{"ids": [[7, 8, 9]], "skip_special_tokens": False}],
}
"""Bodies that are answered, by path."""

STRINGS = (
    "",
    " ",
    "read mail",
    "query",
    "hybrid",
    "plain-document",
    "\x00\x1b\x7f",
    "é\u202e\U0001f600\ufffd",
    "../../etc/passwd",
    "%00%ff",
    "x" * 5_000,
    "\n" * 300,
    "section=web",
    "NaN",
    "1",
)
NUMBERS = (0, 1, -1, 2, 16, 64, 65, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e300, 1e-300, 3.0)
METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW")
TYPES = ("application/json", "application/vnd.x+json; charset=latin-1", "text/plain", "", "a" * 900)
PATHS = ("/", "//", "/v1", "/v1/vectors/", "/V1/VECTORS", "/%", "/%00", "/%ff%fe", "/é", "/a" * 900)


class Fuzz:
    """Random requests, the same for a seed: valid ones changed in one or many places."""

    def __init__(self, seed: int, described: dict[str, Any]) -> None:
        self.random = random.Random(seed)
        self.routes = [
            (route.path, method)
            for route in application(Service()).routes
            if isinstance(route, Route)
            for method in sorted(set(route.methods or ()) - {"HEAD"})
        ]
        self.names: dict[str, list[str]] = {}
        for path, methods in described["paths"].items():
            for entry in methods.values():
                content = entry.get("requestBody", {}).get("content", {}).get("application/json")
                fields = (content or {}).get("schema", {}).get("properties", {})
                self.names.setdefault(path, []).extend(fields)

    def value(self, depth: int = 0) -> Any:
        """A value of JSON."""
        draw, inner = self.random, depth + 1
        made = draw.randrange(12 if depth < 3 else 8)
        if made < 4:
            return draw.choice(STRINGS)
        if made < 6:
            return draw.choice(NUMBERS)
        if made < 8:
            return draw.choice((None, True, False))
        if made < 10:
            length = draw.choice((0, 1, 2, 2, 3, 40 if depth == 0 else 4))
            return [self.value(inner) for _ in range(length)]
        names = ("content", "type", "text", "id", "", draw.choice(STRINGS))
        return {name: self.value(inner) for name in draw.sample(names, draw.randrange(4))}

    def changed(self, value: Any) -> Any:
        """A value with one thing changed somewhere inside."""
        draw = self.random
        if isinstance(value, dict) and value and draw.random() < 0.8:
            name = draw.choice(list(value))
            return {**value, name: self.changed(value[name])}
        if isinstance(value, list) and value and draw.random() < 0.6:
            place = draw.randrange(len(value))
            return [*value[:place], self.changed(value[place]), *value[place + 1 :]]
        return self.value()

    def body(self, path: str) -> bytes:
        """A body: valid, or changed as JSON, or changed as bytes."""
        draw = self.random
        names = self.names.get(path) or ["texts", "query"]
        base: Any = draw.choice(VALID.get(path) or [{}])  # a DELETE has a path only
        for _ in range(draw.choice((0, 1, 1, 1, 2, 5))):
            base = self.changed(base)
        if isinstance(base, dict) and draw.random() < 0.3:
            base = {**base, draw.choice([*names, *STRINGS]): self.value()}
        if draw.random() < 0.05:
            base = self.value()
        made = bytearray(json.dumps(base, ensure_ascii=draw.random() < 0.5).encode())
        if draw.random() < 0.15:
            for _ in range(draw.choice((1, 1, 2, 20))):
                what, place = draw.randrange(3), draw.randrange(len(made) + 1)
                if what == 0:
                    made[place:place] = draw.randbytes(draw.choice((1, 2, 50)))
                elif what == 1:
                    del made[place : place + draw.choice((1, 2, 50))]
                else:
                    made[place:] = made[:place]
        return bytes(made)

    def __call__(self) -> tuple[str, str, bytes | None, dict[str, str]]:
        """Method, path, body and headers of a request."""
        draw = self.random
        path, method = draw.choice(self.routes)
        if draw.random() < 0.7:  # mostly where there is a body
            path, method = draw.choice([each for each in self.routes if each[1] != "GET"])
        body = self.body(path) if method != "GET" else None
        names = ("hybrid", "plain-query", "d3", "a%20b", "%ff", "..", "%00")
        path = re.sub(r"\{[a-z]+(:path)?\}", draw.choice(names), path)
        if draw.random() < 0.02:
            path = draw.choice(PATHS)
        if draw.random() < 0.03:
            path += "?" + "".join(draw.choices(string.printable[:94], k=20)).replace("#", "")
        if draw.random() < 0.03:
            method = draw.choice(METHODS)
        headers = {"content-type": TYPES[0] if draw.random() < 0.97 else draw.choice(TYPES)}
        if draw.random() < 0.05:
            headers[draw.choice(("authorization", "accept", "x-api-key"))] = draw.choice(
                STRINGS[:6]
            )
        return method, path, body, headers


def ask(opened: http.client.HTTPConnection, asked: tuple) -> tuple[int, bytes]:
    """Send a request with whatever is in it, and return status and body of the answer."""
    method, path, body, headers = asked
    opened.putrequest(method, "/", skip_accept_encoding=True)
    # http.client refuses what is not ASCII: the line of the request is written by hand.
    lines: list[bytes] = vars(opened)["_buffer"]
    lines[0] = f"{method} {path} HTTP/1.1".encode()
    for name, value in headers.items():
        opened.putheader(name, "".join(c if c.isprintable() else "?" for c in value).encode())
    if body is not None:
        opened.putheader("content-length", str(len(body)))
    opened.endheaders(body)
    answer = opened.getresponse()
    return answer.status, answer.read()


def fuzz(running: Running, caplog: pytest.LogCaptureFixture, seed: int, count: int) -> Counter[int]:
    """Send so many requests, some at once; return how often each status came."""
    described = running.get("/openapi.json").json()
    make, found = Fuzz(seed, described), Counter[int]()
    port = int(running.url.rpartition(":")[2])
    with caplog.at_level(logging.ERROR), ExitStack() as stack:
        opened = stack.enter_context(
            closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60))
        )
        for _ in range(count):
            asked = make()
            try:
                code, body = ask(opened, asked)
            except (http.client.HTTPException, ConnectionError) as error:
                # What is no HTTP ends the connection, if need be without an answer.
                code, body = 0, repr(error).encode()
                assert not asked[1].isascii() or " " in asked[1], (asked, error)
            if code in (0, 400) and not body.startswith(b"{"):
                opened.close()
            found[code] += 1
            assert code < 500, (asked, code, body)
            if code >= 400 and body.startswith(b"{"):
                said = json.loads(body)
                text = json.dumps(said)
                assert "Traceback" not in text and len(text) < 8_000, (asked, text)
    assert not caplog.records, [each.getMessage() for each in caplog.records][:3]
    return found


@pytest.fixture(scope="module")
def fuzzed(hybrid_folder, encoder_folder, tmp_path_factory) -> Iterator[Running]:
    """A server for random requests, which change its index."""
    texts = make_index(tmp_path_factory.mktemp("fuzzed") / "texts", hybrid_folder)
    models = {"hybrid": hybrid_folder, "plain": encoder_folder}
    with serving(models, indexes={"texts": texts}) as running:
        yield running


def test_the_bodies_that_fuzzing_starts_from_are_answered(fuzzed):
    routes = [each for each in application(Service()).routes if isinstance(each, Route)]
    assert {each.path for each in routes if "POST" in (each.methods or ())} == set(VALID)
    for path, bodies in VALID.items():
        for body in bodies:
            answer = fuzzed.post(path, body)
            assert answer.status_code == 200, (path, body, answer.text)


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 500), pytest.param(1, 10_000, marks=pytest.mark.slow)]
)
def test_random_requests_never_fail_the_server(fuzzed, caplog, seed, count):
    with undisturbed(fuzzed):
        found = fuzz(fuzzed, caplog, seed, count)
    # Requests that are all refused at the first check would test little.
    assert found[200] > count / 10 and found[400] > count / 10
    assert {200, 400, 404, 405, 415} <= set(found), found


RAW = (
    b"",
    b"\r\n\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a greeting of TLS
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/vectors HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/vectors HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n{}",
    b"POST /v1/vectors HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(5_000)) + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_bytes_that_are_no_request_get_an_error_or_a_closed_connection(strict, monkeypatch, raw):
    monkeypatch.setattr(connection, "SECONDS", 0.4)
    with undisturbed(strict), connected(strict) as opened:
        opened.sendall(raw)
        answer = answered(opened)
    assert answer == b"" or 400 <= status(answer) < 500

import json
import socket
import threading
import time
from contextlib import suppress

import pytest

import tercet.curate.synthesis.endpoint as calling
from tercet.curate.synthesis.endpoint import Calls, EndpointGenerator
from tercet.curate.synthesis.generators import Answer, Generator, Prompt, TokenSampling
from tercet.errors import ModelError, RecipeError
from tests.answering import Reply, completion, endpoint

QUICK = Calls(pause_seconds=0.01, retries=3, timeout_seconds=5)
KEY = "sk-only-a-test"


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {n}", n) for n in range(count)]


def asked(url: str, count: int = 1, calls: Calls = QUICK) -> dict[int, Answer]:
    return dict(EndpointGenerator(url, "writer", calls=calls).answers(prompts(count)))


def test_a_call_says_what_the_protocol_asks_for(monkeypatch):
    monkeypatch.setenv("TEST_KEY", f" {KEY}\n")
    with endpoint(lambda body, _: completion("What is ls?")) as served:
        sampling = TokenSampling(temperature=0.5, top_p=0.9, max_tokens=7)
        generator = EndpointGenerator(
            served.url + "/", "writer", sampling, key_variable="TEST_KEY", calls=QUICK
        )
        assert isinstance(generator, Generator)
        assert list(generator.answers([Prompt("Ask.", 2**40 + 3)])) == [(0, Answer("What is ls?"))]
    ((path, headers, body),) = served.calls
    assert path == "/v1/chat/completions"
    assert (headers["Authorization"], headers["Content-Type"]) == (
        f"Bearer {KEY}",
        "application/json",
    )
    assert body == {
        "model": "writer",
        "messages": [{"role": "user", "content": "Ask."}],
        "seed": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
    }
    assert KEY not in json.dumps(dict(generator.about))


def test_without_a_variable_no_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with endpoint(lambda *_: completion("x")) as served:
        asked(served.url)
    assert "Authorization" not in served.calls[0][1]


def test_each_answer_comes_with_the_number_of_its_prompt_whoever_is_first():
    def reply(body, _):
        text = body["messages"][0]["content"]
        time.sleep(0.05 if text == "prompt 0" else 0)
        return completion(f"to {text}")

    with endpoint(reply) as served:
        found = asked(served.url, 11)
    assert found == {n: Answer(f"to prompt {n}") for n in range(11)}


def test_calls_run_at_the_same_time_and_prompts_are_read_as_they_are_needed():
    meeting = threading.Barrier(3, timeout=5)
    read: list[int] = []

    def endless():
        for n in range(10_000):
            read.append(n)
            yield Prompt(f"prompt {n}", n)

    def reply(*_):
        meeting.wait()  # breaks, and with it the call, unless three are here together
        return completion("x")

    with endpoint(reply) as served:
        calls = Calls(workers=3, retries=0, timeout_seconds=8)
        answers = EndpointGenerator(served.url, "writer", calls=calls).answers(endless())
        assert [next(answers)[1].failure for _ in range(2)] == [None, None]
        meeting.abort()
        answers.close()
    assert len(read) < 20


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(status):
    def reply(_, number):
        return completion("x") if number == 2 else Reply(status, {"error": {"message": "later"}})

    with endpoint(reply) as served:
        assert asked(served.url) == {0: Answer("x")}
    assert len(served.calls) == 3


def test_an_endpoint_may_say_how_long_to_wait():
    def reply(_, number):
        return completion("x") if number else Reply(429, {}, {"Retry-After": "0"})

    with endpoint(reply) as served:
        started = time.monotonic()
        assert asked(served.url, calls=Calls(pause_seconds=30)) == {0: Answer("x")}
    assert time.monotonic() - started < 10


def test_pauses_double(monkeypatch):
    generator = EndpointGenerator("http://127.0.0.1:1/v1", "writer", calls=QUICK)
    pauses: list[float] = []
    monkeypatch.setattr(generator._stopped, "wait", lambda pause: pauses.append(pause))
    ((_, answer),) = generator.answers(prompts(1))
    assert answer.failure and pauses == [0.01, 0.02, 0.04]


@pytest.mark.parametrize(
    ("reply", "tries", "said"),
    [
        (Reply(503, {"error": {"message": "no room"}}), 4, "status 503: 'no room'"),
        (Reply(500, b""), 4, "status 500: Internal Server Error"),
        (Reply(400, {"error": {"message": "prompt too long"}}), 1, "status 400: 'prompt too long'"),
        (Reply(400, {"error": "bad"}), 1, "status 400: 'bad'"),
        (Reply(200, b"<html>"), 1, "not a chat completion: b'<html>'"),
        (Reply(200, {"choices": []}), 1, "not a chat completion: b'{\"choices\": []}'"),
        (completion(None), 1, "a chat completion without a text: None"),
    ],
)
def test_a_call_that_fails_says_why(reply, tries, said):
    with endpoint(lambda *_: reply) as served:
        assert asked(served.url) == {0: Answer(failure=said)}
    assert len(served.calls) == tries


def test_nobody_there_and_nobody_answering_are_failures():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        calls = Calls(retries=1, pause_seconds=0.01, timeout_seconds=0.2)
        refused = asked(nobody, calls=calls)[0]
        taken.listen()
        silent = asked(nobody, calls=calls)[0]
    assert "refused" in str(refused.failure) and "timed out" in str(silent.failure)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "status 401: 'no'; check the key"),
        (403, "status 403: 'no'; check the key"),
        (404, "status 404: 'no'; check the address and the name of the model"),
    ],
)
def test_what_no_other_call_would_change_stops_all(status, said):
    with endpoint(lambda *_: Reply(status, {"error": {"message": "no"}})) as served:
        with pytest.raises(ModelError, match=said):
            asked(served.url, 50)
    assert len(served.calls) <= QUICK.workers * 3


def test_a_redirection_is_not_followed_so_that_the_key_stays_here(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with endpoint(lambda *_: completion("x")) as elsewhere:
        moved = Reply(302, b"", {"Location": f"{elsewhere.url}/chat/completions"})
        with endpoint(lambda *_: moved) as served:
            generator = EndpointGenerator(served.url, "writer", key_variable="TEST_KEY")
            with pytest.raises(ModelError, match="give the address that it leads to"):
                list(generator.answers(prompts(1)))
    assert elsewhere.calls == []


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "file:///etc/passwd", "http://", "http://[::1", "http://host:port/v1", ""],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(RecipeError, match="is not an address; give one such as"):
        EndpointGenerator(url, "writer")


def test_addresses_are_completed_and_passwords_are_no_part_of_them():
    for url in ("http://host/v1", "http://host/v1/", "http://host/v1/chat/completions"):
        assert EndpointGenerator(url, "m").url == "http://host/v1/chat/completions"
    with pytest.raises(RecipeError, match="contains a user or password") as caught:
        EndpointGenerator("http://me:secret@host/v1", "m")
    assert "secret" not in str(caught.value)


def test_a_variable_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(RecipeError, match="TEST_KEY has no key; set it"):
        EndpointGenerator("http://host/v1", "m", key_variable="TEST_KEY")
    monkeypatch.setenv("TEST_KEY", "two\nlines")
    with pytest.raises(RecipeError, match="the key in TEST_KEY must be printable ASCII") as caught:
        EndpointGenerator("http://host/v1", "m", key_variable="TEST_KEY")
    assert "two" not in str(caught.value)


@pytest.mark.parametrize("how", [{"workers": 0}, {"timeout_seconds": 0.0}, {"retries": -1}])
def test_calls_that_ask_nothing_are_refused(how):
    with pytest.raises(RecipeError, match="workers must be at least 1"):
        Calls(**how)


@pytest.mark.parametrize("beginning", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n", b""])
def test_an_endpoint_that_sends_a_byte_now_and_then_is_given_up(beginning):
    """A timeout alone would start again with every byte, of the headers or of the body."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(beginning)
            while True:
                connection.sendall(b"H" if not beginning else b"x")
                time.sleep(0.05)

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    began = time.monotonic()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with listener, pytest.raises(ModelError, match="a reply did not end within 1 seconds"):
        asked(url, calls=Calls(workers=1, timeout_seconds=0.2, retries=4, pause_seconds=0))
    assert time.monotonic() - began < 10
    thread.join(timeout=10)


def test_a_reply_without_end_is_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(calling, "_MOST_BYTES", 1_000)
    with endpoint(lambda *_: completion("x" * 2_000)) as served:
        assert asked(served.url) == {0: Answer(failure="a reply of more than 1,000 bytes")}

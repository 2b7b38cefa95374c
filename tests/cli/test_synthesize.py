import json
import signal
import subprocess
import sys
import time
from threading import Event

import pytest

from tercet.data.files.sources import iter_examples
from tests.answering import Reply, completion, endpoint, written
from tests.cli.lines import cells, write
from tests.processes import ROOT
from tests.toy import SENTENCES


@pytest.fixture
def docs(tmp_path):
    """Twelve documents of some lines, in two splits."""
    records = [
        {
            "name": f"d{n}",
            "body": "\n\n".join(f"{SENTENCES[(n + i) % 12]}, as page {n} says." for i in range(9)),
            "split": "test" if n % 4 == 3 else "train",
        }
        for n in range(12)
    ]
    return write(tmp_path / "docs.jsonl", *records)


@pytest.fixture
def start(docs, tmp_path):
    """The words of a synthesis by an endpoint, but for its URL."""
    words = ["synthesize", docs, "--model", "writer", "--out", tmp_path / "q.jsonl"]
    words += ["--text-field", "body", "--title-field", "name", "--id-field", "name"]
    return [
        *words,
        "--min-characters",
        "60",
        "--max-characters",
        "200",
        "--split",
        "train",
        "--retries",
        "0",
    ]


def counted(out: str) -> dict[str, str]:
    """The last column by the first, of all tables."""
    return {row[0]: row[-1] for row in map(cells, out.splitlines())}


def ask(body, number):
    return completion(f"Question: What does page {number} say of many things?")


def test_an_endpoint_writes_examples_and_the_table_says_what_became_of_each(
    tercet, start, tmp_path
):
    with endpoint(ask) as served:
        ended = tercet(*start, "--url", served.url)
    found = counted(ended.out)
    assert ended.status == 0, ended.err
    names = ("documents drawn", "passages", "answered now", "failed calls", "duplicates", "kept")
    assert [found[name] for name in names] == ["9", "9", "9", "0", "0", "9"]
    assert (found["refused: pronoun"], found["first"]) == ("0", "3")
    examples = list(iter_examples(tmp_path / "q.jsonl"))
    assert len(examples) == 9 and {example.task for example in examples} == {"q"}
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert not {row["document_id"] for row in rows} & {"d3", "d7", "d11"}  # the test split
    assert "raw answers stay in" in ended.err and "9 answers in" in ended.err
    asked = served.calls[0][2]["messages"][0]["content"]
    assert 'called "d' in asked and "the language of the text" in asked


def test_the_same_command_goes_on_and_asks_again_only_for_what_failed(tercet, start, tmp_path):
    def sometimes(body, number):
        return ask(body, number) if number % 3 else Reply(503, {"error": {"message": "down"}})

    with endpoint(sometimes) as served:
        first = tercet(*start, "--url", served.url)
        second = tercet(*start, "--url", served.url)
    assert counted(first.out)["failed calls"] == "3" and counted(first.out)["kept"] == "6"
    assert "tercet: note: 3 calls failed: status 503: 'down'" in first.err
    assert counted(second.out)["answered before"] == "6" and len(served.calls) == 12


def test_a_check_drops_questions_without_new_answers(tercet, start, encoder_folder, tmp_path):
    with endpoint(ask) as served:
        url = ["--url", served.url]
        tercet(*start, *url)
        check = ["--check-model", encoder_folder, "--work", tmp_path / "work", "--top", "1"]
        ended = tercet(*start, *url, *check, "--find-in", "documents")
    found = counted(ended.out)
    assert len(served.calls) == 9 and found["answered now"] == "0"
    inconsistent, kept = int(found["inconsistent, among 9"]), int(found["kept"])
    assert inconsistent + kept == 9 and 0 < inconsistent
    assert "questions were checked among only 9 documents" in ended.err


def test_prompt_language_task_and_numbers_are_handed_on(tercet, start, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-test")
    (tmp_path / "prompt.txt").write_text("In {language}: {passage}")
    more = ["--prompt-file", tmp_path / "prompt.txt", "--language", "Danish", "--task", "pages"]
    more += ["--documents", "4", "--samples", "2", "--seed", "7", "--key-variable", "TEST_KEY"]
    more += ["--temperature", "0.1", "--top-p", "0.5", "--max-tokens", "9", "--calls", "1"]
    with endpoint(ask) as served:
        ended = tercet(*start, "--url", served.url, *more)
    assert ended.status == 0, ended.err
    assert len(served.calls) == 8
    assert {example.task for example in iter_examples(tmp_path / "q.jsonl")} == {"pages"}
    for _, headers, body in served.calls:
        assert body["messages"][0]["content"].startswith("In Danish: ")
        numbers = (body["temperature"], body["top_p"], body["max_tokens"])
        assert numbers == (0.1, 0.5, 9) and headers["Authorization"] == "Bearer sk-test"
    assert "sk-test" not in (tmp_path / "q.log.jsonl").read_text() + ended.err + ended.out


def test_answers_that_are_no_questions_leave_nothing_and_the_table_says_why(
    tercet, start, tmp_path
):
    with endpoint(lambda *_: completion("No.")) as served:
        ended = tercet(*start, "--url", served.url)
    assert ended.status == 2 and counted(ended.out)["refused: no question"] == "9"
    assert f"tercet: {tmp_path / 'q.jsonl'}: not written: no question is left" in ended.err
    assert not (tmp_path / "q.jsonl").exists()


def test_a_local_model_that_writes_nothing_of_use_is_counted(tercet, docs, start, tmp_path):
    folder = written(tmp_path / "writer", template="{{ messages[0]['content'][:40] }}")
    words = [folder if word == "writer" else word for word in start]
    ended = tercet(*words, "--documents", "3", "--max-tokens", "6", "--batch", "2")
    found = counted(ended.out)
    assert ended.status == 2 and (found["answered now"], found["kept"]) == ("3", "0")


def test_what_a_user_gets_wrong_is_said_in_a_line(refused, start, docs, tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    url = ["--url", "http://127.0.0.1:9/v1"]
    assert "writer: no such folder" in refused(*start) or "cannot write" in refused(*start)
    assert refused(*start, "--url", "localhost:9").startswith("'localhost:9' is not an address")
    assert "TEST_KEY has no key" in refused(*start, *url, "--key-variable", "TEST_KEY")
    assert refused(*start, "--key-variable", "TEST_KEY").startswith("--key-variable is for an")
    assert refused(*start, *url, "--max-characters", "61").startswith(
        "the longest passage must be at least twice"
    )
    assert "has no {passage}" in refused(*start, *url, "--prompt-file", docs)
    assert refused(*start, *url, "--split", "dev").endswith(
        "has no record whose \"split\" is 'dev'"
    )
    assert refused(*start, *url, "--text-field", "long").startswith(f'{docs}:1: "long" is missing')
    assert refused(*start, *url, "--temperature", "-1").endswith("got -1, 0.95 and 64")
    into = [docs if word == tmp_path / "q.jsonl" else word for word in start]
    assert refused(*into, *url) == f"{docs}: is an input; " + ("give another --out")
    assert 'unknown kind of file ".txt"' in refused(*start, *url, "--out", tmp_path / "q.txt")


def test_an_endpoint_that_does_not_know_the_model_is_named(refused, start):
    missing = Reply(404, {"error": {"message": "no model writer"}})
    with endpoint(lambda *_: missing) as served:
        said = refused(*start, "--url", served.url)
    assert said.startswith(f"{served.url}/chat/completions: status 404: 'no model writer'; check")


REPEATED = "sk-live-1234567890"
REPEATING = {
    "an answer": lambda: completion(f"Question: What is {REPEATED} for, among many things?"),
    "an escaped answer": lambda: Reply(
        body=json.dumps(completion(f"Question: Why {REPEATED}?").body)
        .replace("sk-", "\\u0073k-")
        .encode()
    ),
    "no answer": lambda: Reply(body=b'{"you": "%s"' % REPEATED.encode()),
    "a refusal": lambda: Reply(401, {"error": {"message": f"wrong key {REPEATED}"}}),
    "a long refusal": lambda: Reply(401, {"error": "x" * 90 + REPEATED}),
    "a fault": lambda: Reply(500, f"Authorization: Bearer {REPEATED}".encode()),
    "another answer": lambda: Reply(400, {"error": [REPEATED]}, {"X-Key": REPEATED}),
    "a redirection": lambda: Reply(302, b"", {"Location": f"http://host/?key={REPEATED}"}),
}


@pytest.mark.parametrize("how", REPEATING)
def test_a_key_that_an_endpoint_repeats_is_written_nowhere(
    tercet, start, tmp_path, monkeypatch, how
):
    monkeypatch.setenv("TEST_KEY", REPEATED)
    for name in ("q.jsonl", "q.log.jsonl"):
        (tmp_path / name).touch(0o644)
    with endpoint(lambda *_: REPEATING[how]()) as served:
        ended = tercet(*start, "--url", served.url, "--key-variable", "TEST_KEY")
        assert served.calls[0][1]["Authorization"] == f"Bearer {REPEATED}"
    left = [path.read_text() for path in tmp_path.iterdir() if path.is_file()]
    for text in (ended.out, ended.err, *left):
        assert "1234567" not in text and "sk-live" not in text
    kept = (tmp_path / "q.log.jsonl").read_text() + ended.err
    assert "***" in kept or how in ("a redirection", "a long refusal")
    assert (tmp_path / "q.log.jsonl").stat().st_mode & 0o777 == 0o600
    if "answer" in how and ended.status == 0:
        assert (tmp_path / "q.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_signal_does_not_wait_for_calls_and_keeps_the_answers(tercet, start, tmp_path):
    over = Event()

    def reply(body, number):
        if 5 <= number < 9:  # all of its workers wait
            over.wait(60)
        return ask(body, number)

    with endpoint(reply) as served:
        words = [str(word) for word in (*start, "--url", served.url, "--timeout", "50")]
        command = [sys.executable, "-m", "tercet", *words]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while len(served.calls) < 9:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)  # until the answers are logged
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        over.set()
        assert process.returncode == 143
        assert err.splitlines()[-1] == (
            "tercet: stopped; answers so far are kept, and the same command asks for the rest"
        )
        ended = tercet(*start, "--url", served.url, "--timeout", "50")
    found = counted(ended.out)
    assert (found["answered before"], found["answered now"]) == ("5", "4")

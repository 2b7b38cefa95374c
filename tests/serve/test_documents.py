"""Documents added, replaced and removed over HTTP, and indexes that change while they are open."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event

import httpx2
import pytest

from tercet.data.files.documents import Document
from tercet.errors import IndexFolderError
from tercet.models.embedder import Embedder
from tercet.search.exact import manifest
from tercet.search.opening import open_engine, verify_index
from tercet.search.text_index import open_index
from tercet.serve.search.indexes import open_indexes
from tercet.serve.served import ServedModel
from tests.serve.indexed import DOCUMENTS, document, found, make_index
from tests.serving import Running, load, serving
from tests.toy import SENTENCES

ROOT = Path(__file__).parents[2]
NEW = "count mountains and rivers on maps"


@pytest.fixture
def folder(hybrid_folder, tmp_path) -> Path:
    return make_index(tmp_path / "index", hybrid_folder)


@pytest.fixture
def server(folder) -> Iterator[Running]:
    with serving(indexes={"docs": folder}) as running:
        yield running


def upsert(server: Running, *documents: dict, **more) -> httpx2.Response:
    return server.post("/v1/documents", {"documents": list(documents), **more})


def best(server: Running, query: str) -> str:
    return found(server.post("/v1/search", {"query": query, "k": 1}))[0][0]


def until(holds, seconds: float = 20) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def commit(folder: Path) -> int:
    read = manifest.read(folder / "exact")
    assert read is not None
    return read.number


def test_a_document_is_found_when_its_upsert_is_answered(server):
    fields = {"lang": "en", "tags": ["a", "b"], "year": 1999, "open": True}
    answer = upsert(server, document("new/1 ?", NEW, title="Maps", fields=fields))
    assert answer.json() == {"index": "docs", "upserted": 1, "unchanged": 0, "truncated": []}
    assert best(server, NEW) == "new/1 ?"
    where = {"tags": "b", "open": True}
    assert found(server.post("/v1/search", {"query": "a", "where": where})) == [["new/1 ?"]]
    fetched = server.get("/v1/documents/new/1%20%3F", params={"index": "docs"})
    assert fetched.json() == {"id": "new/1 ?", "text": NEW, "title": "Maps", "fields": fields}


def test_documents_over_http_score_as_those_of_the_command_do(
    server, folder, hybrid_folder, tmp_path
):
    whole = make_index(tmp_path / "whole", hybrid_folder)
    server.post("/v1/documents/delete", {"ids": [each.id for each in DOCUMENTS]})
    answer = upsert(
        server,
        *(document(d.id, d.text, title=d.title, fields=dict(d.fields)) for d in DOCUMENTS),
    )
    assert answer.json()["upserted"] == len(DOCUMENTS)
    with open_index(whole, load=load) as expected:
        hits = expected.search([NEW], 12)[0]
    got = server.post("/v1/search", {"query": NEW, "k": 12}).json()["results"][0]["hits"]
    assert [hit["id"] for hit in got] == [hit.record.id for hit in hits]
    for one, other in zip(got, hits, strict=True):
        assert one["scores"] == pytest.approx(other.scores, abs=1e-3)  # half precision of multi


def test_an_upsert_replaces_a_document_and_skips_unchanged_ones(server):
    same = DOCUMENTS[3]
    given = document(same.id, same.text, title=same.title, fields=dict(same.fields))
    answer = upsert(server, document("d1", NEW), given)
    assert (answer.json()["upserted"], answer.json()["unchanged"]) == (1, 1)
    assert server.lines[-1]["texts"] == 1
    assert best(server, NEW) == "d1"
    assert upsert(server, document("d1", NEW), given).json()["unchanged"] == 2
    assert "texts" not in server.lines[-1]
    (state,) = server.get("/v1/indexes").json()["indexes"]
    assert state["documents"] == len(DOCUMENTS)


def test_a_document_that_was_cut_is_named(server):
    answer = upsert(server, document("long", "music " * 100), document("short", "music"))
    assert answer.json()["truncated"] == ["long"]


def test_deleted_documents_are_gone(server, folder):
    answer = server.post("/v1/documents/delete", {"ids": ["d1", "d2", "d1", "lost"]})
    assert answer.json() == {"index": "docs", "deleted": 2}
    assert server.http.delete("/v1/documents/d3").json()["deleted"] == 1
    assert server.http.delete("/v1/documents/d3").json()["deleted"] == 0
    answer = server.get("/v1/documents/d1")
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "code": "no_document",
        "message": 'the index docs has no document with the id "d1"',
    }
    hits = found(server.post("/v1/search", {"query": "music", "k": 20}))[0]
    assert len(hits) == len(DOCUMENTS) - 3
    with closing(open_engine(folder, read_only=True)) as engine:
        assert {record.id for record in engine.scan()} == set(hits)


@pytest.mark.parametrize("name", [".", "..", "../d1", "a/./b", "/", "?id=d1&index=x", "100%"])
def test_a_document_of_any_id_is_fetched_and_removed_by_the_query(server, name):
    assert upsert(server, document(name, NEW)).json()["upserted"] == 1
    params = {"id": name, "index": "docs"}
    assert server.get("/v1/documents", params=params).json()["id"] == name
    assert server.http.delete("/v1/documents", params=params).json()["deleted"] == 1
    answer = server.get("/v1/documents", params=params)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_document")


def test_a_request_for_no_document_says_where_the_id_goes(server):
    for answer in (server.get("/v1/documents"), server.http.delete("/v1/documents")):
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            400,
            '"id" is missing; give it in the address: /v1/documents?id=ID',
        )


@pytest.mark.parametrize(
    "documents, message",
    [
        ([], '"documents" must not be empty'),
        ({}, '"documents" must be a list of objects; got an object'),
        (["a"], '"documents[0]" must be an object with id and text; got "a"'),
        ([{"text": "a"}], '"documents[0].id" must be a string that is not blank; got null'),
        (
            [{"id": "a", "text": " "}],
            '"documents[0].text" must be a string that is not blank; got " "',
        ),
        (
            [document("a", "b"), document("a", "c")],
            '"documents[1].id" must be unique; "documents[0].id" is the same',
        ),
        (
            [document("a", "b", lang="en")],
            '"documents[0]" has the unknown field "lang"; put it into "fields"',
        ),
        ([document("a", "b", title=0)], '"documents[0].title" must be a string; got 0'),
        (
            [document("a", "b", fields=[])],
            '"documents[0].fields" must be an object; got an empty list',
        ),
        (
            [document("a", "b", fields={"x": {"y": 1}})],
            '"documents[0].fields.x" must be a text, a number, true or false, or a list of these; '
            "got an object",
        ),
    ],
    ids=str,
)
def test_documents_that_cannot_be_are_refused_and_change_nothing(
    server, folder, documents, message
):
    before = commit(folder)
    answer = server.post("/v1/documents", {"documents": documents})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert commit(folder) == before


def test_upserts_that_arrive_together_share_commits_and_all_are_found(server, folder):
    before = commit(folder)

    def send(number: int) -> int:
        text = f"{NEW} {SENTENCES[number % 12]}"
        return upsert(server, document(f"n{number}", text)).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(send, range(64))) == {200}
    assert commit(folder) - before < 48
    for number in range(64):
        assert server.get(f"/v1/documents/n{number}").status_code == 200
    (state,) = server.get("/v1/indexes").json()["indexes"]
    assert state["documents"] == len(DOCUMENTS) + 64


def test_while_another_process_writes_changes_are_refused_and_searches_go_on(server, folder):
    with closing(open_engine(folder)):
        answer = upsert(server, document("new", NEW))
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        assert answer.json()["error"]["message"] == (
            "another process, such as tercet index, is writing to the index docs; send this again "
            "when it is done"
        )
        assert server.get("/v1/documents/new").status_code == 404
        assert best(server, SENTENCES[1]) == "d1"
    assert upsert(server, document("new", NEW)).status_code == 200


def test_a_change_waits_for_another_process_that_is_done_soon(server, folder):
    with ThreadPoolExecutor(1) as pool:
        with closing(open_engine(folder)):
            answer = pool.submit(upsert, server, document("new", NEW))
            time.sleep(0.3)
            assert not answer.done()
        assert answer.result().status_code == 200


def test_two_servers_write_to_one_index_and_see_each_other(server, folder):
    with serving(indexes={"docs": folder}) as other:
        servers = [server, other]

        def send(number: int) -> int:
            chosen = servers[number % 2]
            return upsert(chosen, document(f"n{number}", f"{NEW} {number}")).status_code

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(send, range(16))) == {200}
        for each in servers:
            until(
                lambda each=each: all(
                    each.get(f"/v1/documents/n{number}").status_code == 200 for number in range(16)
                )
            )


def test_an_index_of_qdrant_is_changed_and_searched(hybrid_folder, tmp_path):
    pytest.importorskip("qdrant_edge")
    folder = make_index(tmp_path / "edge", hybrid_folder, engine="qdrant")
    with serving(indexes={"docs": folder}) as server:
        assert upsert(server, document("new", NEW)).json()["upserted"] == 1
        assert best(server, NEW) == "new"
        answer = server.post("/v1/search", {"query": NEW, "highlight": True}).json()
        assert answer["notes"] == [
            "highlight: only indexes of the exact engine can say which tokens match"
        ]
        assert server.http.delete("/v1/documents/new").json()["deleted"] == 1
        assert best(server, NEW) != "new"


# ---- changes by other processes ------------------------------------------------------------------


def test_what_another_process_wrote_is_searched_without_a_restart(server, folder, hybrid_folder):
    assert server.service.indexes is not None
    index = server.service.indexes.find("docs")
    loaded = index.loaded
    changed = [*DOCUMENTS[1:], type(DOCUMENTS[0])("new", NEW)]
    make_index(folder, hybrid_folder, changed)
    until(lambda: best(server, NEW) == "new")
    assert server.get("/v1/documents/d0").status_code == 404
    (state,) = server.get("/v1/indexes").json()["indexes"]
    assert (state["documents"], state["error"]) == (len(DOCUMENTS), None)
    assert index.loaded > loaded
    assert state["loaded"] == index.loaded.isoformat(timespec="seconds")
    assert upsert(server, document("newer", NEW)).status_code == 200


def test_an_index_made_again_with_another_model_is_not_taken_over(
    server, folder, encoder_folder, caplog
):
    make_index(folder, encoder_folder, DOCUMENTS[:3], fresh=True)
    until(lambda: best(server, SENTENCES[9]) == "d9" and state(server)["error"])
    assert state(server)["error"].startswith(f"{folder}: was built with fingerprint")
    assert (state(server)["documents"], state(server)["kinds"][-1]) == (len(DOCUMENTS), "multi")
    assert "index docs stays" in caplog.text
    answer = upsert(server, document("new", NEW))
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == (
        "the index has changed: it was built again with another model or other settings; send this "
        "again when the server has loaded it, or restart the server if GET /v1/indexes reports an "
        "error"
    )


def test_an_index_made_again_with_other_settings_of_its_model_is_taken_over(
    server, folder, hybrid_folder
):
    make_index(folder, hybrid_folder, fresh=True, dims=16, kinds=["dense"], precision="int8")
    until(lambda: best(server, SENTENCES[9]) == "d9" and state(server)["dims"] == 16)
    assert (state(server)["kinds"], state(server)["error"]) == (["dense"], None)
    assert upsert(server, document("new", NEW)).status_code == 200


def test_a_damaged_index_is_not_taken_over_until_it_is_whole_again(server, folder):
    place = folder / "exact/manifest.json"
    whole = place.read_text()
    place.write_text(whole[:-20])
    until(lambda: best(server, SENTENCES[9]) == "d9" and state(server)["error"])
    assert "manifest.json cannot be read" in state(server)["error"]
    assert upsert(server, document("new", NEW)).status_code == 500
    place.write_text(whole)
    until(lambda: best(server, SENTENCES[9]) == "d9" and not state(server)["error"])
    assert upsert(server, document("new", NEW)).status_code == 200


def state(server: Running) -> dict:
    (found,) = server.get("/v1/indexes").json()["indexes"]
    return found


REWRITER = """
import sys
from pathlib import Path
import torch
from tests.serve.indexed import DOCUMENTS, make_index
from tercet.data.files.documents import Document
torch.set_num_threads(1)
folder, model = map(Path, sys.argv[1:3])
for round in range(6):
    extra = [Document(f"r{round} {i}", f"count words of round {round} {i}") for i in range(300)]
    make_index(folder, model, [*DOCUMENTS, *extra], fresh=round % 3 == 2)
"""


@pytest.mark.slow
def test_searches_go_on_while_another_process_writes_the_index_again(server, folder, hybrid_folder):
    """Each answer is of an index that was complete once: all of its documents, or all of others."""
    words = [sys.executable, "-c", REWRITER, str(folder), str(hybrid_folder)]
    rounds: set[str] = set()
    slowest = 0.0
    with subprocess.Popen(words, cwd=ROOT) as rewriter:
        while rewriter.poll() is None:
            began = time.monotonic()
            where = {"query": "count words", "k": 400, "candidates": 0}
            hits = found(server.post("/v1/search", where))[0]
            slowest = max(slowest, time.monotonic() - began)
            seen = {name.split()[0] for name in hits if name.startswith("r")}
            rounds |= seen
            assert len(seen) <= 1
            assert len(hits) == len(DOCUMENTS) + (300 if seen else 0)
    assert rewriter.returncode == 0
    until(lambda: state(server)["documents"] == 312 and best(server, "round 5 1").startswith("r5"))
    assert state(server)["error"] is None
    assert len(rounds) > 2
    assert slowest < 5


# ---- kill -9 -------------------------------------------------------------------------------------

SERVER = """
import os, sys
from pathlib import Path
import torch
from tercet.serve.server import ServeOptions, serve
from tests.serving import load
torch.set_num_threads(1)
for _ in sys.stdin:
    if not (child := os.fork()):
        options = ServeOptions(indexes={"docs": Path(sys.argv[1])}, port=0, load=load)
        serve(options, lambda line: os.write(1, f"{line}\\n".encode()))
        os._exit(0)
    os.write(1, f"process {child}\\n".encode())  # in one piece, unlike print
    os.waitpid(child, 0)
"""


def words_of(name: str) -> str:
    """Return a text that no other document has."""
    return " ".join(random.Random(name).choices(" ".join(SENTENCES).split(), k=12))


def acknowledged(url: str, prefix: str, begun: Event) -> tuple[dict[str, str], set[str]]:
    """Change documents until the server is gone; return what is there and what is not."""
    there: dict[str, str] = {}
    gone: set[str] = set()
    http = httpx2.Client(base_url=url, trust_env=False, timeout=20)
    with http:
        for number in range(10_000):
            names = [f"{prefix} {number} {i}" for i in range(3)]
            documents = [document(name, words_of(name)) for name in names]
            try:
                if http.post("/v1/documents", json={"documents": documents}).status_code != 200:
                    break
                begun.set()
                there |= {each["id"]: each["text"] for each in documents}
                if number % 3 == 2:
                    doomed = names[0]
                    del there[doomed]  # unknown until it is acknowledged
                    if http.delete(f"/v1/documents/{doomed}").status_code == 200:
                        gone.add(doomed)
            except httpx2.HTTPError:
                break
    return there, gone


@contextmanager
def killed_at_the_end(starter: subprocess.Popen[str]) -> Iterator[None]:
    """A test that fails does not wait for its processes."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_upserts_loses_no_acknowledged_document(folder, hybrid_folder):
    """Eight times, at random moments, with four clients that write."""
    words = [sys.executable, "-c", SERVER, str(folder)]
    kept, lost = {document.id: document.text for document in DOCUMENTS}, set[str]()
    pipe = subprocess.PIPE
    chance = random.Random(17)
    started = subprocess.Popen(
        words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )
    with started as starter, killed_at_the_end(starter):
        assert starter.stdin is not None and starter.stdout is not None
        for round_ in range(8):
            starter.stdin.write("go\n")
            starter.stdin.flush()
            lines = [starter.stdout.readline()]
            while not any("http://" in line for line in lines):
                lines.append(starter.stdout.readline())
                assert lines[-1], lines
            child = next(int(line.split()[1]) for line in lines if line.startswith("process"))
            url = next(line.split()[-1] for line in lines if "http://" in line)
            begun = Event()
            with ThreadPoolExecutor(4) as pool:
                clients = [
                    pool.submit(acknowledged, url, f"{round_} {client}", begun)
                    for client in range(4)
                ]
                assert begun.wait(30)
                time.sleep(chance.random() / 2)
                os.kill(child, signal.SIGKILL)
                results = [client.result() for client in clients]
            for there, gone in results:
                kept |= there
                lost |= gone
            verify_index(folder)
            with closing(open_engine(folder, read_only=True)) as engine:
                records = {record.id: record.text for record in engine.scan()}
            assert kept.items() <= records.items()
            assert not lost & set(records)
            assert all(records[name] == words_of(name) for name in set(records) - set(kept))
        starter.stdin.close()
    assert len(kept) > len(DOCUMENTS) + 30
    names = random.Random(1).sample(sorted(set(kept) - {d.id for d in DOCUMENTS}), 20)
    vectors = load(str(hybrid_folder), "float32").encode_vectors(
        [kept[name] for name in names], "document", kinds=["dense"]
    )
    with closing(open_engine(folder, read_only=True)) as engine:  # each has its own vectors
        hits = engine.search(vectors, 1)
    assert [hit.record.id for (hit,) in hits] == names
    assert [hit.score for (hit,) in hits] == pytest.approx([1.0] * len(names), abs=1e-5)


def test_a_server_that_stops_has_answered_changes(folder):
    with (
        httpx2.Client(trust_env=False, timeout=20) as http,
        ThreadPoolExecutor(1) as pool,
        serving(indexes={"docs": folder}) as server,
    ):
        body = {"documents": [document("last", NEW)]}
        answer = pool.submit(http.post, f"{server.url}/v1/documents", json=body)
        assert server.service.indexes is not None
        index = server.service.indexes.find("docs")
        until(lambda: len(index._tasks) > 0)  # of its commit
    assert answer.result().status_code == 200
    with closing(open_engine(folder, read_only=True)) as engine:
        assert engine.fetch(["last"])[0] is not None


def test_a_model_that_is_gone_is_an_error_at_the_start(hybrid_folder, tmp_path):
    Embedder.load(hybrid_folder).save(tmp_path / "model")
    folder = make_index(tmp_path / "index", tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")

    def model_of(source: str, precision: str, fingerprint: str) -> ServedModel:
        return ServedModel("toy", load(source, precision), most=1)

    with pytest.raises(IndexFolderError, match="its model cannot be loaded"):
        open_indexes({"docs": folder}, model_of)


def test_fields_that_json_hardly_holds_are_answered(hybrid_folder, tmp_path):
    """A whole number beyond 64 bits, and half of a character."""
    fields = {"isbn": 123456789012345678901, "note": "\ud800 half"}
    folder = make_index(tmp_path / "index", hybrid_folder, [Document("1", NEW, fields=fields)])
    with serving(indexes={"docs": folder}) as running:
        answer = running.post("/v1/search", {"query": NEW})
        assert found(answer) == [["1"]]
        assert answer.json()["results"][0]["hits"][0]["fields"] == fields
        assert running.get("/v1/documents?id=1").json()["fields"] == fields

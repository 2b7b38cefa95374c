"""What holds for the server as a whole: loading, names, connections, its log."""

import asyncio
import json
import os
import shutil
import socket
import time
from contextlib import closing, suppress
from threading import Event

import httpx2
import numpy as np
import pytest
import torch

from tercet.errors import IndexFolderError
from tercet.models.embedder import Embedder
from tercet.serve import connection, server
from tercet.serve.access_log import access_log
from tercet.serve.endpoint import Service
from tercet.serve.server import ServeOptions, application, serve
from tests.serve.indexed import make_index
from tests.serving import load, serving
from tests.toy import SENTENCES


def test_any_failure_of_loading_ends_the_server():
    def load(source: str, precision: str) -> Embedder:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        serve(ServeOptions(models={"a": "minilm"}, port=0, load=load))


def test_two_names_of_one_model_share_it(encoder_folder):
    loads = []

    def load(source: str, precision: str) -> Embedder:
        loads.append(source)
        return Embedder.load(source)

    with serving({"a": encoder_folder, "b": encoder_folder}, load=load) as running:
        for name in ("a", "b", "b-query"):
            asked = {"texts": ["x"], "model": name}
            assert running.post("/v1/vectors", asked).status_code == 200, name
        listed = [each["id"] for each in running.get("/v1/models").json()["data"]]
    assert len(loads) == 1
    assert {"a", "b", "a-query", "b-document"} <= {*listed}


def test_an_index_takes_its_model_from_where_the_command_says(hybrid_folder, tmp_path):
    """As in a container, where the model is not where it was when the index was made."""
    shutil.copytree(hybrid_folder, tmp_path / "then")
    folder = make_index(tmp_path / "index", tmp_path / "then")
    (tmp_path / "then").rename(tmp_path / "now")
    with serving({"now": tmp_path / "now"}, indexes={"docs": folder}) as running:
        assert [each["name"] for each in running.get("/v1/state").json()["models"]] == ["now"]
        found = running.post("/v1/search", {"query": "music", "k": 1}).json()
        assert len(found["results"][0]["hits"]) == 1
    with pytest.raises(IndexFolderError, match="its model cannot be loaded"):
        serve(ServeOptions(indexes={"docs": folder}, port=0, load=load))


@pytest.mark.parametrize("moved", [False, True])
def test_a_model_takes_the_type_of_an_index_that_it_made(hybrid_folder, tmp_path, moved):
    shutil.copytree(hybrid_folder, tmp_path / "then")
    folder, place, loads = make_index(tmp_path / "index", tmp_path / "then"), tmp_path / "then", []
    if moved:
        place = place.rename(tmp_path / "now")

    def load(source: str, precision: str) -> Embedder:
        loads.append(precision)
        return Embedder.load(source, dtype=getattr(torch, precision))

    options = ServeOptions(
        models={"m": str(place)},
        indexes={"docs": folder},
        precision=lambda source, of_index: of_index or "bfloat16",
        load=load,
    )
    service = Service()
    server.load(service, options)
    assert service.models is not None and service.indexes is not None
    service.indexes.close()
    for model in service.models:
        model.close()
    assert loads == ["float32"] and [*service.models.by_name] == ["m"]


def test_without_a_role_the_default_prompt_is_taken_as_by_encode(encoder_folder, tmp_path):
    prompts = {"query": "find : ", "document": "file : ", "other": "play : "}
    embedder = Embedder.load(encoder_folder, prompts=prompts, default_prompt="other")
    embedder.save(tmp_path / "model")
    with serving({"model": tmp_path / "model"}) as running:
        for role in (None, "default", "query", "document", "passage"):
            body = {"texts": ["a small web server"], "kinds": ["dense"], "role": role}
            found = running.post("/v1/vectors", body).json()["texts"][0]["dense"]
            expected = embedder.encode(["a small web server"], role or "default")[0]
            np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=str(role))


def test_unknown_paths_are_counted_and_logged(hybrid_folder):
    with serving({"hybrid": hybrid_folder}) as running:
        assert running.get("/v1/nothing").status_code == 404
        assert running.get("/embed").status_code == 405
        lines = [line for line in running.lines if line["path"] == "unknown"]
        metrics = running.get("/metrics").text
    assert [line["status"] for line in lines] == [404, 405]
    assert 'tercet_requests_total{path="unknown",status="404"} 1.0' in metrics


def _open(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 20)


def _closes(opened: socket.socket) -> float:
    """Return the seconds until the other side closes a connection."""
    began = time.monotonic()
    try:
        while opened.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def _asked(path: str, field: str, texts: list[str]) -> bytes:
    """Return a request as bytes."""
    body = json.dumps({field: texts}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def _begun(opened: socket.socket) -> tuple[int, int]:
    """Return how long an answer is, and how much of it has come."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += opened.recv(1_024)
    head, _, rest = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    return int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]), len(rest)


def test_an_answer_that_nobody_reads_is_dropped(server, monkeypatch):
    monkeypatch.setattr(connection, "SECONDS", 0.3)
    with closing(_open(server.url)) as opened:
        opened.sendall(_asked("/embed_all", "inputs", [" ".join(SENTENCES)] * 600))
        length, received = _begun(opened)
        time.sleep(1.5)  # longer than the limit, with nothing read
        try:
            while part := opened.recv(1 << 20):
                received += len(part)
        except ConnectionResetError:
            pass
    assert length > 20_000_000, "more than fits into buffers of the system"
    assert received < length, "the rest was dropped"


def test_an_answer_that_is_read_slowly_is_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr(connection, "SECONDS", 0.5)
    with closing(_open(server.url)) as opened:
        opened.sendall(_asked("/embed_all", "inputs", [" ".join(SENTENCES)] * 600))
        length, received = _begun(opened)
        began = time.monotonic()
        while received < length:
            part = opened.recv(min(length - received, 3 << 20))
            assert part, "the connection was closed before the end"
            received += len(part)
            if time.monotonic() - began < 2:
                time.sleep(0.1)


def test_the_rest_of_a_refused_body_has_a_time_limit(hybrid_folder, monkeypatch):
    monkeypatch.setattr(connection, "SECONDS", 0.3)
    with (
        serving({"hybrid": hybrid_folder}, key="k", wait=False) as running,
        closing(_open(running.url)) as opened,
    ):
        opened.sendall(
            b"POST /v1/vectors HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        )
        assert opened.recv(12) == b"HTTP/1.1 401"
        opened.sendall(b"{")
        assert _closes(opened) < 5


def test_a_log_that_nobody_reads_holds_up_nobody():
    read, write = os.pipe()
    stream = open(write, "w")
    began = time.monotonic()
    with access_log(stream) as note:
        for number in range(20_000):
            note({"number": number})
    assert time.monotonic() - began < 5
    os.close(read)
    time.sleep(0.2)  # the writer sees that
    with suppress(BrokenPipeError):
        stream.close()


def test_requests_are_refused_while_models_are_loaded(encoder_folder):
    opened = Event()

    def load_later(source: str, precision: str) -> Embedder:
        assert opened.wait(30)
        return Embedder.load(source)

    asked = {
        "/v1/vectors": {"texts": ["a"]},
        "/v1/embeddings": {"input": "a"},
        "/v2/embed": {"texts": ["a"]},
        "/embed": {"inputs": "a"},
        "/v1/search": {"query": "a"},
    }
    with serving({"a": encoder_folder}, load=load_later, wait=False) as running:
        try:
            assert running.get("/health/live").status_code == 200
            assert running.get("/health/ready").status_code == 503
            assert running.get("/openapi.json").status_code == 200
            for path, body in asked.items():
                refused = running.post(path, body)
                assert refused.status_code == 503, path
                assert refused.headers["retry-after"] == "2", path
                assert "models are being loaded; try again soon" in refused.text, path
        finally:
            opened.set()
        until = time.monotonic() + 30
        while running.get("/health/ready").status_code == 503 and time.monotonic() < until:
            time.sleep(0.02)
        assert running.post("/v1/vectors", {"texts": ["a"]}).status_code == 200


def test_only_pages_of_named_origins_may_send_requests():
    async def ask(origins: list[str]) -> httpx2.Headers:
        app = httpx2.ASGITransport(app=application(Service(), origins=origins))
        headers = {
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        async with httpx2.AsyncClient(transport=app, base_url="http://localhost") as http:
            return (await http.options("/v1/vectors", headers=headers)).headers

    name = "access-control-allow-origin"
    assert asyncio.run(ask(["https://page.example"]))[name] == "https://page.example"
    assert name not in asyncio.run(ask(["https://other.example"]))
    assert name not in asyncio.run(ask([]))

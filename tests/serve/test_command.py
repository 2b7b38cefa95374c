"""The command ``tercet serve`` as users run it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pytest

from tercet.cli.app import main
from tests.serving import command
from tests.toy import SENTENCES


@pytest.mark.slow
def test_the_command_answers_in_three_protocols_and_ends_after_its_last_answer(hybrid_folder):
    with command(str(hybrid_folder)) as running:
        texts = ["a small web server", "read mail"]
        asked = {"model": "hybrid", "input": texts}
        ours = {"texts": texts, "kinds": ["dense"]}
        with httpx2.Client(base_url=running.url) as http:
            openai = http.post("/v1/embeddings", json=asked).raise_for_status().json()
            plain = http.post("/v1/vectors", json=ours).raise_for_status().json()
            tei = http.post("/embed", json={"inputs": texts}).raise_for_status().json()
            cohere = {"model": "hybrid", "texts": texts, "input_type": "search_document"}
            found = http.post("/v2/embed", json=cohere).raise_for_status().json()
        expected = [row["dense"] for row in plain["texts"]]
        np.testing.assert_allclose(
            [row["embedding"] for row in openai["data"]], expected, atol=1e-6
        )
        np.testing.assert_allclose(tei, expected, atol=1e-6)
        np.testing.assert_allclose(found["embeddings"]["float"], expected, atol=1e-6)

        answers = []

        def ask():
            many = {"texts": [" ".join(SENTENCES)] * 2_000, "kinds": ["dense"]}
            answers.append(httpx2.post(f"{running.url}/v1/vectors", json=many, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        asking.join()
        assert answers[0].status_code == 200 and len(answers[0].json()["texts"]) == 2_000
        assert running.process.wait(20) == 0
    assert "stopped; all requests were answered" in running.lines
    log = [json.loads(line) for line in running.lines if line.startswith("{")]
    assert [line["path"] for line in log] == [
        "/v1/embeddings",
        "/v1/vectors",
        "/embed",
        "/v2/embed",
        "/v1/vectors",
    ]
    assert all(line["status"] == 200 and line["tokens"] > 0 for line in log)
    assert not any("web server" in line for line in running.lines), "texts are not logged"


@pytest.mark.slow
def test_a_key_from_the_environment_is_asked_for(hybrid_folder):
    environment = {"SERVER_KEY": "secret-1"}
    words = (f"mine={hybrid_folder}", "--api-key-env", "SERVER_KEY", "--no-access-log")
    with command(*words, environment=environment) as running:
        body = {"texts": ["read mail"], "kinds": ["dense"]}
        statuses = [
            httpx2.post(f"{running.url}/v1/vectors", json=body, headers=headers).status_code
            for headers in (
                {},
                {"authorization": "Bearer secret-2"},
                {"authorization": "Bearer secret-1"},
                {"x-api-key": "secret-1"},
            )
        ]
        assert statuses == [401, 401, 200, 200]
        assert httpx2.get(f"{running.url}/health").status_code == 200
        assert httpx2.get(f"{running.url}/metrics").status_code == 401
    assert not any(line.startswith("{") for line in running.lines)
    assert not any("secret" in line for line in running.lines)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_command(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "tercet", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"tercet: {tmp_path}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a model or an --index: tercet serve minilm"),
        (["--index", "nowhere"], "nowhere: is not an index folder; make one with: tercet index"),
        (["minilm", "a=minilm", "a=minilm"], 'two models are named "a": minilm and minilm; give'),
        (["minilm", "--api-key-env", "NO_SUCH_KEY"], "must hold a key; it is not set or empty"),
        (["minilm", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8080"),
        (["minilm", "--queue-tokens", "0"], "should be greater than or equal to 1"),
    ],
)
def test_slips_are_explained(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", *words])
    assert end.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_port_in_use_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as end:
            main(["serve", "minilm", "--port", port])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port} (Address already in use)" in said
    assert "choose others: --host, --port" in said

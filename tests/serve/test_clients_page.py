"""The examples of docs/howto/clients.md run, and get the vectors of the embedder.

Those of packages that are not installed here are skipped: some of them pin huggingface-hub below
what others need, and bring hundreds of megabytes.
"""

import gc
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.models.pairs import score_pairs
from tests.serve.indexed import make_index
from tests.serving import Running, serving

PAGE = Path(__file__).parents[2] / "docs/howto/clients.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
QUERY, OTHER = "a small web server", "a web server"
TEXTS = ["nginx serves files", "chess against the computer"]


def block(imported: str) -> str:
    """The example that begins with this import."""
    (found,) = [each for each in BLOCKS if f"from {imported} import" in each]
    package = imported.partition(".")[0]
    if find_spec(package) is None or find_spec(imported) is None:
        pytest.skip(f"{package} is not installed")
    return found


@pytest.fixture(scope="module")
def server(hybrid_folder, tmp_path_factory) -> Iterator[Running]:
    folder = make_index(tmp_path_factory.mktemp("index") / "index", hybrid_folder)
    with serving({"mine": hybrid_folder}, indexes={"docs": folder}) as running:
        yield running


@pytest.fixture
def run(server, monkeypatch):
    """Run an example against the server, and return what it defines."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")

    def run(imported: str) -> dict[str, Any]:
        code = block(imported).replace("http://127.0.0.1:8080", server.url)
        names: dict[str, Any] = {"__name__": "page"}
        exec(compile(code, str(PAGE), "exec"), names)
        return names

    yield run
    gc.collect()  # some clients cannot be closed: their sockets end here, where that is ignored


@pytest.fixture
def encode(server):
    return server.embedder("mine").encode


def test_tercets_client(server, run, capsys):
    names = run("tercet")
    embedder = server.embedder("mine")
    np.testing.assert_allclose(names["dense"], embedder.encode([QUERY], "query"), atol=1e-6)
    assert names["vectors"].kinds == ("dense", "sparse", "multi")
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert names["client"].fetch(["nginx"]) == [None]
    names["client"].close()


def test_openais_client(run, encode):
    names = run("openai")
    np.testing.assert_allclose(names["query"], encode([QUERY], "query", dims=32)[0], atol=1e-6)
    names["openai"].close()


def test_coheres_client(run, encode):
    np.testing.assert_allclose(run("cohere")["query"], encode([QUERY], "query")[0], atol=1e-6)


@pytest.mark.parametrize(
    "imported",
    [
        "langchain_openai",
        "langchain_huggingface",
        "llama_index.embeddings.openai_like",
        "llama_index.embeddings.text_embeddings_inference",
        "haystack.components.embedders",
        "haystack_integrations.components.embedders.huggingface_api",
    ],
)
def test_classes_of_other_libraries(server, run, encode, imported):
    names = run(imported)
    text = OTHER if "llama" in imported else QUERY
    says_no_role = imported.endswith(("text_embeddings_inference", "huggingface_api"))
    role = "default" if says_no_role else "query"
    np.testing.assert_allclose(names["query"], encode([text], role)[0], atol=1e-6)
    if "rows" in names:
        np.testing.assert_allclose(names["rows"], encode(TEXTS, "document"), atol=1e-6)
    if "documents" in names and imported.startswith("haystack."):
        (document,) = names["documents"]
        true = encode([document.content], "document")[0]
        np.testing.assert_allclose(document.embedding, true, atol=1e-6)
    if "best" in names:
        texts = TEXTS[::-1]  # as in the example
        scores = score_pairs(server.embedder("mine"), [QUERY] * 2, texts)
        best = int(scores["dense+sparse+multi"].argmax())
        assert [each.content for each in names["best"]] == [texts[best]]
        assert 0 < names["best"][0].score < 1

"""The peers of ``serve_speed``, each a server on loopback in a separate environment.

    python3.11 -m venv st infinity m3    # three of them
    st/bin/pip install torch==2.13.0
    st/bin/pip install sentence-transformers==6.2.0 fastapi "uvicorn[standard]" orjson
    infinity/bin/pip install torch==2.13.0
    infinity/bin/pip install "infinity-emb[torch,server,logging]==0.0.78"
    m3/bin/pip install torch==2.13.0
    m3/bin/pip install m3serve==0.2.3 numpy fastapi "uvicorn[standard]" orjson

    st/bin/python -m benchmarks.serve_peers st FOLDER --port 8001 --threads 1

All of them answer ``POST /v1/embeddings``; ``m3`` also ``POST /v1/vectors`` with all three kinds.
``GET /counts`` says how many tokens and slots of padded batches went through the model, and
``GET /versions`` the versions of packages.

- ``st``: sentence-transformers behind FastAPI, as a user who cares about speed would write it: one
  thread runs the model, takes all that arrived while the last batches ran, sorts it by length and
  encodes it in batches, each answered when it is done. JSON by orjson, straight from arrays.
- ``infinity``: the server of the package as its command starts it, torch engine. Its
  BetterTransformer does not exist for this transformers. Requests are not logged.
- ``m3``: the engine of the package, which has no server, behind FastAPI.

In favour of all peers: uvloop and httptools, and no log of requests.
"""

import argparse
import asyncio
import base64
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from threading import Condition, Thread
from typing import Any

PACKAGES = "torch transformers sentence-transformers infinity-emb m3serve tokenizers numpy"
PACKAGES += " fastapi starlette uvicorn uvloop httptools orjson pydantic"
BATCH = 32
COUNTS: Counter[str] = Counter()


def versions() -> dict[str, str]:
    """Versions of the packages that are installed here."""
    found = {}
    for package in PACKAGES.split():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def count(mask: Any) -> None:
    """Add up a batch: what counts in its mask, and what was read."""
    COUNTS["tokens"] += int(mask.sum())
    COUNTS["slots"] += mask.numel()
    COUNTS["batches"] += 1


def add_facts(app: Any) -> None:
    """Give an app the two routes that say what it did, and with what."""
    app.add_api_route("/counts", lambda: dict(COUNTS))
    app.add_api_route("/versions", versions)


def answer(model: str, vectors: Any, form: str, tokens: int) -> Any:
    """An answer in OpenAI's form, written straight from arrays."""
    import orjson
    from fastapi import Response  # pyright: ignore[reportMissingImports]

    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row).decode() if form == "base64" else row,
        }
        for i, row in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    said = {"object": "list", "model": model, "data": data, "usage": usage}
    return Response(
        orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )


# ---- sentence-transformers -------------------------------------------------------------------


class Batching:
    """A queue in front of ``encode``: a batch is what waits, in order of length."""

    def __init__(self, model: Any, given: argparse.Namespace) -> None:
        self.model, self.batch, self.window = model, given.batch, given.window / 1000
        self._waiting: list[tuple[str, Any]] = []
        self._changed = Condition()
        self._loop = asyncio.get_running_loop()
        Thread(target=self._run, daemon=True).start()

    async def encode(self, texts: list[str]) -> list[Any]:
        """Vectors of the texts of a request."""
        futures = [self._loop.create_future() for _ in texts]
        with self._changed:
            self._waiting.extend(zip(texts, futures, strict=True))
            self._changed.notify()
        return await asyncio.gather(*futures)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
            if self.window:
                time.sleep(self.window)
            with self._changed:
                items, self._waiting = self._waiting, []
            items.sort(key=lambda item: len(item[0]))
            for i in range(0, len(items), self.batch):
                part = items[i : i + self.batch]
                texts = [text for text, _ in part]
                vectors = self.model.encode(texts, batch_size=self.batch, show_progress_bar=False)
                self._loop.call_soon_threadsafe(self._finish, part, vectors)

    @staticmethod
    def _finish(part: list[tuple[str, Any]], vectors: Any) -> None:
        for (_, future), vector in zip(part, vectors, strict=True):
            if not future.cancelled():
                future.set_result(vector)


def sentence_transformers(given: argparse.Namespace) -> Any:
    """The app of sentence-transformers behind FastAPI."""
    from contextlib import asynccontextmanager

    from fastapi import FastAPI  # pyright: ignore[reportMissingImports]
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer

    class Asked(BaseModel):
        model: str
        input: str | list[str]
        encoding_format: str = "float"

    model = SentenceTransformer(given.folder, device="cpu")
    first: Any = model[0]
    read = first.forward

    def counted(features: Any, **options: Any) -> Any:
        count(features["attention_mask"])
        return read(features, **options)

    first.forward = counted
    queues = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        queues.append(Batching(model, given))
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/embeddings")
    async def embeddings(asked: Asked) -> Any:
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        return answer(asked.model, await queues[0].encode(texts), asked.encoding_format, 0)

    return app


# ---- infinity --------------------------------------------------------------------------------


def infinity(given: argparse.Namespace) -> Any:
    """The app of infinity, as ``infinity_emb v2 --engine torch`` makes it."""
    from infinity_emb.args import EngineArgs  # pyright: ignore[reportMissingImports]
    from infinity_emb.infinity_server import create_server  # pyright: ignore
    from infinity_emb.primitives import Dtype, InferenceEngine  # pyright: ignore
    from infinity_emb.transformer.embedder import sentence_transformer  # pyright: ignore

    embedder = sentence_transformer.SentenceTransformerPatched
    read = embedder.encode_core

    def counted(self: Any, features: Any) -> Any:
        count(features["attention_mask"])
        return read(self, features)

    embedder.encode_core = counted
    engine = EngineArgs(
        model_name_or_path=given.folder,
        served_model_name="minilm",
        batch_size=given.batch,
        engine=InferenceEngine.torch,
        device="cpu",
        dtype=Dtype.float32,
        bettertransformer=False,
    )
    return create_server(engine_args_list=[engine], url_prefix="/v1", doc_extra={})


# ---- m3serve ---------------------------------------------------------------------------------


def m3serve(given: argparse.Namespace) -> Any:
    """The engine of m3serve behind FastAPI; all three kinds go out as JSON, by orjson."""
    from contextlib import asynccontextmanager

    import numpy as np
    import orjson
    from fastapi import FastAPI, Response  # pyright: ignore[reportMissingImports]
    from m3serve import Engine  # pyright: ignore[reportMissingImports]
    from pydantic import BaseModel

    class Asked(BaseModel):
        model: str = ""
        input: str | list[str] = []
        texts: list[str] = []
        encoding_format: str = "float"

    engine = Engine(
        given.folder,
        device="cpu",
        max_batch_size=given.batch,
        batch_delay=given.window / 1000,
        max_length=256,
    )
    read = engine._encoder.encode_core

    def counted(features: Any, *options: Any) -> Any:
        count(features["attention_mask"])
        return read(features, *options)

    engine._encoder.encode_core = counted

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/embeddings")
    async def embeddings(asked: Asked) -> Any:
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        found = await engine.embed(texts)
        vectors = np.array(found.dense, dtype=np.float32)
        return answer(asked.model, vectors, asked.encoding_format, 0)

    @app.post("/v1/vectors")
    async def vectors(asked: Asked) -> Any:
        found = await engine.embed(asked.texts, return_sparse=True, return_colbert=True)
        return Response(orjson.dumps(found.__dict__), media_type="application/json")

    return app


APPS = {"st": sentence_transformers, "infinity": infinity, "m3": m3serve}


def main() -> None:
    """Serve one of them until stopped."""
    parser = argparse.ArgumentParser(description="Serve a peer of serve_speed.")
    parser.add_argument("peer", choices=APPS)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window", type=float, default=0.0, help="milliseconds to wait for more")
    parser.add_argument("--batch", type=int, default=BATCH, help="texts of a batch at most")
    given = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": str(given.threads),
        "RAYON_NUM_THREADS": str(given.threads),
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import torch
    import uvicorn

    torch.set_num_threads(given.threads)
    app = APPS[given.peer](given)
    add_facts(app)
    uvicorn.run(
        app, port=given.port, log_level="warning", access_log=False, loop="uvloop", http="httptools"
    )


if __name__ == "__main__":
    main()

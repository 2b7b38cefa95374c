import asyncio
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

from tercet.models.embedder import Embedder
from tercet.serve.queue import Answer, Batch, PackedQueue
from tercet.serve.requests import RequestError
from tercet.serve.served import ServedModel
from tests.toy import SENTENCES

LONG = " ".join(SENTENCES)


@pytest.fixture(scope="module")
def embedder(encoder_folder: Path) -> Embedder:
    """A model that makes all kinds of vectors."""
    torch.manual_seed(0)
    return Embedder.load(encoder_folder, kinds=("dense", "sparse", "multi"), multi_dim=16)


class Gate:
    """Holds the forwards of an embedder until it is opened, and notes them."""

    def __init__(self, embedder: Embedder) -> None:
        self.whole = embedder.encode_packed
        self.forwards: list[tuple[int, tuple[str, ...]]] = []  # texts and kinds of each
        self.began, self.opened = Event(), Event()

    def __call__(self, texts, kinds):
        self.began.set()
        assert self.opened.wait(20)
        self.forwards.append((len(texts), tuple(kinds)))
        return self.whole(texts, kinds)


@contextmanager
def served(embedder: Embedder, most: int = 1_000_000, batch_tokens: int | None = None):
    """Offer a model whose forwards wait at a gate, and the gate."""
    model = ServedModel("toy", embedder, most=most)
    gate = Gate(embedder)
    embedder.batch_tokens = batch_tokens
    embedder.encode_packed = gate
    try:
        yield model, gate
    finally:
        gate.opened.set()
        model.close()
        del embedder.encode_packed
        embedder.batch_tokens = None


async def begun(gate: Gate, model: ServedModel) -> asyncio.Task:
    """Hold the queue's thread in a first forward."""
    first = asyncio.create_task(read(model, ["a"], ["dense"]))
    await asyncio.to_thread(gate.began.wait, 20)
    return first


async def until(holds) -> None:
    """Wait until a condition holds."""
    while not holds():
        await asyncio.sleep(0.005)


async def read(model: ServedModel, texts, kinds, role="document"):
    return await model.read(await model.prepare(texts, role), kinds)


def test_requests_of_different_kinds_and_lengths_share_one_forward(embedder):
    asked = [
        (["a small web server", LONG], ["dense"], "document"),
        (["play music"], ["sparse", "multi"], "query"),
        ([LONG, "x", "read mail"], ["multi", "dense", "states"], "query"),
        (["count words"], ["sparse"], "document"),
    ]

    async def ask_all(model, gate):
        first = await begun(gate, model)
        tasks = [asyncio.create_task(read(model, *each)) for each in asked]
        await asyncio.sleep(0.05)
        gate.opened.set()
        return await asyncio.gather(*tasks, first)

    with served(embedder) as (model, gate):
        answers = asyncio.run(ask_all(model, gate))
        assert gate.forwards == [(1, ("dense",)), (7, ("dense", "sparse", "multi"))]
        for (texts, kinds, role), answer in zip(asked, answers, strict=False):
            alone = embedder.encode_vectors(texts, role)
            found = answer.vectors()
            assert set(found.kinds) == {*kinds} - {"states"}
            if "dense" in kinds:
                expected = embedder.encode(texts, role)
                np.testing.assert_allclose(model.dense(answer), expected, atol=1e-6)
                shorter = embedder.encode(texts, role, dims=8)
                np.testing.assert_allclose(model.dense(answer, 8), shorter, atol=1e-6)
            if "sparse" in kinds:
                assert found.sparse is not None and alone.sparse is not None
                assert torch.equal(found.sparse.ids, alone.sparse.ids)
                torch.testing.assert_close(
                    found.sparse.weights, alone.sparse.weights, atol=1e-6, rtol=0
                )
            if "multi" in kinds:
                assert found.multi is not None and alone.multi is not None
                assert torch.equal(found.multi.offsets, alone.multi.offsets)
                torch.testing.assert_close(
                    found.multi.vectors, alone.multi.vectors, atol=1e-6, rtol=0
                )
        states = answers[2].states
        assert [len(each) for each in states] == embedder.tokenize(asked[2][0], "query").lengths
        pooled = embedder.encode(asked[2][0], "query", output="tokens")
        np.testing.assert_allclose(states[1], pooled[1], atol=1e-5)


def test_a_long_request_does_not_hold_up_a_short_one(embedder):
    order = []

    async def ask(model, gate, name, texts):
        await read(model, texts, ["dense"])
        order.append((name, len(gate.forwards)))

    async def ask_all(model, gate):
        first = await begun(gate, model)
        long = asyncio.create_task(ask(model, gate, "long", [LONG[:60]] * 40))
        await asyncio.sleep(0.05)
        short = asyncio.create_task(ask(model, gate, "short", ["read mail"]))
        await asyncio.sleep(0.05)
        gate.opened.set()
        await asyncio.gather(first, long, short)

    with served(embedder, batch_tokens=40) as (model, gate):
        asyncio.run(ask_all(model, gate))
    assert [name for name, _ in order] == ["short", "long"]
    assert order[0][1] <= 3, "the first batch, and one or two more"
    assert order[1][1] > 10


def test_two_long_requests_take_turns(embedder):
    done = {}

    async def ask(model, gate, name, texts):
        await read(model, texts, ["dense"])
        done[name] = len(gate.forwards)

    async def ask_all(model, gate):
        first = await begun(gate, model)
        tasks = [
            asyncio.create_task(ask(model, gate, "words", ["read mail in a window"] * 60)),
            asyncio.create_task(ask(model, gate, "sentences", [LONG[:100]] * 20)),
        ]
        await asyncio.sleep(0.05)
        gate.opened.set()
        await asyncio.gather(first, *tasks)

    with served(embedder, batch_tokens=64) as (model, gate):
        counts = {
            "words": 60 * model.embedder.tokenize(["read mail in a window"], "document").lengths[0],
            "sentences": 20 * model.embedder.tokenize([LONG[:100]], "document").lengths[0],
        }
        asyncio.run(ask_all(model, gate))
    fewer, more = sorted(counts, key=lambda name: counts[name])
    # While both wait each gets half: the smaller one is done after twice its tokens.
    expected = done[more] * 2 * counts[fewer] / sum(counts.values())
    assert done[fewer] == pytest.approx(expected, rel=0.15)


def test_short_requests_that_keep_coming_do_not_starve_a_long_one(embedder):
    length = embedder.tokenize(["read mail"], "document").lengths[0]
    short_callers, texts = 12, 20
    answered = []

    async def ask_all(model, gate):
        gate.opened.set()
        long = asyncio.create_task(read(model, ["read mail"] * texts, ["dense"]))

        async def ask_again():
            while not long.done() and len(answered) < 5_000:
                await read(model, ["read mail"], ["dense"])
                answered.append(1)

        await asyncio.gather(*(ask_again() for _ in range(short_callers)))
        return long

    # A batch holds half of the callers, so some texts of short requests always wait.
    with served(embedder, batch_tokens=length * short_callers // 2) as (model, gate):
        long = asyncio.run(ask_all(model, gate))
    assert not long.cancelled()
    # Its share is one of thirteen: each of its texts waits for at most about twelve others.
    assert len(answered) < texts * short_callers * 3


def test_a_cancelled_request_leaves_the_queue(embedder):

    async def ask_all(model, gate):
        first = await begun(gate, model)
        gone = asyncio.create_task(read(model, [LONG] * 30, ["dense"]))
        await until(lambda: model.queue.tokens > 1_000)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert model.queue.tokens == 0
        gate.opened.set()
        await first
        await read(model, ["x"], ["dense"])

    with served(embedder) as (model, gate):
        asyncio.run(ask_all(model, gate))
    assert [texts for texts, _ in gate.forwards] == [1, 1]


def test_what_would_wait_too_long_is_refused_with_the_numbers(embedder):

    async def ask_all(model, gate):
        first = await begun(gate, model)
        waits = asyncio.create_task(read(model, ["read mail"] * 10, ["dense"]))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError, match="40 tokens wait for the model, and at most") as full:
            await read(model, ["read mail"] * 10, ["dense"])
        with pytest.raises(RequestError, match="at most 60 tokens; got 120; send several") as large:
            await read(model, ["read mail"] * 30, ["dense"])
        gate.opened.set()
        await asyncio.gather(first, waits)
        await read(model, ["read mail"] * 10, ["dense"])
        return full.value, large.value

    with served(embedder, most=60) as (model, gate):
        full, large = asyncio.run(ask_all(model, gate))
    assert (full.status, large.status) == (429, 413)
    assert full.retry_after is not None and full.retry_after >= 1
    assert large.retry_after is None


def test_a_broken_forward_answers_its_requests_and_leaves_the_next_ones(embedder, caplog):
    broken = [True]

    def fails_once(texts, kinds, whole=embedder.encode_packed):
        if broken.pop() if broken else False:
            raise RuntimeError("out of memory")
        return whole(texts, kinds)

    async def ask_all(model, gate):
        gate.whole = fails_once
        gate.opened.set()
        with pytest.raises(RequestError, match="the model failed on this batch") as error:
            await read(model, [LONG] * 60, ["dense"])
        assert error.value.status == 500
        assert model.queue.tokens == 0
        assert len((await read(model, ["x"], ["dense"])).dense[0]) == 1

    with served(embedder) as (model, gate):
        asyncio.run(ask_all(model, gate))
    assert "out of memory" in caplog.text


def test_a_text_with_nan_fails_its_request_only(embedder):
    def with_nan(texts, kinds, whole=embedder.encode_packed):
        found, states = whole(texts, kinds)
        assert found.dense is not None
        if len(texts) > 1:
            with torch.inference_mode():
                found.dense[texts.lengths.index(max(texts.lengths))] = float("nan")
        return found, states

    async def ask_all(model, gate):
        gate.whole = with_nan
        first = await begun(gate, model)
        tasks = [
            asyncio.create_task(read(model, texts, ["dense"])) for texts in (["x"], ["y", LONG])
        ]
        await asyncio.sleep(0.05)
        gate.opened.set()
        await first
        return await asyncio.gather(*tasks, return_exceptions=True)

    with served(embedder) as (model, gate):
        fine, bad = asyncio.run(ask_all(model, gate))
    assert isinstance(fine, Answer) and np.isfinite(fine.dense[0]).all()
    assert "the vector of text 1 holds NaN or infinity" in str(bad)


def test_a_closed_queue_answers_what_waits_and_refuses_what_comes(embedder):

    async def ask_all(model, gate):
        first = await begun(gate, model)
        waits = asyncio.create_task(read(model, ["x"], ["dense"]))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(asyncio.to_thread(model.close))
        await until(lambda: model.queue._closing)
        with pytest.raises(RequestError, match="the server is stopping") as error:
            await read(model, ["x"], ["dense"])
        gate.opened.set()
        await asyncio.gather(first, waits, closing)
        return error.value.status

    with served(embedder) as (model, gate):
        assert asyncio.run(ask_all(model, gate)) == 503


def test_batches_are_counted(embedder):
    counted: list[Batch] = []
    queue = PackedQueue(embedder, most=1_000, on_batch=counted.append)
    tokens = embedder.tokenize(["read mail", "x"], "document")
    asyncio.run(queue.read(tokens, ["dense"]))
    queue.close()
    (batch,) = counted
    assert (batch.requests, batch.texts, batch.tokens) == (1, 2, sum(tokens.lengths))
    assert batch.seconds > 0

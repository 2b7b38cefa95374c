"""Batches of many sources, as Arctic-Embed 2.0 takes them: trap A15 of its specification."""

import numpy as np
import pytest

from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.batches.token_cache import CachedTokens, stored_tokens
from tercet.data.files import sources as files
from tercet.data.files.folders import open_sources
from tercet.data.files.sources import write_examples
from tercet.errors import DataError, RecipeError
from tercet.models.tokens import Tokens
from tercet.types import Example


def rows_of(name, count, lang=""):
    return [Example(f"{name}.{lang}.{i}", (f"answer {i}",), lang=lang) for i in range(count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three sources, two of them in several languages and shards, with small row groups."""
    monkeypatch.setattr(files, "ROWS_PER_GROUP", 8)
    base = tmp_path / "sources"
    write_examples(base / "news" / "1.parquet", [*rows_of("news", 40, "de"), *rows_of("news", 9)])
    write_examples(base / "news" / "2.jsonl", [*rows_of("news", 21, "en")])
    write_examples(base / "wiki" / "lang=fr" / "1.parquet", rows_of("wiki", 30))
    write_examples(base / "wiki" / "lang=pl" / "1.jsonl", rows_of("wiki", 17))
    write_examples(base / "nq.parquet", rows_of("nq", 50))
    return base


def drawn(sampler, sources, world):
    """Batch after batch, the examples that ``world`` processes draw together, in its order."""
    while (batch := sampler.next_batch()) is not None:
        shares = [batch.share(rank, world).examples(sources) for rank in range(world)]
        yield [shares[place % world][place // world] for place in range(len(batch))]


PLAN = BatchPlan(batch_size=8, seed=5, epochs=2)


def test_every_batch_has_one_source_and_language_and_every_row_comes_once(folder):
    """Trap A15 of Arctic-Embed."""
    sources = open_sources(folder)
    assert len(sources) == 6
    batches = list(drawn(Sampler(sources, PLAN), sources, 1))
    for batch in batches:
        assert len({(example.query.split(".")[0], example.lang) for example in batch}) == 1
    every = {(row.query, row.lang) for it in sources for row in it.examples(range(len(it)))}
    assert len(every) == 167
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        seen = [(example.query, example.lang) for batch in epoch for example in batch]
        assert len(seen) == len(set(seen)) == 167 - 2  # of 9 and 17 rows, one would be alone
        assert set(seen) <= every


def test_the_order_differs_by_epoch(folder):
    """Trap A15 of Arctic-Embed."""
    sources = open_sources(folder)
    batches = list(drawn(Sampler(sources, PLAN), sources, 1))
    first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    assert len(first) == len(second)
    assert [batch[0].lang for batch in first] != [batch[0].lang for batch in second]

    def of(part, name):
        return [e.query for batch in part for e in batch if e.query.startswith(name)]

    for name in ("nq", "news.de", "wiki"):
        assert of(first, name) != of(second, name)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 1), (4, 2)])
def test_a_resumed_run_draws_the_same_next_batch_also_in_another_world(folder, before, after):
    """Trap A15 of Arctic-Embed."""
    sources = open_sources(folder)
    whole = list(drawn(Sampler(sources, PLAN), sources, 1))
    for done in (0, 1, 7, len(whole) // 2, len(whole) - 2, len(whole)):
        sampler = Sampler(sources, PLAN)
        begun = drawn(sampler, sources, before)
        assert [next(begun) for _ in range(done)] == whole[:done]
        opened = open_sources(folder)  # as after a kill
        other = Sampler(opened, PLAN)
        other.restore(sampler.state())
        assert list(drawn(other, opened, after)) == whole[done:]


def test_a_run_does_not_go_on_when_a_shard_has_changed(folder):
    """Trap A15 of Arctic-Embed."""
    sources = open_sources(folder)
    sampler = Sampler(sources, PLAN)
    sampler.next_batch()
    write_examples(folder / "news" / "2.jsonl", rows_of("other", 21, "en"))
    with pytest.raises(DataError, match=r"2.jsonl: has changed since it was opened"):
        list(drawn(sampler, sources, 1))
    with pytest.raises(RecipeError, match="the data, the seed or the batch settings differ"):
        Sampler(open_sources(folder), PLAN).restore(sampler.state())


def test_the_rows_of_a_source_come_in_windows_of_few_row_groups(tmp_path, monkeypatch):
    """Trap A15 of Arctic-Embed."""
    monkeypatch.setattr(files, "ROWS_PER_GROUP", 64)
    for shard in range(4):
        rows = [Example(f"{shard} {i}", ("p",)) for i in range(1024)]
        write_examples(tmp_path / "s" / "x" / f"{shard}.parquet", rows)
    (source,) = open_sources(tmp_path / "s")
    assert len(source.blocks) == 64
    sampler = Sampler([source], BatchPlan(batch_size=16, seed=0))
    rows = []
    while (batch := sampler.next_batch()) is not None:
        rows += batch.row.tolist()
    assert sorted(rows) == list(range(4096))
    for window in np.reshape(rows, (8, -1)) // 64:
        assert len(set(window.tolist())) == 8


def test_token_ids_above_65535_survive_the_token_cache(folder, monkeypatch, tmp_path):
    """Trap A9 of Arctic-Embed."""
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))

    def tokenize(texts, role, prompts):
        ids = [np.array([250_000, 65_536 + len(text), 1], np.int32) for text in texts]
        return Tokens(ids, [0] * len(ids), 0, cuts=[False] * len(ids))

    sources = open_sources(folder)
    stored = stored_tokens(sources, lambda role: "large", tokenize, lambda role, task: "")
    cached = CachedTokens(tokenize, stored)
    texts = [example.query for example in sources[0].examples(range(8))]
    found, right = cached(texts, "query", [""] * 8), tokenize(texts, "query", [""] * 8)
    assert cached.missed == 0
    assert found.pack().ids.tolist() == right.pack().ids.tolist()
    assert int(found.pack().ids.max()) == 250_000

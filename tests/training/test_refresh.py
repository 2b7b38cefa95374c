"""Negatives that are mined by the model in training. As a script: one of two processes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet import distributed
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.examples import ExampleFields
from tercet.data.files.sources import Source, iter_examples, open_source, write_examples
from tercet.data.files.texts import normal_form, open_texts
from tercet.errors import DataError, RecipeError
from tercet.models.embedder import Embedder
from tercet.training import refresh as refreshing
from tercet.training.recipe import Refresh
from tercet.training.refresh import Refresher
from tercet.types import Example
from tests import toy
from tests.processes import run_together
from tests.toy import SENTENCES
from tests.training.refreshes import DRAWN, NEAREST, prepare, rows, small_parts


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    small_parts(monkeypatch)


@pytest.fixture
def source(tmp_path):
    return prepare(tmp_path)


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder)


def all_of(source: Source) -> list[Example]:
    return source.examples(range(len(source)))


def mined(
    embedder: Embedder, sources: Sequence[Source], folder: Path, step: int = 2, **changes: Any
) -> list[list[Example]]:
    """The examples of each source after a refresh."""
    refresher = Refresher(Refresh(every=2, **{"mining": NEAREST, **changes}), sources, folder, 0)
    refresher.mine(embedder, step)
    return [all_of(source) for source in refresher.sources]


def test_the_negatives_are_the_nearest_documents_that_answer_nothing(source, embedder, tmp_path):
    (found,) = mined(embedder, [source], tmp_path / "run")
    given = rows()
    documents = {normal_form(t): t for e in given for t in (*e.positives, *e.negatives)}
    vectors = embedder.encode(list(documents.values())).astype(np.float64)
    for old, new in zip(given, found, strict=True):
        assert replace(new, negatives=()) == replace(old, negatives=(), task="pairs")
        known = {normal_form(old.query)}
        for other in given:
            if normal_form(other.query) == normal_form(old.query):
                known |= set(map(normal_form, other.positives))
        scores = vectors @ embedder.encode([old.query], "query")[0].astype(np.float64)
        order = [list(documents)[i] for i in np.argsort(-scores)]
        expected = [key for key in order if key not in known][:3]
        assert list(map(normal_form, new.negatives)) == expected


def test_a_positive_of_the_same_query_in_another_row_or_case_is_no_negative(
    source, embedder, tmp_path
):
    everything = replace(NEAREST, negatives=40, depth=80)
    (found,) = mined(embedder, [source], tmp_path / "run", mining=everything)
    given = rows()
    for row in (0, 5):
        answers = {normal_form(text) for r in (0, 5) for text in given[r].positives}
        assert not answers & set(map(normal_form, found[row].negatives))
        assert len(found[row].negatives) > 20
    assert normal_form(SENTENCES[3]) not in map(normal_form, found[7].negatives)


def test_rows_and_all_that_batches_hang_on_stay(source, embedder, tmp_path):
    refresher = Refresher(Refresh(every=2, mining=NEAREST), [source], tmp_path / "run", 0)
    (view,) = refresher.sources
    before = view.examples([20, 3, 3, 11])
    assert before == source.examples([20, 3, 3, 11])
    refresher.mine(embedder, 2)
    after = view.examples([20, 3, 3, 11])
    assert [e.query for e in after] == [e.query for e in before]
    assert all(a.negatives != b.negatives for a, b in zip(after, before, strict=True))
    assert view.fingerprint == source.fingerprint and view.sizes is source.sizes


def test_own_negatives_stay_beside_mined_ones_on_request(source, embedder, tmp_path):
    (found,) = mined(embedder, [source], tmp_path / "run", mining=replace(NEAREST, keep=True))
    for old, new in zip(rows(), found, strict=True):
        assert len(new.negatives) == 3
        assert new.negatives[0] == old.negatives[0]


def test_documents_of_further_files_are_mined_too(source, embedder, tmp_path):
    text = rows()[2].query + " again"
    (tmp_path / "more.txt").write_text(text + "\n")
    more = (str(tmp_path / "more.txt"),)
    (found,) = mined(embedder, [source], tmp_path / "run", corpus=more)
    assert any(text in example.negatives for example in found)


def test_documents_that_have_changed_since_the_run_began_are_refused(source, embedder, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("one text\n")
    refresh = Refresh(every=2, mining=NEAREST, corpus=(str(more),))
    refresher = Refresher(refresh, [source], tmp_path / "run", 0)
    refresher.mine(embedder, 2)
    more.write_text("a text\n")
    with pytest.raises(DataError, match=r"more\.txt: these documents have changed since the run"):
        refresher.mine(embedder, 4)
    assert Refresher(refresh, [source], tmp_path / "run", 0).read != refresher.read


def test_sources_of_the_same_name_and_of_many_parts_are_told_apart(embedder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_examples(tmp_path / "a/pairs.jsonl", rows())
    write_examples(tmp_path / "b/pairs.jsonl", rows()[::-1])
    sources = [open_source(tmp_path / name / "pairs.jsonl") for name in ("a", "b")]
    first, second = mined(embedder, sources, tmp_path / "run")
    assert first == second[::-1]
    assert [e.query for e in first] == [e.query for e in rows()]


def test_what_is_drawn_differs_by_refresh_and_by_seed_and_repeats_otherwise(
    source, embedder, tmp_path
):
    drawn = replace(NEAREST, rule=DRAWN, depth=20)

    def found(folder: str, step: int, seed: int) -> list[Example]:
        refresher = Refresher(Refresh(every=2, mining=drawn), [source], tmp_path / folder, seed)
        refresher.mine(embedder, step)
        return all_of(refresher.sources[0])

    one = found("one", 2, 0)
    assert one == found("two", 2, 0)
    assert one != found("three", 4, 0)
    assert one != found("four", 2, 1)


def test_what_changed_is_counted(source, embedder, tmp_path):
    refresher = Refresher(Refresh(every=2, mining=NEAREST), [source], tmp_path / "run", 0)
    first = refresher.mine(embedder, 2)
    given = [set(map(normal_form, e.negatives)) for e in rows()]
    now = [set(map(normal_form, e.negatives)) for e in all_of(refresher.sources[0])]
    new = sum(len(after - before) for before, after in zip(given, now, strict=True))
    assert (first.rows, first.negatives, first.new, first.empty) == (24, 72, new, 0)
    again = refresher.mine(embedder, 4)  # the same model finds the same
    assert (again.negatives, again.new) == (72, 0)
    assert again.summary == "72 negatives for 24 queries, 0% of them new; 0 queries have none"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["refresh-4"]
    assert not (tmp_path / "run/refresh-4/vectors").exists()


def test_a_query_whose_every_document_is_too_near_has_none(source, embedder, tmp_path):
    rule = MiningRule(kind="absolute", value=-1.0)
    refresher = Refresher(
        Refresh(every=1, mining=replace(NEAREST, rule=rule)), [source], tmp_path / "run", 0
    )
    found = refresher.mine(embedder, 1)
    assert (found.negatives, found.empty, found.new_share) == (0, 24, 0.0)
    assert all(not example.negatives for example in all_of(refresher.sources[0]))


def test_what_another_model_mined_in_the_same_folder_is_not_taken(source, embedder, tmp_path):
    folder = tmp_path / "run/refresh-2"
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(json.dumps({"model": "another"}))
    (folder / "refresh.json").write_text(json.dumps({"model": "another"}))
    (folder / "0-0.jsonl").write_text("stale\n")
    assert mined(embedder, [source], tmp_path / "run") == mined(
        embedder, [source], tmp_path / "fresh"
    )


def test_texts_and_a_corpus_that_is_not_there_are_refused_before_training(source, tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    texts = open_texts(tmp_path / "texts.txt")
    (tmp_path / "named.jsonl").write_text('{"q": "a", "positives": ["b"]}\n')
    named = open_source(tmp_path / "named.jsonl", fields=ExampleFields(query="q"))
    Refresher(Refresh(every=2), [named], tmp_path / "run", 0)  # is not refused
    with pytest.raises(RecipeError, match="holds texts, and negatives are mined for examples"):
        Refresher(Refresh(every=2), [texts], tmp_path / "run", 0)
    missing = Refresh(every=2, corpus=(str(tmp_path / "no.jsonl"),))
    with pytest.raises(RecipeError, match=r"no\.jsonl: there is no such file of documents"):
        Refresher(missing, [source], tmp_path / "run", 0)
    with pytest.raises(RecipeError, match="every is 0; give 1 or more"):
        Refresh(every=0)
    with pytest.raises(RecipeError, match="a refresh has at_least 1, but leaves out no row"):
        Refresh(every=1, mining=replace(NEAREST, at_least=1))


# ---- several processes -----------------------------------------------------------------------


def one_of_two(folder: Path) -> None:
    """Mine as one of two processes, and write what this one reads afterwards."""
    torch.set_num_threads(1)
    distributed.start()
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        wrote: list[str] = []
        write = refreshing.write_examples

        def recorded(path: Path, examples: Any) -> None:
            wrote.append(path.name)
            write(path, examples)

        patch.setattr(refreshing, "write_examples", recorded)
        source = open_source(folder / "pairs.jsonl")
        (found,) = mined(Embedder.load(folder / "base"), [source], folder / "two")
    write_examples(folder / f"{distributed.rank()}.jsonl", found)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(wrote))
    distributed.stop()


def test_two_processes_share_the_parts_and_find_what_one_finds(tmp_path):
    source = prepare(tmp_path)
    toy.save_model(tmp_path / "base", "bert")
    run_together(__file__, str(tmp_path))
    (alone,) = mined(Embedder.load(tmp_path / "base"), [source], tmp_path / "one")
    for rank in range(2):
        assert list(iter_examples(tmp_path / f"{rank}.jsonl", "pairs")) == alone
    wrote = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert wrote == [["0-0.jsonl", "0-20.jsonl"], ["0-10.jsonl"]]


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))

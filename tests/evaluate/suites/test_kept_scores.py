import json

import numpy as np
import pytest

from tercet.evaluate.suites.kept_scores import KeptScores
from tercet.evaluate.suites.languages import SetScores, measure_sets, places_in
from tercet.models.embedder import Embedder
from tests.toy import SENTENCES


@pytest.fixture
def folder(tmp_path):
    """Two sets."""
    for lang in ("de", "fr"):
        rows = ({"query": text.split()[-1], "positives": [text]} for text in SENTENCES[:5])
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "sets").mkdir(exist_ok=True)
        (tmp_path / f"sets/{lang}.jsonl").write_text(lines)
    return tmp_path / "sets"


@pytest.fixture
def kept(tmp_path):
    (tmp_path / "kept").mkdir()
    return KeptScores(tmp_path / "kept", "a model")


def as_lists(found: SetScores):
    scores = {name: values.tolist() for name, values in found.scores.items()}
    told = (found.name, found.group, found.axis, found.languages, found.documents, found.langs)
    return told, scores, *(it.tolist() for it in (found.same, found.chance, found.own))


def test_what_was_measured_is_found_again_and_the_model_is_not_asked(
    folder, kept, encoder_folder, monkeypatch
):
    embedder = Embedder.load(encoder_folder)
    first = next(measure_sets(embedder, places_in(folder), kept=kept))  # as if killed after it
    measured, plain = [], Embedder.encode
    monkeypatch.setattr(
        Embedder,
        "encode",
        lambda self, texts, *a, **k: measured.append(1) or plain(self, texts, *a, **k),
    )
    again = list(measure_sets(embedder, places_in(folder), kept=kept))
    assert as_lists(again[0]) == as_lists(first) and len(measured) == 2  # of the second set alone
    monkeypatch.undo()
    plainly = list(measure_sets(embedder, places_in(folder)))
    assert list(map(as_lists, again)) == list(map(as_lists, plainly))


def test_other_files_another_model_or_a_damaged_file_are_measured_anew(folder, kept, tmp_path):
    place, _ = places_in(folder)
    one = np.array([0.5])
    scores = {"ndcg@10": one, "recall@100": one}
    own = np.array([True])
    found = SetScores("de", "", "monolingual", "de", 3, ("de",), scores, one, one, own)
    kept.keep(place, found)
    assert as_lists(kept.find(place)) == as_lists(found)
    assert KeptScores(tmp_path / "kept", "another").find(place) is None
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert kept.find(place) is None
    file.write_bytes(whole)
    place.path.write_text(place.path.read_text().replace("server", "servant"))
    assert kept.find(place) is None

"""The diagnosis of transfer on a toy: a series of checkpoints, from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.cli import main
from tercet.data.files.sources import open_source, write_examples
from tercet.errors import DataError, RecipeError
from tercet.evaluate.measures.retrieval import measure
from tercet.evaluate.report.intervals import interval, paired_difference, relative_change
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.models.embedder import Embedder
from tercet.recipes.arctic_embed import arctic_embed
from tercet.recipes.finetune import finetune
from tercet.studies import run as ablation_run
from tercet.studies.languages import Budget, Language, open_languages
from tercet.studies.transfer import Transfer, checkpoints_of, reference_of
from tercet.studies.transfer_tables import SEEN, UNSEEN, by_heading, transfer_table
from tercet.train.loop import train
from tercet.train.run import Run
from tercet.types import Example
from tests.toy import SENTENCES, save_model

QUIET = Run(device="cpu", show_progress=False)
NUMBERS = {"finetuning_steps": 1, "finetuning_batch_size": 4, "finetuning_learning_rate": 1e-3}
PNG = b"\x89PNG\r\n\x1a\n"


def prepare(folder: Path) -> None:
    """A base, a run with a series, data to fine-tune on, and sets in four languages."""
    save_model(folder / "base", "bert")
    rows = [
        Example(text.split()[-1], (text,), (SENTENCES[(i + 3) % 12], SENTENCES[(i + 5) % 12]))
        for i, text in enumerate(SENTENCES)
    ]
    write_examples(folder / "mined.jsonl", rows)
    for lang, part in (("en", slice(0, 9)), ("de", slice(3, 12)), ("fr", slice(2, 9))):
        write_examples(folder / f"sets/{lang}.jsonl", rows[part])
    nordic = [Example(row.query, row.positives, lang="da") for row in rows[:7]]
    write_examples(folder / "sets/nordic.jsonl", nordic)
    recipe = finetune(base=str(folder / "base"), steps=2, batch_size=6, learning_rate=1e-3)
    series = Run(device="cpu", show_progress=False, models_at=(0, 1, 2))
    train(recipe, [open_source(folder / "mined.jsonl")], folder / "run", run=series)


def command(folder: Path, out: Path, *more: str, status: int = 0) -> None:
    numbers = [f"--{name.replace('_', '-')}={number}" for name, number in NUMBERS.items()]
    data = ["--data", str(folder / "mined.jsonl"), "--eval", str(folder / "sets")]
    flags = ["--seen=en,fr", "--seeds=0,1", "--dims=16", "--out", str(out), "--device=cpu"]
    with pytest.raises(SystemExit) as end:
        main(["transfer", str(folder / "run"), *data, *flags, *numbers, *more])
    assert (end.value.code or 0) == status


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    prepare(folder)
    command(folder, folder / "out")
    return folder


def stored(folder: Path, cell: str, lang: str) -> np.ndarray:
    with np.load(folder / "out/cells" / cell / "answers.npz") as arrays:
        return arrays[f"0/{lang}"]


@pytest.fixture(scope="module")
def found(folder) -> Transfer:
    steps, langs = (0, 1, 2), ("en", "fr", "da", "de")
    raw = [{lang: stored(folder, f"{step}-raw", lang) for lang in langs} for step in steps]
    tuned = [
        [{lang: stored(folder, f"{step}-seed-{s}", lang) for lang in langs} for s in (0, 1)]
        for step in steps
    ]
    return Transfer(open_languages([folder / "sets"], ["en", "fr"]), steps, raw, tuned, 1)


def test_a_cell_holds_what_training_and_measuring_by_hand_give(folder, tmp_path):
    base = folder / "run/steps/1"
    recipe = arctic_embed(base=str(base), stages="finetuning", dims=[16], seed=1, **NUMBERS)
    source = open_source(folder / "mined.jsonl")
    trained = train(recipe, {"mined": [source]}, tmp_path / "by-hand", run=QUIET)
    for lang, file in (("de", "de"), ("da", "nordic")):
        data = RetrievalSet.from_examples(folder / f"sets/{file}.jsonl")
        for cell, model in (("1-raw", Embedder.load(base)), ("1-seed-1", trained)):
            expected = measure(model, data).result.scores["ndcg@10"]
            assert np.allclose(stored(folder, cell, lang), expected)


def test_figures_are_of_the_mean_over_seeds_and_paired(folder, found):
    record = json.loads((folder / "out/transfer.json").read_text())
    assert (record["steps"], record["reference"], record["seeds"]) == ([0, 1, 2], 1, [0, 1])
    rows = {(row["kind"], row["group"], row["seen"]): row for row in record["rows"]}
    means = {
        step: np.mean([stored(folder, f"{step}-seed-{s}", "de") for s in (0, 1)], axis=0)
        for step in (0, 1, 2)
    }
    row = rows["language", "de", False]
    lead = paired_difference(means[2], means[1])
    told = row["difference"]["finetuned"]
    assert [told[name] for name in ("mean", "low", "high")] == [lead.mean, lead.low, lead.high]
    change = relative_change([means[2]], [means[1]])
    assert row["relative_change"]["finetuned"]["low"] == change.low
    raw = stored(folder, "2-raw", "de")
    assert row["raw"][2]["mean"] == pytest.approx(raw.mean())
    assert [each["high"] for each in row["finetuned"]] == [
        interval(scores).high for scores in means.values()
    ]
    assert row["best_step"] == max(means, key=lambda step: means[step].mean())
    spread = np.std([stored(folder, f"1-seed-{s}", "de").mean() for s in (0, 1)], ddof=1)
    assert row["spread_over_seeds"][1] == pytest.approx(spread)
    germanic = rows["family", "Germanic", False]
    both = [stored(folder, "0-raw", lang).mean() for lang in ("da", "de")]
    assert germanic["raw"][0]["mean"] == pytest.approx(np.mean(both))


def test_seen_languages_are_marked_and_those_of_a_family_are_kept_apart(found):
    groups = {(g.name, g.seen): g.languages for g in found.groups if g.is_family}
    assert groups == {
        ("Germanic", True): ("en",),
        ("Romance", True): ("fr",),
        ("Germanic", False): ("da", "de"),
    }
    headings = by_heading(found)
    assert [group.name for group in headings[SEEN]] == ["en", "fr"]
    assert [group.title for group in headings[UNSEEN]] == ["da (unseen)", "de (unseen)"]
    table = transfer_table(found, headings[UNSEEN])
    assert table[0][3:6] == ["raw 1", "raw 2", "change"]
    assert table[1][:3] == ["da", "Germanic", "no"] and table[1][-1] in ("0", "1", "2")
    change = found.change("finetuned", headings[UNSEEN][0])
    shown = f"{100 * change.mean:+.1f} % [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    assert table[1][8] == shown


def test_a_picture_and_a_page_are_written(folder):
    assert (folder / "out/transfer.png").read_bytes().startswith(PNG)
    page = (folder / "out/report.html").read_text()
    assert "Languages not seen in pretraining" in page and "Germanic (unseen)" in page


def test_given_again_nothing_is_trained_and_other_numbers_are_refused(folder, monkeypatch, capsys):
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("this cell is done")

    monkeypatch.setattr(ablation_run, "train", fails)
    command(folder, folder / "out")
    said = capsys.readouterr()
    assert said.err.count("is done already") == 3 + 6
    assert "Languages seen in pretraining" in said.out
    command(folder, folder / "out", "--finetuning-steps=2", status=2)
    assert "was run with another recipe" in capsys.readouterr().err


def test_a_diagnosis_that_was_killed_goes_on(folder, monkeypatch, tmp_path, capsys):
    real, calls = ablation_run.train, []

    def stopped(*given: Any, **more: Any) -> Any:
        calls.append(given[0].model.base)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(ablation_run, "train", stopped)
    flags = ("--seeds=0", "--queries=3")
    command(folder, tmp_path / "out", *flags, status=130)
    assert not (tmp_path / "out/transfer.json").exists()
    capsys.readouterr()
    command(folder, tmp_path / "out", *flags)
    assert capsys.readouterr().err.count("is done already") == 3 + 2
    assert len(calls) == 4 and calls[2] == calls[3]


def test_other_weights_under_the_same_name_are_not_taken_for_those_measured(folder, tmp_path):
    files = {}
    for name in ("1", "2"):
        files[name] = (folder / f"run/steps/{name}/model.safetensors").read_bytes()
    (folder / "run/steps/1/model.safetensors").write_bytes(files["2"])
    try:
        command(folder, folder / "out", status=2)
    finally:
        (folder / "run/steps/1/model.safetensors").write_bytes(files["1"])
    command(folder, folder / "out")


def test_a_budget_takes_the_first_queries_and_what_answers_them_first(folder, tmp_path):
    def examined(*budget: int | None) -> Language:
        rows = [Example(f"q{i}", (f"p{i}",), (f"n{i}",)) for i in range(5)]
        write_examples(tmp_path / "de.jsonl", rows)
        (one,) = open_languages([tmp_path / "de.jsonl"], [], Budget(*budget))
        return one

    assert examined().examined.size == "5 queries, 10 documents"
    assert examined(2).examined.size == "2 queries, 10 documents"
    assert examined(2, 3).examined.size == "2 queries, 3 documents"
    assert examined(3, 1).examined.size == "3 queries, 3 documents"
    prints = {examined(*b).examined.fingerprint for b in ((None,), (2,), (2, 3), (3, 1))}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("steps", "wanted", "place"),
    [((0, 4, 10, 20, 40), None, 1), ((0, 40), None, 0), ((2, 8, 130), None, 1), ((0, 9), 0, 0)],
)
def test_the_reference_is_the_first_checkpoint_at_six_percent(steps, wanted, place):
    assert reference_of(steps, wanted) == place


def test_a_reference_that_is_none_is_refused():
    for wanted in (3, 9):
        with pytest.raises(RecipeError, match="is no checkpoint before the last one; choose from"):
            reference_of((0, 2, 9), wanted)


def test_models_are_a_series_in_the_order_given(folder):
    names = [str(folder / "run/model"), str(folder / "base")]
    assert [(c.step, c.folder.name) for c in checkpoints_of(names)] == [(1, "model"), (2, "base")]
    numbered = [str(folder / f"run/steps/{step}") for step in (2, 0)]
    assert [each.step for each in checkpoints_of(numbered)] == [0, 2]
    for alone in ([str(folder / "base")], [numbered[0], numbered[0]]):
        with pytest.raises(RecipeError, match="two checkpoints or more is needed, each once"):
            checkpoints_of(alone)


def test_what_a_user_gets_wrong_is_told(folder, tmp_path, capsys):
    for flag, problem in (
        ("--seeds=1,1", "give whole numbers from 0 up"),
        ("--seen=en,ko", "'ko' is said to be seen, but no evaluation set is in it"),
        ("--queries=0", "queries is 0; give 1 or more"),
        ("--reference=7", "the reference 7 is no checkpoint"),
    ):
        command(folder, tmp_path / "out", flag, status=2)
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "out/cells").exists()
    write_examples(tmp_path / "test.set.jsonl", [Example("a", ("b",))])
    with pytest.raises(DataError, match=r"'test\.set' is none; give rows a \"lang\""):
        open_languages([tmp_path / "test.set.jsonl"], [])

"""The experiment of the English gap on a toy: equal samples, and leads over English alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from tercet.cli import main
from tercet.data.files.sources import write_examples
from tercet.errors import RecipeError
from tercet.evaluate.report.intervals import paired_difference
from tercet.studies.gap import BOTH, arms_of, equal_corpora, gap_cells, pairs_read, require_english
from tercet.studies.languages import open_languages
from tercet.types import Example
from tests.toy import SENTENCES, save_model

FLAGS = (
    "--steps=4 --batch-size=5 --finetuning-steps=1 --finetuning-batch-size=4 --dims=16 "
    "--learning-rate=1e-3 --keep-models"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gap")
    save_model(folder / "base", "bert")
    rows = [
        Example(text.split()[-1], (text,), (SENTENCES[(i + 3) % 12],))
        for i, text in enumerate(SENTENCES)
    ]
    write_examples(folder / "mined.jsonl", rows)
    for lang, count in (("en", 12), ("de", 11)):  # of unequal length
        pairs = [Example(row.query, row.positives, lang=lang) for row in rows[:count]]
        write_examples(folder / f"{lang}.jsonl", pairs)
        write_examples(folder / f"sets/{lang}.jsonl", rows[:9])
    command(folder)
    return folder


def command(folder: Path) -> None:
    words = ["ablate", "english-gap", "--base", str(folder / "base"), "--out", str(folder / "out")]
    words += ["--english", str(folder / "en.jsonl"), "--other", str(folder / "de.jsonl")]
    words += ["--data", str(folder / "mined.jsonl"), "--eval", str(folder / "sets")]
    with pytest.raises(SystemExit) as end:
        main([*words, *FLAGS])
    assert not end.value.code


def test_all_arms_but_the_first_read_equally_many_pairs(folder):
    read = {arm: pairs_read(folder / f"out/cells/{arm}/1-pretraining") for arm in arms_of(["de"])}
    assert read == {"en": 10, "en+en": 20, "en+de": 20}
    tuned = {pairs_read(folder / f"out/cells/{arm}/2-finetuning") for arm in read}
    assert tuned == {4}


def test_leads_over_english_alone_are_paired(folder):
    record = json.loads((folder / "out/results.json").read_text())
    scores = {}
    for arm in ("en+de", BOTH):
        with np.load(folder / "out/cells" / arm / "answers.npz") as arrays:
            scores[arm] = arrays["1/en"]
    lead = paired_difference(scores["en+de"], scores[BOTH])
    (row,) = (
        row for row in record["rows"] if (row["cell"], row["column"]) == ("en+de", "en, fine-tuned")
    )
    assert row["minus en+en"] == [lead.mean, lead.low, lead.high]
    assert row["mean"] == pytest.approx(scores["en+de"].mean())
    table = record["tables"]["English, and the mean of the other languages"]
    header = ["en, raw", "en, fine-tuned", "others, raw", "others, fine-tuned"]
    assert table[0] == ["nDCG@10", *header]
    assert [line[0] for line in table[1:]] == ["en", BOTH, "en+de", "en - en+en", "en+de - en+en"]
    assert table[-1][2] == f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
    assert (folder / "out/gap.png").read_bytes().startswith(b"\x89PNG")


def test_corpora_are_equally_long_and_of_whole_batches(folder, tmp_path):
    paths = (folder / "en.jsonl", [folder / "de.jsonl"], tmp_path)
    for size, rows, expected in ((5, None, 10), (4, 7, 4), (11, None, 11)):
        found = equal_corpora(*paths, batch_size=size, rows=rows)
        assert {lang: len(source) for lang, source in found.items()} == dict.fromkeys(
            ("en", "de"), expected
        )
    with pytest.raises(RecipeError, match="the smallest corpus has 11 pairs, and a batch 12"):
        equal_corpora(*paths, batch_size=12, rows=None)
    with pytest.raises(RecipeError, match="its language 'de' has a corpus already"):
        equal_corpora(paths[0], [*paths[1], *paths[1]], tmp_path, batch_size=5, rows=None)


def test_an_arm_of_half_the_steps_needs_an_even_number():
    with pytest.raises(RecipeError, match="steps is 3; give an even number"):
        list(gap_cells(["de"], 0, steps=3))


def test_sets_without_english_are_refused(folder):
    with pytest.raises(RecipeError, match=r"no evaluation set is in English \(there are de\)"):
        require_english(open_languages([folder / "sets/de.jsonl"], []))


def test_given_again_no_arm_is_run_again(folder, capsys):
    capsys.readouterr()
    command(folder)
    assert capsys.readouterr().err.count("is done already") == 3

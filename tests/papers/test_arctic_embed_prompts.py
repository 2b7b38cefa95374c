"""Arctic-Embed 2.0's prompts: ``query: `` before a query, and nothing before a document."""

import json

import numpy as np
import pytest

from tercet.models.embedder import Embedder
from tests.toy import SENTENCES

PROMPTS = {"query": "query: ", "document": ""}


@pytest.fixture(scope="module")
def saved(encoder_folder, tmp_path_factory):
    """A model with the prompts of the paper, as a folder."""
    folder = tmp_path_factory.mktemp("arctic") / "model"
    Embedder.load(encoder_folder, prompts=PROMPTS).save(folder)
    return folder


@pytest.fixture(scope="module")
def bare(encoder_folder):
    """The same weights, and no prompts."""
    return Embedder.load(encoder_folder)


def test_a_saved_model_puts_its_prompt_before_queries_by_itself_and_once(saved, bare):
    """Trap A19 of Arctic-Embed."""
    found = Embedder.load(saved).encode(SENTENCES, "query")
    by_hand = bare.encode([f"query: {text}" for text in SENTENCES], "query")
    np.testing.assert_array_equal(found, by_hand)
    assert np.abs(found - bare.encode(SENTENCES, "query")).max() > 0.01


def test_documents_get_no_prefix(saved, bare):
    """Trap A19 of Arctic-Embed."""
    found = Embedder.load(saved).encode(SENTENCES, "document")
    np.testing.assert_array_equal(found, bare.encode(SENTENCES, "document"))


def test_an_evaluation_uses_the_prompts_of_the_folder_and_drops_them_only_on_request(
    saved, encoder_folder, tmp_path, capsys
):
    """Trap A19 of Arctic-Embed."""
    from tercet.cli import main

    file = tmp_path / "de.jsonl"
    rows = ({"query": text.split()[-1], "positives": [text]} for text in SENTENCES)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown, prompts = [], []
    for model, words in ((saved, ()), (saved, ("--no-prompts",)), (encoder_folder, ())):
        record = tmp_path / "record.json"
        with pytest.raises(SystemExit, match="0"):
            main(
                [
                    "eval",
                    str(file),
                    "--model",
                    str(model),
                    "--no-bm25",
                    "--json",
                    str(record),
                    *words,
                ]
            )
        figures = json.loads(record.read_text())
        shown.append(figures["results"][str(model)])
        prompts.append(figures["models"][str(model)]["prompts"])
    capsys.readouterr()
    assert shown[1] == shown[2] != shown[0]
    assert prompts == [PROMPTS, {}, {}]


def test_sentence_transformers_files_name_the_prompt_too(saved):
    """Trap A19 of Arctic-Embed."""
    written = json.loads((saved / "config_sentence_transformers.json").read_text())
    assert written["prompts"]["query"] == "query: "
    assert not written["prompts"].get("document")

import json

import pytest

from tercet.errors import ModelError, RecipeError
from tercet.models.embedder import Embedder
from tercet.models.settings import Settings, changed, read_settings

RECORD = {"version": 1, "attention": "causal", "window": "keep", "settings": {}}


def read(folder, **changes):
    (folder / "tercet.json").write_text(json.dumps({**RECORD, **changes}))
    return read_settings(folder)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"normalize": "yes"}, "normalize is 'yes'; it should be true or false"),
        ({"prompts": ["query: "]}, r"prompts is \['query: '\]; it should be texts by role"),
        ({"suffixes": {"query": 1}}, "suffixes is .* should be texts by role"),
        ({"task_prompts": {"mail": "find: "}}, "should be texts by task and role"),
        ({"query_tokens": "512"}, "query_tokens is '512'; it should be a whole number above 0"),
        ({"document_tokens": True}, "document_tokens is True"),
        ({"dims": 64}, "dims is 64; it should be a list of widths"),
        ({"dims": [64, 0]}, "should be a list of widths"),
        ({"pooling": ["mean"]}, "no such pooling"),
        ({"on_empty": "skip"}, "no such on_empty: skip; choose from all, error"),
        ({"poling": "mean"}, "no such setting: poling"),
        ([], "settings an object"),
    ],
)
def test_a_settings_file_with_a_wrong_value_is_refused_and_the_value_named(
    tmp_path, settings, problem
):
    with pytest.raises(ModelError, match=f"tercet.json: .*{problem}"):
        read(tmp_path, settings=settings)


@pytest.mark.parametrize(
    "changes",
    [{"attention": 5}, {"window": None}, {"adapter_of": 3}, {"version": None}, {"version": "x"}],
)
def test_a_settings_file_with_a_wrong_record_is_refused(tmp_path, changes):
    with pytest.raises(ModelError, match=r"tercet\.json"):
        read(tmp_path, **changes)


def test_a_settings_file_that_is_a_list_is_refused(tmp_path):
    (tmp_path / "tercet.json").write_text("[]")
    with pytest.raises(ModelError, match="not a tercet settings file"):
        read_settings(tmp_path)


def test_settings_that_were_not_saved_have_their_usual_value(tmp_path):
    saved = read(tmp_path, settings={"dims": [64, 32], "prompts": {"query": "q: "}})
    assert saved is not None
    assert saved["settings"] == Settings(dims=(64, 32), prompts={"query": "q: "})
    assert (saved["attention"], saved["window"]) == ("causal", "keep")


def test_a_wrong_value_from_a_caller_is_the_callers_mistake(encoder_folder):
    with pytest.raises(RecipeError, match="echo is 1; it should be true or false"):
        Embedder.load(encoder_folder, echo=1)
    assert changed(Settings(), {"dims": [8]}).dims == (8,)


def test_an_adapter_without_settings_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"an adapter without tercet.json, so nothing says which"):
        Embedder.load(tmp_path)

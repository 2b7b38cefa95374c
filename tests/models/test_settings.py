import json
from dataclasses import asdict

import numpy as np
import pytest

from tercet.errors import ModelError, RecipeError
from tercet.models.embedder import Embedder
from tercet.models.settings import (
    Settings,
    changed,
    keep,
    quantizer_of,
    read_settings,
    require_settings,
    save_ranges,
)
from tercet.rank.quantized import Ranges
from tests.toy import SENTENCES

RECORD = {"version": 1, "attention": "causal", "window": "keep", "settings": {}}


def read(folder, **changes):
    (folder / "tercet.json").write_text(json.dumps({**RECORD, **changes}))
    return read_settings(folder)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"normalize": "yes"}, "normalize must be true or false; got 'yes'"),
        (
            {"prompts": ["query: "]},
            r"prompts must be texts by role, in valid Unicode; got \['query: '\]",
        ),
        ({"suffixes": {"query": 1}}, "suffixes must be texts by role"),
        ({"task_prompts": {"mail": "find: "}}, "must be texts by task and role"),
        ({"query_tokens": "512"}, "query_tokens must be a whole number above 0; got '512'"),
        ({"document_tokens": True}, "document_tokens must be .* got True"),
        ({"dims": 64}, "dims must be a list of widths; got 64"),
        ({"dims": [64, 0]}, "must be a list of widths"),
        ({"pooling": ["mean"]}, "pooling must be one of mean"),
        ({"on_empty": "skip"}, "on_empty must be all or error; got 'skip'"),
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
    with pytest.raises(RecipeError, match="echo must be true or false; got 1"):
        Embedder.load(encoder_folder, echo=1)
    assert changed(Settings(), {"dims": [8]}).dims == (8,)


def test_an_adapter_without_settings_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"an adapter without tercet.json, so the direction"):
        Embedder.load(tmp_path)


# ---- settings added to a saved model ----------------------------------------------------------

KEPT = {4: Ranges((0.1, 0.0, -0.2, 0.3), 0.5, 0.25, 0.125)}


def test_ranges_are_kept_with_a_model_and_nothing_else_changes(encoder_folder, tmp_path):
    """Its vectors, its fingerprint and sentence-transformers' files stay as they are."""
    embedder = Embedder.load(encoder_folder)
    embedder.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").rglob("*.json")}
    save_ranges(tmp_path / "model", KEPT)
    after = {path.name: path.read_bytes() for path in (tmp_path / "model").rglob("*.json")}
    assert [name for name in after if after[name] != before[name]] == ["tercet.json"]
    again = Embedder.load(tmp_path / "model")
    assert again.settings.ranges == KEPT
    assert again.fingerprint() == embedder.fingerprint()
    texts = SENTENCES[:2]
    assert (again.encode(texts) == embedder.encode(texts)).all()


def test_ranges_survive_saving_and_loading_and_more_can_be_added(encoder_folder, tmp_path):
    more = {2: Ranges((0.0, 0.5), 1.0, 0.5, 0.3)}
    Embedder.load(encoder_folder, ranges=KEPT).save(tmp_path / "one")
    save_ranges(tmp_path / "one", more)
    Embedder.load(tmp_path / "one").save(tmp_path / "two")
    assert Embedder.load(tmp_path / "two").settings.ranges == {**KEPT, **more}
    assert (tmp_path / "two/modules.json").is_file()


def test_a_model_without_ranges_says_how_to_learn_them():
    settings = Settings(ranges=KEPT)
    found = quantizer_of(settings, "int4", 4)
    assert (found.precision, found.limit) == ("int4", 0.25)
    assert found.centre is not None and (found.centre == np.array(KEPT[4].centre, np.float32)).all()
    with pytest.raises(
        RecipeError, match=r"int8 codes of 8 .* for: 4.*tercet tune codes .*--dims 8"
    ):
        quantizer_of(settings, "int8", 8)
    with pytest.raises(RecipeError, match="it has some for: none"):
        quantizer_of(Settings(), "binary", 8)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"int8": 0}, {"int4": -1}, {"binary": float("nan")}, {"int8": "wide"}, {"int4": None}),
        *({"centre": [1, 2, 3]}, {"centre": [1, 2, 3, float("inf")]}, {"centre": None}),
    ],
)
def test_a_damaged_range_is_refused_and_its_coordinates_named(wrong):
    record = {**asdict(KEPT[4]), **wrong}
    with pytest.raises(RecipeError, match=r"ranges is damaged for 4 coordinates.*tune codes"):
        changed(Settings(), {"ranges": {"4": record}})


def test_a_damaged_setting_of_ranges_is_refused():
    with pytest.raises(RecipeError, match="setting ranges must be"):
        changed(Settings(), {"ranges": [1]})
    with pytest.raises(RecipeError, match="ranges is damaged for four coordinates"):
        changed(Settings(), {"ranges": {"four": asdict(KEPT[4])}})


def test_nothing_is_kept_in_a_folder_without_settings(encoder_folder, tmp_path):
    with pytest.raises(ModelError, match=r"has no tercet.json, so ranges of codes cannot be kept"):
        save_ranges(encoder_folder, KEPT)
    with pytest.raises(ModelError, match="so weights cannot be kept there"):
        require_settings(tmp_path / "nowhere")


def test_what_is_kept_under_a_name_stands_beside_other_names(tmp_path):
    (tmp_path / "tercet.json").write_text(json.dumps({"settings": {"weights": {"a": 1}}}))
    keep(tmp_path, "weights", {"b": 2})
    keep(tmp_path, "weights", {"a": 3})
    assert json.loads((tmp_path / "tercet.json").read_text())["settings"] == {
        "weights": {"a": 3, "b": 2}
    }

import json

import pytest
from safetensors import SafetensorError
from transformers import AutoConfig

from tercet.errors import ModelError
from tercet.models.network.loading import loading, misfits


def test_a_folder_that_transformers_cannot_load_is_refused_in_a_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(ModelError) as caught, loading("base: cannot be loaded", "; look inside"):
        AutoConfig.from_pretrained(tmp_path)
    message = str(caught.value)
    assert message.startswith("base: cannot be loaded: The checkpoint you are trying to load has")
    assert message.endswith("; look inside") and "\n" not in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [OSError, TypeError, KeyError, RuntimeError, SafetensorError])
def test_an_error_without_a_word_is_named_by_its_class(error):
    with pytest.raises(ModelError, match=f"^base: {error.__name__}$"), loading("base"):
        raise error


def test_what_is_no_failure_to_load_keeps_its_traceback():
    with pytest.raises(AssertionError, match="a bug"), loading("base"):
        raise AssertionError("a bug")


def test_weights_that_do_not_fit_are_named_three_of_each_kind():
    assert misfits({"a": (1,), "b": (2, 3)}, {"b": (2, 3), "a": (1,)}) == ""
    found = misfits({"x": (1,), "e": (2, 3)}, {**dict.fromkeys("abcd", (1,)), "e": (3, 2)})
    assert found == (
        "4 missing: a, b, c, ...; 1 unknown: x; 1 of another size: e (2 x 3, expected 3 x 2)"
    )

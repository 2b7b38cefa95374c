import json

import pytest
import torch

from tercet.data.files.examples import parse_example
from tercet.errors import RecipeError
from tercet.models.formats.bge_m3_files import FlagRows, flag_files, lexical_weights
from tercet.vectors import Terms
from tests.oracles import terms_of

ROW = {"query": "q", "pos": ["p"], "neg": ["n1", "n2", "n3"]}


def example(row: dict, *, own_group: bool = False, **how):
    rows = FlagRows(**how)
    return parse_example(rows.record(row, 0, own_group=own_group), "set")


# ---- lexical weights -----------------------------------------------------------------------------


def test_weights_are_plain_numbers_by_id_each_token_once_and_none_of_zero():
    """The second text is empty, and 7 occurs twice in the first: its larger weight counts."""
    ids, weights = torch.tensor([7, 3, 7, 9, 5]), torch.tensor([0.5, 0.25, 0.75, 0.0, 2.0])
    found = lexical_weights(Terms(ids, weights, torch.tensor([0, 4, 4, 5])))
    assert found == [{"3": 0.25, "7": 0.75}, {}, {"5": 2.0}]
    assert json.loads(json.dumps(found)) == found


def test_mappings_become_terms_again():
    terms = terms_of([{"7": 0.75, "3": 0.25}, {}, {"5": 2.0}])
    assert terms.ids.tolist() == [7, 3, 5]
    assert terms.weights.tolist() == [0.75, 0.25, 2.0]
    assert terms.offsets.tolist() == [0, 2, 2, 3]
    assert len(terms_of([])) == 0


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [None, [], ["n1"], [f"n{i}" for i in range(9)]])
def test_rows_with_none_few_and_many_negatives_are_all_read_b17(negatives):
    row = {"query": "q", "pos": ["p"], "neg": negatives}
    assert example(row).negatives == tuple(negatives or ())
    del row["neg"]
    assert example(row).negatives == ()


def test_scores_stay_with_their_texts():
    found = example({**ROW, "pos_scores": [3], "neg_scores": [0.5, 1, -2.5]})
    assert found.positive_scores == (3.0,)
    assert found.negative_scores == (0.5, 1.0, -2.5)


def test_the_prompt_of_a_row_stands_before_that_of_all_rows():
    assert example({**ROW, "prompt": "find: "}, prompt="other: ").query_prompt == "find: "
    assert example(ROW, prompt="other: ").query_prompt == "other: "
    told = example({**ROW, "prompt": "find"}, form="Instruct: {}\nQuery: {}")
    assert told.query_prompt == "Instruct: find\nQuery: "


def test_without_a_prompt_the_models_own_is_used_b16():
    assert example(ROW).query_prompt is None
    assert example({**ROW, "prompt": None}).query_prompt is None
    assert example({**ROW, "prompt": ""}, form="Instruct: {}\nQuery: {}").query_prompt is None


@pytest.mark.parametrize("kind", ["symmetric_sts", "symmetric_clustering"])
def test_documents_of_symmetric_tasks_have_the_prompt_too(kind):
    found = example({**ROW, "prompt": "find: ", "type": kind})
    assert (found.query_prompt, found.document_prompt) == ("find: ", "find: ")


@pytest.mark.parametrize("kind", ["symmetric_class", "symmetric", "normal", None])
def test_documents_of_other_tasks_have_none_and_keep_all_negatives(kind):
    found = example({**ROW, "prompt": "find: ", "type": kind})
    assert (found.document_prompt, len(found.negatives)) == (None, 3)


def test_types_that_ask_for_half_a_batch_are_counted():
    rows = FlagRows()
    kinds = ["symmetric_sts", "symmetric_class", "symmetric", "symmetric_sts", "only_1neg", None]
    for number, kind in enumerate(kinds):
        rows.record({**ROW, "type": kind}, number, own_group=False)
    (note,) = (note for note in rows.notes if "half a batch" in note)
    assert rows.notes[note] == 4


def test_rows_that_want_one_negative_get_one_with_its_score():
    """Which one is drawn by the seed and the row: all of them, over enough rows."""
    row = {**ROW, "type": "only_1neg", "pos_scores": [9], "neg_scores": [1, 2, 3]}
    rows = FlagRows(seed=3)
    drawn = [
        parse_example(rows.record(row, number, own_group=False), "set") for number in range(30)
    ]
    assert {(e.negatives, e.negative_scores) for e in drawn} == {
        (("n1",), (1.0,)),
        (("n2",), (2.0,)),
        (("n3",), (3.0,)),
    }
    assert rows.notes["negatives of rows with the type only_1neg"] == 60
    again = FlagRows(seed=3).record(row, 4, own_group=False)
    assert parse_example(again, "set") == drawn[4]


def test_a_wrong_type_or_form_is_refused():
    with pytest.raises(ValueError, match='"type" must be a text; got 3'):
        example({**ROW, "type": 3})
    for form in ("{}", "{}{} ", "a", "{}{}{}"):
        with pytest.raises(RecipeError, match="nothing after the text"):
            FlagRows(form=form)


def test_what_is_wrong_with_a_row_is_said_as_for_any_other():
    for row, message in (
        ([1], "expected an object"),
        ({"pos": ["p"]}, '"query" is missing'),
        ({"query": "q"}, '"positives" is missing or empty'),
        ({**ROW, "prompt": 3}, '"prompt" must be a text'),
        ({**ROW, "neg_scores": [1]}, "1 numbers for 3 texts"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_example(FlagRows().record(row, 0, own_group=False), "set")


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name", "task", "alone"),
    [
        ("data", "nq.jsonl", "nq", False),
        ("data", "nq_no_in_batch_neg.jsonl", "nq_no_in_batch_neg", True),
        ("sts_no_in_batch_neg", "a.jsonl", "a", True),
        ("data", "nq_len-0-500.jsonl", "nq", False),
        ("data", "nq_no_in_batch_neg_len-7000-inf.jsonl", "nq_no_in_batch_neg", True),
        ("data", "no_in_batch_neg_not.jsonl", "no_in_batch_neg_not", False),
    ],
)
def test_names_of_files_and_folders_say_what_rows_do_not(tmp_path, folder, name, task, alone):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / name
    path.write_text("")
    (tmp_path / folder / "README.md").write_text("")
    assert [(f.path, f.task, f.own_group) for f in flag_files(path.parent)] == [(path, task, alone)]
    (given,) = flag_files(path)  # by itself, its folder says nothing
    assert given.own_group == task.endswith("no_in_batch_neg")
    assert example(ROW, own_group=alone).in_batch == ("none" if alone else None)

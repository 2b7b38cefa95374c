import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.files.examples import example_record, parse_example
from tercet.types import Example

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
fields = st.sampled_from(["query", "pos", "positive", "negatives", "neg_scores", "prompt", "task"])


def test_an_example_with_every_field():
    record = {
        "query": "q",
        "positives": ["p", "p2"],
        "negatives": ["n"],
        "positive_scores": [1, 0.5],
        "negative_scores": [-2.5],
        "query_prompt": "find: ",
        "document_prompt": "text: ",
        "task": "nq",
        "lang": "de",
        "unknown": 7,
    }
    assert parse_example(record, "file") == Example(
        query="q",
        positives=("p", "p2"),
        negatives=("n",),
        positive_scores=(1.0, 0.5),
        negative_scores=(-2.5,),
        query_prompt="find: ",
        document_prompt="text: ",
        task="nq",
        lang="de",
    )


def test_only_a_query_and_a_positive_are_needed_and_null_is_absent():
    expected = Example("q", ("p",), task="file")
    assert parse_example({"query": "q", "positives": ["p"]}, "file") == expected
    nulls = {"negatives": None, "neg_scores": None, "task": None, "prompt": None}
    assert parse_example({"query": "q", "positives": ["p"], **nulls}, "file") == expected


def test_one_text_may_stand_for_a_list():
    record = {"query": "q", "positive": "p", "negative": "n"}
    assert parse_example(record, "f") == Example("q", ("p",), ("n",), task="f")


def test_the_names_of_flagembedding_are_read():
    record = {
        "query": "q",
        "pos": ["p"],
        "neg": ["n", "m"],
        "pos_scores": [3.0],
        "neg_scores": [1.0, 2.0],
        "prompt": "find: ",
        "type": "normal",
    }
    assert parse_example(record, "f") == Example(
        "q", ("p",), ("n", "m"), (3.0,), (1.0, 2.0), query_prompt="find: ", task="f"
    )


def test_a_negative_equal_to_a_positive_is_kept():
    record = {"query": "q", "positives": ["p"], "negatives": ["p"]}
    assert parse_example(record, "f").negatives == ("p",)


GOOD = {"query": "q", "positives": ["p"]}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], "expected an object with named fields, {...}, got list"),
        (None, "expected an object with named fields, {...}, got NoneType"),
        ({}, '"query" is missing; an example needs a "query" and its "positives"'),
        (GOOD | {"query": 1}, '"query" must be a text, got 1'),
        (GOOD | {"query": " \n"}, '"query" holds a blank text'),
        (GOOD | {"query": "a\ud83d"}, '"query" holds half a character at position 1'),
        ({"query": "q"}, '"positives" is missing or empty; a query needs at least one document'),
        (GOOD | {"positives": []}, '"positives" is missing or empty'),
        (GOOD | {"positives": {}}, '"positives" must be a list of texts, got {}'),
        (GOOD | {"positives": ["p", 2]}, '"positives" must be a text, got 2'),
        (GOOD | {"positives": ["p", ""]}, '"positives" holds a blank text'),
        (GOOD | {"pos": ["p"]}, '"positives" and "pos" are two names of one field; keep one'),
        (GOOD | {"negatives": 3}, '"negatives" must be a list of texts, got 3'),
        (GOOD | {"neg": [None]}, '"neg" must be a text, got None'),
        (GOOD | {"positive_scores": 1.0}, '"positive_scores" must be a list of numbers, got 1.0'),
        (GOOD | {"pos_scores": [1, 2]}, '"pos_scores" has 2 numbers for 1 texts'),
        (GOOD | {"negative_scores": [1]}, '"negative_scores" has 1 numbers for 0 texts'),
        (GOOD | {"positive_scores": [True]}, '"positive_scores" must hold numbers, got True'),
        (GOOD | {"positive_scores": ["1"]}, "\"positive_scores\" must hold numbers, got '1'"),
        (GOOD | {"positive_scores": [float("nan")]}, '"positive_scores" must hold finite numbers'),
        (GOOD | {"positive_scores": [10**400]}, '"positive_scores" must hold finite numbers'),
        (GOOD | {"query_prompt": 1}, '"query_prompt" must be a text, got 1'),
        (GOOD | {"task": ["nq"]}, "\"task\" must be a text, got ['nq']"),
    ],
)
def test_a_message_names_the_field_and_what_is_wrong_with_it(record, problem):
    with pytest.raises(ValueError) as caught:
        parse_example(record, "f")
    assert str(caught.value).startswith(problem)


def test_a_message_quotes_only_the_beginning_of_a_long_value():
    with pytest.raises(ValueError) as caught:
        parse_example(GOOD | {"query": ["x" * 1000]}, "f")
    assert len(str(caught.value)) < 120


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(fields, json_values))
def test_any_record_is_an_example_or_a_value_error(record):
    try:
        example = parse_example(record, "f")
    except ValueError:
        return
    assert example.query.strip()
    assert all(text.strip() for text in example.positives)


def test_a_record_leaves_absent_fields_out():
    assert example_record(Example("q", ("p",))) == GOOD

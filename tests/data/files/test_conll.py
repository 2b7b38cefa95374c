import pytest

from tercet.data.files.conll import UNLABELLED, LabelledSentence, read_labelled
from tercet.errors import DataError, RecipeError


@pytest.fixture
def write(tmp_path):
    def written(text, name="words.conll"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


COLUMNS = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\n# SYM O\n"


def test_the_word_is_in_the_first_column_and_its_label_in_the_last(write):
    assert read_labelled(write(COLUMNS)) == [
        LabelledSentence(("EU", "rejects"), ("B-ORG", "O")),
        LabelledSentence(("#",), ("O",)),
    ]


def test_a_column_is_counted_from_one(write):
    assert [it.labels for it in read_labelled(write(COLUMNS), 2)] == [("NNP", "VBZ"), ("SYM",)]


def test_where_the_first_line_has_tabs_a_space_is_part_of_a_word(write):
    path = write("\ufeff-DOCSTART- O\r\n\r\nNew York\tB-LOC\r\nis\tO\r\n")
    assert read_labelled(path) == [LabelledSentence(("New York", "is"), ("B-LOC", "O"))]


def test_a_space_that_does_not_break_lines_breaks_no_columns(write):
    assert read_labelled(write("10\u00a0km  CD\n"))[0].words == ("10\u00a0km",)


def conllu(identity, form, upos, xpos):
    return "\t".join((identity, form, form.lower(), upos, xpos, "_", "0", "root", "_", "_")) + "\n"


CONLLU = (
    "# text = I don't know\n"
    + conllu("1", "I", "PRON", "PRP")
    + conllu("2-3", "don't", "_", "_")
    + conllu("2", "do", "AUX", "VBP")
    + conllu("3", "n't", "_", "RB")
    + conllu("3.1", "ghost", "VERB", "VB")
    + "\n# a comment\n"
    + conllu("1", "#", "SYM", "#")
)


def test_conllu_is_known_by_its_ten_columns(write):
    assert read_labelled(write(CONLLU)) == [
        LabelledSentence(("I", "do", "n't"), ("PRON", "AUX", UNLABELLED)),
        LabelledSentence(("#",), ("SYM",)),
    ]
    assert read_labelled(write(CONLLU), 5)[0].labels == ("PRP", "VBP", "RB")


def test_a_record_has_tokens_and_labels_and_null_is_no_label(write):
    path = write('{"tokens": ["New York", "is"], "labels": ["B-LOC", null]}\n', "words.jsonl")
    assert read_labelled(path) == [LabelledSentence(("New York", "is"), ("B-LOC", UNLABELLED))]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a X\nb Y Z\n", 2, "has 3 columns, but line 1 has 2; give each word the same columns"),
        ("a X\n\nb\n", 3, "has 1 columns, but line 1 has 2; give each word the same columns"),
        ("\na\n", 2, "has only 1 columns; there is no column 2, which would hold the label"),
        ("a\tX\nb\t \n", 2, 'column 2 is blank; write "_" for a word without a label'),
        (b"a X\nb \xff\n", 2, "invalid UTF-8 at byte 6 of the file (0xff); save the file as UTF-8"),
        ("\n\n", None, "holds no sentences; write a word and its label per line"),
        ("-DOCSTART- O\n", None, "holds no sentences; write a word and its label per line"),
        ("", None, "holds no sentences; write a word and its label per line"),
    ],
)
def test_what_is_wrong_with_columns_is_said_with_its_line(write, text, line, problem):
    path = write(text)
    with pytest.raises(DataError) as caught:
        read_labelled(path)
    assert str(caught.value) == f"{path}{'' if line is None else f':{line}'}: {problem}"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            '{"tokens": ["a", "b"], "labels": ["X"]}',
            '"labels" has 1 entries for 2 words in "tokens"; '
            "give one label for each word, null for none",
        ),
        ('{"tokens": "a", "labels": ["X"]}', "\"tokens\" must be a list of texts, got 'a'"),
        ('{"tokens": ["a"]}', '"labels" must be a list of texts, got None'),
        ('{"tokens": [], "labels": []}', '"tokens" is empty; a sentence needs a word'),
        (
            '{"tokens": [" "], "labels": ["X"]}',
            '"tokens" holds a blank text; write the text or remove the record',
        ),
        ('{"tokens": ["a"], "labels": [3]}', '"labels" must be a text, got 3'),
    ],
)
def test_what_is_wrong_with_a_record_is_said_with_its_line(write, record, problem):
    path = write('{"tokens": ["a"], "labels": ["X"]}\n' + record + "\n", "words.jsonl")
    with pytest.raises(DataError) as caught:
        read_labelled(path)
    assert str(caught.value) == f"{path}:2: {problem}"


def test_a_column_that_is_not_there_is_named(write):
    path = write("\na X\n")
    with pytest.raises(DataError, match=f"{path}:2: has only 2 columns; there is no column 4"):
        read_labelled(path, 4)


@pytest.mark.parametrize("column", [1, 0, -1])
def test_the_column_of_the_word_holds_no_labels(write, column):
    with pytest.raises(RecipeError, match=f"column {column} cannot hold labels; give a later one"):
        read_labelled(write("a X\n"), column)


def test_records_have_no_columns(write):
    path = write('{"tokens": ["a"], "labels": ["X"]}\n', "words.jsonl")
    with pytest.raises(RecipeError, match="has no columns; remove the column of the labels"):
        read_labelled(path, 2)

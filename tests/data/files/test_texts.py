import json
import pickle
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.files.texts import evenly_spaced, open_texts
from tercet.errors import DataError
from tercet.types import Example

LINES = ("first line", "", "zweite Zeile, größer", "  ", "third\ttext")


@pytest.fixture(params=[".txt", ".jsonl", ".parquet"])
def file(request, tmp_path):
    path = tmp_path / f"texts{request.param}"
    kept = [line for line in LINES if line.strip()]
    if request.param == ".txt":
        path.write_bytes("\r\n".join(LINES).encode())
    elif request.param == ".jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in kept))
    else:
        pq.write_table(pa.table({"body": kept, "other": [1, 2, 3]}), path)
    return path


def test_texts_are_read_by_row_whatever_the_file(file):
    source = pickle.loads(pickle.dumps(open_texts(file, field="body", weight=2)))
    assert len(source) == 3
    assert (source.name, source.weight) == ("texts", 2)
    assert source.examples([2, 0]) == [
        Example(text, (text,), task="texts") for text in ("third\ttext", "first line")
    ]
    assert source.sizes.tolist() == [10, 22, 10]


def test_blank_lines_are_texts_on_request(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES) + "\n")
    source = open_texts(path, blank_lines=True)
    assert [example.query for example in source.examples(range(5))] == list(LINES)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"\n \n", "holds no texts; write one text per line"),
        ("a.txt", b"fine\n\xff\n", ":2: invalid UTF-8 at byte 5"),
        ("a.jsonl", b'{"text": "x"}\n{"long": "y"}\n', ':2: "text" is missing'),
        ("a.jsonl", b'{"text": " "}\n', ':1: "text" holds a blank text'),
        ("a.jsonl", b'{"text": 3}\n', ':1: "text" must be a text, got 3'),
        ("a.doc", b"x\n", 'unknown kind of file ".doc"; use .jsonl, .csv, .tsv, .parquet or .txt'),
    ],
)
def test_a_file_without_texts_says_what_is_wrong_with_it(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_texts(tmp_path / name)
    assert problem in str(caught.value)


def test_a_file_that_changed_since_it_was_opened_is_refused(file):
    source = open_texts(file, field="body")
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match="has changed"):
        source.examples([0])


@pytest.mark.parametrize(("count", "most"), [(0, 3), (3, 3), (7, 3), (1_000, 10), (21, 20)])
def test_texts_are_taken_from_all_over_a_file(count, most):
    texts = evenly_spaced((str(i) for i in range(count)), most)
    numbers = [int(text) for text in texts]
    assert min(count, most) / 2 <= len(numbers) <= most
    assert len({after - before for before, after in pairwise(numbers)}) <= 1
    assert not count or numbers[-1] >= count - 2 * count / len(numbers)

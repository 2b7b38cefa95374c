"""Each format of a file gives the same examples, and what is wrong with one says what to do."""

import csv
import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.data.files.documents import Document, read_documents
from tercet.data.files.examples import ExampleFields
from tercet.data.files.folders import find_groups, open_sources
from tercet.data.files.labelled import LabelledText, read_labelled_texts
from tercet.data.files.similarity import SimilaritySet
from tercet.data.files.sources import iter_examples, open_source, refuse_scored, write_examples
from tercet.data.files.texts import open_texts, read_texts
from tercet.data.report import CheckOptions, check_data
from tercet.errors import DataError
from tercet.files import forms, records
from tercet.files.forms import FileForm, bare_name, known_form
from tercet.files.records import iter_records
from tercet.types import Example

ROWS = [
    {"query": "a, b", "positives": 'say "x"\nnext\r\nline', "negatives": "\ttab; \\ \u2028 ø"},
    {"query": "c", "positives": " d ", "negatives": "ß\x00\x0b é"},
]
EXAMPLES = [
    Example(row["query"], (row["positives"],), (row["negatives"],), task="t") for row in ROWS
]
PLAIN = ["jsonl", "csv", "tsv"]
FORMATS = [f"{kind}{packed}" for kind in PLAIN for packed in ("", ".gz", ".zst")] + ["parquet"]


def packed(name, content):
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    if name.endswith(".zst"):
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, "zstd") as stream:
            stream.write(content)
        return out.getvalue().to_pybytes()
    return content


def table(rows, mark):
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=mark)
    writer.writerow(names)
    cells = [["" if row.get(name) is None else row[name] for name in names] for row in rows]
    writer.writerows(cells)
    return out.getvalue().encode()


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def written(folder, rows, suffix, name="t"):
    path = folder / f"{name}.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    kind = suffix.partition(".")[0]
    content = lines(rows) if kind == "jsonl" else table(rows, "," if kind == "csv" else "\t")
    path.write_bytes(packed(suffix, content))
    return path


def problem(read, path):
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_format_gives_the_same_examples_in_any_order(tmp_path, suffix):
    path = written(tmp_path, ROWS, suffix)
    assert list(iter_examples(path)) == EXAMPLES
    source = pickle.loads(pickle.dumps(open_source(path)))
    assert source.name == "t"
    assert source.examples([1, 0, 1]) == [EXAMPLES[1], EXAMPLES[0], EXAMPLES[1]]
    longest = [max(len(text.encode()) for text in row.values()) for row in ROWS]
    assert source.sizes.tolist() == longest
    (one,) = open_sources(path)
    assert one.examples([0, 1]) == EXAMPLES


few = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: not text.isspace()
)


@few
@given(rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5))
def test_all_formats_agree_about_arbitrary_texts(tmp_path, rows):
    named = [dict(zip(("query", "positive", "negative_1"), row, strict=True)) for row in rows]
    wanted = [Example(query, (good,), (bad,), task="t") for query, good, bad in rows]
    for suffix in FORMATS:
        source = open_source(written(tmp_path, named, suffix))
        assert source.examples(range(len(rows))) == wanted, suffix


def test_what_is_packed_has_the_fingerprint_of_its_content(tmp_path):
    prints = {name: open_source(written(tmp_path, ROWS, name)).fingerprint for name in FORMATS}
    assert len({prints[name] for name in FORMATS if name.startswith("jsonl")}) == 1
    tables = [name for name in FORMATS if name.startswith(("csv", "tsv"))]
    assert len({prints[name] for name in tables}) == 1
    other = open_source(written(tmp_path, ROWS[::-1], "csv.gz", "u"))
    assert other.fingerprint != prints["csv.gz"]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv", "tsv.zst"])
def test_rows_are_read_from_a_copy_that_only_the_owner_reads_and_that_is_made_once(
    tmp_path, suffix, monkeypatch
):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path, ROWS, suffix)
    source = open_source(path)
    copy = source.reader.path  # pyright: ignore  # of a reader of files
    assert copy.parent == tmp_path / "cache/unpacked"
    assert copy.stat().st_mode & 0o777 == 0o600
    before = copy.stat().st_ino
    again = open_source(path).reader.path  # pyright: ignore  # of a reader of files
    assert again.stat().st_ino == before
    copy.write_bytes(b"{}\n" * 9)  # damaged: made once more, while others go on to read
    assert open_source(path).examples([0, 1]) == EXAMPLES
    assert source.examples([0, 1]) == EXAMPLES
    written(tmp_path, ROWS[::-1], suffix)
    assert open_source(path).examples([0, 1]) == EXAMPLES[::-1]
    assert len(list(copy.parent.glob("*.lines"))) == 1  # the copy of the old state is gone


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_names_the_first_line_of_a_bad_row_also_after_line_breaks_in_cells(
    tmp_path, suffix
):
    mark = "," if suffix == "csv" else "\t"
    path = tmp_path / f"a.{suffix}"
    rows = [["query", "positive"], ["a", "b\nc\nd"], ["e", "f"], ["g"]]
    path.write_text("\n\n".join(mark.join(f'"{c}"' for c in row) for row in rows))
    assert problem(open_source, path).startswith(
        ":9: has 1 cell, but the first line names 2 columns; put quotation marks around a text "
    )
    path.write_text(f"query{mark}positive\na{mark}b\n{mark}c\n")
    assert problem(open_source, path).startswith(':3: "query" is missing')


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ": holds no records; write the names of the columns, and a row for each"),
        (b"query,positive\n", ": holds no records; write the names of the columns"),
        (b"query;positive\na;b\n", ":1: its first line has a semicolon but no comma"),
        (b"query\tpositive\na\tb\n", ":1: its first line has a tab but no comma"),
        (b'{"query": "a"}\n', ":1: its first line is JSON; name a file of JSON lines .jsonl"),
        (b"query,query\na,b\n", ':1: its first line names a column "query" twice; rename one'),
        (b",\na,b\n", ":1: its first line is blank; it names the columns"),
        (b"how,so\na,b\n", ': has no column "query"; rename one of its columns to it, or name it'),
        (b'query,positive\na,"b\nc\n', ":2: a quotation mark that opens in this row is never"),
        (b'query,positive\na,"b"c\n', ":2: cannot be split into columns: ',' expected after"),
        (b"query,positive\na\rb,c\n", ":2: holds a carriage return that ends no line"),
        (b"query,positive\na,b\nc,\xff\n", ":3: invalid UTF-8 at byte 21 of the file (0xff)"),
        (b"question,anchor,positive\na,b,c\n", ':2: "anchor" and "question" may both be the query'),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, content, said):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert problem(open_source, path).startswith(said)


def test_columns_without_a_name_and_empty_cells_are_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeff,query,positive,negative_2,negative_10\r\n0,a,b,,n\r\n".encode())
    assert list(iter_examples(path)) == [Example("a", ("b",), ("n",), task="a")]


def test_numbered_columns_are_in_the_order_of_their_numbers(tmp_path):
    row = {"anchor": "a", "positive": "b"} | {f"negative_{i}": f"n{i}" for i in (10, 2, 1)}
    (example,) = iter_examples(written(tmp_path, [row], "jsonl"))
    assert example.negatives == ("n1", "n2", "n10")
    row["negative"] = "n"
    assert '"negative" and "negative_1" are two names of one field' in problem(
        open_source, written(tmp_path, [row], "jsonl", "u")
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("query", "positive"),
    [
        ("anchor", "positive"),
        ("question", "answer"),
        ("question", "context"),
        ("query", "passage"),
        ("query", "document"),
        ("query", "text"),
        ("sentence1", "sentence2"),
    ],
)
def test_usual_names_are_recognised(tmp_path, query, positive, suffix):
    path = written(tmp_path, [{query: "a", positive: "b"}], suffix)
    assert open_source(path).examples([0]) == [Example("a", ("b",), task="t")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_our_names_win_over_usual_ones(tmp_path, suffix, caplog):
    row = {"query": "a", "question": "x", "positives": "b", "text": "y"}
    path = written(tmp_path, [row], suffix)
    assert open_source(path).examples([0]) == [Example("a", ("b",), task="t")]
    assert 'not read: "question", "text"' in caplog.records[0].getMessage()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_two_usual_names_are_ambiguous_and_a_given_name_decides(tmp_path, suffix):
    path = written(tmp_path, [{"question": "a", "context": "b", "answer": "c"}], suffix)
    assert problem(open_source, path) == (
        ':2: "answer" and "context" may both be the positives; name the one that is with '
        "--positive-field"
    ).replace(":2", ":2" if suffix == "csv" else ":1")
    source = open_source(path, fields=ExampleFields(positives="context"))
    assert source.examples([0]) == [Example("a", ("b",), task="t")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv.gz", "parquet"])
def test_columns_may_be_named(tmp_path, suffix):
    rows = [{"q": "a", "good": "b", "bad_1": "c", "bad_2": "d"}]
    fields = ExampleFields(query="q", positives="good", negatives="bad")
    path = written(tmp_path, rows, suffix)
    wanted = [Example("a", ("b",), ("c", "d"), task="t")]
    assert open_source(path, fields=fields).examples([0]) == wanted
    assert list(iter_examples(path, fields=fields)) == wanted
    (source,) = open_sources(path, fields=fields)
    assert pickle.loads(pickle.dumps(source)).examples([0]) == wanted
    assert check_data([path], CheckOptions(fields=fields)).errors == ()


SCORED: list[dict[str, object]] = [
    {"text1": "a", "text2": "b", "score": 1.5, "task": "x", "prompt": "p: ", "lang": "de"},
    {"text1": "c", "text2": "d", "score": 0.5},
]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("names", [("text1", "text2"), ("sentence1", "sentence2")])
def test_two_texts_with_a_score_are_a_pair(tmp_path, suffix, names):
    renamed: dict[str, str] = dict(zip(("text1", "text2"), names, strict=True))
    rows = [{renamed.get(name, name): value for name, value in row.items()} for row in SCORED]
    path = written(tmp_path, rows, suffix)
    wanted = [
        Example("a", ("b",), query_prompt="p: ", task="x", lang="de", score=1.5),
        Example("c", ("d",), task="t", score=0.5),
    ]
    source = open_source(path)
    assert source.examples([0, 1]) == wanted
    assert (source.scored, source.without_negatives) == (2, 0)
    total = check_data([path]).total
    assert total is not None and (total.scored_pairs, total.rows) == (2, 2)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pairs_with_scores_are_written_as_they_are_read(tmp_path, suffix):
    pairs = open_source(written(tmp_path, SCORED, "jsonl")).examples([0, 1])
    write_examples(tmp_path / f"again.{suffix}", pairs)
    assert list(iter_examples(tmp_path / f"again.{suffix}", scored=True)) == pairs
    with pytest.raises(DataError) as caught:
        write_examples(tmp_path / "both.parquet", [*pairs, Example("q", ("p",))])
    assert str(caught.value) == (
        f"{tmp_path}/both.parquet: cannot hold both examples and pairs with a similarity score; "
        "write a .jsonl file, or each to a file"
    )


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (("text1", "text2"), ExampleFields(negatives="neg2")),
        (("sentence1", "sentence2"), ExampleFields(negatives="hard")),
        (("sentence1", "sentence2"), ExampleFields(query="sentence1", positives="sentence2")),
        (("sentence1", "text2"), ExampleFields()),
        (("text1", "sentence2"), ExampleFields()),
    ],
)
def test_a_pair_with_a_score_is_no_example_whatever_fields_are_named(
    tmp_path, suffix, names, fields
):
    path = written(tmp_path, [dict(zip((*names, "score"), ("a", "b", 0.0), strict=True))], suffix)
    source = open_source(path, fields=fields)
    assert source.scored == 1
    assert source.examples([0]) == [Example("a", ("b",), task="t", score=0.0)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_score_is_not_dropped_where_one_of_its_texts_would_be_a_positive(tmp_path, suffix):
    row = {"query": "id7", "text1": "a", "text2": "b", "score": 0.0}
    assert problem(open_source, written(tmp_path, [row], suffix)).endswith(
        '"text2" with a "score" is a text of a pair with a similarity score, and would be read as '
        'a positive of "query"; remove "query" if "text1" and "text2" are the pair, or "score" if '
        'every "text2" answers its query'
    )
    row = {"query": "a", "text1": "b", "score": 0.0}
    path = written(tmp_path, [row], suffix, "first")
    fields = ExampleFields(positives="text1")
    assert '"text1" with a "score"' in problem(lambda it: open_source(it, fields=fields), path)


def test_text1_is_a_query_without_a_score_where_it_is_named(tmp_path):
    path = written(tmp_path, [{"text1": "a", "text2": "b"}], "jsonl")
    source = open_source(path, fields=ExampleFields(query="text1", positives="text2"))
    assert source.examples([0]) == [Example("a", ("b",), task="t")]


@pytest.mark.parametrize("suffix", ["csv", "tsv.gz"])
@pytest.mark.parametrize("names", [("text1", "text2"), ("sentence1", "sentence2")])
def test_an_empty_cell_for_a_score_is_a_missing_score(tmp_path, suffix, names):
    rows = [dict(zip((*names, "score"), ("a", "b", score), strict=True)) for score in (1.5, "")]
    said = problem(open_source, written(tmp_path, rows, suffix))
    assert said == ':3: "score" is missing; give the similarity of the two texts as a number'


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("negatives", ["c"]),
        ("negative_1", "c"),
        ("positives", ["c"]),
        ("negative_scores", [1.0]),
        ("document_prompt", "p: "),
        ("in_batch", "none"),
    ],
)
def test_what_a_pair_with_a_score_does_not_use_is_refused(tmp_path, name, value):
    row = {"sentence1": "a", "sentence2": "b", "score": 1.0, name: value}
    said = problem(open_source, written(tmp_path, [row], "jsonl"))
    assert said == (
        f':1: "{name}" is not read beside two texts with a similarity score; remove it, or the '
        "score if the second text answers the first"
    )


def test_a_score_beside_a_query_is_that_of_a_filter(tmp_path):
    path = written(tmp_path, [{"query": "a", "positives": ["b"], "score": 0.9}], "jsonl")
    assert open_source(path).examples([0]) == [Example("a", ("b",), task="t")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sentence1": "a", "sentence2": "b", "score": None}, '"score" is missing; give the'),
        ({"text1": "a", "text2": "b"}, '"score" is missing; give the similarity of the two texts'),
        ({"text1": "a", "score": 1}, '"text2" is missing; a pair needs "text1", "text2" and'),
        ({"text1": "a", "text2": "b", "score": "x"}, "\"score\" must hold numbers, got 'x'"),
        ({"text1": "a", "text2": " ", "score": 1}, '"text2" holds a blank text'),
        ({"sentence1": "a", "sentence2": "b", "label": 2}, '"label" may be a class; rename it to'),
        ({"text": "a", "label": "b"}, "tercet convert labels"),
    ],
)
def test_what_is_no_pair_and_no_example_is_refused(tmp_path, row, said):
    assert said in problem(open_source, written(tmp_path, [row], "jsonl"))


def test_examples_are_needed_where_pairs_with_scores_teach_something_wrong(tmp_path):
    path = written(tmp_path, SCORED, "jsonl")
    said = problem(lambda it: list(iter_examples(it)), path)
    assert said == (
        ":1: a pair with a similarity score is not an example; make examples of such pairs with: "
        "tercet convert scores"
    )
    with pytest.raises(DataError, match="and mining needs queries and what answers them"):
        refuse_scored([open_source(path)], "mining")


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_reader_reads_each_format(tmp_path, suffix):
    path = written(tmp_path, [{"text": "a", "id": "7", "label": "x"}, {"content": "c"}][:1], suffix)
    document = Document("7", "a", fields={"label": "x"})
    assert list(read_documents(path, keep_others=True)) == [document]
    assert list(read_texts(path)) == ["a"]
    assert open_texts(path).examples([0]) == [Example("a", ("a",), task="t")]
    assert list(read_labelled_texts(path)) == [LabelledText("a", ("x",))]
    scored = [{"text1": "a", "text2": "b", "score": 1.5}, {"text1": "c", "text2": "b", "score": 2}]
    data = SimilaritySet.from_file(written(tmp_path, scored, suffix, "sts"))
    assert (data.name, data.scores.tolist()) == ("sts", [1.5, 2.0])
    body = written(tmp_path, [{"body": "b", "_id": "1"}], suffix, "body")
    assert list(read_documents(body)) == [Document("1", "b")]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_lines_of_plain_text_may_be_packed(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(packed(ending, "\ufeffone\r\n\ntwo\n".encode()))
    assert list(read_texts(path)) == ["one", "", "two"]
    assert [e.query for e in open_texts(path).examples([1, 0])] == ["two", "one"]
    all_lines = open_texts(path, blank_lines=True)
    assert [e.query for e in all_lines.examples([2, 1, 0])] == ["two", "", "one"]


def test_a_folder_holds_files_of_all_formats(tmp_path):
    (tmp_path / "s").mkdir()
    for suffix in FORMATS:
        written(tmp_path / "s", ROWS, suffix, suffix.replace(".", "-"))
    assert [group.name for group in find_groups(tmp_path / "s")] == sorted(
        suffix.replace(".", "-") for suffix in FORMATS
    )
    assert [len(source) for source in open_sources(tmp_path / "s")] == [2] * len(FORMATS)


UTF16 = "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {0} > new-{0}"


def _zip():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", "b")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", gzip.compress(lines(ROWS), mtime=0), "is a gzip file; name it a.jsonl.gz"),
        ("a.jsonl", packed(".zst", lines(ROWS)), "is a zstd file; name it a.jsonl.zst"),
        ("a.jsonl.gz", packed(".zst", lines(ROWS)), "is a zstd file; name it a.jsonl.zst"),
        ("a.csv.gz", table(ROWS, ","), "is not a gzip file; name it a.csv"),
        ("a.csv", b"PAR1\x15\x04", "is a parquet file; name it a.parquet"),
        ("a.csv", _zip(), "is a zip archive or a spreadsheet; unpack it, or save the table as CSV"),
        ("a.jsonl", lines(ROWS).decode().encode("utf-16"), UTF16.format("a.jsonl")),
        ("a.csv", "query,positive\n".encode("utf-16-le"), "is UTF-16; convert it: iconv"),
        (
            "a.parquet",
            gzip.compress(b"x", mtime=0),
            "is a gzip file; unpack it, or name it after what is",
        ),
        ("a.jsonl", b'[{"query": "a"}]', "is one JSON value and not one object per line; convert"),
        ("a.jsonl", b'[\n{"query": "a"}\n]', "jq -c '.[]' a.jsonl > lines-of-a.jsonl"),
        ("a.jsonl", b'{\n"query": "a"\n}', "jq -c . a.jsonl > lines-of-a.jsonl"),
        ("a.jsonl", b"query,positive\na,b\n", "looks like a table, whose file is named a.csv"),
        ("a.jsonl", b"query\tpositive\na\tb\n", "looks like a table, whose file is named a.tsv"),
        ("a.json", b'[{"query": "a"}]', "jq -c '.[]' a.json > a.jsonl"),
        ("a.xlsx", _zip(), "is a spreadsheet; save the table as CSV (UTF-8) and give a.csv"),
        ("a.safetensors", b"x", "holds the weights of a model; name the model with --model"),
        ("a.zip", _zip(), "is an archive; unpack it and give the files in it"),
        (
            "a.gz",
            gzip.compress(b"x", mtime=0),
            "does not say what is packed; name it after that, as in",
        ),
        (
            "a.parquet.gz",
            gzip.compress(b"x", mtime=0),
            "is packed twice, as parquet is packed inside",
        ),
        ("a", b"x", 'unknown kind of file ""; use .jsonl, .csv, .tsv or .parquet'),
    ],
)
def test_a_file_under_a_wrong_name_says_what_it_is_and_what_to_do(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    assert said in problem(open_source, path)
    assert said in check_data([path]).errors[0]


@pytest.mark.parametrize("cut", [10, 60])
@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv.zst"])
def test_a_packed_file_that_is_cut_off_is_refused(tmp_path, suffix, cut):
    path = written(tmp_path, ROWS, suffix)
    path.write_bytes(path.read_bytes()[:-cut])
    assert problem(open_source, path).startswith(": cannot be read: Truncated compressed stream")


def test_a_model_given_as_data_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = ": is the folder of a model; name the model with --model, and give data here"
    assert problem(open_source, tmp_path) == said
    assert problem(open_sources, tmp_path) == said
    assert problem(lambda path: list(read_documents(path)), tmp_path) == said


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "csv.gz"])
def test_a_file_that_unpacks_without_end_is_refused(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(forms, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(forms, "MAX_EXPANSION", 10)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed(suffix, b"query,positive\n" + b"a,b\n" * 1_000_000))
    if "jsonl" in suffix:
        path.write_bytes(packed(suffix, b'{"query": "a", "positives": "b"}\n' * 200_000))
    assert "bytes unpack to more than 1,048,576; no texts do that" in problem(open_source, path)


def test_a_line_and_a_row_have_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 50)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" + b"x" * 60, mtime=0))
    assert problem(open_source, path).startswith(":2: is longer than 50 bytes")
    path = tmp_path / "a.csv"
    path.write_bytes(b'query,positive\na,"' + b"x\n" * 60)
    assert ": a row is longer than 50 bytes; is a quotation mark open?" in problem(
        open_source, path
    )


def test_long_cells_are_read(tmp_path):
    long = "x" * 300_000  # more than csv reads by itself
    path = written(tmp_path, [{"query": "a", "positive": long}], "csv")
    assert open_source(path).examples([0])[0].positives == (long,)


def test_a_name_says_the_format_in_any_case():
    assert known_form(forms.Path("x/Pairs.CSV.GZ")) == FileForm("csv", "gzip")
    assert known_form(forms.Path("a.parquet.gz")) is None
    assert known_form(forms.Path(".jsonl")) is None
    assert bare_name(forms.Path("x/de.jsonl.zst")) == "de"
    assert FileForm("csv", "gzip").described == "CSV, gzip"


def test_check_shows_what_was_understood(tmp_path):
    rows = [{"question": "a", "answer": "b", "negative_1": "c", "negatvies": "d"}] * 3
    path = written(tmp_path, rows, "csv.gz")
    (file,) = check_data([path]).files
    assert (file.path, file.format, file.encoding, file.rows) == (
        str(path),
        "CSV, gzip",
        "UTF-8",
        3,
    )
    assert file.columns == {"query": "question", "positives": "answer", "negatives": "negative_1"}
    assert file.unread == ("negatvies",)
    (file,) = check_data([written(tmp_path, rows, "parquet")]).files
    assert (file.format, file.encoding, file.unread) == ("parquet", "", ("negatvies",))
    bom = tmp_path / "bom.jsonl"
    bom.write_bytes("\ufeff".encode() + lines(rows))
    assert check_data([bom]).files[0].encoding == "UTF-8 with BOM"


def test_progress_of_a_packed_file_rises(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"query": rng.bytes(500).hex(), "positives": "b"} for _ in range(2000)]
    path = written(tmp_path, rows, "jsonl.gz")
    done = [record.done for record in iter_records(path, (), needs=())]
    assert done == sorted(done)
    assert done[0] < 0.5 < done[-1] <= 1

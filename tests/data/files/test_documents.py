import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.data.files import documents
from tercet.data.files.documents import Document, Fields, read_documents
from tercet.data.files.texts import read_texts
from tercet.errors import DataError

few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def written(tmp_path, content, name="docs.jsonl"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problem_of(path, read=read_documents):
    with pytest.raises(DataError) as caught:
        list(read(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_documents_have_an_id_a_text_and_a_title(tmp_path):
    path = written(
        tmp_path,
        '{"id": "x", "text": "t", "title": "T", "more": 1}\n\n{"text": "u", "title": null}\n'
        '{"id": 7, "text": "v"}\n',
    )
    assert list(read_documents(path)) == [
        Document("x", "t", "T"),
        Document("3", "u", ""),
        Document("7", "v", ""),
    ]


def test_fields_may_have_other_names(tmp_path):
    path = written(tmp_path, '{"package": "vim", "long": "editor", "short": "vi"}\n')
    found = read_documents(path, Fields(text="long", title="short", id="package"))
    assert list(found) == [Document("vim", "editor", "vi")]


def test_parquet_gives_the_same_documents(tmp_path):
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "id": ["x", None]}), path)
    assert list(read_documents(path)) == [Document("x", "a"), Document("2", "b")]
    assert problem_of(path, lambda path: read_texts(path, "body")) == (
        ': has no column "body"; rename one of its columns to it, or name it with --text-field: '
        '"text", "id"'
    )


def test_a_line_of_plain_text_is_a_document_named_by_its_number(tmp_path):
    path = written(tmp_path, "\ufeffa\r\n\n \u3000\nb c", "docs.txt")
    assert list(read_documents(path)) == [Document("1", "a"), Document("4", "b c")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", ":2: expected an object with named fields, {...}, got list"),
        ("{}", ':2: "text" is missing; it holds the text'),
        ('{"text": " "}', ':2: "text" holds a blank text'),
        ('{"text": 1}', ':2: "text" must be a text, got 1'),
        ('{"text": "\\ud800"}', ':2: "text" holds half a character at position 0'),
        ('{"text": "t", "title": 0}', ':2: "title" must be a text, got 0'),
        ('{"text": "t", "id": true}', ':2: "id" must be a text or a whole number, got True'),
        ('{"text": "t", "id": 1.5}', ':2: "id" must be a text or a whole number, got 1.5'),
        ('{"text": "t", "id": ""}', ':2: "id" holds a blank text'),
        (b"\xff", ":2: invalid UTF-8 at byte 14 of the file (0xff)"),
        ("{", ":2: not JSON: "),
    ],
)
def test_a_message_says_file_line_and_problem(tmp_path, line, problem):
    line = line if isinstance(line, bytes) else line.encode()
    path = written(tmp_path, b'{"text": "t"}\n' + line)
    assert problem_of(path).startswith(problem)


def test_two_documents_of_one_id_are_refused_with_both_lines(tmp_path):
    path = written(tmp_path, '{"text": "a", "id": "x"}\n' * 1 + '\n{"text": "b", "id": "x"}\n')
    assert problem_of(path) == (
        ":3: \"id\" 'x' is already on line 1; give each document a unique id"
    )


def test_an_id_may_not_be_that_of_a_document_named_by_its_line(tmp_path):
    path = written(tmp_path, '{"text": "a"}\n{"text": "b", "id": "1"}\n')
    assert problem_of(path).startswith(":2: \"id\" '1' is already on line 1")
    path = written(tmp_path, '{"text": "a", "id": 2}\n{"text": "b"}\n')
    assert problem_of(path).startswith(":2: \"id\" '2' is already on line 1")


def test_ids_of_equal_hash_are_not_taken_for_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "hash", lambda _: 0, raising=False)
    path = written(tmp_path, "a\nb\nc\n", "docs.txt")
    assert [document.id for document in read_documents(path)] == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.txt"])
@pytest.mark.parametrize("read", [read_documents, read_texts])
def test_an_empty_file_is_refused(tmp_path, name, read):
    assert problem_of(written(tmp_path, "", name), read).startswith(": holds no ")


def test_invalid_utf8_in_plain_text_is_found_at_its_byte(tmp_path):
    path = written(tmp_path, b"ok\nbad \xe9\n", "docs.txt")
    problem = ":2: invalid UTF-8 at byte 7 of the file (0xe9); save the file as UTF-8"
    assert problem_of(path) == problem
    assert problem_of(path, read_texts) == problem


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    path = written(tmp_path, "a", "docs.doc")
    assert problem_of(path) == (
        ': unknown kind of file ".doc"; use .jsonl, .csv, .tsv, .parquet or .txt'
    )
    assert problem_of(tmp_path / "absent.txt") == ": no such file"


def test_texts_to_encode_keep_blank_ones_in_their_place(tmp_path):
    path = written(tmp_path, "a\n\n b \n", "docs.txt")
    assert list(read_texts(path)) == ["a", "", " b "]
    path = written(tmp_path, '{"long": ""}\n{"long": "a"}\n')
    assert list(read_texts(path, "long")) == ["", "a"]
    assert problem_of(path, read_texts).startswith(':1: "text" is missing')


@few
@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("suffix", ["jsonl", "txt", "parquet"])
def test_a_file_of_any_bytes_is_read_or_is_a_data_error(tmp_path, suffix, content):
    path = written(tmp_path, content, f"docs.{suffix}")
    for read in (read_documents, read_texts):
        try:
            list(read(path))
        except DataError:
            pass


def test_other_fields_are_kept_on_request_where_a_filter_can_ask_for_them(tmp_path):
    line = (
        '{"id": "x", "text": "t", "section": "web", "year": 1999, "free": false, "tags": ["a", 2], '
        '"none": null, "nested": {"a": 1}, "deep": [[1]]}\n'
    )
    fields = {"section": "web", "year": 1999, "free": False, "tags": ["a", 2]}
    (found,) = read_documents(written(tmp_path, line), keep_others=True)
    assert found == Document("x", "t", fields=fields)
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"text": ["t"], "year": [1999], "bytes": [b"\x00"]}), path)
    (found,) = read_documents(path, keep_others=True)
    assert found == Document("1", "t", fields={"year": 1999})
    (plain,) = read_documents(path)
    assert plain == Document("1", "t")

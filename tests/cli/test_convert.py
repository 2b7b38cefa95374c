import pytest

from tercet.data.files.sources import iter_examples, write_examples
from tercet.types import Example
from tests.cli.lines import cells, table, write

HOW = ("--task", "t", "--instruction", "Sort.")


@pytest.fixture
def labelled(tmp_path):
    records = [
        {"text": f"{label} {n}", "label": label, "split": "test" if n == 4 else "train"}
        for label in ("joy", "fear", "awe")
        for n in range(5)
    ]
    return write(tmp_path / "moods.jsonl", *records)


@pytest.fixture
def pairs(tmp_path):
    scored = [("red cat sits", "red cat naps", 5), ("red cat runs", "blue cat sits", 1)]
    records = [{"text1": a, "text2": b, "score": score} for a, b, score in scored]
    return write(tmp_path / "pairs.jsonl", *records)


@pytest.mark.parametrize("verb", ["labels", "labels"])
def test_labelled_texts_become_rows_and_a_table(tercet, labelled, tmp_path, verb):
    out = tmp_path / "rows.jsonl"
    ended = tercet("convert", verb, labelled, *HOW, "--negatives", 2, "--rows", 9, "--out", out)
    assert ended.status == 0
    rows = [cells(line) for line in ended.out.splitlines()]
    for row in (["records", "15"], ["rows", "9"], ["negatives per row", "2.00"], ["joy", "3"]):
        assert row in rows
    assert "rows of mode example" in ended.err
    examples = list(iter_examples(out))
    assert len(examples) == 9
    assert {(e.task, e.in_batch, e.query_prompt) for e in examples} == {
        ("t", "none", "Instruct: Sort.\nQuery: ")
    }


def test_all_flags_of_labelled_texts_reach_the_rows(tercet, tmp_path):
    records = [
        {"title": f"{topic} {n}", "body": "long", "topics": [f"mood::{topic}", "form::text"]}
        for topic in ("joy", "fear", "awe")
        for n in range(3)
    ]
    file = write(tmp_path / "a.jsonl", *({**r, "split": "train"} for r in records[:-1]))
    file.write_text(
        file.read_text() + '{"title": "quiet", "topics": ["mood::x"], "split": "test"}\n'
    )
    words = tmp_path / "words.json"
    words.write_text('{"joy": "It is joy."}')
    fields = ("--text-field", "title", "--text-field", "body", "--label-field", "topics")
    labels = ("--label-prefix", "mood::", "--label-texts", words, "--mode", "label")
    out = tmp_path / "rows.parquet"
    command = ("convert", "labels", file, *HOW, *fields, *labels, "--split", "train")
    assert tercet(*command, "--out", out).status == 0
    rows = list(iter_examples(out))
    assert [(row.query, row.positives) for row in rows[:4]] == [
        ("joy 0 long", ("It is joy.",)),
        ("joy 1 long", ("It is joy.",)),
        ("joy 2 long", ("It is joy.",)),
        ("fear 0 long", ("fear",)),
    ]
    assert len(rows) == 8
    assert {row.in_batch for row in rows} == {"none"}


def test_the_same_command_writes_the_same_file_and_another_seed_another(tercet, labelled, tmp_path):
    written = []
    for seed in (3, 3, 4):
        out = tmp_path / "rows.jsonl"
        tercet("convert", "labels", labelled, *HOW, "--out", out, "--seed", seed)
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_text_without_another_of_its_label_is_left_out_on_request(tercet, labelled, tmp_path):
    labelled.write_text(labelled.read_text() + '{"text": "calm 0", "label": "calm"}\n')
    command = ("convert", "labels", labelled, *HOW, "--out", tmp_path / "rows.jsonl")
    rows = [cells(line) for line in tercet(*command).out.splitlines()]
    assert ["rows with the label for want of another text", "1"] in rows and ["rows", "16"] in rows
    rows = [cells(line) for line in tercet(*command, "--lonely", "skip").out.splitlines()]
    assert ["no row: no other text of its label", "1"] in rows and ["rows", "15"] in rows


def test_texts_of_a_test_are_left_out_before_rows_are_made(tercet, labelled, tmp_path):
    test = write(tmp_path / "test.jsonl", {"text": "JOY 0"}, {"text": "fear  1"})
    out = tmp_path / "rows.jsonl"
    command = ("convert", "labels", labelled, *HOW, "--test-data", test, "--out", out)
    ended = tercet(*command)
    assert "2 of 15 left out" in ended.err
    assert ["test.jsonl", "text", "exact", "2"] in [cells(line) for line in ended.out.splitlines()]
    texts = {t for e in iter_examples(out) for t in (e.query, *e.positives, *e.negatives)}
    assert len(texts) == 13 and not texts & {"joy 0", "fear 1"}


def test_scored_pairs_become_rows(tercet, pairs, tmp_path):
    out = tmp_path / "rows.jsonl"
    ended = tercet("convert", "scores", pairs, *HOW, "--out", out)
    rows = [cells(line) for line in ended.out.splitlines()]
    assert ["no row: score too low", "1"] in rows and ["rows", "2"] in rows
    assert [row.query for row in iter_examples(out)] == ["red cat sits", "red cat naps"]
    assert (
        "2 records gave no row"
        in tercet("convert", "scores", pairs, *HOW, "--out", out, "--scale", 0, 10).err
    )
    test = write(tmp_path / "test.jsonl", {"text": "blue CAT sits"})
    ended = tercet("convert", "scores", pairs, *HOW, "--out", out, "--test-data", test)
    assert "1 of 2 left out" in ended.err or ended.status == 2


def test_test_texts_are_taken_out_of_rows(tercet, tmp_path):
    rows = [{"query": f"q{n}", "positives": [f"p{n}"], "negatives": ["x", "y"]} for n in range(4)]
    file = write(tmp_path / "rows.jsonl", *rows)
    test = write(tmp_path / "test.jsonl", {"text": "Q1"}, {"text": "p2"})
    more = tmp_path / "more.txt"
    more.write_text("X\n")
    out = tmp_path / "clean.jsonl"
    ended = tercet("decontaminate", file, "--test-data", test, "--test-data", more, "--out", out)
    assert ended.status == 0
    assert [(row.query, row.negatives) for row in iter_examples(out)] == [
        ("q0", ("y",)),
        ("q3", ("y",)),
    ]
    assert [cells(line) for line in ended.out.splitlines()[1:]] == [
        ["more.txt", "negatives", "exact", "2"],
        ["test.jsonl", "positives", "exact", "1"],
        ["test.jsonl", "query", "exact", "1"],
    ]
    assert "2 of 4 left out" in ended.err


def test_when_nothing_is_left_nothing_is_written(tercet, tmp_path):
    file = write(tmp_path / "rows.jsonl", {"query": "q", "positives": ["p"]})
    out = tmp_path / "clean.jsonl"
    ended = tercet("decontaminate", file, "--test-data", file, "--out", out)
    assert ended.status == 2
    assert "is an input" not in ended.err and "nothing is left" in ended.err
    assert not out.exists()


def test_a_folder_is_cleaned_shard_by_shard_or_into_one_file(tercet, tmp_path):
    folder, test = tmp_path / "sources", write(tmp_path / "test.txt")
    test.write_text("q1\nq3\n")
    for name, numbers in (("news/lang=de/1", (0, 1)), ("news/2", (2,)), ("nq", (3,))):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, *({"query": f"q{i}", "positives": [f"p{i}"]} for i in numbers))
    ended = tercet("decontaminate", folder, "--test-data", test, "--out", tmp_path / "clean")
    assert ended.status == 0 and "2 of 4 left out" in ended.err
    assert f"{tmp_path}/clean/nq.jsonl: not written: no row is left" in ended.err
    found = sorted((tmp_path / "clean").rglob("*.jsonl"))
    assert found == [tmp_path / "clean/news" / name for name in ("2.jsonl", "lang=de/1.jsonl")]
    (row,) = iter_examples(found[1])
    assert (row.query, row.lang, row.task) == ("q0", "de", "news")
    out = tmp_path / "clean.parquet"
    assert tercet("decontaminate", folder, "--test-data", test, "--out", out).status == 0
    assert sorted(row.query for row in iter_examples(out)) == ["q0", "q2"]
    ended = tercet("decontaminate", folder, "--test-data", test, "--out", folder)
    assert ended.status == 2 and "is an input; give another --out" in ended.err


def test_an_input_is_never_overwritten(refused, labelled, pairs, tmp_path):
    other = write(tmp_path / "other.jsonl", {"text": "z"})
    for file, words in (
        (labelled, ("convert", "labels", labelled, *HOW, "--out", labelled)),
        (pairs, ("convert", "scores", pairs, *HOW, "--out", tmp_path / "x/../pairs.jsonl")),
        (other, ("decontaminate", labelled, "--test-data", other, "--out", other)),
    ):
        before = file.read_bytes()
        assert "is an input; give another --out" in refused(*words)
        assert file.read_bytes() == before


def test_another_kind_of_result_is_refused_before_anything_is_read(refused, tmp_path):
    out = tmp_path / "rows.csv"
    line = refused("convert", "labels", tmp_path / "none.jsonl", *HOW, "--out", out)
    assert line == f'{out}: unknown kind of file ".csv"; use .jsonl or .parquet'


def test_rows_of_flagembedding_become_ours_and_what_is_left_out_is_told(tercet, tmp_path):
    folder = tmp_path / "sts_no_in_batch_neg"
    folder.mkdir()
    more = {"type": "symmetric_sts", "batch_size": 8}
    records = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": ["n"], **more} for i in range(3)]
    write(folder / "a.jsonl", *records)
    out = tmp_path / "rows.jsonl"
    form = r"Instruct: {}\nQuery: {}"
    ended = tercet(
        *("convert", "flagembedding", folder, "--prompt", "Find it", "--prompt-format", form),
        *("--rows", 2, "--out", out),
    )
    assert ended.status == 0
    assert table(ended.out)["a"] == "2"
    assert 'left out: 2 values of "batch_size"' in ended.err
    assert ended.err.count("left out: 2 rows with half a batch") == 1
    prompt = "Instruct: Find it\nQuery: "
    assert {(e.query_prompt, e.document_prompt, e.in_batch) for e in iter_examples(out)} == {
        (prompt, prompt, "none")
    }


def test_a_place_without_rows_of_flagembedding_ends_with_2(tercet, tmp_path):
    ended = tercet("convert", "flagembedding", tmp_path, "--out", tmp_path / "rows.jsonl")
    assert ended.status == 2
    assert "has no .jsonl file" in ended.err
    assert not (tmp_path / "rows.jsonl").exists()


ROWS = [
    Example("play music", ("a player of music",), ("read mail", "a map"), task="rows"),
    Example("maps", ("a map", "make maps"), task="rows"),
    Example("mail", ("read mail",), ("make maps",), task="rows"),
]


def test_rows_go_to_tables_and_back(tercet, refused, tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_examples(rows, ROWS)
    tables, back = tmp_path / "tables", tmp_path / "back" / "rows.jsonl"
    ended = tercet("convert", "arctic", rows, "--out", tables)
    assert ended.status == 0 and ["3", "3", "0", "3"] in map(cells, ended.out.splitlines())
    work = ("--work", tmp_path / "work")
    mined = ("--mined", tables / "mined.parquet")
    assert tercet("convert", "arctic", tables, *mined, "--out", back, *work).status == 0
    assert list(iter_examples(back)) == ROWS
    words = ("convert", "arctic", rows, "--out", tmp_path)
    assert "is or contains the input" in refused(*words)
    (tables / "labels.parquet").unlink()
    said = refused("convert", "arctic", tables, "--out", tmp_path / "none.jsonl", *work)
    assert said == f"{tables}/labels.parquet: no such file"
    assert not (tmp_path / "none.jsonl").exists()

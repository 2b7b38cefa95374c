import numpy as np
import pytest

from tercet.nn.embedder import Embedder
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


def test_the_role_and_the_dims_of_encode_are_taken(tercet, encoder_folder, files, tmp_path):
    model, out = tmp_path / "prompted", tmp_path / "v.npy"
    Embedder.load(encoder_folder, prompts={"query": "read mail "}).save(model)
    flags = ["--role", "query", "--dims", "16"]
    assert tercet("encode", model, files / "texts.txt", "--out", out, *flags).status == 0
    expected = Embedder.load(model).encode(SENTENCES, "query", dims=16)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("output", ["tokens", "words"])
def test_encode_writes_vectors_of_parts_and_where_each_text_begins(
    tercet, decoder_folder, files, tmp_path, output
):
    out = tmp_path / "v.npz"
    flags = ["--output", output, "--dims", "16", "--attention", "bidirectional"]
    ended = tercet("encode", decoder_folder, files / "texts.txt", "--out", out, *flags)
    model = Embedder.load(decoder_folder, attention="bidirectional")
    expected = model.encode(SENTENCES, output=output, dims=16)
    with np.load(out) as found:
        offsets, vectors = found["offsets"], found["vectors"]
    assert ended.out == f"{out}: vectors of {offsets[-1]} {output} of 12 texts\n"
    assert np.diff(offsets).tolist() == [len(part) for part in expected]
    assert vectors.dtype == np.float32
    for start, part in zip(offsets, expected, strict=False):
        np.testing.assert_allclose(vectors[start : start + len(part)], part, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        (["--attention", "bidirectional"], {"attention": "bidirectional"}),
        (["--pooling", "weighted_mean"], {"pooling": "weighted_mean"}),
        (["--echo"], {"echo": True}),
    ],
)
def test_encode_reads_as_its_flags_say(tercet, decoder_folder, files, tmp_path, flags, how):
    out = tmp_path / "v.npy"
    assert tercet("encode", decoder_folder, files / "texts.txt", "--out", out, *flags).status == 0
    expected = Embedder.load(decoder_folder, **how).encode(SENTENCES)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)
    assert np.abs(expected - Embedder.load(decoder_folder).encode(SENTENCES)).max() > 1e-3


@pytest.mark.parametrize(("output", "wrong"), [("texts", ".npz"), ("words", ".npy")])
def test_a_file_named_for_another_kind_of_vectors_is_refused(
    refused, decoder_folder, files, tmp_path, output, wrong
):
    words = ["encode", decoder_folder, files / "texts.txt", "--output", output]
    said = refused(*words, "--out", tmp_path / f"v{wrong}")
    assert said.startswith(f"{tmp_path}/v{wrong}: vectors of {output} are a .np")
    assert list(tmp_path.iterdir()) == []


def test_an_index_cut_to_dims_is_searched_with_as_many(tercet, encoder_folder, files, tmp_path):
    words = ["--out", tmp_path / "index", "--dims", "16"]
    assert tercet("index", encoder_folder, files / "docs.jsonl", *words).status == 0
    ended = tercet("search", tmp_path / "index", SENTENCES[5])
    assert cells(ended.out.splitlines()[2])[:2] == ["1.000", "d5"]


def test_fields_of_other_names_are_indexed(tercet, encoder_folder, tmp_path):
    file = write(tmp_path / "faq.jsonl", {"key": 7, "body": "play music", "head": "Music"})
    fields = ["--text-field", "body", "--title-field", "head", "--id-field", "key"]
    out = ["--out", tmp_path / "index"]
    assert tercet("index", encoder_folder, file, *out, *fields).status == 0
    ended = tercet("search", tmp_path / "index", "play music")
    assert cells(ended.out.splitlines()[2]) == ["1.000", "7", "Music"]


def test_an_index_finds_its_model_from_another_folder(
    tercet, encoder_folder, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(encoder_folder.parent)
    words = [encoder_folder.name, files / "docs.jsonl", "--out", tmp_path / "index"]
    assert tercet("index", *words).status == 0
    monkeypatch.chdir(tmp_path)
    assert tercet("search", "index", "music").status == 0


def test_a_model_without_its_tokenizer_or_with_half_its_weights_is_refused(
    refused, encoder_folder, files, tmp_path
):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((encoder_folder / name).read_bytes())
    words = ["encode", tmp_path, files / "texts.txt", "--out", tmp_path / "v.npy"]
    assert f"{tmp_path}: has no tokenizer (tokenizer.json)" in refused(*words)
    for size in (100, 50_000):
        half = (encoder_folder / "model.safetensors").read_bytes()[:size]
        (tmp_path / "model.safetensors").write_bytes(half)
        assert f"{tmp_path}: cannot be loaded: " in refused(*words)


def test_a_folder_that_is_no_index_cannot_be_searched(refused, encoder_folder, files, tmp_path):
    assert refused("search", tmp_path / "lost", "q").endswith("build one with: tercet index")
    for other in (files / "folder", encoder_folder, files / "docs.jsonl"):
        assert refused("search", other, "q").startswith(f"{other}: is not an index")
        out = refused("index", encoder_folder, files / "docs.jsonl", "--out", encoder_folder)
        assert "is not an index and would be overwritten" in out


def test_an_index_whose_model_has_changed_or_is_gone_is_not_searched(
    refused, tercet, encoder_folder, files, tmp_path
):
    model, index = tmp_path / "model", tmp_path / "index"
    Embedder.load(encoder_folder).save(model)
    assert tercet("index", model, files / "docs.jsonl", "--out", index).status == 0
    Embedder.load(encoder_folder, pooling="first").save(model)
    assert f"{index}: was built with fingerprint" in refused("search", index, "music")
    model.rename(tmp_path / "moved")
    said = refused("search", index, "music")
    assert said.startswith(f"{index}: its model cannot be loaded: {model}: no such folder")


def test_an_index_made_elsewhere_that_does_not_name_its_model_is_refused(refused, tmp_path):
    from tercet.search.exact import ExactIndex

    vectors, documents = np.ones((1, 4), np.float32), [("a", "", "text")]
    ExactIndex.build(tmp_path / "index", vectors=vectors, documents=documents, settings={})
    assert "does not say with which model it was made" in refused("search", tmp_path / "index", "q")


@pytest.mark.parametrize("query", ["", " \n"])
def test_a_blank_query_is_refused(refused, files, query):
    assert refused("search", files / "index", "music", query) == (
        "a query is blank; say what to look for"
    )


def test_a_task_without_prompts_is_refused(refused, encoder_folder, files, tmp_path):
    words = [files / "texts.txt", "--out", tmp_path / "v.npy", "--task", "nq"]
    assert "has no prompt for the task 'nq'" in refused("encode", encoder_folder, *words)


def test_texts_are_printed_as_they_are_and_cannot_steer_the_terminal(
    tercet, encoder_folder, tmp_path
):
    file = write(
        tmp_path / "docs.jsonl",
        {"id": "[red]x[/red]", "title": "[/b] \x1b[31mred\x1b[0m :smile:", "text": "music"},
        {"id": "a\nb", "text": "[bold]web[/bold] server " * 20},
    )
    assert tercet("index", encoder_folder, file, "--out", tmp_path / "index").status == 0
    ended = tercet("search", tmp_path / "index", "[/x] \x1b[1mquery")
    lines = ended.out.splitlines()
    assert ended.status == 0 and "\x1b" not in ended.out
    assert lines[0] == "[/x] [1mquery"
    rows = {cells(line)[1]: cells(line)[2] for line in lines[2:]}
    assert rows["[red]x[/red]"] == "[/b] [31mred [0m :smile:"
    assert rows["a b"].startswith("[bold]web[/bold] server") and len(rows["a b"]) == 90


def test_a_table_has_a_line_for_each_row_however_wide(tercet, encoder_folder, tmp_path):
    records = [{"id": f"{i}" + "x" * 300, "title": "t " * 100, "text": "music"} for i in range(3)]
    file = write(tmp_path / "docs.jsonl", *records)
    assert tercet("index", encoder_folder, file, "--out", tmp_path / "index").status == 0
    ended = tercet("search", tmp_path / "index", "music")
    assert [len(cells(line)) for line in ended.out.splitlines()] == [1, 3, 3, 3, 3]
    assert {cells(line)[1] for line in ended.out.splitlines()[2:]} == {r["id"] for r in records}

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from tercet.files.arrays import read_vectors
from tercet.kinds import KINDS, Kind
from tercet.models.embedder import Embedder
from tercet.models.network.reader import Network
from tercet.search import export
from tests.cli.lines import write
from tests.toy import SENTENCES

EVERY_ROW = np.arange(len(SENTENCES))


@pytest.fixture(scope="module")
def model(tmp_path_factory, encoder_folder):
    """A model of three kinds of vectors."""
    folder = tmp_path_factory.mktemp("kinds") / "model"
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8).save(folder)
    return folder


def test_the_role_and_the_dims_of_encode_are_taken(tercet, encoder_folder, files, tmp_path):
    model, out = tmp_path / "prompted", tmp_path / "v.npy"
    Embedder.load(encoder_folder, prompts={"query": "read mail "}).save(model)
    flags = ["--role", "query", "--dims", "16"]
    assert tercet("encode", files / "texts.txt", "--model", model, "--out", out, *flags).status == 0
    expected = Embedder.load(model).encode(SENTENCES, "query", dims=16)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("output", ["tokens", "words"])
def test_encode_writes_vectors_of_parts_and_where_each_text_begins(
    tercet, decoder_folder, files, tmp_path, output
):
    out = tmp_path / "v.npz"
    flags = ["--per", output[:-1], "--dims", "16", "--attention", "bidirectional"]
    ended = tercet("encode", files / "texts.txt", "--model", decoder_folder, "--out", out, *flags)
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
    assert (
        tercet(
            "encode", files / "texts.txt", "--model", decoder_folder, "--out", out, *flags
        ).status
        == 0
    )
    expected = Embedder.load(decoder_folder, **how).encode(SENTENCES)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)
    assert np.abs(expected - Embedder.load(decoder_folder).encode(SENTENCES)).max() > 1e-3


@pytest.mark.parametrize(("output", "wrong"), [("texts", ".npz"), ("words", ".npy")])
def test_a_file_named_for_another_kind_of_vectors_is_refused(
    refused, decoder_folder, files, tmp_path, output, wrong
):
    words = ["encode", files / "texts.txt", "--model", decoder_folder, "--per", output[:-1]]
    said = refused(*words, "--out", tmp_path / f"v{wrong}")
    assert said.startswith(f"{tmp_path}/v{wrong}: vectors of {output} are a .np")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", ["sparse, dense", "multi", "dense, sparse, multi", "dense"])
def test_kinds_are_written_as_a_folder_of_arrays(tercet, model, files, tmp_path, named):
    out = tmp_path / "vectors"
    kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind in named)
    flags = [word for kind in named.split(", ") for word in ("--kind", kind)]
    ended = tercet("encode", files / "texts.txt", "--model", model, "--out", out, *flags)
    assert (ended.status, ended.out) == (0, f"{out}: 12 texts\n")
    assert {path.stem.partition("_")[0] for path in out.glob("*.npy")} == set(kinds)
    expected = Embedder.load(model).encode_vectors(SENTENCES, kinds=kinds)
    if "dense" in kinds:
        assert expected.dense is not None
        np.testing.assert_allclose(np.load(out / "dense.npy"), expected.dense, atol=1e-6)
    if "sparse" in kinds:
        found = read_vectors(out, EVERY_ROW, "sparse").sparse
        assert found is not None and expected.sparse is not None
        assert found.ids.tolist() == expected.sparse.ids.tolist()
        np.testing.assert_allclose(found.weights, expected.sparse.weights, atol=1e-6)
        assert f"sparse {8 * len(found.ids) / 12:,.0f}" in ended.err
    if "multi" in kinds:
        found = read_vectors(out, EVERY_ROW, "multi").multi
        assert found is not None and expected.multi is not None
        assert found.offsets.tolist() == expected.multi.offsets.tolist()
        np.testing.assert_allclose(found.vectors, expected.multi.vectors, atol=5e-4)
        assert np.load(out / "multi.npy", mmap_mode="r").dtype == np.float16


def test_dense_vectors_named_as_a_kind_may_be_one_file(tercet, model, files, tmp_path):
    words = ["encode", files / "texts.txt", "--model", model]
    assert tercet(*words, "--out", tmp_path / "a.npy", "--kind", "dense").status == 0
    assert tercet(*words, "--out", tmp_path / "b.npy").status == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_rows_for_an_engine_have_ids_texts_fields_and_vectors(tercet, model, tmp_path):
    records = [{"key": i, "body": text, "year": 2000 + i} for i, text in enumerate(SENTENCES)]
    file, out = write(tmp_path / "docs.jsonl", *records), tmp_path / "rows.jsonl"
    fields = ["--text-field", "body", "--id-field", "key"]
    ended = tercet("encode", file, "--model", model, "--out", out, "--format", "milvus", *fields)
    assert (ended.status, ended.out) == (0, f"{out}: 12 texts\n")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    expected = Embedder.load(model).encode_vectors(SENTENCES).dense
    assert expected is not None
    np.testing.assert_allclose([row["dense"] for row in rows], expected, atol=1e-6)
    assert [(row["id"], row["text"], row["year"]) for row in rows] == [
        (str(i), text, 2000 + i) for i, text in enumerate(SENTENCES)
    ]
    assert {frozenset(row) for row in rows} == {
        frozenset({"id", "title", "text", "year", "dense", "sparse"})
    }
    size = sum(len(json.dumps(row["dense"], separators=(",", ":"))) for row in rows) / 12
    assert f"bytes a text in there: dense {size:,.0f}, sparse " in ended.err


def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(refused, files, tmp_path):
    words = ["encode", files / "docs.jsonl", "--model", tmp_path / "lost", "--out"]
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "vectors"
    milvus = ["--format", "milvus"]
    assert refused(*words, tmp_path / "v.npy", *milvus).endswith(
        "v.npy: rows for milvus are lines of JSON; name it .jsonl"
    )
    assert refused(*words, rows, *milvus, "--kind", "dense", "--kind", "multi") == (
        "--kind multi: rows for milvus hold dense and sparse vectors only; leave it out"
    )
    assert refused(*words, rows, *milvus, "--per", "word").startswith("--per word: rows")
    for name in ("v.npy", "v.npz", "v.jsonl"):
        said = refused(*words, tmp_path / name, "--kind", "dense", "--kind", "sparse")
        assert f"{name}: vectors of some kinds are a folder of arrays; name it without" in said
    said = refused(*words, folder, "--kind", "sparse", "--per", "token")
    assert said == "--per token applies to dense vectors only; leave --kind out"
    assert "'terms' is not one of" in refused(*words, folder, "--kind", "terms")
    assert list(tmp_path.iterdir()) == []


def test_a_kind_that_the_model_lacks_and_a_folder_of_others_are_refused(
    refused, encoder_folder, files, tmp_path
):
    words = ["encode", files / "texts.txt", "--model", encoder_folder, "--kind", "sparse", "--out"]
    said = refused(*words, tmp_path / "vectors")
    assert said == "the model makes no sparse vectors; it makes dense"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear all")
    said = refused(*words, tmp_path / "mine")
    assert "mine: is not a folder of vectors and would be overwritten" in said
    assert (tmp_path / "mine/letter.txt").exists() and not (tmp_path / "vectors").exists()


def test_a_folder_with_an_array_of_somebody_s_is_left_as_it_is(
    tercet, refused, encoder_folder, files, tmp_path
):
    out = tmp_path / "mine"
    words = [
        "encode",
        files / "texts.txt",
        "--model",
        encoder_folder,
        "--kind",
        "dense",
        "--out",
        out,
    ]
    for _ in range(2):  # what was written here may be replaced
        assert tercet(*words).status == 0
    np.save(out / "labels.npy", np.arange(3))
    said = refused(*words)
    assert said == (
        f"{out}: holds labels.npy, which tercet did not write, and would be replaced as a whole; "
        "move it away, or choose another folder"
    )
    assert sorted(path.name for path in out.glob("*.npy")) == ["dense.npy", "labels.npy"]


@pytest.mark.parametrize("flags", [[], ["--kind", "dense"]])
def test_vectors_that_are_no_numbers_are_not_written(
    refused, model, files, tmp_path, monkeypatch, flags
):
    """Of the fifth text, which stands in the second window."""
    monkeypatch.setattr(export, "WINDOW_OF_TEXTS", 3)
    out = tmp_path / ("vectors" if flags else "v.npy")
    fifth = Embedder.load(model).tokenize(SENTENCES[4:5], "document").ids[0].tolist()
    states_of = Network.states

    def broken(network, texts):
        states = states_of(network, texts).clone()
        for start, end in pairwise(texts.offsets.tolist()):
            if texts.ids[start:end].tolist() == fifth:
                states[start:end] = float("nan")
        return states

    monkeypatch.setattr(Network, "states", broken)
    said = refused("encode", files / "texts.txt", "--model", model, "--out", out, *flags)
    assert re.match(
        rf"the vector of text \d, '{SENTENCES[4]}', holds NaN or infinity; the model", said
    )
    assert list(tmp_path.iterdir()) == []


def test_a_field_that_a_row_has_already_or_that_is_no_json_is_refused(refused, model, tmp_path):
    out = ["--out", tmp_path / "rows.jsonl", "--format", "vespa"]
    clash = write(tmp_path / "a.jsonl", {"id": "a", "text": "music", "dense": "very"})
    said = refused("encode", clash, "--model", model, *out)
    assert 'has a field "dense", as its row has; give the field another name' in said
    (tmp_path / "b.jsonl").write_text('{"id": "b", "text": "music", "size": NaN}\n')
    assert "a field of the document 'b' cannot be written: " in refused(
        "encode", tmp_path / "b.jsonl", "--model", model, *out
    )
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_folder_of_files_becomes_a_folder_of_vectors(tercet, encoder_folder, files, tmp_path):
    folder, out = tmp_path / "texts", tmp_path / "vectors"
    folder.mkdir()
    (folder / "a.txt").write_text((files / "texts.txt").read_text())
    flags = ["--out", out, "--runner", "loop", "--part", "5"]
    ended = tercet("encode", folder, "--model", encoder_folder, *flags)
    assert (ended.status, ended.out) == (0, f"{out}: 12 texts\n")
    found = np.concatenate([np.load(out / f"a-0000{part}.npy") for part in range(3)])
    np.testing.assert_allclose(found, Embedder.load(encoder_folder).encode(SENTENCES), atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "v.npy"], "v.npy: several files or parts become a folder of vectors; name one"),
        (["--out", "v", "--format", "milvus"], "--format milvus takes one file and one process"),
        (["--out", "v", "--per", "word"], "--per word takes one file and one process"),
        (["--out", "v", "--runner", "ray"], "--runner ray needs --address"),
    ],
)
def test_what_parts_are_not_for_is_refused(refused, encoder_folder, files, flags, said):
    words = ["encode", files / "texts.txt", "--model", encoder_folder, "--part", "5"]
    assert refused(*words, *flags).startswith(said)


@pytest.mark.parametrize("flag", ["title", "id"])
@pytest.mark.parametrize("more", [[], ["--part", "5"]])
def test_fields_that_only_rows_have_are_refused_elsewhere(
    refused, encoder_folder, files, tmp_path, flag, more
):
    words = ["encode", files / "texts.txt", "--model", encoder_folder, "--out", tmp_path / "v.npy"]
    said = refused(*words, f"--{flag}-field", "other", *more)
    assert said == f"--{flag}-field needs --format, whose rows have it; leave it out"

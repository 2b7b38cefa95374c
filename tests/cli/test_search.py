import json
import re
import shutil

import pytest

from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.rank.quantized import Ranges
from tercet.rank.scoring import scores_of
from tests.cli.lines import cells, write
from tests.rank.formulas import weighted_scores
from tests.toy import SENTENCES


def test_an_index_cut_to_dims_is_searched_with_as_many(tercet, encoder_folder, files, tmp_path):
    words = ["--out", tmp_path / "index", "--dims", "16"]
    assert tercet("index", files / "docs.jsonl", "--model", encoder_folder, *words).status == 0
    ended = tercet("search", tmp_path / "index", SENTENCES[5])
    assert cells(ended.out.splitlines()[2])[:2] == ["1.000", "d5"]


def test_what_dense_vectors_or_other_kinds_are_needed_for_is_refused(
    tercet, refused, hybrid, tmp_path
):
    out = tmp_path / "index"
    words = ["index", hybrid / "docs.jsonl", "--model", hybrid / "model", "--out", out]
    said = refused(*words, "--kind", "sparse", "--dims", "8")
    assert said == "dims is 8, and no dense vectors are kept; leave it out"
    assert tercet(*words, "--kind", "dense").status == 0
    said = refused("search", out, "music", "--kind-weight", "sparse=5")
    assert said == f"--kind-weight sparse: {out} has no sparse vectors; leave it out"


def test_an_unfinished_index_says_so_when_verified(tercet, encoder_folder, files, tmp_path):
    out = tmp_path / "index"
    words = ["index", files / "texts.txt", "--model", encoder_folder, "--out", out]
    assert tercet(*words).status == 0
    about = json.loads((out / "index.json").read_text())
    assert tercet("index", "--verify", "--out", out).err == ""
    (out / "index.json").write_text(json.dumps({**about, "complete": False}))
    said = "it is not complete: tercet index was stopped; run the same command again\n"
    assert tercet("index", "--verify", "--out", out).err == said
    ended = tercet(*words, "--fresh")  # nothing is kept aside of what is incomplete
    assert ended.status == 0 and "stays until" not in ended.err
    ended = tercet(*words, "--fresh")
    assert ended.status == 0 and f"{out} stays until the new index is whole" in ended.err


def test_fields_of_other_names_are_indexed(tercet, encoder_folder, tmp_path):
    file = write(tmp_path / "faq.jsonl", {"key": 7, "body": "play music", "head": "Music"})
    fields = ["--text-field", "body", "--title-field", "head", "--id-field", "key"]
    out = ["--out", tmp_path / "index"]
    assert tercet("index", file, "--model", encoder_folder, *out, *fields).status == 0
    ended = tercet("search", tmp_path / "index", "play music")
    assert cells(ended.out.splitlines()[2]) == ["1.000", "7", "Music"]


def test_an_index_finds_its_model_from_another_folder(
    tercet, encoder_folder, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(encoder_folder.parent)
    words = [files / "docs.jsonl", "--model", encoder_folder.name, "--out", tmp_path / "index"]
    assert tercet("index", *words).status == 0
    monkeypatch.chdir(tmp_path)
    assert tercet("search", "index", "music").status == 0


def test_a_model_without_its_tokenizer_or_with_half_its_weights_is_refused(
    refused, encoder_folder, files, tmp_path
):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((encoder_folder / name).read_bytes())
    words = ["encode", files / "texts.txt", "--model", tmp_path, "--out", tmp_path / "v.npy"]
    assert f"{tmp_path}: has no tokenizer (tokenizer.json)" in refused(*words)
    for size in (100, 50_000):
        half = (encoder_folder / "model.safetensors").read_bytes()[:size]
        (tmp_path / "model.safetensors").write_bytes(half)
        assert f"{tmp_path}: cannot be loaded: " in refused(*words)


def test_a_folder_that_is_no_index_cannot_be_searched(refused, encoder_folder, files, tmp_path):
    assert refused("search", tmp_path / "lost", "q").endswith("build one with: tercet index")
    for other in (files / "folder", encoder_folder, files / "docs.jsonl"):
        assert refused("search", other, "q").startswith(f"{other}: is not an index")
        out = refused(
            "index", files / "docs.jsonl", "--model", encoder_folder, "--out", encoder_folder
        )
        assert out == f"{encoder_folder}: is an input; give another --out"


def test_an_index_whose_model_has_changed_or_is_gone_is_not_searched(
    refused, tercet, encoder_folder, files, tmp_path
):
    model, index = tmp_path / "model", tmp_path / "index"
    Embedder.load(encoder_folder).save(model)
    assert tercet("index", files / "docs.jsonl", "--model", model, "--out", index).status == 0
    Embedder.load(encoder_folder, pooling="first").save(model)
    assert f"{index}: was built with fingerprint" in refused("search", index, "music")
    model.rename(tmp_path / "moved")
    said = refused("search", index, "music")
    assert said.startswith(f"{index}: its model cannot be loaded: {model}: no such folder")


@pytest.mark.parametrize("query", ["", " \n"])
def test_a_blank_query_is_refused(refused, files, query):
    assert refused("search", files / "index", "music", query) == (
        "a query is blank; say what to look for"
    )


def test_a_task_without_prompts_is_refused(refused, encoder_folder, files, tmp_path):
    words = [files / "texts.txt", "--out", tmp_path / "v.npy", "--task", "nq"]
    assert "has no prompt for the task 'nq'" in refused("encode", "--model", encoder_folder, *words)


def test_texts_are_printed_as_they_are_and_cannot_steer_the_terminal(
    tercet, encoder_folder, tmp_path
):
    file = write(
        tmp_path / "docs.jsonl",
        {"id": "[red]x[/red]", "title": "[/b] \x1b[31mred\x1b[0m :smile:", "text": "music"},
        {"id": "a\nb", "text": "[bold]web[/bold] server " * 20},
    )
    assert tercet("index", file, "--model", encoder_folder, "--out", tmp_path / "index").status == 0
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
    assert tercet("index", file, "--model", encoder_folder, "--out", tmp_path / "index").status == 0
    ended = tercet("search", tmp_path / "index", "music")
    assert [len(cells(line)) for line in ended.out.splitlines()] == [1, 3, 3, 3, 3]
    assert {cells(line)[1] for line in ended.out.splitlines()[2:]} == {r["id"] for r in records}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory, encoder_folder):
    """A model of three kinds of vectors, with weights tuned for it, and documents."""
    folder = tmp_path_factory.mktemp("hybrid")
    tuned = {"": Weights(0.5, 0.25, 2.0)}
    Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8, weights=tuned).save(folder / "model")
    records = [
        {"id": f"d{i}", "text": text, "section": ("web", "sound")[i % 2], "year": 2000 + i}
        for i, text in enumerate(SENTENCES)
    ]
    write(folder / "docs.jsonl", *records)
    return folder


@pytest.fixture
def indexed(tercet, hybrid, tmp_path):
    out = tmp_path / "index"
    ended = tercet("index", hybrid / "docs.jsonl", "--model", hybrid / "model", "--out", out)
    assert (ended.status, ended.out) == (0, f"{out}: 12 documents\n")
    assert re.match(
        r"12 documents; their vectors will take about .* [KM]?B: "
        r"dense 3.07 KB, sparse \S+ (bytes|KB), multi \S+ KB\n",
        ended.err,
    )
    return out


def rows(ended):
    assert ended.status == 0, ended.err
    return [cells(line) for line in ended.out.splitlines()[2:]]


def test_a_hybrid_index_shows_the_score_and_its_parts(tercet, hybrid, indexed):
    ended = tercet(
        "search",
        indexed,
        SENTENCES[4],
        "--kind-weight",
        "dense=1",
        "--kind-weight",
        "sparse=0.3",
        "--kind-weight",
        "multi=1",
        "-k",
        "3",
    )
    assert cells(ended.out.splitlines()[1]) == [
        *("score", "dense", "sparse", "multi"),
        *("id", "title"),
    ]
    embedder = Embedder.load(hybrid / "model")
    docs = embedder.encode_vectors(SENTENCES)
    query = embedder.encode_vectors([SENTENCES[4]], "query")
    sums = weighted_scores(query, docs, Weights(1.0, 0.3, 1.0))[0]
    best = sums.argsort(descending=True)[:3].tolist()
    found = rows(ended)
    assert [row[4] for row in found] == [f"d{i}" for i in best]
    for row, doc in zip(found, best, strict=True):
        assert float(row[0]) == pytest.approx(float(sums[doc]), abs=2e-3)
        for shown, kind in zip(row[1:4], KINDS, strict=True):
            true = float(scores_of(kind, query, docs)[0, doc])
            assert float(shown) == pytest.approx(true, abs=2e-3)


def test_without_weights_the_model_s_tuned_ones_rank(tercet, indexed):
    tuned = rows(
        tercet(
            "search",
            indexed,
            "music",
            "--kind-weight",
            "dense=0.5",
            "--kind-weight",
            "sparse=0.25",
            "--kind-weight",
            "multi=2",
        )
    )
    assert rows(tercet("search", indexed, "music")) == tuned
    assert (
        rows(
            tercet(
                "search",
                indexed,
                "music",
                "--kind-weight",
                "dense=1",
                "--kind-weight",
                "sparse=0.3",
                "--kind-weight",
                "multi=1",
            )
        )
        != tuned
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--fusion", "rrf"],
        [
            "--fusion",
            "rrf",
            "--kind-weight",
            "dense=1",
            "--kind-weight",
            "sparse=1",
            "--kind-weight",
            "multi=1",
        ],
        ["--fusion", "rerank", "--candidates", "5"],
        ["--candidates", "0"],
        [
            "--candidates",
            "3",
            "--kind-weight",
            "dense=0",
            "--kind-weight",
            "sparse=0",
            "--kind-weight",
            "multi=1",
        ],
    ],
)
def test_every_fusion_finds_a_text_by_itself(tercet, indexed, flags):
    found = rows(tercet("search", indexed, SENTENCES[7], *flags))
    assert "d7" in [row[-2] for row in found]
    shown = {"rrf": 2 if "--kind-weight" not in flags else 3}.get(flags[1], 3)
    assert sum(part != "-" for part in found[0][1:4]) == (1 if "dense=0" in flags else shown)


def test_a_filter_keeps_what_has_the_values(tercet, indexed):
    def found(*conditions):
        words = [word for condition in conditions for word in ("--where", condition)]
        return {row[-2] for row in rows(tercet("search", indexed, "music", "-k", "20", *words))}

    assert found("section=web") == {f"d{i}" for i in range(0, 12, 2)}
    assert found("year=2003", "year=2004") == {"d3", "d4"}
    assert found("section=web", "year=2003") == set()
    assert len(found("section=web", "section=sound")) == 12


def test_a_value_that_no_document_has_is_told(tercet, indexed):
    ended = tercet("search", indexed, "music", "--where", "section=wbe")
    assert ended.status == 0 and rows(ended) == []
    assert ended.err == (
        "tercet: note: --where section=wbe: no document has this value; there are: web\n"
    )
    ended = tercet("search", indexed, "music", "--where", "year=2003", "--where", "year=1")
    assert len(rows(ended)) == 1
    assert "--where year=1: no document has this value; there are: 2000, 2001" in ended.err
    ended = tercet("search", indexed, "music", "--where", "section=web", "--where", "year=2003")
    assert rows(ended) == [] and ended.err == ""


def test_a_field_that_no_document_has_is_told(tercet, indexed):
    ended = tercet("search", indexed, "music", "--where", "sort=web", "--where", "year=2003")
    assert ended.status == 0 and rows(ended) == []
    assert ended.err == (
        "tercet: note: --where sort: no document has this field; there are: section, year\n"
    )


def test_a_query_that_is_no_unicode_is_refused_wherever_it_stands(refused, files):
    said = refused("search", files / "index", "music", "caf\udce9")
    assert said == ("query must be valid UTF-8; got 'caf\\udce9', wrong at position 3")


def test_a_field_asked_for_in_bytes_that_are_no_unicode_finds_nothing(tercet, indexed):
    ended = tercet("search", indexed, "music", "--where", "section=w\udce9b")
    assert ended.status == 0 and rows(ended) == []
    assert "--where section=w\\udce9b: no document has this value" in ended.err


def test_an_index_whose_documents_are_gone_is_refused(refused, hybrid, tercet, tmp_path):
    out = tmp_path / "index"
    assert (
        tercet("index", hybrid / "docs.jsonl", "--model", hybrid / "model", "--out", out).status
        == 0
    )
    for path in (out / "exact").glob("segment-*"):
        shutil.rmtree(path)
    manifest = out / "exact/manifest.json"
    about = json.loads(manifest.read_text()) | {"segments": [], "checksums": {}}
    del about["checksum"]
    manifest.write_text(json.dumps(about))
    said = refused("search", out, "music")
    assert said == f"{out}: its documents are gone; build it again with: tercet index --fresh"


@pytest.fixture
def server(monkeypatch):
    """The client's local mode, in the place of a server."""
    pytest.importorskip("qdrant_client")
    from qdrant_client import QdrantClient

    from tercet.search.qdrant import server as qdrant_cluster

    local = QdrantClient(":memory:")
    with monkeypatch.context() as patched:
        patched.setattr(local, "close", lambda: None)
        patched.setattr(qdrant_cluster, "QdrantClient", lambda **_: local)
        yield local
    local.close()


def test_a_second_call_leaves_a_collection_with_what_the_file_holds_too(
    tercet, hybrid, tmp_path, server
):
    lines = (hybrid / "docs.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "docs.jsonl"
    words = [
        "index",
        file,
        "--model",
        hybrid / "model",
        "--out",
        tmp_path / "index",
        "--engine",
        "qdrant",
    ]
    words += ["--url", "http://localhost:6333", "--kind", "dense", "--kind", "sparse"]
    for flags, kept, held in (
        ([], 12, 12),
        (["--keep-missing"], 9, 12),
        ([], 9, 9),
        (["--fresh"], 4, 4),
    ):
        file.write_text("".join(lines[:kept]))
        ended = tercet(*words, *flags)
        assert (ended.status, ended.out) == (0, f"{tmp_path / 'index'}: {held} documents\n")
        assert ("3 documents that" in ended.err) == ("--keep-missing" in flags)
        assert server.count("tercet").count == held
    assert len(rows(tercet("search", tmp_path / "index", "music", "-k", "20"))) == 4


def test_a_collection_of_another_index_is_neither_filled_nor_emptied(
    tercet, refused, hybrid, tmp_path, server
):
    words = ["index", hybrid / "docs.jsonl", "--model", hybrid / "model", "--engine", "qdrant"]
    words += ["--url", "http://localhost:6333", "--kind", "dense"]
    assert tercet(*words, "--out", tmp_path / "first").status == 0
    for flags in ([], ["--fresh"]):
        said = refused(*words, "--out", tmp_path / "second", *flags)
        assert "collection tercet: another index made this collection" in said
        assert server.count("tercet").count == 12
        assert not (tmp_path / "second").exists()
    assert tercet(*words, "--out", tmp_path / "second", "--collection", "more").status == 0
    first, second = tmp_path / "first/index.json", tmp_path / "second/index.json"
    second.write_text(first.read_text().replace('"mark": "', '"mark": "0'))
    assert "another index made" in refused("search", tmp_path / "second", "music")


@pytest.mark.parametrize("flags", [["--collection", "more"], ["--url", "http://other:6333"], []])
def test_a_collection_that_is_left_behind_is_named(tercet, hybrid, tmp_path, server, flags):
    out = tmp_path / "index"
    words = [
        "index",
        hybrid / "docs.jsonl",
        "--model",
        hybrid / "model",
        "--out",
        out,
        "--kind",
        "dense",
    ]
    there = ["--engine", "qdrant", "--url", "http://localhost:6333", "--collection", "old"]
    note = (
        f"tercet: note: {out}: its collection old stays on the server http://localhost:6333; "
        "it may be deleted there\n"
    )
    for _ in range(2):
        assert note not in tercet(*words, *there, "--fresh").err
    if "--url" in flags:  # one client stands for all servers
        server.delete_collection("old")
    ended = tercet(*words, "--fresh", *([*there, *flags] if flags else []))
    assert (ended.status, ended.err.count(note)) == (0, 1)
    assert server.collection_exists("old")


def test_an_index_of_some_kinds_is_searched_by_these(tercet, hybrid, tmp_path):
    words = [
        "index",
        hybrid / "docs.jsonl",
        "--model",
        hybrid / "model",
        "--out",
        tmp_path / "index",
    ]
    assert tercet(*words, "--kind", "sparse", "--kind", "dense").status == 0
    ended = tercet("search", tmp_path / "index", "music")
    assert cells(ended.out.splitlines()[1])[:3] == ["score", "dense", "sparse"]


def test_a_second_call_encodes_what_is_new_and_removes_what_is_gone(
    tercet, hybrid, indexed, tmp_path, monkeypatch
):
    lines = (hybrid / "docs.jsonl").read_text().splitlines(keepends=True)
    shorter = tmp_path / "docs.jsonl"
    shorter.write_text("".join(lines[:10]) + '{"id": "new", "text": "a new text"}\n')
    words = ["index", shorter, "--model", hybrid / "model", "--out", indexed]
    ended = tercet(*words, "--keep-missing")
    assert ended.out == f"{indexed}: 13 documents\n"
    assert f"1 encoded, 10 unchanged, 0 removed because {shorter} lacks them" in ended.err
    assert f"2 documents that {shorter} lacks were kept; to remove them, omit " in ended.err
    ended = tercet(*words)
    assert ended.out == f"{indexed}: 11 documents\n"
    assert f"0 encoded, 11 unchanged, 2 removed because {shorter} lacks them" in ended.err


def test_an_index_of_another_model_is_replaced_on_request_only(
    tercet, refused, encoder_folder, hybrid, indexed
):
    words = ["index", hybrid / "docs.jsonl", "--model", encoder_folder, "--out", indexed]
    assert f"{indexed}: was built with model" in (said := tercet(*words).err)
    assert "--fresh" in said
    assert tercet(*words, "--fresh").out == f"{indexed}: 12 documents\n"
    assert cells(tercet("search", indexed, "music").out.splitlines()[1])[:2] == ["score", "id"]


def test_an_index_that_is_not_complete_says_so(tercet, indexed):
    about = indexed / "index.json"
    about.write_text(about.read_text().replace('"complete": true', '"complete": false'))
    ended = tercet("search", indexed, "music")
    assert ended.status == 0
    assert ended.err == (
        f"tercet: note: {indexed}: some documents are missing; call tercet index again\n"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kind-weight", "1"], "--kind-weight is '1'; write NAME=NUMBER, as in sparse=0.3"),
        (["--kind-weight", "sparse=-1"], "the weight of sparse must be 0 or more; got -1"),
        (["--kind-weight", "dense=nan"], "the weight of dense must be 0 or more; got nan"),
        (
            ["--kind-weight", "dense=0", "--kind-weight", "sparse=0", "--kind-weight", "multi=0"],
            "all kinds have the weight 0; give one of them a number above 0",
        ),
        (["--where", "web"], "--where web: write a field and its value"),
        (["--where", "=web"], "--where =web: write a field and its value"),
        (["--fusion", "rrf", "--candidates", "0"], "candidates must be 1 or more with rrf; got 0"),
    ],
)
def test_what_cannot_be_searched_for_is_said(refused, indexed, flags, said):
    assert refused("search", indexed, "music", *flags).startswith(said)


def test_what_cannot_be_indexed_is_said(refused, encoder_folder, files, tmp_path):
    words = ["index", files / "docs.jsonl", "--model", encoder_folder, "--out", tmp_path / "index"]
    said = refused(*words, "--kind", "dense", "--kind", "sparse")
    assert said == "kinds must be among dense, which the model makes; got dense, sparse"
    assert refused(*words, "--url", "http://localhost:1").startswith("url needs the engine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "bytes_each"), [("int8", 16), ("int4", 8), ("binary", 2), ("binary+int8", 18)]
)
def test_an_index_keeps_vectors_in_codes_and_is_searched_by_them(
    tercet, encoder_folder, files, tmp_path, precision, bytes_each
):
    index = tmp_path / "index"
    words = [
        "index",
        files / "docs.jsonl",
        "--model",
        encoder_folder,
        "--out",
        index,
        "--dims",
        "16",
    ]
    first = tercet(*words, "--store-as", precision)
    assert first.status == 0
    said = f"dense vectors: 16 coordinates in {precision}, {bytes_each} bytes each, "
    assert said in " ".join(first.err.split())
    assert "documents, and kept with the index" in " ".join(first.err.split())
    again = tercet(*words, "--store-as", precision)
    assert again.status == 0 and "learned" not in again.err
    ended = tercet("search", index, SENTENCES[5])
    assert ended.status == 0
    score, name = cells(ended.out.splitlines()[2])[:2]
    assert name == "d5" or precision == "binary"
    assert float(score) == pytest.approx(1, abs={"int8": 0.02, "int4": 0.1}.get(precision, 0.3))


def test_codes_are_those_of_the_ranges_that_the_model_keeps(
    tercet, files, tmp_path, encoder_folder
):
    model = tmp_path / "model"
    Embedder.load(encoder_folder).save(model)
    calibrated = tercet(
        "tune", "codes", files / "docs.jsonl", "--model", model, "--dims", "16", "--save"
    )
    assert calibrated.status == 0
    index = tmp_path / "index"
    words = ["--out", index, "--dims", "16", "--store-as", "int4"]
    ended = tercet("index", files / "docs.jsonl", "--model", model, *words)
    assert "codes: by the ranges that the model keeps for 16 coordinates" in ended.err
    kept = json.loads((index / "exact/manifest.json").read_text())["ranges"]
    assert Ranges.read(kept) == Embedder.load(model).settings.ranges[16]


def test_an_index_of_other_codes_or_dims_is_not_added_to(
    tercet, refused, encoder_folder, files, tmp_path
):
    words = ["index", files / "docs.jsonl", "--model", encoder_folder, "--out", tmp_path / "index"]
    assert tercet(*words, "--dims", "16", "--store-as", "int4").status == 0
    for flags, said in (
        (("--dims", "16", "--store-as", "int8"), "built with precision 'int4', not 'int8'"),
        (("--dims", "16"), "built with precision 'int4', not 'float32'"),
        (("--dims", "8", "--store-as", "int4"), "built with dims 16, not 8"),
    ):
        told = refused(*words, *flags)
        assert said in told and "build it again with: tercet index --fresh" in told
    assert tercet(*words, "--store-as", "int8", "--fresh").status == 0
    assert tercet("search", tmp_path / "index", SENTENCES[5]).status == 0


def test_documents_that_teach_no_codes_replace_no_index(
    tercet, refused, encoder_folder, files, tmp_path
):
    words = ["--out", tmp_path / "index", "--store-as", "int4"]
    assert tercet("index", files / "docs.jsonl", "--model", encoder_folder, *words).status == 0
    one = write(tmp_path / "one.jsonl", {"id": "a", "text": "music"})
    told = refused("index", one, "--model", encoder_folder, *words, "--fresh")
    assert "codes cannot be learned from 1 vectors that do not differ" in told
    assert tercet("search", tmp_path / "index", SENTENCES[5]).status == 0


def test_codes_of_what_has_none_are_refused(refused, hybrid, files, tmp_path):
    words = [
        "index",
        files / "docs.jsonl",
        "--model",
        hybrid / "model",
        "--out",
        tmp_path / "index",
    ]
    told = refused(*words, "--kind", "sparse", "--store-as", "int8")
    assert "precision int8 needs dense vectors; got the kinds sparse" in told
    told = refused(*words, "--engine", "qdrant", "--store-as", "binary+int8")
    assert "take binary in place of binary+int8, or the exact engine" in told
    assert not (tmp_path / "index").exists()


def test_verify_checks_an_index_without_a_model_and_names_a_damaged_file(tercet, refused, indexed):
    ended = tercet("index", "--verify", "--out", indexed)
    assert ended.status == 0
    assert ended.out == f"{indexed}: 12 documents, as they were written\n"
    before = {path: path.stat().st_mtime_ns for path in indexed.rglob("*")}
    path = next((indexed / "exact").glob("segment-*")) / "records.parquet"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    said = refused("index", "--verify", "--out", indexed)
    name = path.relative_to(indexed / "exact")
    assert said == (
        f"{indexed}/exact: the index is damaged ({name} is not as it was written); build it again "
        "with: tercet index --fresh"
    )
    assert {path: path.stat().st_mtime_ns for path in indexed.rglob("*")}.keys() == before.keys()


def test_verify_says_when_an_index_has_no_checksums(tercet, indexed):
    path = indexed / "exact/manifest.json"
    about = json.loads(path.read_text())
    del about["checksum"], about["checksums"]
    path.write_text(json.dumps(about))
    ended = tercet("index", "--verify", "--out", indexed)
    assert ended.status == 0
    assert ended.out == (f"{indexed}: 12 documents, readable; there are no checksums of them\n")


def test_an_index_needs_a_model_and_documents_or_verify(refused, indexed, tmp_path):
    assert refused("index", "--out", tmp_path / "new") == (
        "tercet index needs a FILE of documents; or --verify, which checks the index in --out"
    )
    assert refused("index", "--model", "minilm", "--verify", "--out", indexed) == (
        "--verify checks the index in --out; leave out FILE and --model"
    )
    said = refused("index", "--verify", "--out", tmp_path)
    assert said == f"{tmp_path}: is not an index; build one with: tercet index"

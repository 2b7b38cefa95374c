import gc
import json
import re
import struct
import sys
import weakref

import numpy as np
import pytest

from tercet.errors import DataError, MissingExtraError, RecipeError, StorageError
from tercet.evaluate.insight.diagnose import (
    Diagnosis,
    Material,
    diagnose,
    diagnosis_section,
    prefix_table,
    write_diagnosis,
)
from tercet.evaluate.insight.lookahead import DirectionMap, PrefixResult, PrefixTriple
from tercet.evaluate.report.figures import drawing
from tercet.evaluate.report.page import Page, write_page
from tercet.models.embedder import Embedder

TRIPLES = (
    PrefixTriple("read mail in a", " terminal", " panel", " photograph"),
    PrefixTriple("keep passwords", " in a file", " in a map", " from the moon"),
)
MATERIAL = Material(
    TRIPLES, ("a small web server", "maps of rivers"), {"triples": "a", "texts": "b"}
)
FILES = ["diagnosis.json", "direction_map.png", "prefix_sensitivity.png", "report.html"]


def prefixes(*gaps, skipped=0):
    negative = np.linspace(0.4, 0.6, len(gaps))
    return PrefixResult(negative + np.array(gaps), negative, skipped)


def direction(*tokens, layers=4, seed=0):
    cosines = np.random.default_rng(seed).random((layers, len(tokens)))
    return DirectionMap(tokens, cosines)


@pytest.fixture(scope="module")
def found():
    return {
        "base": Diagnosis(
            {"causal": prefixes(0, 0, 0), "bidirectional": prefixes(0.1, 0.2, -0.06)},
            (direction("a", "small", "server"), direction("maps", "of", seed=1)),
        ),
        "+ MNTP": Diagnosis(
            {"bidirectional": prefixes(0.2, 0.3, skipped=1)},
            (direction("a", "small", "server", seed=2), direction("maps", "of", seed=3)),
        ),
    }


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    """What is written of it."""
    folder = tmp_path_factory.mktemp("diagnosis")
    write_diagnosis(folder, found, MATERIAL, seed=3)
    return folder


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_a_decoder_is_read_in_all_ways_and_later_ones_and_encoders_both_ways(
    decoder_folder, encoder_folder, tmp_path
):
    folders = {"encoder": encoder_folder, "first": decoder_folder, "second": decoder_folder}
    models = ((name, Embedder.load(folder)) for name, folder in folders.items())
    found = diagnose(models, tmp_path / "out", material=MATERIAL, seed=5)
    assert {name: list(each.prefixes) for name, each in found.items()} == {
        "encoder": ["bidirectional"],
        "first": ["causal", "echo", "bidirectional"],
        "second": ["bidirectional"],
    }
    assert {name: len(each.maps) for name, each in found.items()} == {
        "encoder": 0,
        "first": 2,
        "second": 2,
    }
    first = found["first"].prefixes
    np.testing.assert_allclose(first["causal"].positive, 1, atol=1e-5)
    assert first["echo"].positive.max() < 0.9999 > first["bidirectional"].positive.max()
    np.testing.assert_array_equal(
        first["bidirectional"].gap, found["second"].prefixes["bidirectional"].gap
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == FILES
    record = json.loads((tmp_path / "out/diagnosis.json").read_text(encoding="utf-8"))
    assert record["models"]["encoder"]["direction_map"] is None
    assert record["texts"] == {"from": "b", "texts": list(MATERIAL.texts)}
    assert record["triples"] == {"from": "a", "count": 2}
    assert record["seed"] == 5


def test_one_model_at_a_time_is_in_memory(decoder_folder, tmp_path):
    earlier = []

    def models():
        for name in ("first", "second"):
            gc.collect()
            assert not [each for each in earlier if each() is not None]
            embedder = Embedder.load(decoder_folder)
            earlier.append(weakref.ref(embedder))
            yield name, embedder
            del embedder

    assert list(diagnose(models(), tmp_path, material=MATERIAL)) == ["first", "second"]


def test_the_record_holds_all_numbers(found, folder):
    record = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
    base = record["models"]["base"]
    both_ways = base["prefix_sensitivity"]["bidirectional"]
    assert both_ways["positive"] == pytest.approx([0.5, 0.7, 0.54])
    assert both_ways["negative"] == pytest.approx([0.4, 0.5, 0.6])
    assert both_ways["gap"]["mean"] == pytest.approx(0.08)
    assert both_ways["gap"]["low"] < 0.08 < both_ways["gap"]["high"]
    assert both_ways["accuracy"] == pytest.approx(2 / 3)
    mntp = record["models"]["+ MNTP"]["prefix_sensitivity"]["bidirectional"]
    assert (mntp["triples"], mntp["skipped"]) == (2, 1)
    first, second = found["base"].maps
    assert base["direction_map"]["maps"][1]["tokens"] == ["maps", "of"]
    np.testing.assert_allclose(
        base["direction_map"]["maps"][0]["cosines"], first.cosines, atol=1e-6
    )
    for layer, mean in enumerate(base["direction_map"]["layer_means"]):  # five tokens in all
        expected = (first.cosines[layer].sum() + second.cosines[layer].sum()) / 5
        assert mean == pytest.approx(expected, abs=1e-6)


def test_the_page_shows_each_model_and_way_beside_the_others(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in (
        "<h1>Diagnosis of base, + MNTP</h1>",
        '<th scope="row">base causal</th>',
        '<th scope="row">base bidirectional</th>',
        '<th scope="row">+ MNTP bidirectional</th>',
        "over layers 1 to 3",
        ">server<",
    ):
        assert part in page
    assert page.count("<figure>") == 2
    assert page.count("data:image/png;base64,") == 3  # two maps and the scale
    assert set(re.findall(r'(?:src|href)="([^#"]{5})', page)) == {"data:"}
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names))


def test_the_lowest_layer_is_told_with_its_number(found):
    cosines = np.array([[1.0, 1.0], [0.9, 0.7], [0.1, 0.3], [0.5, 0.5]])
    one = {"base": Diagnosis(found["base"].prefixes, (DirectionMap(("a", "b"), cosines),))}
    # layers 1 to 3: means 0.8, 0.2 and 0.5
    with drawing():
        first = diagnosis_section(one).parts[0]
    assert first == (
        "<p>base: its causal and bidirectional states have a mean cosine of 0.500 over layers "
        "1 to 3; the lowest is 0.200, in layer 2, and the last is 0.500.</p>"
    )


def test_the_same_numbers_give_the_same_bytes_and_a_picture_grows_with_the_models(
    found, folder, tmp_path
):
    write_diagnosis(tmp_path, {"base": found["base"]}, MATERIAL)
    two, one = (png_size(where / "direction_map.png") for where in (folder, tmp_path))
    assert two[0] == one[0] == 1440 and two[1] > one[1] * 1.5
    assert png_size(folder / "prefix_sensitivity.png")[0] == 1440
    write_diagnosis(tmp_path, found, MATERIAL, seed=3)  # our own report may be replaced
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_encoders_alone_have_no_map_to_draw(found, tmp_path):
    only = {"encoder": Diagnosis({"bidirectional": prefixes(0.1, 0.2)}, ())}
    write_diagnosis(tmp_path, only, MATERIAL)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [FILES[0], *FILES[2:]]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<figure>") == 1


def test_signs_that_the_font_lacks_and_naughty_names_are_drawn(found, tmp_path):
    maps = (direction("한국어", "$x$", "<b>", "\u202e", "a_1"),)
    one = Diagnosis(found["base"].prefixes, maps)
    naughty = {"<script>&$": one, "the same": one}
    write_diagnosis(tmp_path, naughty, MATERIAL)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "한국어" in page and "$x$" in page
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names))  # of equal pictures too


def test_long_texts_are_drawn_without_labels_and_lightly(found, tmp_path):
    maps = (direction(*(f"token{i}" for i in range(256)), layers=81),)
    write_diagnosis(tmp_path, {"big": Diagnosis(found["base"].prefixes, maps)}, MATERIAL)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "token7" not in page and len(page) < 300_000


def test_a_table_has_a_row_for_each_way_of_reading(found):
    table = prefix_table(found, seed=9)
    assert list(table) == ["base causal", "base bidirectional", "+ MNTP bidirectional"]
    assert table["base bidirectional"]["gap"].mean == pytest.approx(0.08)
    assert table["base bidirectional"]["gap"].seed == 9


def test_a_section_can_stand_in_the_report_of_a_run(found, tmp_path):
    with drawing():
        page = Page("A run", ["It ran."], [diagnosis_section(found)])
    write_page(tmp_path / "report.html", page)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("It ran.") < page.index("<h2>The effect of the words that follow</h2>")


def test_the_report_of_another_run_is_not_overwritten(found, tmp_path, decoder_folder):
    (tmp_path / "report.html").write_text("a day's work")
    asked = []

    def models():
        asked.append(1)
        yield "base", Embedder.load(decoder_folder)

    with pytest.raises(RecipeError, match="is not a diagnosis and would be overwritten"):
        diagnose(models(), tmp_path, material=MATERIAL)
    with pytest.raises(RecipeError, match="choose another folder"):
        write_diagnosis(tmp_path, found, MATERIAL)
    assert not asked
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_package_shows_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[plot\]'"):
        diagnose((pytest.fail("loaded") for _ in range(1)), tmp_path / "out", material=MATERIAL)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told(found, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(StorageError):
        write_diagnosis(tmp_path / "file", found, MATERIAL)


def test_material_is_our_own_or_a_users(tmp_path):
    own = Material.read()
    assert (len(own.triples), len(own.texts)) == (40, 3)
    (tmp_path / "t.jsonl").write_text(
        '{"prefix": "A", "query": " b", "positive": " c", "negative": " d"}\n'
    )
    (tmp_path / "x.txt").write_text("".join(f"text {i}\n\n" for i in range(7)))
    given = Material.read(tmp_path / "t.jsonl", tmp_path / "x.txt")
    assert given.triples == [PrefixTriple("A", " b", " c", " d")]
    assert given.texts == [f"text {i}" for i in range(5)]
    assert given.origin == {
        "triples": str(tmp_path / "t.jsonl"),
        "texts": str(tmp_path / "x.txt"),
    }


def test_material_that_cannot_be_read_is_told_with_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r'x.jsonl:2: "text" must be a text'):
        Material.read(text=tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r'x.jsonl:1: "prefix" is missing'):
        Material.read(triples=tmp_path / "x.jsonl")

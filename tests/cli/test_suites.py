import json
import math

import pytest

from tercet.evaluate.report.intervals import paired_difference
from tercet.evaluate.sets.location import sets_in
from tercet.evaluate.suites.averages import averages, cells_of, language_bias
from tercet.evaluate.suites.by_language import measure_sets
from tercet.models.embedder import Embedder
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Sets in German, French and Korean, from Korean to English, and in all of them."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [{"query": text.split()[-1], "positives": [text]} for text in SENTENCES]
    for lang, some in (("de", rows[:4]), ("fr", rows[4:8]), ("ko", rows[:6])):
        write(folder / f"{lang}.jsonl", *some)
    for name in ("ko-en", "mixed"):
        (folder / name).mkdir()
        known = [(i, text, ("de", "fr", "ko")[i % 3]) for i, text in enumerate(SENTENCES)]
        langs = {} if name == "ko-en" else {i: {"lang": lang} for i, _, lang in known}
        write(
            folder / name / "corpus.jsonl",
            *({"_id": f"d{i}", "text": text} | langs.get(i, {}) for i, text, _ in known),
        )
        write(
            folder / name / "queries.jsonl",
            *(
                {"_id": f"q{i}", "text": t[:9]} | langs.get(i + 1, langs.get(0, {}))
                for i, t, _ in known
            ),
        )
        write(
            folder / name / "qrels.jsonl",
            *({"qid": f"q{i}", "docid": f"d{i}", "score": 1} for i, *_ in known),
        )
    return folder


@pytest.fixture(scope="module")
def other_folder(encoder_folder, tmp_path_factory):
    """A second model: the first with fewer layers."""
    folder = tmp_path_factory.mktemp("other") / "model"
    Embedder.load(encoder_folder, keep_layers=1).save(folder)
    return folder


@pytest.fixture(scope="module")
def expected(suite, encoder_folder, other_folder):
    """What the two models are worth, set by set."""
    return [
        {each.name: each for each in measure_sets(Embedder.load(model), sets_in(suite))}
        for model in (encoder_folder, other_folder)
    ]


def test_every_set_is_measured_and_averages_never_cross_an_axis(
    tercet, suite, encoder_folder, other_folder, expected, tmp_path
):
    file, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    ended = tercet(
        *("eval", encoder_folder, suite, "--against", other_folder, "--seen", "de, fr"),
        *("--seed", 3, "--json", file, "--plot", plot),
    )
    assert ended.status == 0, ended.err
    lines = [cells(line) for line in ended.out.splitlines()]
    one, two = expected
    for name, each in one.items():
        (row,) = [line for line in lines if line[:2] == [name, each.axis]]
        gain = paired_difference(each.scores["ndcg@10"], two[name].scores["ndcg@10"], seed=3)
        assert f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in row
        assert row[2:4] == [each.languages, str(len(each.langs))]
    alone = [each for each in one.values() if each.axis == "monolingual"]
    ours = averages(cells_of(alone, lambda it: it.scores["ndcg@10"], seed=3), seen=["de", "fr"])
    for row, figure, lang in ours.rows():
        (line,) = [
            line for line in lines if line[0] == f"monolingual: {row}" and "+" not in line[1]
        ]
        assert line[1] == f"{figure} {lang}".strip()
    assert plot.read_bytes().startswith(b"\x89PNG")
    record = json.loads(file.read_text())
    assert set(record["averages"]) == {"monolingual", "cross-lingual", "mixed"}
    figures = record["averages"]["monolingual"]["figures"][str(encoder_folder)]
    assert figures["unseen"]["mean"] == pytest.approx(figures["languages"]["ko"]["mean"])
    assert figures["over_families"]["mean"] == pytest.approx(ours.over_families.mean)


def test_the_record_says_under_which_conditions_each_figure_was_measured(
    tercet, suite, encoder_folder, expected, tmp_path
):
    file = tmp_path / "figures.json"
    how = ("--dims", 8, "--precision", "int8", "--query-tokens", 7, "--json", file)
    assert tercet("eval", encoder_folder, suite, *how).status == 0
    record = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    model = record["models"][str(encoder_folder)]
    assert (model["dims"], model["stored"], model["query_tokens"]) == (8, "int8", 7)
    assert model["prompts"] == {} and model["weights"] == "float32"
    assert {"torch", "transformers", "bm25s"} <= set(record["versions"]) and record["seed"] == 0
    assert set(record["sets"]) == set(expected[0])
    of_mixed = record["sets"]["mixed"]["results"]
    assert set(of_mixed) == {str(encoder_folder), "BM25", "BM25 of 3 letters"}
    assert set(of_mixed["BM25"]["languages"]) == {"de", "fr", "ko"}


def test_language_bias_is_shown_for_every_system_and_for_each_language_of_the_first(
    tercet, suite, encoder_folder, expected
):
    ended = tercet("eval", encoder_folder, suite)
    rows = [cells(line) for line in ended.out.splitlines()]
    shown = {(row[0], row[2]): row[3:] for row in rows if row[1:2] == ["mixed"] and len(row) > 6}
    assert set(shown) >= {
        *((str(encoder_folder), lang) for lang in ("all", "de", "fr", "ko")),
        ("BM25", "all"),
    }
    found = language_bias(expected[0]["mixed"], "ndcg@10")
    assert found is not None and not math.isnan(found.bias.mean)
    bias = f"{found.bias.mean:+.3f} [{found.bias.low:+.3f}, {found.bias.high:+.3f}]"
    last = shown[str(encoder_folder), "all"]
    assert last[-3:] == [f"{found.same:.3f}", f"{found.chance:.3f}", bias]


def test_a_set_whose_language_nothing_tells_is_said_to_be_in_no_average(
    tercet, encoder_folder, tmp_path
):
    write(tmp_path / "lost.jsonl", {"query": "maps", "positives": [SENTENCES[3]]})
    ended = tercet("eval", encoder_folder, tmp_path, "--no-bm25")
    assert "lost: of unknown language, so left out of all averages" in ended.err
    assert [cells(line)[:2] for line in ended.out.splitlines()[1:]] == [["lost", "unknown"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kinds", "dense"), "--kinds does not apply to a folder of sets; remove it"),
        (("--per-label", "3"), "--per-label does not apply to a folder of sets; remove it"),
    ],
)
def test_what_says_nothing_of_a_folder_of_sets_is_refused(
    refused, encoder_folder, suite, words, said
):
    assert refused("eval", encoder_folder, suite, *words) == said


def test_what_says_nothing_of_a_single_set_is_refused(refused, encoder_folder, suite, tmp_path):
    said = refused("eval", encoder_folder, suite / "de.jsonl", "--seen", "de")
    assert said == "--seen does not apply to a single set; remove it"
    said = refused("eval", encoder_folder)
    assert said == "give either data to measure on, or --mteb with a task"


def test_a_folder_of_one_set_is_measured_as_before(tercet, encoder_folder, suite):
    ended = tercet("eval", encoder_folder, suite / "ko-en", "--no-bm25")
    assert ended.out.splitlines()[0] == "12 queries, 12 documents"

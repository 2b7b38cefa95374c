import numpy as np
import pytest

from tercet.evaluate.report.intervals import Interval, interval
from tercet.evaluate.suites.averages import averages, by_axis, cells_of, differences, language_bias
from tercet.evaluate.suites.by_language import Axis, SetScores


def cell(mean):
    return Interval(mean, mean - 0.1, mean + 0.1, 50)


def scores(name, langs, values, *, axis: Axis = "monolingual", group="", same=None):
    count = len(langs)
    return SetScores(
        name,
        group,
        axis,
        "",
        10,
        tuple(langs),
        {"ndcg@10": np.array(values, dtype=np.float64)},
        np.full(count, 0.5) if same is None else np.array(same, dtype=np.float64),
        np.full(count, 0.25),
        np.array([lang == "de" for lang in langs], dtype=bool),
    )


def ndcg(each):
    return each.scores["ndcg@10"]


def test_a_family_is_one_voice_and_so_is_a_language():
    """By hand: de has two sets; Germanic de and en, Romance fr, and ko on its own."""
    rows = [("de", 0.2), ("de", 0.4), ("en", 0.5), ("fr", 0.8), ("ko", 0.6)]
    found = averages((lang, cell(mean)) for lang, mean in rows)
    means = {lang: each.mean for lang, each in found.languages.items()}
    assert means == pytest.approx({"de": 0.3, "en": 0.5, "fr": 0.8, "ko": 0.6})
    families = {family: each.mean for family, each in found.families.items()}
    assert families == pytest.approx({"Germanic": 0.4, "Romance": 0.8, "Koreanic and Japonic": 0.6})
    assert found.over_languages.mean == pytest.approx((0.3 + 0.5 + 0.8 + 0.6) / 4)
    assert found.over_families.mean == pytest.approx((0.4 + 0.8 + 0.6) / 3)
    assert found.worst == "de" and found.seen is None and found.unseen is None
    assert [name for name, *_ in found.rows()][:3] == [
        "mean of languages",
        "mean of families",
        "worst language",
    ]


def test_a_figure_alone_keeps_its_interval():
    alone = Interval(0.9, 0.7, 1.0, 5)  # not symmetric
    found = averages([("de", alone)])
    assert {found.languages["de"], found.families["Germanic"], found.over_languages} == {alone}


def test_languages_seen_in_training_stand_apart_whatever_their_country():
    rows = [("pt_BR", 0.2), ("en", 0.4), ("zh_CN", 0.9)]
    found = averages([(lang, cell(mean)) for lang, mean in rows], seen=["pt", "en", "xx"])
    assert found.seen is not None and found.seen.mean == pytest.approx(0.3)
    assert found.unseen is not None and found.unseen.mean == pytest.approx(0.9)
    nothing = averages([("en", cell(0.4))], seen=["en"])
    assert nothing.unseen is None and nothing.seen is not None


def test_axes_and_groups_are_kept_apart_and_untold_sets_left_out():
    sets = [
        scores("ko-en", ["ko"], [0.1], axis="cross-lingual"),
        scores("de", ["de"], [0.2]),
        scores("clef/de", ["de"], [0.3], group="clef"),
        scores("lost", [""], [0.4], axis="unknown"),
        scores("mixed", ["de", "en"], [0.5, 0.6], axis="mixed"),
    ]
    found = {place: [each.name for each in some] for place, some in by_axis(sets).items()}
    assert found == {
        ("", "monolingual"): ["de"],
        ("", "cross-lingual"): ["ko-en"],
        ("", "mixed"): ["mixed"],
        ("clef", "monolingual"): ["clef/de"],
    }
    assert list(found)[:2] == [("", "monolingual"), ("", "cross-lingual")]


def test_a_language_of_a_set_has_the_interval_of_its_queries():
    values = np.random.default_rng(0).random(40)
    each = scores("mixed", ["de"] * 30 + ["en"] * 10, values)
    found = dict(cells_of([each], ndcg, seed=3))
    assert found == {"de": interval(values[:30], seed=3), "en": interval(values[30:], seed=3)}


def test_a_difference_is_paired_query_by_query_by_the_name_of_the_set():
    after = [scores("a", ["de", "de"], [0.5, 0.9]), scores("b", ["en"], [0.4])]
    before = [scores("b", ["en"], [0.6]), scores("a", ["de", "de"], [0.1, 0.5])]
    found = dict(differences(after, before, "ndcg@10"))
    assert found["de"].mean == pytest.approx(0.4)
    assert found["de"].low == pytest.approx(0.4) and found["de"].high == pytest.approx(0.4)
    assert found["en"].mean == pytest.approx(-0.2)


def test_bias_leaves_out_queries_that_found_nothing_and_parts_answers_by_language():
    each = scores("mixed", ["de", "de", "fr"], [1, 0, 0.5], same=[1.0, np.nan, 0.0])
    found = language_bias(each, "ndcg@10")
    assert found is not None
    assert (found.same, found.chance) == (0.5, 0.25)
    assert found.bias.mean == pytest.approx(0.25) and found.bias.queries == 2
    assert (found.figure.mean, found.own.mean, found.other.mean) == (0.5, 0.5, 0.5)
    assert found.own.queries == 2 and found.other.queries == 1
    german = language_bias(each, "ndcg@10", lang="de")
    assert german is not None and german.bias.mean == pytest.approx(0.75)
    assert language_bias(each, "ndcg@10", lang="ja") is None

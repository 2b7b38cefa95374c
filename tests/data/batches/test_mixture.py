from dataclasses import replace

import pytest

from tercet.data.batches.mixture import batches_of, by_language, shares_of, weighed
from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.errors import RecipeError
from tests.data.batches.test_sampler import batches_of as drawn
from tests.data.batches.test_sampler import source_of


def of_language(task, lang, rows, **more):
    return replace(source_of(f"{task}/{lang}", [5] * rows, **more), task=task, lang=lang)


NEWS = [of_language("news", "de", 30), of_language("news", "en", 10)]
NQ = source_of("nq", [5] * 20, weight=0.5)


def weights_of(weights, counts=()):
    return {it.name: it.weight for it in weighed([*NEWS, NQ], weights, dict(counts))}


def test_a_source_that_is_not_named_keeps_its_weight():
    assert weights_of({}) == {"news/de": 1, "news/en": 1, "nq": 0.5}


def test_a_name_holds_for_all_languages_and_one_with_a_language_goes_before_it():
    assert weights_of({"news": 2, "news/en": 3, "nq": 1}) == {"news/de": 2, "news/en": 3, "nq": 1}
    assert weights_of({"news/en": 3, "news": 2}) == {"news/de": 2, "news/en": 3, "nq": 0.5}


def test_a_count_is_that_of_the_examples_an_epoch_shared_in_proportion():
    assert weights_of({}, {"nq": 30}) == {"news/de": 1, "news/en": 1, "nq": 1.5}
    found = weighed([*NEWS, NQ], {"nq": 0}, {"news": 8})
    assert [len(it) * it.weight for it in found] == [6, 2]
    batches = drawn(Sampler(found, BatchPlan(batch_size=2, seed=0, epochs=5)))
    assert len(batches) == 5 * 4


def test_weight_zero_leaves_a_source_out():
    assert list(weights_of({"news": 0, "news/en": 1})) == ["news/en", "nq"]


@pytest.mark.parametrize(
    ("weights", "counts", "problem"),
    [
        ({"news/fr": 2}, {}, "there is no source 'news/fr'; the sources are news, news/de, news/e"),
        ({"nq": 1}, {"nq": 5}, "source 'nq' has a weight and a count; give only one of them"),
        ({"nq": float("nan")}, {}, "the weight or count of 'nq' must be 0 or more, got nan"),
        ({}, {"nq": -1}, "the weight or count of 'nq' must be 0 or more, got -1"),
    ],
)
def test_names_and_numbers_that_cannot_be_are_refused(weights, counts, problem):
    with pytest.raises(RecipeError) as caught:
        weights_of(weights, counts)
    assert str(caught.value).startswith(problem)


def test_the_shares_of_a_mixture_add_up_and_follow_the_weights():
    shares = shares_of([*NEWS, NQ], 8)
    assert [each.examples for each in shares] == [30, 10, 10]
    assert [each.share for each in shares] == pytest.approx([0.6, 0.2, 0.2])
    assert [each.batches for each in shares] == [4, 2, 2]
    assert [each.batches for each in shares_of([NQ], 8, single=False)] == [None]
    assert list(by_language(shares)) == ["de", "en", ""]


@pytest.mark.parametrize("rows", [3, 17, 32, 33])
@pytest.mark.parametrize("weight", [1, 2, 1.5, 0.75])
def test_batches_are_counted_as_the_sampler_draws_them(rows, weight):
    sampler = Sampler([source_of("a", [5] * rows, weight=weight)], BatchPlan(batch_size=8, seed=0))
    assert batches_of(rows, weight, 8) == len(drawn(sampler))

"""What the vectors of single words know: a linear probe on a frozen encoder (arXiv 2404.05961).

A linear classifier learns to tell the label of a word from its vector alone; how well it does on
other sentences says what the vector holds. Two baselines know nothing of the context: the most
frequent label of all, and that of the word itself. What a probe gains over the second one comes
from the words around.

The paper trains a linear layer with dropout by gradient steps; here it is a regularised logistic
regression on standardised vectors, which has one solution and no learning rate.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float32, Float64

from tercet.data.files.conll import UNLABELLED, LabelledSentence
from tercet.errors import RecipeError
from tercet.evaluate.measures.probe import mean_f1, regression, vector_probe
from tercet.evaluate.report.intervals import Interval, pooled_interval
from tercet.models.embedder import Embedder

ACCURACY: Final = "accuracy"  # over labelled words; "micro precision" in the paper
MACRO_F1: Final = "macro F1"  # each label counts the same
ENTITY_F1: Final = "entity F1"  # of whole spans, where the labels are B-, I- and O

_NEEDS: Final = "the word probe"

_BIO = re.compile(r"O|[BI]-.+")

Predicted: TypeAlias = tuple[tuple[str, ...], ...]
EntitySpan: TypeAlias = tuple[str, int, int]  # kind, first word, and the word after the last
# Of each sentence and label: words (or spans) told right, there in truth, told at all.
Tallies: TypeAlias = Float64[np.ndarray, "sentences labels 3"]


@dataclass(frozen=True, slots=True)
class WordResult:
    """What a probe, or a baseline, told of the words of a test set."""

    name: str
    scores: Mapping[str, Interval]  # by metric; the intervals are over sentences
    predicted: Predicted  # fewer than words where the model cut the sentence
    cut: int  # labelled test words that the model cut, and that no score counts
    train_cut: int = 0  # labelled words that it did not learn from, for the same reason


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """A model to compare, loaded when its turn comes, so that one at a time is in memory."""

    name: str
    load: Callable[[], Embedder]
    predictor: bool = False  # a word's vector is taken one token earlier, as MNTP learns it


@dataclass(frozen=True, slots=True)
class WordComparison:
    """The baselines and each model on the same words, and what each gains over the first model."""

    results: tuple[WordResult, ...]
    differences: Mapping[str, Mapping[str, Interval]]  # by name, then by metric

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """A table: the header, then a row a model. The last column counts words that were cut."""
        metrics = tuple(self.results[0].scores)
        header = ("model", *(part for name in metrics for part in (name, "minus first")), "cut")
        return (header, *(self._row(result, metrics) for result in self.results))

    def _row(self, result: WordResult, metrics: Sequence[str]) -> tuple[str, ...]:
        gained = self.differences.get(result.name, {})
        cells: list[str] = []
        for metric in metrics:
            each = gained.get(metric)
            told = f"{each.mean:+.3f} [{each.low:+.3f}, {each.high:+.3f}]" if each else "-"
            cells += [str(result.scores[metric]), told]
        return (result.name, *cells, str(result.cut))


def word_probe(
    embedder: Embedder,
    train: Sequence[LabelledSentence],
    test: Sequence[LabelledSentence],
    *,
    predictor: bool = False,
    seed: int = 0,
    name: str = "probe",
) -> WordResult:
    """Learn the labels of the training words from their vectors, and tell those of the test words.

    The encoder stays as it is and reads each sentence once. Words past its longest text have no
    vector: the result counts them, and the encoder says it in the log. The seed decides the
    intervals only; the probe has nothing random.

    Raises:
        RecipeError: when no labelled word is left, or the training words have one label only.
        MissingExtraError: when scikit-learn is not installed.
    """
    regression(_NEEDS)  # a missing package is told before the encoder works for minutes
    train_vectors = embedder.encode_words([it.words for it in train], predictor=predictor)
    classify = linear_probe(train, train_vectors)
    test_vectors = embedder.encode_words([it.words for it in test], predictor=predictor)
    predicted = tuple(tuple(classify(vectors)) for vectors in test_vectors)
    train_cut = sum(_cut(it, len(rows)) for it, rows in zip(train, train_vectors, strict=True))
    return score_words(name, test, predicted, train_cut=train_cut, seed=seed)


def compare_words(
    stages: Sequence[ProbedModel],
    train: Sequence[LabelledSentence],
    test: Sequence[LabelledSentence],
    *,
    seed: int = 0,
) -> WordComparison:
    """Probe each model in turn; differences are to the first one, on the words both have read.

    Raises:
        RecipeError: see :func:`word_probe`; also when two models have the same name.
        MissingExtraError: when scikit-learn is not installed.
    """
    baselines = word_baselines(train, test, seed=seed)
    names = [*(it.name for it in baselines), *(it.name for it in stages)]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice or not stages:
        problem = f"two rows would be called {twice[0]!r}" if twice else "there is no model"
        raise RecipeError(f"{problem}; give one or more models, each its own name")
    probed = [
        word_probe(it.load(), train, test, predictor=it.predictor, seed=seed, name=it.name)
        for it in stages
    ]
    results = (*baselines, *probed)
    first = probed[0]
    differences = {
        it.name: word_differences(it, first, test, seed=seed) for it in results if it is not first
    }
    return WordComparison(results, differences)


def word_baselines(
    train: Sequence[LabelledSentence], test: Sequence[LabelledSentence], *, seed: int = 0
) -> tuple[WordResult, WordResult]:
    """What is reached without a model: the most frequent label, and that of the word itself.

    A word that the training sentences lack gets the most frequent label of all. Of equally
    frequent labels, the one seen first is taken.
    """
    overall: Counter[str] = Counter()
    of_word: dict[str, Counter[str]] = {}
    for word, label in _labelled(train):
        overall[label] += 1
        of_word.setdefault(word, Counter())[label] += 1
    if not overall:
        raise RecipeError("the training sentences hold no labelled word; label some")
    usual = overall.most_common(1)[0][0]
    best = {word: labels.most_common(1)[0][0] for word, labels in of_word.items()}
    majority = tuple((usual,) * len(it.words) for it in test)
    lexicon = tuple(tuple(best.get(word, usual) for word in it.words) for it in test)
    return (
        score_words("most frequent label", test, majority, seed=seed),
        score_words("label of the word", test, lexicon, seed=seed),
    )


def linear_probe(
    sentences: Sequence[LabelledSentence], vectors: Sequence[Float32[np.ndarray, "_ hidden"]]
) -> Callable[[Float32[np.ndarray, "words hidden"]], list[str]]:
    """A function from vectors to labels, learned from the labelled words of these sentences.

    Raises:
        RecipeError: when no labelled word is left, or there is one label only.
    """
    model = regression(_NEEDS, vectors[0].shape[1] if vectors else 1)
    labels = np.array(
        [
            label
            for it, rows in zip(sentences, vectors, strict=True)
            for label in it.labels[: len(rows)]
        ]
    )
    counted = labels != UNLABELLED
    known = np.unique(labels[counted])
    if len(known) < 2:
        held = f"have one label only, {str(known[0])!r}" if len(known) else "hold no labelled word"
        raise RecipeError(f"the training sentences {held}; a probe needs two labels to tell apart")
    features = np.concatenate(vectors)[counted].astype(np.float32, copy=False)
    tell = vector_probe(model, features, labels[counted])
    return lambda words: [str(it) for it in tell(words)]


def score_words(
    name: str,
    test: Sequence[LabelledSentence],
    predicted: Predicted,
    *,
    train_cut: int = 0,
    seed: int = 0,
) -> WordResult:
    """Accuracy, macro F1 and, for labels that begin with B-, I- or are O, F1 of whole entities.

    Macro F1 is over the labels that occur in the test words. A label that was not predicted, or
    not learned, counts as any other mistake.

    Raises:
        RecipeError: when there is no labelled word to score.
    """
    read = [len(labels) for labels in predicted]
    tallies = _tallies(test, predicted, read)
    if not tallies[ACCURACY].sum():
        raise RecipeError("the test sentences hold no labelled word that the model reads")
    return WordResult(
        name=name,
        scores={metric: _interval((each,), seed) for metric, each in tallies.items()},
        predicted=predicted,
        cut=sum(map(_cut, test, read)),
        train_cut=train_cut,
    )


def word_differences(
    after: WordResult, before: WordResult, test: Sequence[LabelledSentence], *, seed: int = 0
) -> dict[str, Interval]:
    """How much better ``after`` is, metric by metric, on the words that both have read.

    Both are scored on the same draws of sentences, so what makes a sentence hard for both drops
    out, and the interval is far narrower than the distance of two.
    """
    read = [min(len(a), len(b)) for a, b in zip(after.predicted, before.predicted, strict=True)]
    first, second = (_tallies(test, each.predicted, read) for each in (after, before))
    return {metric: _interval((first[metric], second[metric]), seed) for metric in first}


def entities(labels: Sequence[str]) -> set[EntitySpan]:
    """The spans that B-, I- and O labels mark; an unlabelled word is O.

    As conlleval reads them: I- goes on with a span of its kind, and begins one where there is
    none. So both writings, with B- at each beginning or only between neighbours, are read.
    """
    found: set[EntitySpan] = set()
    kind, start = "", 0
    for place, label in enumerate((*labels, "O")):
        prefix, _, of = label.partition("-")
        if kind and (prefix != "I" or of != kind):
            found.add((kind, start, place))
            kind = ""
        if not kind and prefix in ("B", "I"):
            kind, start = of, place
    return found


def _tallies(
    test: Sequence[LabelledSentence], predicted: Predicted, read: Sequence[int]
) -> dict[str, Tallies]:
    """For each metric, what its F1 is made of; only the first ``read`` words count."""
    labels = sorted({label for _, label in _labelled(test)})
    row_of = {label: row for row, label in enumerate(labels)}
    total = np.zeros((len(test), 1, 3))
    each = np.zeros((len(test), len(labels), 3))
    spans = np.zeros((len(test), 1, 3))
    for place, (sentence, told, words) in enumerate(zip(test, predicted, read, strict=True)):
        pairs = [
            (gold, guess if gold != UNLABELLED else UNLABELLED)
            for gold, guess in zip(sentence.labels[:words], told[:words], strict=True)
        ]
        for gold, guess in pairs:
            if gold != UNLABELLED:
                total[place, 0] += (gold == guess, 1, 1)
                each[place, row_of[gold]] += (gold == guess, 1, 0)
                if guess in row_of:
                    each[place, row_of[guess], 2] += 1
        right, guessed = (entities([pair[side] for pair in pairs]) for side in (0, 1))
        spans[place, 0] = len(right & guessed), len(right), len(guessed)
    found = {ACCURACY: total, MACRO_F1: each}
    marks_entities = labels != ["O"] and all(_BIO.fullmatch(label) for label in labels)
    return {**found, ENTITY_F1: spans} if marks_entities else found


def _interval(tallies: Sequence[Tallies], seed: int) -> Interval:
    """Of one system, or of what the first of two has more than the second."""
    counts = np.stack(tallies, axis=1)  # [sentences, systems, labels, 3]

    def statistic(sums: Float64[np.ndarray, "draws counts"]) -> Float64[np.ndarray, "draws"]:
        figures = mean_f1(sums.reshape(-1, *counts.shape[1:]))
        return figures[:, 0] - figures[:, 1:].sum(axis=1)

    return pooled_interval(counts.reshape(len(counts), -1), statistic, seed=seed)


def _labelled(sentences: Sequence[LabelledSentence]) -> Iterator[tuple[str, str]]:
    for sentence in sentences:
        for word, label in zip(sentence.words, sentence.labels, strict=True):
            if label != UNLABELLED:
                yield word, label


def _cut(sentence: LabelledSentence, read: int) -> int:
    """How many labelled words lie past the ones that the model has read."""
    return sum(label != UNLABELLED for label in sentence.labels[read:])

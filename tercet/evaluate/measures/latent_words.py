"""What the vectors of single words know: a linear probe on a frozen encoder.

LLM2Vec, arXiv 2404.05961, section 3.1. A linear classifier learns to predict the label of a word
from its vector alone, and is scored on other sentences. Two baselines ignore the context: the most
frequent label of all, and that of the word itself. What a probe gains over the second one comes
from the surrounding words. The paper trains a linear layer with dropout by gradient steps; here it
is a regularised logistic regression on standardised vectors, which has a unique solution.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float32, Float64

from tercet.data.files.conll import UNLABELLED, LabelledSentence
from tercet.errors import RecipeError
from tercet.evaluate.measures.probe import mean_f1, regression, vector_probe
from tercet.evaluate.report.intervals import Interval, pooled_interval
from tercet.models.embedder import Embedder

ACCURACY: Final = "accuracy"  # over labelled words; "micro precision" in the paper
MACRO_F1: Final = "macro F1"  # each label has equal weight
ENTITY_F1: Final = "entity F1"  # of whole spans, if the labels are B-, I- and O

_NEEDS: Final = "the word probe"

_BIO = re.compile(r"O|[BI]-.+")

Predicted: TypeAlias = tuple[tuple[str, ...], ...]
EntitySpan: TypeAlias = tuple[str, int, int]  # kind, first word, and the word after the last
# For each sentence and label: words (or spans) predicted correctly, in truth, and predicted.
Tallies: TypeAlias = Float64[np.ndarray, "sentences labels 3"]


@dataclass(frozen=True, slots=True)
class WordResult:
    """The labels that a probe, or a baseline, predicted for the words of a test set."""

    name: str
    scores: Mapping[str, Interval]  # by metric; the intervals are over sentences
    predicted: Predicted  # fewer than words if the model truncated the sentence
    cut: int  # labelled test words that the model truncated; no score counts them
    train_cut: int = 0  # labelled train words that were truncated


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """A model to compare, which is loaded when it is needed, so that only one is in memory."""

    name: str
    load: Callable[[], Embedder]
    predictor: bool = False  # use the vector one token earlier, from which MNTP predicts a word


@dataclass(frozen=True, slots=True)
class WordComparison:
    """The baselines and each model on the same words, and their gains over the first model."""

    results: tuple[WordResult, ...]
    differences: Mapping[str, Mapping[str, Interval]]  # by name, then by metric

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """Return the rows of a table, with its header; the last column counts truncated words."""
        metrics = tuple(self.results[0].scores)
        header = ("model", *(part for name in metrics for part in (name, "minus first")), "cut")
        rows: list[tuple[str, ...]] = [header]
        for result in self.results:
            gains = self.differences.get(result.name, {})
            cells = (
                (str(result.scores[name]), gains[name].signed() if name in gains else "-")
                for name in metrics
            )
            rows.append((result.name, *chain.from_iterable(cells), str(result.cut)))
        return tuple(rows)


def word_probe(
    embedder: Embedder,
    train: Sequence[LabelledSentence],
    test: Sequence[LabelledSentence],
    *,
    predictor: bool = False,
    seed: int = 0,
    name: str = "probe",
) -> WordResult:
    """Learn labels from the vectors of the training words, and predict those of the test words.

    The encoder is frozen. Words past its length limit have no vector; the result counts them. The
    seed affects the intervals only.

    Raises:
        RecipeError: if no labelled word is left, or the training words have only one label.
        MissingExtraError: if scikit-learn is not installed.
    """
    regression(_NEEDS)  # raises for a missing package before minutes of encoding
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
        RecipeError: see :func:`word_probe`; also if two models have the same name.
        MissingExtraError: if scikit-learn is not installed.
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
    """Score two baselines: the most frequent label, and that of the word itself.

    A word that is not in the training sentences gets the most frequent label of all. Of equally
    frequent labels, the one seen first is taken.
    """
    overall: Counter[str] = Counter()
    of_word: dict[str, Counter[str]] = {}
    for word, label in _labelled(train):
        overall[label] += 1
        of_word.setdefault(word, Counter())[label] += 1
    if not overall:
        raise RecipeError("the training sentences have no labelled word; label some")
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
    """Return a function from vectors to labels, learned from the labelled words of sentences.

    Raises:
        RecipeError: if no labelled word is left, or there is only one label.
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
        have = f"have only one label, {str(known[0])!r}" if len(known) else "have no labelled word"
        raise RecipeError(f"the training sentences {have}; a probe needs at least two labels")
    features = np.concatenate(vectors)[counted].astype(np.float32, copy=False)
    classify = vector_probe(model, features, labels[counted])
    return lambda words: [str(label) for label in classify(words)]


def score_words(
    name: str,
    test: Sequence[LabelledSentence],
    predicted: Predicted,
    *,
    train_cut: int = 0,
    seed: int = 0,
) -> WordResult:
    """Compute accuracy, macro F1 and, for labels with B-, I- and O, the F1 of whole entities.

    Macro F1 is over the labels of the test words. A label that was not predicted, or not learned,
    counts like any other mistake.

    Raises:
        RecipeError: if there is no labelled word to score.
    """
    read = [len(labels) for labels in predicted]
    tallies = _tallies(test, predicted, read)
    if not tallies[ACCURACY].sum():
        raise RecipeError("the test sentences have no labelled word that the model reads")
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
    """Return by how much ``after`` is better, by metric, on the words that both have read.

    Both are scored on the same draws of sentences, so that their difficulty cancels out.
    """
    read = [min(len(a), len(b)) for a, b in zip(after.predicted, before.predicted, strict=True)]
    first, second = (_tallies(test, each.predicted, read) for each in (after, before))
    return {metric: _interval((first[metric], second[metric]), seed) for metric in first}


def entities(labels: Sequence[str]) -> set[EntitySpan]:
    """Return the spans that B-, I- and O labels mark, by the rules of conlleval.

    An unlabelled word is O. I- continues a span of its kind, or else begins one. So both schemes
    are read: B- at each beginning, or only between adjacent entities.
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
    """Return the counts that the F1 of each metric needs; only the first ``read`` words count."""
    labels = sorted({label for _, label in _labelled(test)})
    row_of = {label: row for row, label in enumerate(labels)}
    total = np.zeros((len(test), 1, 3))
    each = np.zeros((len(test), len(labels), 3))
    spans = np.zeros((len(test), 1, 3))
    for place, (sentence, guesses, words) in enumerate(zip(test, predicted, read, strict=True)):
        pairs = [
            (gold, guess if gold != UNLABELLED else UNLABELLED)
            for gold, guess in zip(sentence.labels[:words], guesses[:words], strict=True)
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
    """Return the F1 of one system, or by how much the first of two is better."""
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
    """Return how many labelled words lie past the ones that the model has read."""
    return sum(label != UNLABELLED for label in sentence.labels[read:])

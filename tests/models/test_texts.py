import numpy as np
import pytest

from tercet.errors import RecipeError, TercetError, TextError
from tercet.models.embedder import Embedder
from tercet.models.pairs import score_pairs
from tests.toy import SENTENCES

HALF = "half \ud83d"
GOOD = {
    "tuple": tuple,
    "array of strings": np.array,
    "array of objects": lambda texts: np.array(texts, dtype=object),
    "keys": lambda texts: dict.fromkeys(texts).keys(),
    "generator": lambda texts: (text for text in texts),
}
BAD = {
    "None": (None, "got NoneType None"),
    "number": (7, "got int 7"),
    "nan": (float("nan"), "got float nan"),
    "bytes": (b"hello", "got bytes b'hello'"),
    "list": (["hello"], "got list"),
    "half": (HALF, r"must be valid Unicode; character 6 is half of a surrogate pair \(\\ud83d\)"),
}
ENTRIES = {
    "encode": lambda e, texts: e.encode(texts),
    "tokens": lambda e, texts: e.encode(texts, output="tokens"),
    "words": lambda e, texts: e.encode(texts, output="words"),
    "encode_vectors": lambda e, texts: e.encode_vectors(texts),
    "tokenize": lambda e, texts: e.tokenize(texts, "query"),
    "queries": lambda e, texts: score_pairs(e, texts, list(SENTENCES)),
    "documents": lambda e, texts: score_pairs(e, list(SENTENCES), texts),
    "encode_words": lambda e, texts: e.encode_words([texts]),
}


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder)


@pytest.mark.parametrize("way", GOOD)
def test_every_collection_of_strings_is_accepted(embedder, way):
    expected = embedder.encode(list(SENTENCES))
    np.testing.assert_array_equal(embedder.encode(GOOD[way](SENTENCES)), expected)


def test_a_series_is_accepted(embedder):
    pandas = pytest.importorskip("pandas")
    series = pandas.Series(SENTENCES)[::-1]
    np.testing.assert_array_equal(embedder.encode(series), embedder.encode(SENTENCES[::-1]))
    with pytest.raises(TextError, match="text 2 of 2 must be a string"):
        embedder.encode(pandas.Series(["a", None]))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_text_is_refused_with_its_row(embedder, entry, kind):
    value, message = BAD[kind]
    texts = [*SENTENCES[:2], value, *SENTENCES[3:]]
    with pytest.raises(TextError, match=f"3 of 12 .*{message}"):
        ENTRIES[entry](embedder, texts)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("texts", ["hello", b"hello", None, 5, {"a": 1}, {"a"}])
def test_what_is_no_list_is_refused(embedder, entry, texts):
    with pytest.raises(TextError, match=r"must be a list of (strings|words); got"):
        ENTRIES[entry](embedder, texts)
    assert issubclass(TextError, TercetError) and issubclass(TextError, TypeError)


def test_sentences_are_lists_of_words(embedder):
    for sentences in ("hello", ["hello world"], None):
        with pytest.raises(TextError, match=r"must be a list of (lists of )?words; got"):
            embedder.encode_words(sentences)


def test_a_whole_pair_of_surrogates_and_text_outside_the_plane_are_read(embedder):
    assert embedder.encode(["\U0001f600 smile", "日本語"]).shape == (2, 64)


@pytest.mark.parametrize("name", ["passage", "doc", "docs", "documents", "corpus", "queries"])
def test_usual_synonyms_of_roles_are_the_roles(encoder_folder, name):
    embedder = Embedder.load(encoder_folder, prompts={"query": "play ", "document": "read "})
    role = "query" if name == "queries" else "document"
    expected = embedder.encode(SENTENCES, role)
    np.testing.assert_array_equal(embedder.encode(SENTENCES, name), expected)
    np.testing.assert_array_equal(embedder.encode_vectors(SENTENCES, name).dense, expected)
    first, second = embedder.tokenize(SENTENCES, name), embedder.tokenize(SENTENCES, role)
    assert [ids.tolist() for ids in first.ids] == [ids.tolist() for ids in second.ids]
    synonyms = {"queries": "play ", "passage": "read "}
    loaded = Embedder.load(encoder_folder, prompts=synonyms)
    np.testing.assert_array_equal(loaded.encode(SENTENCES, role), expected)


@pytest.mark.parametrize("name", ["qurey", "Query", "", None, 3])
def test_other_roles_are_refused(embedder, name):
    for read in (embedder.encode, embedder.encode_vectors, embedder.tokenize):
        with pytest.raises(RecipeError, match='role must be "query" or "document"; got'):
            read(SENTENCES, name)
    with pytest.raises(RecipeError, match='did you mean "query"'):
        embedder.encode(SENTENCES, "qurey")


def test_prompts_for_unknown_roles_and_half_characters_are_refused(encoder_folder):
    with pytest.raises(RecipeError, match='"query" or "document"; got \'qurey\''):
        Embedder.load(encoder_folder, prompts={"qurey": "play "})
    with pytest.raises(RecipeError, match="in valid Unicode"):
        Embedder.load(encoder_folder, prompts={"query": HALF})

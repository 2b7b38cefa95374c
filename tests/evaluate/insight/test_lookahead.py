import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tercet.errors import DataError, ModelError, RecipeError
from tercet.evaluate.insight.lookahead import (
    PrefixResult,
    PrefixTriple,
    direction_map,
    prefix_sensitivity,
    read_triples,
)
from tercet.models.embedder import Embedder
from tests.toy import SENTENCES, pack, save_model

TRIPLES = [
    PrefixTriple("read mail in a", " terminal", " panel", " photograph of the moon"),
    PrefixTriple("a compiler", " for programs", " for the language", " of the moon"),
    # The tokenizer joins what stands at the border: "th" + "e" is one token, "th" + "is" are two.
    PrefixTriple("count words, lines and th", "e files", "is file", "em all"),
    PrefixTriple("count words, lines and th", "is file", "e files", "em all"),
    PrefixTriple("count words, lines and th", "e files", "e lines", "e bytes"),
]


@pytest.fixture(scope="module")
def decoder(decoder_folder):
    return Embedder.load(decoder_folder)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@torch.no_grad()
def by_hand(embedder, backbone, triple):
    """Each text alone; the mean over the tokens that all three begin with, inside the prefix."""
    stock = embedder.tokenizer.stock
    out = [stock(text, return_offsets_mapping=True) for text in triple.texts()]
    count = 0
    while len({each["input_ids"][count] for each in out}) == 1 and max(
        each["offset_mapping"][count][1] for each in out
    ) <= len(triple.prefix):
        count += 1
    states = [backbone(pack(torch.tensor(each["input_ids"]))) for each in out]
    query, *others = (each[:count].mean(0) for each in states)
    return [cosine(query, other) for other in others]


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_cosines_equal_those_of_each_text_alone(decoder, attention):
    result = prefix_sensitivity(decoder, TRIPLES, attention=attention)
    with decoder.reading(attention) as reader:
        expected = np.array([by_hand(decoder, reader.backbone, triple) for triple in TRIPLES])
    np.testing.assert_allclose(result.positive, expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(result.negative, expected[:, 1], atol=1e-6)


def test_14_a_causal_model_gives_1_and_one_that_reads_both_ways_does_not(decoder):
    causal = prefix_sensitivity(decoder, TRIPLES)
    np.testing.assert_allclose(causal.positive, 1, atol=1e-5)
    np.testing.assert_allclose(causal.negative, 1, atol=1e-5)
    assert causal.gap.tolist() == [0] * 5 and causal.accuracy == 0
    both_ways = prefix_sensitivity(decoder, TRIPLES, attention="bidirectional")
    assert both_ways.positive.max() < 0.999 and both_ways.negative.max() < 0.999
    assert decoder.backbone.attention == "causal"


def test_a_token_that_joins_prefix_and_rest_stands_in_the_toy_texts(decoder):
    joined = []
    for triple in TRIPLES:
        out = decoder.tokenizer.stock(triple.texts(), return_offsets_mapping=True)
        border = len(triple.prefix)
        rows = out["offset_mapping"]
        joined.append([any(start < border < end for start, end in row) for row in rows])
    assert joined[2:] == [[True, False, True], [False, True, True], [True, True, True]]


def test_special_tokens_are_not_pooled(encoder_folder):
    encoder = Embedder.load(encoder_folder)
    stock = encoder.tokenizer.stock
    triple = PrefixTriple("chess", " against a strong", " with an opponent", " in a panel")
    result = prefix_sensitivity(encoder, [triple])
    count = len(stock("chess", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        query, positive, negative = (
            encoder.backbone(pack(torch.tensor(stock(text)["input_ids"])))[1 : 1 + count].mean(0)
            for text in triple.texts()
        )
    assert result.positive[0] == pytest.approx(cosine(query, positive), abs=1e-6)
    assert result.negative[0] == pytest.approx(cosine(query, negative), abs=1e-6)


@torch.no_grad()
def test_with_echo_the_prefix_of_the_second_copy_has_read_on(decoder):
    triple = TRIPLES[0]
    result = prefix_sensitivity(decoder, [triple], echo=True)
    stock = decoder.tokenizer.stock
    count = len(stock(triple.prefix)["input_ids"])
    states = []
    for text in triple.texts():
        pieces = ["Document:", text, "\nDocument again:", text]
        ids = [stock(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        start = sum(map(len, ids[:3]))
        row = torch.tensor([i for piece in ids for i in piece] + [stock.eos_token_id])
        states.append(decoder.backbone(pack(row))[start : start + count].mean(0))
    query, positive, negative = states
    assert result.positive[0] == pytest.approx(cosine(query, positive), abs=1e-6)
    assert result.negative[0] == pytest.approx(cosine(query, negative), abs=1e-6)
    assert result.positive[0] < 0.999


def test_many_triples_equal_each_alone(decoder):
    triples = [
        PrefixTriple(text, f" and {number}", f" or {number}", " of nothing" * (number % 5))
        for number, text in enumerate(SENTENCES * 6)
    ]
    together = prefix_sensitivity(decoder, triples, attention="bidirectional")
    assert len(together.gap) == 72
    for number in (0, 63, 64, 71):
        alone = prefix_sensitivity(decoder, [triples[number]], attention="bidirectional")
        assert together.gap[number] == pytest.approx(alone.gap[0], abs=1e-6)


def test_triples_that_cannot_be_used_are_counted_and_none_at_all_is_told(decoder):
    long = PrefixTriple("maps", " of rivers" * 200, " of water", " of mail")
    joined = PrefixTriple("i", "n files", "s a file", "s mail")  # "in" is one token
    result = prefix_sensitivity(decoder, [long, *TRIPLES, joined])
    assert result.skipped == 2 and len(result.positive) == 5
    with pytest.raises(RecipeError, match=r"none of 2 triples can be used: .* at most 128 tokens"):
        prefix_sensitivity(decoder, [long, joined])


def test_dropout_is_off_and_the_mode_comes_back(decoder):
    expected = prefix_sensitivity(decoder, TRIPLES, attention="bidirectional")
    decoder.backbone.attention_dropout = 0.5
    try:
        found = prefix_sensitivity(decoder.train(), TRIPLES, attention="bidirectional")
        assert decoder.training
    finally:
        decoder.backbone.attention_dropout = None
        decoder.eval()
    np.testing.assert_array_equal(found.positive, expected.positive)


def test_gaps_within_noise_are_none_and_the_rest_counts():
    # gaps 0.2, -0.1, 1e-6 (noise) and 0.3: two of four above 0, mean 0.4 / 4
    result = PrefixResult(
        np.array([0.9, 0.5, 0.8 + 1e-6, 0.7]), np.array([0.7, 0.6, 0.8, 0.4]), skipped=0
    )
    np.testing.assert_allclose(result.gap, [0.2, -0.1, 0, 0.3])
    assert result.accuracy == 0.5
    columns = result.intervals(seed=3)
    assert columns["gap"].mean == pytest.approx(0.1)
    assert columns["gap"].seed == 3
    assert columns["gap > 0"].mean == 0.5
    assert columns["cosine, same"].mean == pytest.approx(0.725)
    assert columns["cosine, other"].mean == pytest.approx(0.625)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("own", ["causal", "bidirectional"])
def test_14_a_direction_map_is_1_in_layer_0_and_at_the_end_of_layer_1(tmp_path, kind, own):
    embedder = Embedder.load(save_model(tmp_path / "model", kind), attention=own, window="keep")
    text = "the editor for programs and prose"
    found = direction_map(embedder, text)
    assert found.cosines.shape == (4, len(embedder.tokenizer.stock(text)["input_ids"]))
    np.testing.assert_allclose(found.cosines[0], 1, atol=1e-12)
    assert found.cosines[1, -1] == pytest.approx(1, abs=1e-6)
    assert found.cosines[1, :-1].max() < 0.9999 and found.cosines[2:].max() < 0.9999
    assert embedder.backbone.attention == own and not embedder.training


@torch.no_grad()
def test_a_direction_map_compares_the_states_of_two_models_with_the_same_weights(decoder_folder):
    text = "draw maps of rivers"
    models = [Embedder.load(decoder_folder, attention=a) for a in ("causal", "bidirectional")]
    ids = pack(torch.tensor(models[0].tokenizer.stock(text)["input_ids"]))
    causal, both_ways = (model.backbone.layer_states(ids) for model in models)
    found = direction_map(models[0], text)
    for layer in range(4):
        for token in range(len(ids.ids)):
            expected = cosine(causal[layer, token], both_ways[layer, token])
            assert found.cosines[layer, token] == pytest.approx(expected, abs=1e-6)


def test_tokens_stand_below_a_map_as_they_stand_in_the_text(decoder):
    tokens = direction_map(decoder, "the\nweb für").tokens
    assert tokens[:5] == ("t", "he", "Ċ", "w", "e")  # a line end would be nothing to see
    assert tokens[-3:] == ("ü", "ü", "r")  # two tokens, a byte of the letter each


def test_only_the_beginning_of_a_long_text_is_mapped(decoder):
    long = direction_map(decoder, "a small web server " * 100)
    assert long.cosines.shape == (4, 128) and len(long.tokens) == 128


def test_an_encoder_has_no_direction_map_and_no_causal_reading(encoder_folder):
    encoder = Embedder.load(encoder_folder)
    with pytest.raises(ModelError, match=r"needs a decoder; BertModel is an encoder"):
        direction_map(encoder, "a text")
    with pytest.raises(ModelError, match="is an encoder"):
        prefix_sensitivity(encoder, TRIPLES, attention="causal")


def test_the_triples_of_the_package_are_forty_and_no_two_begin_alike():
    triples = read_triples()
    assert len({triple.prefix for triple in triples}) == len(triples) == 40
    for triple in triples:
        rests = (triple.query, triple.positive, triple.negative)
        assert len(set(rests)) == 3 and all(rest.startswith(" ") for rest in rests)
        assert not triple.prefix.endswith(" ")


def test_triples_are_read_from_lines_and_from_parquet(tmp_path):
    record = {"prefix": "A", "query": " b", "positive": " c", "negative": " d", "more": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read_triples(tmp_path / name) == [PrefixTriple("A", " b", " c", " d")]
    assert PrefixTriple("A", " b", " c", " d").texts() == ["A b", "A c", "A d"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prefix": "A", "query": "b", "positive": "c"}', '"negative" is missing; a triple has'),
        ('{"prefix": "A", "query": "b", "positive": " ", "negative": "d"}', '"positive" holds a'),
        ('{"prefix": 3, "query": "b", "positive": "c", "negative": "d"}', '"prefix" must be a t'),
        ('["A", "b", "c", "d"]', "expected an object with named fields"),
        ("A, b, c, d", "not JSON"),
    ],
)
def test_a_bad_triple_is_told_with_its_line(tmp_path, line, problem):
    path = tmp_path / "triples.jsonl"
    good = '{"prefix": "A", "query": "b", "positive": "c", "negative": "d"}'
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"triples.jsonl:3: {problem}"):
        read_triples(path)


def test_a_missing_file_of_triples_and_a_missing_column_are_told(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        read_triples(tmp_path / "none.jsonl")
    pq.write_table(pa.table({"prefix": ["A"], "query": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='has no column "positive"'):
        read_triples(tmp_path / "a.parquet")

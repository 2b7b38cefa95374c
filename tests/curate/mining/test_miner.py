import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tercet.curate.mining import document_pools as mining_documents
from tercet.curate.mining import relevant as mining_relevant
from tercet.curate.mining.miner import Mining, MiningReport, mine, sweep
from tercet.curate.mining.rules import REASONS, MiningRule
from tercet.data.files.sources import iter_examples, open_source, write_examples
from tercet.errors import DataError, ModelError, RecipeError, StorageError
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.types import Example, Role
from tests import toy
from tests.damage import unnoticed
from tests.toy import ENCODERS, SENTENCES, random_model, small_disk

PROMPT = "read mail "
MARGIN = MiningRule(kind="margin", value=0.01)


def key(text: str) -> str:
    return " ".join(text.lower().split())


def rows() -> list[Example]:
    """Queries of the first words of sentences, some with several positives, some asked twice."""
    found = [Example(" ".join(text.split()[:3]), (text,), task="packages") for text in SENTENCES]
    found[1] = Example(found[1].query, (SENTENCES[1], SENTENCES[9]), task="packages")
    found[3] = Example(found[3].query, (SENTENCES[3],), (SENTENCES[6], "a map"), task="packages")
    found.append(Example(found[2].query.upper(), (SENTENCES[4],), task="packages"))
    found.append(Example("a map", ("make maps  sharper",), ("a Map ",), task="packages"))
    return found


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A tiny random BERT that reads words, so that its scores are the same in each run."""
    folder = tmp_path_factory.mktemp("teacher")
    random_model(ENCODERS["bert"]).save_pretrained(folder)
    words = dict.fromkeys(" ".join(SENTENCES).replace(",", " ,").split())
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # pyright: ignore
    fast.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    fast.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    stock = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]")
    stock.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(teacher_folder):
    return Embedder.load(teacher_folder)


@pytest.fixture
def shards_of(monkeypatch):
    """Set how many texts are a shard."""

    def set_to(size: int) -> None:
        for module in (mining_documents, mining_relevant):
            monkeypatch.setattr(module, "SHARD", size)

    return set_to


@pytest.fixture
def pairs(tmp_path):
    write_examples(tmp_path / "pairs.jsonl", rows())
    return tmp_path / "pairs.jsonl"


def mined(teacher: Embedder, file: Path, **how: Any) -> tuple[list[Example], MiningReport]:
    more = {name: how.pop(name) for name in ("documents",) if name in how}
    out, work = file.parent / "out" / f"mined{file.suffix}", file.parent / "work"
    mining = Mining(**{"rule": MARGIN, "negatives": 3, "depth": 9, **how})
    (report,) = mine(teacher, [open_source(file)], out, mining=mining, work=work, **more)
    return list(iter_examples(out)) if report.written else [], report


def slowly(teacher: Embedder, examples: list[Example], rule: MiningRule, more: tuple[str, ...]):
    """Negatives by loops over all texts: of each example, (text, score), and reasons counted."""
    texts: dict[str, str] = {}
    for text in [*(t for e in examples for t in (*e.positives, *e.negatives)), *more]:
        texts.setdefault(key(text), text)
    vectors = {k: teacher.encode([text])[0] for k, text in texts.items()}
    found, reasons = [], dict.fromkeys(REASONS, 0)
    for example in examples:
        query = teacher.encode([example.query], "query")[0]
        scores = {k: float(query @ vector) for k, vector in vectors.items()}
        known = {
            key(text)
            for other in examples
            if key(other.query) == key(example.query)
            for text in other.positives
        }
        lowest = min(scores[key(text)] for text in example.positives)
        kept: list[tuple[str, float]] = []
        shifted = 0
        for k in sorted(scores, key=lambda k: -scores[k])[:9]:
            if k in known:
                reasons["positive"] += 1
            elif k == key(example.query):
                reasons["query"] += 1
            elif shifted < rule.shift:
                shifted += 1
                reasons["shifted"] += 1
            elif rule.kind == "margin" and scores[k] >= lowest - rule.used_value:
                reasons["too close"] += 1
            elif len(kept) < 3:
                kept.append((texts[k], scores[k]))
        found.append(kept)
    return found, reasons


@pytest.mark.parametrize("size", [4, 4096])
@pytest.mark.parametrize("rule", [MARGIN, MiningRule(kind="naive", shift=2)])
def test_mining_equals_loops_over_all_texts(teacher, pairs, shards_of, size, rule):
    shards_of(size)
    more = ("words of  the moon", "play Music from the command line", "  ")
    found, report = mined(teacher, pairs, rule=rule, documents=more)
    expected, reasons = slowly(teacher, rows(), rule, more[:2])
    for example, row, negatives in zip(found, rows(), expected, strict=True):
        assert (example.query, example.positives) == (row.query, row.positives)
        assert list(example.negatives) == [text for text, _ in negatives]
        scores = [score for _, score in negatives]
        np.testing.assert_allclose(example.negative_scores or [], scores, atol=2e-6)
    assert report.dropped == {**reasons, "already": 0}
    assert report.negatives == sum(map(len, expected)) and report.candidates == 14 * 9
    assert reasons["positive"] > 0 and reasons["query"] == 1
    assert 0 < reasons["too close"] + reasons["shifted"] < report.candidates


def test_case_spaces_and_unicode_forms_make_no_other_document():
    same = ["A caf\u00e9 map", " a  CAFE\u0301\tmap\n", "\uff41 caf\u00e9 map"]
    assert len({mining_documents.text_key(text) for text in same}) == 1
    assert mining_documents.text_key("a cafe map") != mining_documents.text_key(same[0])


def test_the_report_sums_up_what_was_written(teacher, pairs):
    found, report = mined(teacher, pairs, depth=4)
    sizes = np.array([len(example.negatives) for example in found])
    assert (report.rows, report.written, report.positives) == (14, 14, 15)
    assert (report.short, report.empty) == ((sizes < 3).sum(), (sizes == 0).sum())
    assert 0 < report.empty < report.short < 14
    positive = [score for example in found for score in example.positive_scores or ()]
    negative = [score for example in found for score in example.negative_scores or ()]
    assert report.positive_score == pytest.approx(np.mean(positive))
    assert report.negative_score == pytest.approx(np.mean(negative))
    assert report.had_negatives == 2 and report.refused == 0
    queries = teacher.encode([row.query for row in rows()], "query")
    texts = list({key(t): t for row in rows() for t in (*row.positives, *row.negatives)}.values())
    best = np.argsort(-queries @ teacher.encode(texts).T, axis=1)[:, :4]
    unfound = [
        text
        for row, columns in zip(rows(), best, strict=True)
        for text in row.positives
        if text not in [texts[column] for column in columns]
    ]
    assert report.unfound == len(unfound) > 0


def test_a_positive_of_any_row_with_the_same_query_is_never_a_negative(teacher, pairs):
    found, _ = mined(teacher, pairs, rule=MiningRule(kind="naive"), negatives=9, depth=14)
    twins = [example for example in found if key(example.query) == key(rows()[2].query)]
    assert len(twins) == 2
    for example in twins:
        assert not {SENTENCES[2], SENTENCES[4]} & set(example.negatives)
    (third,) = [example for example in found if example.query == "a map"]
    assert "a map" not in map(key, third.negatives)


def test_own_negatives_are_replaced_or_kept_in_front_with_scores_and_without_positives(
    teacher, tmp_path
):
    query, mine_own = "play music", (SENTENCES[5], SENTENCES[1].upper(), SENTENCES[5], " ")
    examples = [
        Example(query, (SENTENCES[1],), mine_own),
        *[Example(f"{text[:9]} so", (text,)) for text in SENTENCES[2:]],
    ]
    write_examples(tmp_path / "pairs.jsonl", examples)
    replaced, _ = mined(teacher, tmp_path / "pairs.jsonl", rule=MiningRule(kind="naive"))
    kept, report = mined(
        teacher, tmp_path / "pairs.jsonl", rule=MiningRule(kind="naive"), keep=True
    )
    nearest = [text for text in replaced[0].negatives if text != SENTENCES[5]]
    assert list(kept[0].negatives) == [SENTENCES[5], *nearest[:2]]
    score = teacher.encode([query], "query")[0] @ teacher.encode([SENTENCES[5]])[0]
    assert (kept[0].negative_scores or (0,))[0] == pytest.approx(score, abs=2e-6)
    assert report.refused == 3 and report.negatives == 3 * len(examples)
    full, _ = mined(teacher, tmp_path / "pairs.jsonl", negatives=1, keep=True)
    assert full[0].negatives == (SENTENCES[5],)


def test_rows_with_too_few_negatives_are_left_out(teacher, pairs):
    whole, _ = mined(teacher, pairs, depth=4)
    found, report = mined(teacher, pairs, depth=4, at_least=3)
    assert found == [example for example in whole if len(example.negatives) == 3]
    assert {1, 2} & {len(example.negatives) for example in whole}  # such rows count for nothing
    assert report.left_out == 14 - len(found) > 0
    assert report.negatives == sum(len(example.negatives) for example in found)
    scores = [score for example in found for score in example.negative_scores or ()]
    assert report.negative_score == pytest.approx(np.mean(scores))


def test_a_row_without_negatives_is_written_without_scores_of_them(teacher, pairs):
    found, report = mined(teacher, pairs, rule=MiningRule(kind="absolute", value=-2.0))
    assert report.empty == 14 and report.negatives == 0
    assert {(example.negatives, example.negative_scores) for example in found} == {((), None)}
    assert all(len(e.positive_scores or ()) == len(e.positives) for e in found)


# ---- prompts ---------------------------------------------------------------------------------


def scored(teacher: Embedder, query: str, document: str, prompts: tuple[str, str]) -> float:
    vectors = []
    parts: list[tuple[str, Role, str]] = [
        (query, "query", prompts[0]),
        (document, "document", prompts[1]),
    ]
    for text, role, prompt in parts:
        tokens = teacher.tokenize([text], role, prompt)
        vectors.append(teacher(tokens.pack()).detach().numpy()[0])
    a, b = (vector / np.linalg.norm(vector) for vector in vectors)
    return float(a @ b)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("row", [("keep ", ""), ("keep ", "draw "), ("", ""), ("task ", "")]),
        ("teacher", [("usual ", ""), ("usual ", ""), ("usual ", ""), ("task ", "")]),
    ],
)
def test_texts_are_read_after_the_prompts_of_their_row_or_of_the_teacher(
    teacher_folder, tmp_path, first, expected
):
    teacher = Embedder.load(
        teacher_folder, prompts={"query": "usual "}, task_prompts={"known": {"query": "task "}}
    )
    settings = teacher.settings
    given = [("keep ", None, ""), ("keep ", "draw ", ""), ("", None, ""), (None, None, "known")]
    examples = [
        Example(f"{text[:9]} so", (text,), query_prompt=query, document_prompt=document, task=task)
        for text, (query, document, task) in zip(SENTENCES[:4], given, strict=True)
    ]
    write_examples(tmp_path / "pairs.jsonl", examples)
    more = SENTENCES[6:9]
    rule = MiningRule(kind="naive")
    found, _ = mined(teacher, tmp_path / "pairs.jsonl", rule=rule, documents=more, prompts=first)
    assert teacher.settings is settings
    for example, prompts in zip(found, expected, strict=True):
        for text, score in zip(
            (*example.positives, *example.negatives),
            (*(example.positive_scores or ()), *(example.negative_scores or ())),
            strict=True,
        ):
            assert score == pytest.approx(scored(teacher, example.query, text, prompts), abs=2e-6)
    # Documents of rows with another document prompt are no candidates; further documents are.
    if first == "row":
        assert set(found[1].negatives) == set(more)
    assert [example.query_prompt for example in found] == [query for query, _, _ in given]


def test_prompts_that_a_teacher_without_any_may_not_understand_are_remarked(
    teacher, tmp_path, caplog
):
    rows = [Example(f"{t[:9]} so", (t,), query_prompt="Instruct: find") for t in SENTENCES]
    write_examples(tmp_path / "pairs.jsonl", rows)
    mined(teacher, tmp_path / "pairs.jsonl")
    assert [record.message for record in caplog.records if "rows have prompts" in record.message]
    caplog.clear()
    mined(teacher, tmp_path / "pairs.jsonl", prompts="teacher")
    assert caplog.records == []


# ---- going on --------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are encoded, and after how many calls a run is killed."""
    stock, seen, limit = Embedder.encode, [], [10**9]

    def encode(self: Embedder, texts: list[str], role: Role = "document", **how: Any):
        if limit[0] == 0:
            raise KeyboardInterrupt
        limit[0] -= 1
        seen.extend(texts)
        return stock(self, texts, role, **how)

    monkeypatch.setattr(Embedder, "encode", encode)
    return seen, limit


def test_a_killed_run_goes_on_with_the_shards_that_are_there(teacher, pairs, shards_of, encoded):
    shards_of(5)
    seen, limit = encoded
    documents = len({key(t) for row in rows() for t in (*row.positives, *row.negatives)})
    limit[0] = 2
    with pytest.raises(KeyboardInterrupt):
        mined(teacher, pairs)
    assert len(seen) == 10 and not (pairs.parent / "out/mined.jsonl").exists()
    assert not list((pairs.parent / "out").iterdir())
    limit[0] = 10**9
    found, _ = mined(teacher, pairs)
    assert len(seen) == documents + 14  # each text once, over both runs
    seen.clear()
    (pairs.parent / "out/mined.jsonl").unlink()
    assert mined(teacher, pairs)[0] == found and seen == []


def test_another_rule_costs_no_encoding_and_another_teacher_or_text_does(
    teacher, teacher_folder, pairs, shards_of, encoded
):
    shards_of(5)
    seen, _ = encoded
    before, _ = mined(teacher, pairs)
    everything = list(seen)
    seen.clear()
    mined(teacher, pairs, rule=MiningRule(), depth=5)
    assert seen == []
    changed = rows()
    changed[0] = Example(changed[0].query, ("something else",))
    write_examples(pairs, changed)
    mined(teacher, pairs)
    assert "something else" in seen and len(seen) == 5  # the queries are the same
    seen.clear()
    write_examples(pairs, rows())
    other = Embedder.load(teacher_folder, pooling="first")
    after, _ = mined(other, pairs)
    assert seen == everything
    assert [e.negative_scores for e in after] != [e.negative_scores for e in before]


def test_the_same_weights_read_the_other_way_are_another_teacher(decoder_folder, pairs, encoded):
    seen, _ = encoded
    for way in ("causal", "bidirectional"):
        seen.clear()
        mined(Embedder.load(decoder_folder, attention=way), pairs)
        assert len(seen) > 20


def test_a_query_with_the_text_of_a_document_has_a_vector_of_its_own(teacher_folder, pairs):
    write_examples(pairs, [Example(text, (text,)) for text in SENTENCES])
    found, _ = mined(Embedder.load(teacher_folder, query_tokens=4), pairs)
    assert all(score < 0.999 for example in found for score in example.positive_scores or ())


def test_a_shard_that_was_cut_short_is_made_again(teacher, pairs, encoded):
    found, _ = mined(teacher, pairs)
    for path in (pairs.parent / "work").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:500])
    assert mined(teacher, pairs)[0] == found


# ---- sweeps and quantiles --------------------------------------------------------------------


def test_a_sweep_counts_what_mining_with_each_value_counts(teacher, pairs, tmp_path):
    write_examples(tmp_path / "more.jsonl", rows()[3:8])
    sources = [open_source(pairs), open_source(tmp_path / "more.jsonl")]
    mining = Mining(rule=MARGIN, negatives=3, depth=9)
    found = sweep(teacher, sources, [0.0, 0.01, 0.2], mining=mining, work=tmp_path / "work")
    assert [(r.source, r.rule.value) for r in found] == [
        (name, value) for name in ("pairs", "more") for value in (0.0, 0.01, 0.2)
    ]
    assert len({report.dropped["too close"] for report in found[:3]}) == 3
    for number, value in enumerate((0.0, 0.01, 0.2)):
        each = Mining(rule=MiningRule(kind="margin", value=value), negatives=3, depth=9)
        out, work = tmp_path / "out.jsonl", tmp_path / "work"
        assert mine(teacher, sources, out, mining=each, work=work) == found[number::3]


def test_a_quantile_is_that_of_the_lowest_positives_of_its_source(teacher, pairs):
    rule = MiningRule(kind="quantile", value=0.3)
    found, report = mined(teacher, pairs, rule=rule)
    lowest = [min(example.positive_scores or ()) for example in found]
    cap = np.quantile(lowest, 0.3)
    assert report.rule.kind == "absolute" and report.rule.value == pytest.approx(cap)
    negatives = [score for example in found for score in example.negative_scores or ()]
    assert max(negatives) < cap and report.dropped["too close"] > 0


# ---- files -----------------------------------------------------------------------------------


def test_several_sources_share_their_documents_and_go_into_one_file_or_a_folder(
    teacher, pairs, tmp_path
):
    write_examples(
        tmp_path / "more.parquet", [Example("sharp", ("make it sharp",), in_batch="none")]
    )
    sources = [open_source(pairs), open_source(tmp_path / "more.parquet")]
    mining, work = Mining(rule=MiningRule(kind="naive"), negatives=9, depth=30), tmp_path / "work"
    mine(teacher, sources, tmp_path / "all.jsonl", mining=mining, work=work)
    mine(teacher, sources, tmp_path / "each", mining=mining, work=work)
    merged = list(iter_examples(tmp_path / "all.jsonl"))
    apart = [e for source in sources for e in iter_examples(tmp_path / "each" / source.path.name)]
    assert merged == apart
    assert [example.task for example in merged] == ["packages"] * 14 + ["more"]
    assert set(merged[-1].negatives) < set(SENTENCES) | {"a map", "make maps  sharper"}
    assert "make it sharp" in {text for example in merged[:14] for text in example.negatives}


def test_an_output_in_the_place_of_a_source_or_of_another_output_is_refused(
    teacher, pairs, tmp_path
):
    (tmp_path / "twin").mkdir()
    write_examples(tmp_path / "twin/pairs.jsonl", rows())
    sources = [open_source(pairs), open_source(tmp_path / "twin/pairs.jsonl")]
    for out in (pairs, tmp_path):
        with pytest.raises(RecipeError, match=r"is (an|or contains the) input.*; give another"):
            mine(teacher, sources[:1], out, mining=Mining(), work=tmp_path / "work")
    with pytest.raises(RecipeError, match="two input files have the same name"):
        mine(teacher, sources, tmp_path / "out", mining=Mining(), work=tmp_path / "work")
    with pytest.raises(DataError, match=r'unknown kind of file "[.]csv"'):
        mine(teacher, sources, tmp_path / "out.csv", mining=Mining(), work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_full_disk_leaves_the_old_output(teacher, pairs):
    mined(teacher, pairs)
    out = pairs.parent / "out/mined.jsonl"
    before = out.read_bytes()
    with small_disk(700), pytest.raises(StorageError):
        mined(teacher, pairs, rule=MiningRule(kind="naive"))
    assert out.read_bytes() == before


def test_a_teacher_whose_vectors_are_no_numbers_is_refused(teacher, pairs):
    weight = next(iter(teacher.parameters()))
    weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"vector of text \d+, '.*', holds NaN or infinity"):
        mined(teacher, pairs)
    assert list((pairs.parent / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"negatives": 0}, "negatives must be at least 1; got 0"),
        ({"depth": 9, "rule": MiningRule(shift=3)}, "depth must be at least .* = 10; got 9"),
        (
            {"rule": MiningRule(sample_from=6)},
            "sample_from must be at least the 7 negatives; got 6",
        ),
        ({"at_least": 8}, "at_least must be between 0 and the 7 negatives; got 8"),
    ],
)
def test_numbers_that_cannot_go_together_are_refused(wrong, said):
    with pytest.raises(RecipeError, match=said):
        Mining(**wrong)


def test_every_line_of_the_output_has_one_score_a_text(teacher, pairs):
    mined(teacher, pairs)
    for line in (pairs.parent / "out/mined.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in ("positive", "negative"):
            scores = record.get(f"{name}_scores", [])
            assert len(scores) == len(record.get(f"{name}s", []))
            assert all(score == round(score, 6) for score in scores)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["dense", "hybrid"])
def test_damage_to_stored_vectors_changes_no_row_that_is_mined(
    teacher, pairs, tmp_path, by, caplog
):
    how: dict[str, Any] = {"by": by}
    if by == "hybrid":
        teacher = Embedder.load(tmp_path_of_three_kinds(tmp_path))
        how["rule"] = MiningRule(kind="percent", value=0.95)
    wanted, _ = mined(teacher, pairs, **how)
    work = pairs.parent / "work"
    assert not unnoticed(
        work,
        ask=lambda: mined(teacher, pairs, **how)[0],
        same=lambda found: found == wanted,
        count=1 if by == "hybrid" else 5,
    )
    assert "is damaged, and is made again" in caplog.text


def tmp_path_of_three_kinds(tmp_path: Path) -> Path:
    toy.save_model(tmp_path / "base", "bert")
    Embedder.load(tmp_path / "base", kinds=KINDS).save(tmp_path / "three")
    return tmp_path / "three"


def test_stored_vectors_of_an_earlier_version_are_used_with_one_note(
    teacher, pairs, encoded, caplog
):
    wanted, _ = mined(teacher, pairs)
    for path in (pairs.parent / "work").glob("*.sum"):
        path.unlink()
    seen, _ = encoded
    seen.clear()
    assert mined(teacher, pairs)[0] == wanted
    assert not seen
    assert caplog.text.count("holds files of an earlier version") == 1

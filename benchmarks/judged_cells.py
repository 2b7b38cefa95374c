"""The cells of ``benchmarks/judged.py``: what each trains and measures.

A cell is one process. It finds the sets, the files and models of earlier cells, and their answers
through its :class:`Place`, and returns what its model answers to each set.
"""

import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.judged_sets import (
    ACROSS,
    DEBIAN_TESTED,
    SCIFACT,
    SCIFACT_DEV,
    STS,
    WORDS,
    Answers,
    Cell,
    Found,
    Job,
    Place,
    both_claims,
    debian_pairs,
    dev_claims,
    packages,
    split,
    split_answers,
)
from benchmarks.judged_training import (
    BASES,
    LIMITS,
    baselines,
    by_rate,
    load,
    measured,
    trained,
    untouched,
    variants,
    written,
    written_records,
    written_texts,
)
from benchmarks.llm2vec_quality import sentences_of
from tercet.curate.convert.conversion import Conversion
from tercet.curate.convert.scored_pairs import ALIKE, UNLIKE, convert_similarity
from tercet.curate.jobs.score_job import EmbedderTeacher, ScoreJob, score_rows
from tercet.curate.mining.miner import Mining, mine
from tercet.curate.mining.rules import MiningRule
from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.files.beir import read_folder
from tercet.data.files.similarity import SimilaritySet
from tercet.data.files.sources import Source, iter_examples, open_source
from tercet.data.files.texts import normal_form, open_texts
from tercet.evaluate.measures.retrieval import evaluate_hits, evaluate_retrieval
from tercet.evaluate.measures.tuned_weights import dev_candidates, tune
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.artifacts import read_json
from tercet.kinds import KINDS, Weights
from tercet.metrics import Judgements
from tercet.models.embedder import Embedder
from tercet.models.quantize import quantized
from tercet.models.zoo.zoo import resolve
from tercet.rank.hybrid import HybridHits, each_alone
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.distil import distil
from tercet.recipes.finetune import finetune
from tercet.recipes.llm2vec import llm2vec
from tercet.training.optimizer import factor
from tercet.types import Example

# ---- SciFact -------------------------------------------------------------------------------------

SCIFACT_STEPS: Final = {"minilm": 120, "me5-small": 60}  # twice the layers take twice the time
SCIFACT_NUMBERS: Final[dict[str, Any]] = {  # of every fine-tuning on claims
    "batch_size": 16,
    "negatives": 3,  # mined ones of a claim in a batch
    "query_tokens": 64,
    "document_tokens": 96,  # in training alone
    "freeze_embeddings": True,
}
PEER_STEPS: Final = 30  # in float32, which is slower
PEER_NUMBERS: Final[dict[str, Any]] = {
    "batch_size": 16,
    "negatives": 1,
    "query_tokens": LIMITS["document_tokens"],
    "document_tokens": LIMITS["document_tokens"],
}
PEER_RATE: Final = 5e-5
KEPT: Final = {  # sets that training on claims is not about
    "minilm": ("sts/en", "xquad/en"),
    "me5-small": ("sts/en", "sts/ko", "xquad/de-en"),
}
PARTS: Final = (*KINDS, "usual sum", "tuned sum")  # columns of a model with three kinds


def claims(place: Place) -> Path:
    """The training claims and their abstracts, without claims of the dev set and of the test.

    A claim that equals one of these but for case and spaces is left out too.
    """

    def rows() -> Iterable[Example]:
        train = read_folder(place.sets / SCIFACT, "train")
        dev = {train.queries[name] for name in dev_claims(train)}
        ours = [it for it in iter_examples(place.sets / SCIFACT) if it.query not in dev]
        measured_on = {normal_form(query) for query in both_claims(place.sets).queries}
        kept = [it for it in ours if normal_form(it.query) not in measured_on]
        print(f"claims: {left_out(ours, kept)}", flush=True)
        return kept

    return written(place.file("claims.jsonl", **split()), rows)


def left_out(rows: Sequence[object], kept: Sequence[object]) -> str:
    """What was left out, for the output of a cell."""
    return f"{len(rows) - len(kept)} of {len(rows)} rows equal one of the dev set or the test"


def mined_claims(place: Place, model: str) -> Path:
    """The same with negatives that the untouched model mined."""
    return place.file(f"claims.{model}.jsonl", **mining_numbers(model))


def mining_numbers(model: str) -> dict[str, Any]:
    """The numbers that decide the mined negatives."""
    rule = MINING[model]
    return {**split(), rule.kind: rule.value, "negatives": MINED}


def mined(job: Job, *, model: str) -> Found:
    """Mine negatives below a share of the positive's score, in all abstracts."""
    (report,) = mine(
        load(model),
        [open_source(claims(job.place))],
        mined_claims(job.place, model),
        mining=Mining(rule=MINING[model], negatives=MINED),
        documents=both_claims(job.place.sets).documents,
        work=job.place.file(f"mining-{model}", **mining_numbers(model)),
    )
    return Found(facts={"rows": report.rows, "negatives": report.negatives})


MINED: Final = 8  # negatives of a claim
MINING: Final = {
    "minilm": MiningRule(kind="percent", value=0.95),
    "me5-small": MiningRule(kind="relative", value=0.95),  # all of its cosines lie close together
}


def finetuned(
    job: Job,
    *,
    model: str,
    rate: float | None = None,
    rows: Callable[[Place, str], Path] = mined_claims,
    **numbers: Any,
) -> Found:
    """Fine-tune on claims; without a rate, with the one that was chosen with mined negatives."""
    place = job.place
    rate = rate or chosen_rate(place, model)
    of_stage = {name: numbers.pop(name) for name in ("ignore_rule",) if name in numbers}
    recipe = finetune(
        model=BASES[model],
        learning_rate=rate,
        steps=SCIFACT_STEPS[model],
        seed=job.seed,
        **SCIFACT_NUMBERS,
        **numbers,
    )
    recipe = replace(recipe, stages=(replace(recipe.stages[0], **of_stage),))
    facts = trained(job, recipe, {"pairs": [open_source(rows(place, model))]})
    return measured(place, load(job.folder / "model"), (SCIFACT, *KEPT[model]), rate=rate, **facts)


def chosen_rate(place: Place, model: str) -> float:
    """The learning rate that the dev set chose with mined negatives."""
    return float(place.facts(f"scifact/{model}-mined")["rate"])


RATES: Final = {"minilm": by_rate(5e-5, 1e-4), "me5-small": by_rate(5e-5)}
RULES: Final = {rule: {"ignore_rule": rule} for rule in ("margin", "percent")}


def untrained_kinds(job: Job) -> Found:
    """Measure the heads of the sparse and of the multi-vectors before any training."""
    torch.manual_seed(job.seed)
    return Found(*by_kind(job.place, load("minilm", kinds=KINDS)))


def three_kinds(job: Job) -> Found:
    """Train three kinds of vectors together, at the rate that was chosen with mined negatives."""
    place = job.place
    rate = chosen_rate(place, "minilm")
    recipe = bge_m3(
        model=BASES["minilm"],
        stages="unified",
        unified_learning_rate=rate,
        unified_steps=SCIFACT_STEPS["minilm"],
        unified_batch_size=SCIFACT_NUMBERS["batch_size"],
        unified_negatives=SCIFACT_NUMBERS["negatives"],
        query_tokens=SCIFACT_NUMBERS["query_tokens"],
        document_tokens=SCIFACT_NUMBERS["document_tokens"],
        freeze_embeddings=SCIFACT_NUMBERS["freeze_embeddings"],
        seed=job.seed,
    )
    facts = trained(job, recipe, {"examples": [open_source(mined_claims(place, "minilm"))]})
    model = load(job.folder / "model")
    answers, weights = by_kind(place, model)
    kept = measured(place, model, KEPT["minilm"], rate=rate, **facts, **weights)
    return Found({**answers, **kept.answers}, kept.facts)


def scored_claims(place: Place, _: str = "") -> Path:
    """The mined rows with scores by the sum of kinds."""
    return place.file("claims.scored.jsonl", **mining_numbers("minilm"))


def scored(job: Job) -> Found:
    """Score the documents of the mined rows by the tuned sum of the chosen model of three kinds."""
    place = job.place
    model = load(place.model("scifact/m3") / "model")
    teacher = EmbedderTeacher(model, "hybrid", place.facts("scifact/m3")["weights"])
    source = open_source(mined_claims(place, "minilm"))
    score = ScoreJob(load=lambda: teacher, fingerprint=teacher.fingerprint(), sources=[source])
    report = score_rows(score, scored_claims(place), place.file("scoring"))
    return Found(facts={"rows": report.rows, "positive": report.positive})


LESSONS: Final = {  # the scores are sums of up to three cosines, so their temperature is higher
    lesson: {"distil": lesson, "teacher_temperature": 0.1} for lesson in ("kl", "margin-mse")
}


def by_kind(place: Place, embedder: Embedder) -> tuple[Answers, dict[str, Any]]:
    """The answers by every kind and by two sums: with usual weights, with those tuned on dev."""
    data = both_claims(place.sets)
    found = dev_candidates(embedder, data, tasks=(), kinds=KINDS, depth=1_000)
    dev = slice(split()["dev"])
    tuned = tune(subset(data, dev), some_queries(found, dev))
    alone = [each_alone(KINDS)[kind] for kind in KINDS]
    columns = [
        evaluate_hits(data, found.hits(weights, 10), names=["ndcg@10"]).scores["ndcg@10"]
        for weights in (*alone, Weights(), tuned.weights)
    ]
    weights = {kind: tuned.weights.of(kind) for kind in KINDS}
    return split_answers(np.stack(columns, axis=1)), {"weights": weights}


def subset(data: RetrievalSet, rows: slice) -> RetrievalSet:
    """The set with some of its queries."""
    all_rows = range(len(data.queries))[rows]
    judged, offsets = data.judgements, data.judgements.offsets
    grades = [
        dict(
            zip(
                judged.docs[offsets[i] : offsets[i + 1]].tolist(),
                judged.grades[offsets[i] : offsets[i + 1]].tolist(),
                strict=True,
            )
        )
        for i in all_rows
    ]
    return replace(
        data,
        queries=data.queries[rows],
        query_ids=data.query_ids[rows],
        judgements=Judgements.of(grades),
    )


def some_queries(found: HybridHits, rows: slice) -> HybridHits:
    """The candidates of some queries."""
    return HybridHits(found.kinds, found.rows[rows], found.parts[:, rows])


STUDENT_LAYERS: Final = 3  # of the teacher's 12
STUDENT_STEPS: Final = 400
STUDENT_RATE: Final = 1e-3  # better than 2e-4 on the dev set, in shorter runs (docs/log.md)
STUDENT_BATCH: Final = 64  # texts of at most 128 tokens, the teacher's too


def student(job: Job) -> Found:
    """Teach three layers of me5-small what all of it says of abstracts and titles, unlabelled.

    Every second text is a title, which is read as a query.
    """
    place, base = job.place, BASES["me5-small"]
    recipe = distil(
        model=base,
        teacher=base,
        keep_layers=STUDENT_LAYERS,
        read_as="both",
        steps=STUDENT_STEPS,
        batch_size=STUDENT_BATCH,
        learning_rate=STUDENT_RATE,
        max_tokens=128,
        freeze_embeddings=True,
        seed=job.seed,
    )
    path = written_texts(place.file("abstracts.jsonl"), lambda: abstracts_and_titles(place.sets))
    facts = trained(job, recipe, {"texts": [open_texts(path)]})
    sets = (SCIFACT, *KEPT["me5-small"])
    return measured(place, load(job.folder / "model"), sets, rate=STUDENT_RATE, **facts)


def abstracts_and_titles(sets: Path) -> Iterable[str]:
    """Each abstract with its title, and then its title alone."""
    for line in (sets / SCIFACT / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        yield f"{document['title']} {document['text']}".strip()
        yield document["title"] or document["text"]


def asked_by_student(job: Job) -> Found:
    """The student encodes claims, and the teacher abstracts."""
    place, data = job.place, both_claims(job.place.sets)
    queries = load(place.model("scifact/student") / "model").encode(data.queries, "query")
    documents = load("me5-small").encode(data.documents, "document")
    found = evaluate_retrieval(data, queries, documents, names=["ndcg@10"])
    return Found(split_answers(np.asarray(found.scores["ndcg@10"])))


def one_positive(place: Place) -> Path:
    """Rows of one positive and as many negatives as a batch takes, for both libraries."""
    count = PEER_NUMBERS["negatives"]
    return written(
        place.file("claims.one.jsonl", **mining_numbers("minilm"), taken=count),
        lambda: (
            replace(
                it,
                positives=it.positives[:1],
                negatives=it.negatives[:count],
                positive_scores=None,
                negative_scores=None,
            )
            for it in iter_examples(mined_claims(place, "minilm"))
            if len(it.negatives) >= count
        ),
    )


def beside_peer(job: Job) -> Found:
    """Train in float32 as the peer does; see :func:`peer`."""
    recipe = finetune(
        model=BASES["minilm"],
        learning_rate=PEER_RATE,
        steps=PEER_STEPS,
        seed=job.seed,
        **PEER_NUMBERS,
    )
    stage = replace(recipe.stages[0], mask_duplicates=False)
    source = open_source(one_positive(job.place))
    facts = trained(job, replace(recipe, stages=(stage,)), {"pairs": [source]}, "float32")
    model = load(job.folder / "model")
    return measured(job.place, model, (SCIFACT,), rate=PEER_RATE, **facts)


def peer(job: Job) -> Found:
    """Train by sentence-transformers under the conditions of :func:`beside_peer`.

    Equal are the batches, the loss (equal texts stay negatives of each other), the lengths (256
    tokens, of queries too), the rate and its course, weight decay and clipping. The random numbers
    of dropout differ, and how each library sums.
    """
    size = PEER_NUMBERS["batch_size"]
    source = open_source(one_positive(job.place))
    warmup = round(0.1 * PEER_STEPS)  # as a stage of ours
    task = {
        "model": str(resolve(BASES["minilm"])),
        "batches": batches_in_order(source, steps=PEER_STEPS, batch_size=size, seed=job.seed),
        "learning_rate": PEER_RATE,
        "course": [factor("linear", n, PEER_STEPS, warmup=warmup) for n in range(PEER_STEPS)],
        "temperature": 0.05,
        "weight_decay": 0.01,
        "max_tokens": LIMITS["document_tokens"],
        "seed": job.seed,
        "out": str(job.folder / "model"),
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    script = Path(__file__).with_name("judged_peer.py")
    subprocess.run([job.place.peer, str(script), str(path)], check=True)
    facts = read_json(job.folder / "spent.json")
    facts |= {"rate": PEER_RATE, "steps": PEER_STEPS, "training_precision": "float32"}
    return measured(job.place, load(job.folder / "model"), (SCIFACT,), **facts)


def batches_in_order(
    source: Source, *, steps: int, batch_size: int, seed: int
) -> list[list[list[str]]]:
    """The batches of a training: query, positive and negatives of each row.

    The last batch of an epoch can be smaller.
    """
    sampler = Sampler([source], BatchPlan(batch_size, seed, epochs=steps))
    batches = (sampler.next_batch() for _ in range(steps))
    return [
        [[it.query, *it.positives, *it.negatives] for it in batch.examples([source])]
        for batch in batches
        if batch is not None
    ]


# ---- similarity ----------------------------------------------------------------------------------

STS_NUMBERS: Final[dict[str, Any]] = {
    "steps": 60,
    "batch_size": 32,
    "query_tokens": 64,
    "document_tokens": 64,
}


def sts_sets(lang: str) -> tuple[str, str]:
    """The test and the dev set of a language."""
    return f"sts/{lang}", f"sts/{lang} dev"


def unseen(place: Place, lang: str) -> SimilaritySet:
    """The training pairs, without those of the dev set and of the test.

    A pair is equal to another one in either order, but for case and spaces.
    """
    train, *others = (
        SimilaritySet.from_file(place.sets / "sts" / f"{STS[lang]}.{split}.jsonl")
        for split in ("train", "dev", "test")
    )
    measured_on = {pair for other in others for pair in unordered(other)}
    rows = [row for row, pair in enumerate(unordered(train)) if pair not in measured_on]
    print(f"sts/{lang}: {left_out(train.scores, rows)}", flush=True)  # pyright: ignore[reportArgumentType]
    return replace(train, pairs=train.pairs[rows], scores=train.scores[rows])


def unordered(data: SimilaritySet) -> list[frozenset[str]]:
    """The two texts of each pair, in the form in which equal ones are found."""
    forms = [normal_form(text) for text in data.texts]
    return [frozenset(forms[text] for text in pair) for pair in data.pairs.tolist()]


def as_positives(place: Place, lang: str) -> Path:
    """Rows of pairs that people scored 4 or more, with negatives by BM25, as in NV-Embed."""
    conversion = Conversion(task="sts", instruction="similar")

    def rows() -> Iterable[Example]:
        for it in convert_similarity(unseen(place, lang), conversion).rows:
            yield replace(it, query_prompt="query: ", document_prompt="query: ")

    numbers = {"alike": ALIKE, "unlike": UNLIKE, "negatives": conversion.negatives}
    return written(place.file(f"unseen.positives.{lang}.jsonl", **numbers), rows)


def graded(place: Place, lang: str) -> Path:
    """The scored pairs themselves, which CoSENT learns."""

    def records() -> Iterable[dict[str, Any]]:
        data = unseen(place, lang)
        for (one, other), score in zip(data.pairs.tolist(), data.scores.tolist(), strict=True):
            yield {"text1": data.texts[one], "text2": data.texts[other], "score": score}

    return written_records(place.file(f"unseen.graded.{lang}.jsonl"), records)


STS_METHODS: Final = {"positives": as_positives, "cosent": graded}


STS_RATES: Final = by_rate(1e-5, 3e-5, 1e-4)


def similar(job: Job, *, method: str, lang: str, rate: float | None = None) -> Found:
    """Train on scored pairs in one way; without a rate, with the one chosen for English."""
    rate = rate or float(job.place.facts(f"similarity/{method}-en")["rate"])
    recipe = finetune(
        model=BASES["me5-small"], learning_rate=rate, seed=job.seed, negatives=1, **STS_NUMBERS
    )
    source = open_source(STS_METHODS[method](job.place, lang))
    facts = trained(job, recipe, {"pairs": [source]})
    return measured(job.place, load(job.folder / "model"), sts_sets(lang), rate=rate, **facts)


# ---- words ---------------------------------------------------------------------------------------

DECODER_SETS: Final = (WORDS, "sts/en")
DECODER_LIMITS: Final = {"query_tokens": 128, "document_tokens": 128}
MNTP_STEPS: Final = 50  # of 8 blocks of 256 tokens
SIMCSE_STEPS: Final = 30  # of 64 sentences


def decoder_stage(job: Job, *, stage: str, base: str) -> Found:
    """Train one stage of LLM2Vec on descriptions of packages."""
    after = BASES.get(base) or str(job.place.model(base) / "model")
    recipe = llm2vec(
        model=after,
        stages=stage,
        mntp_steps=MNTP_STEPS,
        mntp_batch_size=8,
        mntp_block_tokens=256,
        mntp_learning_rate=3e-4,
        simcse_steps=SIMCSE_STEPS,
        simcse_batch_size=64,
        simcse_learning_rate=1e-4,
        simcse_max_tokens=64,
        max_tokens=128,
        seed=job.seed,
    )
    known = [row for row in packages("en").values() if row["split"] == "train"]
    texts = {"mntp": (row["long"] for row in known), "simcse": sentences_of(known)}
    path = written_texts(job.place.file(f"{stage}.jsonl"), lambda: texts[stage])
    data = {recipe.stages[0].data: [open_texts(path)]}
    facts = trained(job, recipe, data)
    model = load(job.folder / "model", **DECODER_LIMITS)
    return measured(job.place, model, DECODER_SETS, **facts)


# ---- across languages ----------------------------------------------------------------------------


def on_packages(job: Job) -> Found:
    """Train on descriptions of packages in English and Korean: another domain, two languages."""
    sources = [
        open_source(
            written(
                job.place.file(f"packages.{name}.jsonl"),
                partial(debian_pairs, name, "train"),
            )
        )
        for name in DEBIAN_TESTED
    ]
    recipe = finetune(
        model=BASES["me5-small"],
        steps=40,
        batch_size=48,
        learning_rate=3e-5,
        query_tokens=64,
        document_tokens=128,
        seed=job.seed,
    )
    facts = trained(job, recipe, {"pairs": sources})
    return measured(job.place, load(job.folder / "model"), ACROSS, **facts)


# ---- 8-bit weights -------------------------------------------------------------------------------

CALIBRATING: Final = 500  # descriptions in each language
IN_8_BITS: Final = {"minilm": ("en",), "me5-small": ("en", "ko")}  # languages of these
MEASURED_IN_8_BITS: Final = {
    "minilm": (SCIFACT, *KEPT["minilm"]),
    "me5-small": (SCIFACT, *(f"debian/{name}" for name in DEBIAN_TESTED)),
}


def in_8_bits(job: Job, *, model: str) -> Found:
    """Measure an untouched model with 8-bit weights, calibrated on descriptions of packages."""
    texts: list[str] = []
    for lang in IN_8_BITS[model]:
        known = [row["long"] for row in packages(lang).values() if row["split"] == "train"]
        texts += known[:: max(1, len(known) // CALIBRATING)][:CALIBRATING]
    made = quantized(Embedder.load(BASES[model], **LIMITS), texts)
    facts = {"mean_cosine": round(made.mean, 6), "layers_in_float": len(made.left)}
    return measured(job.place, made.embedder, MEASURED_IN_8_BITS[model], **facts)


# ---- all of them ---------------------------------------------------------------------------------


def all_cells() -> dict[str, Cell]:
    """Every cell by its name, those that decide most first."""
    parts = (_scifact(), _similarity(), _words(), _languages(), _int8())
    return {cell.name: cell for cell in chain(*parts)}


def _scifact() -> Iterable[Cell]:
    for model, minutes in (("minilm", 3), ("me5-small", 6)):
        sets = (SCIFACT, *KEPT[model])
        yield Cell(f"scifact/{model}", partial(untouched, model=model, sets=sets), minutes)
    sets = (SCIFACT, *sorted({*chain(*KEPT.values())}))
    yield Cell("scifact/bm25", partial(baselines, sets=sets), 1)
    for model, minutes in (("minilm", 10), ("me5-small", 12)):
        name, rows = f"scifact/{model}-mined", f"scifact/{model}-rows"
        yield Cell(rows, partial(mined, model=model), minutes / 2 - 1)
        run = partial(finetuned, model=model)
        rates = RATES[model]
        yield from variants(name, run, rates, SCIFACT_DEV, minutes=minutes, needs=(rows,))
    chosen, run = ("scifact/minilm-mined",), partial(finetuned, model="minilm")
    plain = partial(run, rows=lambda place, _: claims(place))
    yield Cell("scifact/minilm-pairs", plain, 7, chosen, seeds=3)
    yield from variants("scifact/minilm-rule", run, RULES, SCIFACT_DEV, minutes=10, needs=chosen)
    rows = ("scifact/minilm-rows",)
    yield Cell("scifact/m3-untrained", untrained_kinds, 6)
    yield Cell("scifact/m3", three_kinds, 14, chosen, seeds=3, keeps_model=True)
    yield Cell("scifact/m3-scores", scored, 5, ("scifact/m3",))
    learned = partial(run, rows=scored_claims)
    about: dict[str, Any] = {"minutes": 10, "needs": (*chosen, "scifact/m3-scores")}
    yield from variants("scifact/minilm-teacher", learned, LESSONS, SCIFACT_DEV, **about)
    yield Cell("scifact/student", student, 14, seeds=3, keeps_model=True)
    yield Cell("scifact/student-queries", asked_by_student, 6, ("scifact/student",))
    yield Cell("scifact/float32", beside_peer, 10, rows, seeds=3)
    yield Cell("scifact/sentence-transformers", peer, 10, rows, seeds=3)


def _similarity() -> Iterable[Cell]:
    sets = tuple(chain(*map(sts_sets, STS)))
    yield Cell("similarity/words", partial(baselines, sets=sets), 0.5)
    yield Cell("similarity/me5-small", partial(untouched, model="me5-small", sets=sets), 2)
    for method in STS_METHODS:
        english, run = f"similarity/{method}-en", partial(similar, method=method)
        dev, minutes = sts_sets("en")[1], 3.5 if method == "positives" else 2.5
        yield from variants(english, partial(run, lang="en"), STS_RATES, dev, minutes=minutes)
        for lang in STS:
            if lang != "en":
                name = f"similarity/{method}-{lang}"
                yield Cell(name, partial(run, lang=lang), minutes, (english,), seeds=3)


def _words() -> Iterable[Cell]:
    yield Cell("words/label", partial(baselines, sets=DECODER_SETS), 0.5)
    for attention in ("causal", "bidirectional"):
        run = partial(
            untouched, model="smollm2", sets=DECODER_SETS, attention=attention, **DECODER_LIMITS
        )
        yield Cell(f"words/{attention}", run, 5)
    run = partial(decoder_stage, stage="mntp", base="smollm2")
    yield Cell("words/mntp", run, 15, keeps_model=True)
    run = partial(decoder_stage, stage="simcse", base="words/mntp")
    yield Cell("words/simcse", run, 15, ("words/mntp",))


def _languages() -> Iterable[Cell]:
    yield Cell("languages/bm25", partial(baselines, sets=ACROSS), 1)
    yield Cell("languages/me5-small", partial(untouched, model="me5-small", sets=ACROSS), 4)
    yield Cell("languages/packages", on_packages, 10, seeds=3)


def _int8() -> Iterable[Cell]:
    for model, minutes in (("minilm", 5), ("me5-small", 10)):
        yield Cell(f"int8/{model}", partial(in_8_bits, model=model), minutes)

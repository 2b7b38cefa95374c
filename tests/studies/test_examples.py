"""The studies of ``examples/studies``: which cells they have, and toy runs of them."""

import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.cli.study import app_of
from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.measures.by_kind import measure_kinds
from tercet.evaluate.measures.retrieval import measure
from tercet.evaluate.report.intervals import paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import COLUMNS
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.objectives.unified import Unified
from tercet.recipes.arctic_embed import arctic_embed as arctic_recipe
from tercet.recipes.finetune import finetune
from tercet.studies.tables import Picture, Results, Table
from tercet.training.loop import train
from tests.studies.toy_studies import QUIET, STUDIES, kept, made_set, rows, run, write_sets
from tests.toy import SENTENCES, save_model

arctic_embed, bge_m3, english_gap, nv_embed, transfer = (
    import_module(f"examples.studies.{name}")
    for name in ("arctic_embed", "bge_m3", "english_gap", "nv_embed", "transfer")
)
ARCTIC: dict[str, Any] = {
    "pretraining_steps": 2,
    "pretraining_batch_size": 5,
    "pretraining_learning_rate": 1e-3,
    "finetuning_steps": 1,
    "finetuning_batch_size": 4,
    "finetuning_negatives": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    save_model(folder / "bert", "bert")
    save_model(folder / "xlm", "xlm-roberta")
    write_sets(folder, ("en", "de"))
    write_examples(folder / "mined.jsonl", rows())
    write_examples(folder / "test.jsonl", rows(count=9))
    records = [{"text": text, "label": f"kind {i % 2}"} for i, text in enumerate(SENTENCES)]
    (folder / "groups.jsonl").write_text("".join(json.dumps(it) + "\n" for it in records))
    return folder


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.py")), ids=lambda file: file.stem)
def test_a_study_has_a_help_with_an_example(file):
    (command,) = app_of(file).registered_commands
    assert command.callback is not None
    assert f"Example: tercet study examples/studies/{file.name} --" in (
        command.callback.__doc__ or ""
    )


def made_up(cells: Any, sets: Any, answers: Any, stages: int = 2) -> Results:
    random = np.random.default_rng(0)
    found = {c.name: [[answers(random) for _ in range(stages)]] for c in cells}
    return Results({each.name: each for each in sets}, found)


# NV-Embed


def nv_cells() -> list[Any]:
    return list(nv_embed.cells(retrieval_steps=3, blended_steps=2, model="x", latents=6))


def test_nv_embed_has_a_grid_and_three_more_schedules_of_equal_length():
    cells = {cell.name: cell.model for cell in nv_cells()}
    assert len(cells) == len(nv_cells()) == 11
    assert [len(recipe.stages) for recipe in cells.values()] == [2] * 8 + [1, 1, 2]
    assert {sum(stage.steps or 0 for stage in recipe.stages) for recipe in cells.values()} == {5}
    for name, policy in (("one-stage-in-batch", "all"), ("one-stage-own", "none")):
        assert [(s.data, s.in_batch) for s in cells[name].stages] == [("blended", policy)]
    stages = [(stage.data, stage.in_batch) for stage in cells["reversed"].stages]
    assert stages == [("blended", "none"), ("retrieval", "all")]


def test_nv_embeds_tables_have_the_papers_layout():
    sets = [made_set("test"), made_set("groups", "Clustering")]
    results = made_up(nv_cells(), sets, lambda r: {"test": r.random(4), "groups": r.random(4)})
    parts = list(nv_embed.report(sets, results))
    tables = {part.title: part.rows for part in parts if isinstance(part, Table)}
    assert [part.name for part in parts if isinstance(part, Picture)] == ["schedules", "poolings"]
    grid = tables["Attention and pooling, after stage 1 (retrieval)"]
    assert grid[0] == ["both ways / causal", "EOS", "mean", "latent", "self-att.", "words"]
    firsts = ["Retrieval, nDCG@10", "Clustering, v-measure", "Average", "95 % of the average"]
    assert [row[0] for row in grid[1:]] == firsts
    first = {name: seeds[0][0]["test"] for name, seeds in results.answers.items()}
    means = [first[f"{attention}-eos"].mean() for attention in ("bidirectional", "causal")]
    assert grid[1][1] == f"{means[0]:.3f} / {means[1]:.3f}"
    leads = tables["Differences on the same texts, after stage 1 (retrieval)"]
    assert len(leads) == 1 + 4 + 3
    lead = paired_difference(first["bidirectional-latent"], first["bidirectional-mean"])
    row = next(row for row in leads if row[0] == "latent - mean")
    assert row[2] == f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
    assert [row[0] for row in tables["What the second stage adds"][1:]] == list(
        nv_embed.POOLINGS.values()
    )
    assert len(tables["Schedules"]) == 1 + 4 + 3


def test_nv_embed_measures_each_set_after_each_stage(folder, decoder_folder, tmp_path):
    files = [
        f"--{flag}={folder / name}"
        for flag, name in (
            ("data", "mined.jsonl"),
            ("tasks", "mined.jsonl"),
            ("test", "test.jsonl"),
            ("test", "groups.jsonl"),
        )
    ]
    numbers = {
        "retrieval_steps": 1,
        "blended_steps": 1,
        "batch_size": 6,
        "latents": 6,
        "max_tokens": 48,
    }
    only = ("--only=bidirectional-eos", "--only=one-stage-own")
    run(STUDIES / "nv_embed.py", tmp_path, *files, *only, model=decoder_folder, **numbers)
    for stage in (0, 1):
        assert kept(tmp_path, "bidirectional-eos", "groups", stage=stage).shape == (5, 12)
    assert kept(tmp_path, "one-stage-own", "test").shape == (9,)
    assert "- eos" not in (tmp_path / "table.md").read_text()


# BGE-M3


def flat(objective: Unified) -> dict[str, Any]:
    """Its fields and those of its mixture."""
    numbers = asdict(objective)
    return numbers | numbers.pop("mixture")


def test_bge_m3s_cells_differ_from_the_full_one_in_what_their_names_say():
    numbers = {"unified_batch_size": 8, "unified_steps": 1}
    full = bge_m3.bge_m3(stages="unified", **numbers)
    cells = {cell.name: cell.model for cell in bge_m3.others(**numbers)}
    assert sorted(cells) == sorted(name for _, names in bge_m3.PARTS.values() for name in names)
    before = flat(full.stages[0].objective)
    changed = {}
    for name, recipe in cells.items():
        *_, unified = recipe.stages
        assert isinstance(unified.objective, Unified) and unified.batch_size == 8
        now = flat(unified.objective)
        changed[name] = {field: value for field, value in now.items() if value != before[field]}
        staged = name.split("-") if name.startswith("retromae") else ["unified"]
        assert [stage.name for stage in recipe.stages] == staged
    assert before["kinds"] == KINDS and before["distilled"] == 1
    assert changed == {
        "no-distillation": {"distilled": 0.0},
        "retromae-unified": {},
        "retromae-contrastive-unified": {},
        "dense": {"kinds": ("dense",)},
        "dense-sparse": {"kinds": ("dense", "sparse")},
        "dense-multi": {"kinds": ("dense", "multi")},
        "teacher-0.5": {"distilled": 0.5},
        "teacher-2": {"distilled": 2.0},
    }


def test_bge_m3_measures_each_kind_and_leaves_open_what_a_cell_does_not_make(folder, tmp_path):
    files = [f"--data={folder / 'mined.jsonl'}", f"--test={folder / 'test.jsonl'}"]
    only = [f"--only={name}" for name in ("full", "dense-sparse", "retromae-unified")]
    sizes = {
        "unified_steps": 1,
        "retromae_steps": 1,
        "unified_batch_size": 4,
        "retromae_batch_size": 4,
    }
    sizes["multi_dim"] = 8
    run(
        STUDIES / "bge_m3.py",
        tmp_path,
        *files,
        *only,
        "--keep-models",
        model=folder / "xlm",
        **sizes,
    )
    data = RetrievalSet.from_examples(folder / "test.jsonl")
    for cell in ("full", "dense-sparse"):
        expected = measure_kinds(Embedder.load(tmp_path / f"cells/{cell}/seed-0/model"), data)
        answers = kept(tmp_path, cell, "test")
        assert answers.shape == (9, len(COLUMNS))
        for column, name in enumerate((*KINDS, expected.total)):
            if name in expected.results:
                assert np.array_equal(answers[:, column], expected.results[name].scores["ndcg@10"])
            else:
                assert np.isnan(answers[:, column]).all()
    first = kept(tmp_path, "retromae-unified", "test")
    assert np.isnan(first[:, 1:3]).all()  # heads that nothing has trained yet
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]
    kinds = tables["Kinds trained together"]
    assert kinds[0] == ["nDCG@10", "dense", "sparse", "multi", "sum"]
    assert [row[0] for row in kinds[1:]] == ["full", "dense-sparse", "words (BM25)"]
    assert [cell == "-" for cell in kinds[2]] == [False, False, False, True, False]
    one, other = (
        kept(tmp_path, c, "test", stage=n)[:, 0] for c, n in (("full", 0), ("retromae-unified", 1))
    )
    lead = paired_difference(one, other)
    leads = tables["Stages: differences on the same queries, with 95 % intervals"]
    assert leads[1][1] == f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
    assert "Weight of self-distillation" not in tables
    assert {path.stem for path in tmp_path.glob("*.png")} == {"stages", "kinds"}


# Arctic-Embed


def test_arctic_embeds_cells_differ_from_the_full_one_in_one_thing():
    read = {name: [] for name in ("pairs", "mined", "pairs-en", "mined-en", "pairs-10")}
    cells = {cell.name: cell for cell in arctic_embed.cells(read, [0.95], ARCTIC)}
    stages = {
        name: (cells[cell.after].model.stages[0], cell.model.stages[0])
        for name, cell in cells.items()
        if cell.after
    }
    assert {name: tuple(stage.data for stage in both) for name, both in stages.items()} == {
        "full": ("pairs", "mined"),
        "all-en": ("pairs", "mined-en"),
        "threshold-0.95": ("pairs", "pairs"),
        "en-all": ("pairs-en", "mined"),
        "en-en": ("pairs-en", "mined-en"),
        "matryoshka-finetuning": ("pairs", "mined"),
        "matryoshka-none": ("pairs", "mined"),
        "filter-10": ("pairs-10", "mined"),
    }
    assert stages["threshold-0.95"][1].refresh.mining.rule.value == 0.95
    dims = {n: [stage.objective.dims for stage in stages[n]] for n in ("full", "matryoshka-none")}
    assert dims == {"full": [(256,), (256,)], "matryoshka-none": [(), ()]}


def run_arctic(folder: Path, out: Path, *words: str, **more: Any) -> str:
    files = [
        f"--{flag}={folder / (prefix + lang)}.jsonl"
        for lang in ("en", "de")
        for flag, prefix in (("data", ""), ("mined", "mined-"))
    ]
    flags = {"model": folder / "bert", "test": folder / "sets", "short": 16}
    return run(STUDIES / "arctic_embed.py", out, *files, *words, **{**flags, **ARCTIC, **more})


def test_arctic_embed_trains_a_shared_pretraining_once_as_a_run_of_both_stages(folder, tmp_path):
    only = (
        "--only=full",
        "--only=all-en",
        "--only=filter-5",
        f"--filtered=5={folder / 'de.jsonl'}",
    )
    printed = run_arctic(folder, tmp_path / "out", *only)
    assert printed.count("pretraining: 2 steps") == 2
    assert printed.count("finetuning: 1 steps") == 3
    recipe = arctic_recipe(model=str(folder / "bert"), dims=[16], **ARCTIC)
    data = {
        name: [open_source(folder / f"{prefix}{lang}.jsonl") for lang in ("en", "de")]
        for name, prefix in (("pairs", ""), ("mined", "mined-"))
    }
    model = train(recipe, data, tmp_path / "by-hand", run=QUIET)
    for lang in ("en", "de"):
        examined = RetrievalSet.from_examples(folder / f"sets/{lang}.jsonl")
        for column, dims in enumerate((None, 16)):
            expected = measure(model, examined, dims=dims).result.scores["ndcg@10"]
            assert np.allclose(kept(tmp_path / "out", "full", lang)[:, column], expected)
    tables = json.loads((tmp_path / "out/results.json").read_text())["tables"]
    assert list(tables) == [arctic_embed.TITLES[part] for part in ("data", "filters")]
    table = tables[arctic_embed.TITLES["data"]]
    assert table[0] == ["nDCG@10", "en, whole", "en, at 16", "others, whole", "others, at 16"]
    assert [row[0] for row in table[1:]] == ["full", "all-en", "all-en - full"]
    lead = paired_difference(*(kept(tmp_path / "out", c, "en")[:, 1] for c in ("all-en", "full")))
    assert table[3][2] == f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"


def test_arctic_embed_refuses_what_it_cannot_vary(folder, tmp_path):
    with pytest.raises(RecipeError, match="no threshold of mining would matter"):
        arctic_embed.require_bare([open_source(folder / "mined-en.jsonl")])
    assert "give NAME=FOLDER" in run_arctic(folder, tmp_path, "--filtered=folder", status=2)
    alone = [open_source(folder / "en.jsonl")]
    assert arctic_embed.english_of(alone, alone) == {}


# The English gap


def test_all_arms_of_the_english_gap_but_the_first_read_equally_many_pairs(folder, tmp_path):
    files = {"english": folder / "en.jsonl", "other": folder / "de.jsonl", "test": folder / "sets"}
    numbers = {**ARCTIC, "pretraining_steps": 4, "dims": 16, "data": folder / "mined.jsonl"}
    run(
        STUDIES / "english_gap.py",
        tmp_path,
        "--keep-models",
        model=folder / "bert",
        **files,
        **numbers,
    )

    def pairs_read(arm: str, stage: str) -> int:
        log = tmp_path / f"cells/{arm}/seed-0/{stage}/log.jsonl"
        return sum(json.loads(line).get("examples", 0) for line in log.read_text().splitlines())

    arms = ("en", "en+en", "en+de")
    assert [pairs_read(arm, "1-pretraining") for arm in arms] == [10, 20, 20]
    assert [pairs_read(arm, "2-finetuning") for arm in arms] == [4, 4, 4]
    record = json.loads((tmp_path / "results.json").read_text())
    table = record["tables"]["English, and the mean of the other languages"]
    header = ["en, raw", "en, fine-tuned", "others, raw", "others, fine-tuned"]
    assert table[0] == ["nDCG@10", *header]
    assert [row[0] for row in table[1:]] == [*arms, "en - en+en", "en+de - en+en"]
    lead = paired_difference(*(kept(tmp_path, arm, "en", stage=1) for arm in ("en+de", "en+en")))
    assert table[-1][2] == f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
    odd = {**numbers, "pretraining_steps": 3}
    assert "pretraining_steps must be even" in run(
        STUDIES / "english_gap.py", tmp_path, **files, **odd, status=2
    )


def test_the_english_gaps_corpora_are_equally_long_and_of_whole_batches(folder, tmp_path):
    paths = (folder / "en.jsonl", [folder / "de.jsonl"], tmp_path)
    for size, limit, expected in ((5, None, 10), (4, 7, 4), (11, None, 11)):
        found = english_gap.equal_corpora(*paths, batch_size=size, rows=limit)
        assert {lang: len(source) for lang, source in found.items()} == dict.fromkeys(
            ("en", "de"), expected
        )
    with pytest.raises(RecipeError, match="the smallest corpus has 11 pairs, and a batch 12"):
        english_gap.equal_corpora(*paths, batch_size=12, rows=None)
    with pytest.raises(RecipeError, match="its language 'de' has a corpus already"):
        english_gap.equal_corpora(
            paths[0], [*paths[1], *paths[1]], tmp_path, batch_size=5, rows=None
        )


# Transfer


@pytest.fixture(scope="module")
def series(folder) -> Path:
    recipe = finetune(model=str(folder / "bert"), steps=2, batch_size=6, learning_rate=1e-3)
    source = open_source(folder / "mined.jsonl")
    train(recipe, [source], folder / "run", run=replace(QUIET, models_at=(0, 1, 2)))
    return folder / "run"


def test_transfer_shows_each_language_raw_and_after_fine_tuning(folder, series, tmp_path):
    write_examples(tmp_path / "sets/da.jsonl", rows(count=5))
    files = [
        f"--test={folder / 'sets'}",
        f"--test={tmp_path / 'sets'}",
        f"--data={folder / 'mined.jsonl'}",
    ]
    numbers = {
        "finetuning_steps": 1,
        "finetuning_batch_size": 4,
        "dims": 16,
        "seeds": 1,
        "seen": "en",
    }
    printed = run(STUDIES / "transfer.py", tmp_path / "out", *files, checkpoints=series, **numbers)
    assert "cell 6 of 6: 2-fine-tuned" in printed
    recipe = arctic_recipe(
        model=str(series / "steps/1"),
        stages="finetuning",
        dims=[16],
        finetuning_steps=1,
        finetuning_batch_size=4,
    )
    by_hand = train(
        recipe, {"mined": [open_source(folder / "mined.jsonl")]}, tmp_path / "by-hand", run=QUIET
    )
    data = RetrievalSet.from_examples(folder / "sets/de.jsonl")
    for model, cell in (
        (Embedder.load(series / "steps/1"), "1-raw"),
        (by_hand, "1-fine-tuned"),
    ):
        expected = measure(model, data).result.scores["ndcg@10"]
        assert np.allclose(kept(tmp_path / "out", cell, "de"), expected)
    tables = json.loads((tmp_path / "out/results.json").read_text())["tables"]
    seen, unseen, families = tables.values()
    assert [row[0] for row in seen[1:]] == ["en (seen)"]
    assert [row[0] for row in unseen[1:]] == ["da (unseen)", "de (unseen)"]
    assert [row[0] for row in families[1:]] == ["Germanic (seen)", "Germanic (unseen)"]
    assert unseen[0][1:4] == ["raw 1", "raw 2", "change"]
    means = {n: kept(tmp_path / "out", f"{n}-fine-tuned", "de").mean() for n in (0, 1, 2)}
    assert unseen[2][4:6] == [f"{means[1]:.3f}", f"{means[2]:.3f}"]
    assert unseen[2][-1] == str(max(means, key=lambda step: means[step]))
    assert (tmp_path / "out/transfer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("steps", "wanted", "step"),
    [((0, 4, 10, 20, 40), None, 4), ((0, 40), None, 0), ((2, 8, 130), None, 8), ((0, 9), 0, 0)],
)
def test_transfers_reference_is_the_first_checkpoint_at_six_percent(steps, wanted, step):
    assert transfer.reference_of(steps, wanted) == step


def test_transfer_refuses_what_is_no_series_reference_or_seen_language(folder, series):
    names = [str(series / "model"), str(folder / "bert")]
    assert [(s, p.name) for s, p in transfer.models_of(names).items()] == [
        (1, "model"),
        (2, "bert"),
    ]
    numbered = [str(series / f"steps/{step}") for step in (2, 0)]
    assert list(transfer.models_of(numbered)) == [0, 2]
    for alone in ([str(folder / "bert")], [numbered[0], numbered[0]]):
        with pytest.raises(RecipeError, match="two checkpoints or more is needed, each once"):
            transfer.models_of(alone)
    for wanted in (3, 9):
        with pytest.raises(RecipeError, match="must be a checkpoint before the last; got"):
            transfer.reference_of((0, 2, 9), wanted)
    sets = transfer.open_languages([folder / "sets"])
    with pytest.raises(RecipeError, match="--seen has 'ko', but no evaluation set"):
        transfer.groups_of(sets, ["en", "ko"])

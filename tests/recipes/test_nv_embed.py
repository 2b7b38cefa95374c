import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import ModelError, RecipeError
from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder, Settings
from tercet.models.formats.manifest import manifest
from tercet.models.merge import load_adapters
from tercet.models.network.backbone import Backbone
from tercet.models.settings import as_prompt
from tercet.recipes.finetune import finetune
from tercet.recipes.nv_embed import nv_embed
from tercet.training.log import read
from tercet.training.loop import build, train, with_prompts_of
from tercet.training.memory import graph_bytes
from tercet.training.recipe import Run
from tercet.types import Example
from tests import toy
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, save_steps=2)
FIND, KIND = as_prompt("Find it"), as_prompt("Tell its kind")


@pytest.fixture
def data(tmp_path) -> dict[str, Any]:
    pairs = [
        Example(t.split()[-1], (t,), (SENTENCES[(i + 1) % 12],), query_prompt=FIND, task="find")
        for i, t in enumerate(SENTENCES)
    ]
    kinds = [
        Example(
            t,
            (SENTENCES[(i + 2) % 12],),
            (SENTENCES[(i + 1) % 12], SENTENCES[(i + 3) % 12]),
            query_prompt=KIND,
            document_prompt=KIND,
            task="kind",
            in_batch="none",
        )
        for i, t in enumerate(SENTENCES)
    ]
    write_examples(tmp_path / "find.jsonl", pairs)
    write_examples(tmp_path / "kind.jsonl", kinds)
    find, kind = open_source(tmp_path / "find.jsonl"), open_source(tmp_path / "kind.jsonl")
    return {"retrieval": [find], "blended": [find, kind]}


def small(base: Path, **changes: Any):
    numbers: dict[str, Any] = {
        "retrieval_steps": 4,
        "blended_steps": 4,
        "batch_size": 6,
        "latents": 8,
        "heads": 4,
        "max_tokens": 64,
        "retrieval_learning_rate": 1e-2,
        "blended_learning_rate": 1e-2,
        "lora_rank": 4,
    }
    return nv_embed(model=str(base), **(numbers | changes))


def test_the_recipe_has_the_papers_numbers():
    recipe = nv_embed()
    first, second = recipe.stages
    lora = recipe.model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.1)
    assert (first.learning_rate, second.learning_rate) == (2e-5, 1.5e-5)
    assert (first.batch_size, first.negatives, recipe.model.query_tokens) == (128, 7, 512)
    assert (first.in_batch, second.in_batch, second.mixing) == ("all", "none", "blended")
    assert first.schedule == second.schedule == "linear"
    assert first.weight_decay == 0
    assert nv_embed(retrieval_steps=20_000).stages[0].warmup_steps == 500
    published = nv_embed(preset="nv-embed").model.layer
    assert published == LayerSettings(latents=512, heads=8, head_size="hidden", init="normal")


@pytest.mark.parametrize("pooling", ["latent", "self_attention", "mean", "eos"])
def test_each_pooling_learns_is_saved_and_gives_the_same_vectors_back(
    decoder_folder, data, tmp_path, pooling
):
    model = train(small(decoder_folder, pooling=pooling), data, tmp_path / "run", run=QUIET)
    back = Embedder.load(tmp_path / "run/model")
    texts = ["find me", *SENTENCES]
    assert np.array_equal(model.encode(texts, "query"), back.encode(texts, "query"))
    assert back.settings == model.settings
    assert (back.layer is not None) == (pooling in ("latent", "self_attention"))
    assert back.backbone.attention == "bidirectional"
    start = Embedder.load(decoder_folder, attention="bidirectional")
    assert not np.allclose(start.encode(texts), back.encode(texts), atol=1e-3)
    losses = [line["loss"] for line in read(tmp_path / "run/1-retrieval/log.jsonl")]
    assert losses[-1] < losses[0]


def test_every_weight_of_the_layer_is_trained_and_of_the_decoder_the_low_rank_updates(
    decoder_folder, data, tmp_path
):
    recipe = small(decoder_folder, init="normal")
    model = train(recipe, data, tmp_path / "run", run=QUIET)
    assert model.layer is not None
    first = Embedder.load(tmp_path / "run/1-retrieval/model").layer
    assert first is not None
    for (name, one), other in zip(
        first.state_dict().items(), model.layer.state_dict().values(), strict=True
    ):
        assert not np.array_equal(one.numpy(), other.numpy()), name
    embedding = "embed_tokens.weight"
    base = Backbone.load(decoder_folder).model.state_dict()[embedding]
    assert np.array_equal(base.numpy(), model.backbone.model.state_dict()[embedding].numpy())


def test_the_prompts_of_the_data_are_stored_and_used_by_default(decoder_folder, data, tmp_path):
    model = train(small(decoder_folder), data, tmp_path / "run", run=QUIET)
    assert model.settings.prompts == {"query": FIND}
    assert model.settings.task_prompts == {
        "find": {"query": FIND},
        "kind": {"query": KIND, "document": KIND},
    }
    kind = model.encode(["chess"], "document", task="kind")
    assert not np.array_equal(kind, model.encode(["chess"], "document"))
    assert np.array_equal(
        model.encode(["chess"], "query", task="find"), model.encode(["chess"], "query")
    )
    said = manifest(str(tmp_path / "run/model"))
    assert said["prompt of a query, kind"] == repr(KIND)
    assert said["layer before pooling"] == "latent: 8 latents, 4 heads"


def test_an_instruction_of_the_recipe_stays_the_default(data):
    chosen = Settings(prompts={"query": "mine: "})
    assert with_prompts_of([data["blended"]], chosen).prompts == {"query": "mine: "}
    assert with_prompts_of([[]], chosen) == chosen


def test_the_first_prompts_of_a_task_count_and_any_before_an_empty_one(tmp_path):
    rows = {
        "a": [Example("q", ("p",), query_prompt="first: ", document_prompt="", task="t")],
        "b": [Example("r", ("s",), query_prompt="second: ", document_prompt="doc: ", task="t")],
    }
    for name, examples in rows.items():
        write_examples(tmp_path / f"{name}.jsonl", examples)
    sources = [open_source(tmp_path / f"{name}.jsonl") for name in rows]
    settings = with_prompts_of([sources], Settings())
    assert settings.task_prompts == {"t": {"query": "first: ", "document": "doc: "}}


def test_rows_without_a_prompt_are_not_trained_with_that_of_another_task(
    decoder_folder, data, tmp_path, monkeypatch
):
    """Retrieval that brings none, beside a task that brings one for both sides."""
    bare = [
        Example(t.split()[-1], (t,), (SENTENCES[(i + 1) % 12],)) for i, t in enumerate(SENTENCES)
    ]
    write_examples(tmp_path / "bare.jsonl", bare)
    source = open_source(tmp_path / "bare.jsonl")
    given: set[tuple[str, str]] = set()
    tokenize = Embedder.tokenize

    def seen(self: Embedder, texts: Any, role: Any, prompts: Any, *cut: Any) -> Any:
        given.update((role, prompt) for prompt in prompts)
        return tokenize(self, texts, role, prompts, *cut)

    monkeypatch.setattr(Embedder, "tokenize", seen)
    both = {"retrieval": [source], "blended": [source, data["blended"][1]]}
    recipe = small(decoder_folder, retrieval_steps=2, blended_steps=2)
    model = train(recipe, both, tmp_path / "run", run=QUIET)
    assert given == {("query", ""), ("document", ""), ("query", KIND), ("document", KIND)}
    assert not any(model.settings.prompts.values())
    assert model.settings.task_prompts == {"kind": {"query": KIND, "document": KIND}}


def test_the_end_token_is_pooled_and_the_instruction_is_not(decoder_folder):
    recipe = small(decoder_folder, instruction="Find it")
    embedder = build(recipe.model)
    texts = embedder.tokenize(["chess"], "query").pack()
    end = embedder.tokenizer.stock.eos_token_id
    assert texts.ids[-1] == end
    assert bool(texts.pooled[-1])
    assert not bool(texts.pooled[0])


def test_rows_without_negatives_are_told_where_they_would_teach_nothing(
    decoder_folder, data, tmp_path, caplog
):
    bare = [Example(t.split()[-1], (t,)) for t in SENTENCES]
    write_examples(tmp_path / "bare.jsonl", bare)
    source = open_source(tmp_path / "bare.jsonl")
    given = {"retrieval": [source], "blended": [source, data["blended"][1]]}
    with pytest.raises(RecipeError, match=r"bare.jsonl: no example has negatives, and the stage"):
        train(small(decoder_folder), given, tmp_path / "run", run=QUIET)
    assert not (tmp_path / "run/1-retrieval").exists()  # told before anything is trained
    some = [*bare[:5], Example("other", ("a text",), ("another",))]
    write_examples(tmp_path / "some.jsonl", some)
    source = open_source(tmp_path / "some.jsonl")
    with caplog.at_level(logging.WARNING, "tercet"):
        recipe = small(decoder_folder, stages="blended", blended_steps=1)
        train(recipe, {"blended": [source]}, tmp_path / "more", run=QUIET)
    assert "5 of 6 examples have no negatives and teach nothing in the stage" in caplog.text


def test_a_source_remembers_the_first_prompts_of_each_task(data):
    find, kind = data["blended"]
    assert find.prompts == {"find": {"query": FIND}}
    assert kind.prompts == {"kind": {"query": KIND, "document": KIND}}
    assert (find.without_negatives, kind.without_negatives) == (0, 0)


def test_only_the_first_layers_are_kept_on_request(decoder_folder, tmp_path):
    whole, cut = Backbone.load(decoder_folder), Backbone.load(decoder_folder, keep_layers=2)
    assert len(cut.model.layers) == 2
    for one, other in zip(
        whole.model.layers[:2].parameters(), cut.model.layers.parameters(), strict=True
    ):
        assert np.array_equal(one.detach().numpy(), other.detach().numpy())
    for wrong in (0, 4):
        with pytest.raises(ModelError, match=f"keep_layers must be between 1 and 3; got {wrong}"):
            Backbone.load(decoder_folder, keep_layers=wrong)
    embedder = Embedder.load(decoder_folder, keep_layers=2)
    embedder.save(tmp_path / "cut")
    toy.align(tmp_path / "cut/model.safetensors")
    assert np.array_equal(Embedder.load(tmp_path / "cut").encode(["a"]), embedder.encode(["a"]))


def test_another_layer_takes_the_place_of_a_trained_one_with_a_warning(
    decoder_folder, data, tmp_path, caplog
):
    train(
        small(decoder_folder, retrieval_steps=1, blended_steps=1), data, tmp_path / "run", run=QUIET
    )
    model = str(tmp_path / "run/model")
    same = LayerSettings(latents=8, heads=4, init="normal")  # of the same sizes, however it begins
    kept, trained = Embedder.load(model, layer=same), Embedder.load(model)
    assert np.array_equal(kept.encode(["a"]), trained.encode(["a"]))
    with caplog.at_level(logging.WARNING, "tercet"):
        other = Embedder.load(model, layer=replace(same, latents=4))
    assert "is replaced by a new one" in caplog.text
    assert other.layer is not None and len(other.layer.latents) == 4
    assert Embedder.load(model, layer=None).layer is None
    for pooling in ("mean", "eos"):
        assert build(small(Path(model), pooling=pooling).model).layer is None


def test_a_model_whose_layer_was_not_copied_is_refused(decoder_folder, data, tmp_path):
    train(
        small(decoder_folder, retrieval_steps=1, blended_steps=1), data, tmp_path / "run", run=QUIET
    )
    shutil.rmtree(tmp_path / "run/model/1_Layer")
    with pytest.raises(ModelError, match=r"a trained layer, and its folder \(1_Layer\) is not"):
        Embedder.load(tmp_path / "run/model")
    (tmp_path / "run/model/tercet.json").unlink()  # as sentence-transformers would leave it
    with pytest.raises(ModelError, match="has a trained layer"):
        Embedder.load(tmp_path / "run/model")


def test_an_adapter_keeps_its_layer_alone_and_merged(decoder_folder, tmp_path):
    flagged = tmp_path / "flagged"
    Embedder.load(decoder_folder, attention="bidirectional").save(flagged)
    embedder = Embedder.load(flagged, layer=LayerSettings(latents=5, heads=2))
    embedder.backbone.add_lora(rank=3, alpha=6, dropout=0.0)
    embedder.eval()
    embedder.save_adapter(tmp_path / "adapter", str(flagged))
    expected = embedder.encode(list(SENTENCES))
    loaded, merged = Embedder.load(tmp_path / "adapter"), load_adapters([tmp_path / "adapter"])
    for other in (loaded, merged):
        assert np.allclose(other.encode(list(SENTENCES)), expected, atol=1e-6)


def test_low_rank_updates_and_a_layer_take_memory_of_their_own(decoder_folder):
    embedder = build(small(decoder_folder).model)
    bare = graph_bytes(embedder.backbone)
    assert graph_bytes(embedder.backbone, layer=embedder.settings.layer) > bare
    embedder.backbone.add_lora(rank=4, alpha=8, dropout=0.1)
    assert graph_bytes(embedder.backbone) > 1.4 * bare


def test_finetune_goes_on_with_a_trained_layer(decoder_folder, data, tmp_path):
    train(
        small(decoder_folder, retrieval_steps=1, blended_steps=1), data, tmp_path / "run", run=QUIET
    )
    base = str(tmp_path / "run/model")
    sources: list[Source] = data["retrieval"]
    tuned = train(
        finetune(model=base, steps=2, batch_size=6), sources, tmp_path / "more", run=QUIET
    )
    before = Embedder.load(base).layer
    assert tuned.layer is not None and before is not None
    assert not np.array_equal(before.latents.detach().numpy(), tuned.layer.latents.detach().numpy())


def test_prompts_of_tasks_come_back_from_the_files_of_sentence_transformers(
    decoder_folder, data, tmp_path
):
    train(
        small(decoder_folder, retrieval_steps=1, blended_steps=1), data, tmp_path / "run", run=QUIET
    )
    before = Embedder.load(tmp_path / "run/model").settings
    (tmp_path / "run/model/tercet.json").unlink()  # as it is where that library saved it again
    after = Embedder.load(tmp_path / "run/model", attention="bidirectional").settings
    assert (after.prompts, after.task_prompts) == (before.prompts, before.task_prompts)

"""BGE-M3: dense, sparse and multi-vector retrieval from one model (arXiv 2402.03216).

RetroMAE on texts makes an encoder that compresses a text into a vector. Contrastive training of the
dense vector on pairs follows. Then all three kinds are trained together on examples with hard
negatives, and the weighted sum of their scores teaches each of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

from tercet.data.batches.shuffling import CutName
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind, Weights, parse_kinds
from tercet.models.choices import PoolingName
from tercet.recipes import flags
from tercet.recipes.flags import lora_of, prompts_by_role
from tercet.types import Distillation, Vocabulary

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe, Refresh

WARMUP: Final = 0.1  # share of a stage's steps

Train: TypeAlias = Literal["all", "heads"]
ByLength: TypeAlias = Literal["fit", "bge-m3-80gb"]
RefreshBy: TypeAlias = Literal["dense", "sparse", "multi", "hybrid"]


def bge_m3(
    base: flags.Base = "me5-small",
    stages: Annotated[str, "Of retromae, contrastive and unified, in order, with commas."] = (
        "retromae,contrastive,unified"
    ),
    kinds: Annotated[str, "Of vectors to train together: dense, sparse, multi, with commas."] = (
        "dense,sparse,multi"
    ),
    multi_dim: Annotated[int | None, "Width of a token's vector; None: the model's."] = None,
    retromae_steps: Annotated[int, "Of the stage retromae."] = 1_000,
    contrastive_steps: Annotated[int, "Of the stage contrastive."] = 1_000,
    steps: Annotated[int, "Of the stage unified."] = 1_000,
    retromae_batch_size: Annotated[int, "Blocks of texts a step."] = 32,
    contrastive_batch_size: Annotated[int, "Pairs a step, over all processes."] = 256,
    batch_size: Annotated[int, "Queries a step of the stage unified, over all processes."] = 64,
    retromae_learning_rate: Annotated[float, "Of the stage retromae, at its peak."] = 7e-5,
    contrastive_learning_rate: Annotated[float, "Of the stage contrastive, at its peak."] = 5e-5,
    learning_rate: Annotated[float, "Of the stage unified, at its peak."] = 1e-5,
    encoder_mask: Annotated[float, "Share of words hidden from the encoder."] = 0.3,
    decoder_mask: Annotated[float, "Share of tokens hidden from each row of the decoder."] = 0.5,
    vocabulary: Annotated[
        Vocabulary, "Tokens that RetroMAE names: those that the data have, or all."
    ] = "seen",
    temperature: flags.Temperature = 0.02,
    negatives: Annotated[int, "Mined negatives of a query, at most."] = 7,
    sum_weights: Annotated[str, "Of dense, sparse and multi scores in their sum."] = "1,0.3,1",
    self_distillation: Annotated[bool, "Let the sum of the scores teach each kind."] = True,
    lesson_weights: Annotated[
        str | None, "Of what it teaches dense, sparse and multi; None: those of the losses."
    ] = None,
    distil_after: Annotated[int, "Optimizer steps of the stage unified before that."] = 0,
    dense_loss: Annotated[float, "Weight of the dense loss; 0 leaves it out."] = 1.0,
    sparse_loss: Annotated[float, "Weight of the sparse loss."] = 0.1,
    multi_loss: Annotated[float, "Weight of the multi-vector loss."] = 1.0,
    sum_loss: Annotated[float, "Weight of the loss of the sum."] = 1.0,
    teacher: Annotated[
        Distillation,
        "Learn the scores that examples bring, if they are a reranker's; not mining's cosines.",
    ] = "none",
    dims: Annotated[
        list[int] | None, "A shorter dense width to train too; may be repeated."
    ] = None,
    batching: Annotated[
        ByLength | None, "Batch sizes by length: what memory takes, or the paper's tables a device."
    ] = None,
    length_edges: flags.LengthEdges = None,
    refresh_steps: Annotated[
        int | None, "Mine negatives anew with the model in training, every so many steps."
    ] = None,
    refresh_by: Annotated[
        RefreshBy, "Which of its scores say what is near; hybrid: their sum, by sum_weights."
    ] = "dense",
    shuffle_segments: Annotated[
        float, "Share of the positives whose thirds change places; the paper: 0.002."
    ] = 0.0,
    shuffle_at: Annotated[CutName, "Where positives are cut for that."] = "characters",
    pooling: Annotated[PoolingName | None, "first as in the paper; None: the model's own."] = None,
    cls_every: Annotated[
        int | None, "The start token again before every so many tokens (MCLS; with first)."
    ] = None,
    attention: flags.TurnDecoder = None,
    patience: flags.Patience = None,
    train: Annotated[Train, "In the stage unified: every weight, or the new heads alone."] = "all",
    freeze_embeddings: flags.FreezeEmbeddings = False,
    lora_rank: flags.LoraRank = None,
    query_prompt: Annotated[str | None, "Put before every query; None: the model's own."] = None,
    document_prompt: Annotated[str | None, "Put before every document."] = None,
    query_tokens: flags.QueryTokens = None,
    document_tokens: flags.DocumentTokens = None,
    positions: Annotated[
        int | None, "Give an encoder room for texts of so many tokens; train it on such texts."
    ] = None,
    retromae_tokens: Annotated[int, "Of a text in RetroMAE, and of a block of texts."] = 512,
    seed: Annotated[int, "Of batches, masks, dropout and new weights."] = 0,
) -> "Recipe":
    """Train one model for dense, sparse and multi-vector retrieval, each taught by their sum."""
    from tercet.losses.unified import Mixture
    from tercet.objectives.contrastive import Contrastive
    from tercet.objectives.retromae import RetroMAE
    from tercet.objectives.unified import Unified
    from tercet.training.recipe import Model, Recipe, Stage, chosen

    trained, summed = parse_kinds(kinds), Weights.parse(sum_weights)
    edges = tuple(length_edges or ())
    shuffles = {"shuffle_segments": shuffle_segments, "shuffle_at": shuffle_at}
    built = {
        "retromae": Stage(
            name="retromae",
            objective=RetroMAE(
                encoder_mask=encoder_mask,
                decoder_mask=decoder_mask,
                max_tokens=retromae_tokens,
                vocabulary=vocabulary,
                head=base,
                head_needed=False,
            ),
            data="texts",
            keep="last",
            steps=retromae_steps,
            batch_size=retromae_batch_size,
            learning_rate=retromae_learning_rate,
            warmup=WARMUP,
        ),
        "contrastive": Stage(
            name="contrastive",
            objective=Contrastive(temperature=temperature, dims=tuple(dims or ())),
            data="pairs",
            steps=contrastive_steps,
            batch_size=contrastive_batch_size,
            negatives=0,
            learning_rate=contrastive_learning_rate,
            warmup=WARMUP,
            batching="bge-m3-pairs-80gb" if batching == "bge-m3-80gb" else batching,
            length_edges=edges,
            **shuffles,
        ),
        "unified": Stage(
            name="unified",
            objective=Unified(
                kinds=trained,
                mixture=Mixture(
                    temperature=temperature,
                    in_sum=summed,
                    in_loss=Weights(dense_loss, sparse_loss, multi_loss),
                    of_sum=sum_loss,
                    distilled=1.0 if self_distillation else 0.0,
                    in_distilled=None if lesson_weights is None else Weights.parse(lesson_weights),
                    distil=teacher,
                ),
                distil_after=distil_after,
                dims=tuple(dims or ()),
            ),
            data="examples",
            steps=steps,
            batch_size=batch_size,
            negatives=negatives,
            learning_rate=learning_rate,
            warmup=WARMUP,
            refresh=_refresh(refresh_steps, refresh_by, trained, summed),
            patience=patience,
            batching="bge-m3-finetune-80gb" if batching == "bge-m3-80gb" else batching,
            length_edges=edges,
            **shuffles,
        ),
    }
    wanted = chosen(built, stages)
    if train == "heads" and [stage.name for stage in wanted] != ["unified"]:
        raise RecipeError(
            "training the heads alone leaves the other stages nothing to do; "
            "give --stages unified as well"
        )
    return Recipe(
        name="bge-m3",
        model=Model(
            base=base,
            attention=attention,
            pooling=pooling,
            kinds=tuple(kind for kind in KINDS if kind in {"dense", *trained}),
            multi_dim=multi_dim,
            cls_every=cls_every,
            freeze_backbone=train == "heads",
            freeze_embeddings=freeze_embeddings,
            positions=positions,
            lora=lora_of(lora_rank),
            prompts=prompts_by_role(query_prompt, document_prompt),
            query_tokens=query_tokens,
            document_tokens=document_tokens,
        ),
        stages=wanted,
        seed=seed,
        paper="arXiv 2402.03216",
        notes={
            "temperature": "named in no text of the paper; 0.02 as in its code",
            "masks": "RetroMAE's shares are not stated for M3; 0.3 and 0.5 as in its code",
            "pooling": "the base model's own by default; the paper's is the first token",
            "distil_after": "the paper warms up about 6,000 steps without; 0 as in its script",
            "heads": "sparse starts as the overlap of words, multi as a rotation of the states",
        },
    )


def _refresh(
    every: int | None, by: RefreshBy, kinds: Sequence[Kind], weights: Weights
) -> "Refresh | None":
    """How negatives are mined in mid-run; a hybrid sum has the kinds in training only."""
    from tercet.training.recipe import RANKS_10_TO_210, Refresh

    if every is None:
        if by != "dense":
            raise RecipeError(f"refresh_by is {by}, but nothing is refreshed; give refresh_steps")
        return None
    needed = {"hybrid": {"dense", "sparse"}}.get(by, {by})
    if missing := sorted(needed - {"dense", *kinds}):
        raise RecipeError(
            f"refresh_by is {by}, but the model makes no {' and no '.join(missing)} vectors; "
            "train these kinds too, or refresh by dense"
        )
    summed = weights.only(("dense", *kinds)) if by == "hybrid" else None
    return Refresh(every=every, mining=replace(RANKS_10_TO_210, by=by, weights=summed))

"""BGE-M3: dense, sparse and multi-vector retrieval from one model (arXiv 2402.03216).

RetroMAE on texts makes an encoder that compresses a text into a vector. Contrastive training of the
dense vector on pairs follows. Then all three kinds are trained together on examples with hard
negatives, and the weighted sum of their scores teaches each of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

from tercet.data.batches.shuffling import CutName
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind, Weights, parse_kinds
from tercet.recipes import flags
from tercet.recipes.flags import divided, lora_of, prompts_by_role, recorded
from tercet.types import Vocabulary

if TYPE_CHECKING:
    from tercet.training.recipe import Recipe, Refresh

SHARES: Final[Mapping[str, int]] = {"retromae": 1, "contrastive": 1, "unified": 1}  # of the steps
WARMUP: Final = 0.1  # share of a stage's steps

Train: TypeAlias = Literal["all", "heads"]
ByLength: TypeAlias = Literal["fit", "bge-m3-80gb"]
RefreshBy: TypeAlias = Literal["dense", "sparse", "multi", "hybrid"]


@recorded
def bge_m3(
    model: flags.ModelName = "me5-small",
    stages: flags.Stages = "retromae,contrastive,unified",
    steps: flags.Steps = None,
    retromae_steps: flags.StageSteps = None,
    contrastive_steps: flags.StageSteps = None,
    unified_steps: flags.StageSteps = None,
    kinds: Annotated[
        str, "Kinds of vectors to train: dense, sparse and multi, with commas between."
    ] = "dense,sparse,multi",
    multi_dim: Annotated[
        int | None, "Width of a token's vector. Default: the model's width.", "coordinates"
    ] = None,
    retromae_batch_size: Annotated[int, "Blocks of texts in a step.", "blocks"] = 32,
    contrastive_batch_size: Annotated[int, "Pairs in a step, over all processes.", "pairs"] = 256,
    unified_batch_size: Annotated[int, "Queries in a step, over all processes.", "queries"] = 64,
    retromae_learning_rate: Annotated[float, "Learning rate at its peak."] = 7e-5,
    contrastive_learning_rate: Annotated[float, "Learning rate at its peak."] = 5e-5,
    unified_learning_rate: Annotated[float, "Learning rate at its peak."] = 1e-5,
    retromae_encoder_mask: Annotated[
        float, "Share of the words that are masked in the encoder.", "share"
    ] = 0.3,
    retromae_decoder_mask: Annotated[
        float, "Share of the tokens that are masked in each row of the decoder.", "share"
    ] = 0.5,
    retromae_vocabulary: Annotated[
        Vocabulary, "Tokens that RetroMAE chooses from: those that occur in the data, or all."
    ] = "seen",
    retromae_max_tokens: Annotated[
        int, "Length of a block of texts; longer texts are cut.", "tokens"
    ] = 512,
    temperature: flags.Temperature = 0.02,
    unified_negatives: flags.Negatives = 7,
    unified_sum_weights: Annotated[
        str, "Weights of dense, sparse and multi scores in their sum, with commas between."
    ] = "1,0.3,1",
    unified_self_distillation: Annotated[bool, "Let the sum of the scores teach each kind."] = True,
    unified_distillation_weights: Annotated[
        str | None,
        "Weights of what the sum teaches dense, sparse and multi. Default: those of the losses.",
    ] = None,
    unified_distil_after: Annotated[
        int, "Optimizer steps before self-distillation begins.", "steps"
    ] = 0,
    unified_dense_loss: Annotated[float, "Weight of the dense loss; 0 leaves it out."] = 1.0,
    unified_sparse_loss: Annotated[float, "Weight of the sparse loss."] = 0.1,
    unified_multi_loss: Annotated[float, "Weight of the multi-vector loss."] = 1.0,
    unified_sum_loss: Annotated[float, "Weight of the loss of the sum."] = 1.0,
    unified_distil: flags.Distil = "none",
    unified_distil_weight: flags.DistilWeight = 1.0,
    unified_teacher_temperature: flags.TeacherTemperature = 1.0,
    dims: flags.ShorterDims = None,
    batching: Annotated[
        ByLength | None,
        "Batch sizes by length: what memory takes (fit), or the paper's tables for a device of "
        "80 GB.",
    ] = None,
    length_edges: flags.LengthEdges = None,
    unified_refresh_steps: Annotated[
        int | None,
        "Mine negatives with the model in training after this many steps, again and again.",
        "steps",
    ] = None,
    unified_refresh_by: Annotated[
        RefreshBy, "Scores by which it mines; hybrid: their sum by sum_weights."
    ] = "dense",
    shuffle_segments: Annotated[
        float, "Share of the positives whose thirds change places; 0.002 in the paper.", "share"
    ] = 0.0,
    shuffle_at: Annotated[CutName, "Where positives are cut for that."] = "characters",
    pooling: flags.ModelsPooling = None,
    cls_every: Annotated[
        int | None, "Repeat the start token after this many tokens (MCLS; with first).", "tokens"
    ] = None,
    attention: flags.TurnDecoder = None,
    unified_patience: flags.Patience = None,
    unified_train: Annotated[Train, "Train every weight, or the new heads alone."] = "all",
    freeze_embeddings: flags.FreezeEmbeddings = False,
    lora_rank: flags.LoraRank = None,
    query_prompt: flags.QueryPrompt = None,
    document_prompt: flags.DocumentPrompt = None,
    query_tokens: flags.QueryTokens = None,
    document_tokens: flags.DocumentTokens = None,
    positions: Annotated[
        int | None,
        "Extend an encoder's table of positions to texts of this length; train on such texts.",
        "tokens",
    ] = None,
    seed: flags.Seed = 0,
) -> "Recipe":
    """Train one model for dense, sparse and multi-vector retrieval, each taught by their sum."""
    from tercet.losses.unified import Mixture
    from tercet.objectives.contrastive import Contrastive
    from tercet.objectives.retromae import RetroMAE
    from tercet.objectives.unified import Unified
    from tercet.training.recipe import Model, Recipe, Stage, chosen

    trained, summed = parse_kinds(kinds), Weights.parse(unified_sum_weights)
    own = {"retromae": retromae_steps, "contrastive": contrastive_steps, "unified": unified_steps}
    steps_of = divided(steps, stages, SHARES, own)
    edges = tuple(length_edges or ())
    shuffles = {"shuffle_segments": shuffle_segments, "shuffle_at": shuffle_at}
    built = {
        "retromae": Stage(
            name="retromae",
            objective=RetroMAE(
                encoder_mask=retromae_encoder_mask,
                decoder_mask=retromae_decoder_mask,
                max_tokens=retromae_max_tokens,
                vocabulary=retromae_vocabulary,
                head=model,
                head_needed=False,
            ),
            data="texts",
            keep="last",
            steps=steps_of["retromae"],
            batch_size=retromae_batch_size,
            learning_rate=retromae_learning_rate,
            warmup=WARMUP,
        ),
        "contrastive": Stage(
            name="contrastive",
            objective=Contrastive(temperature=temperature, dims=tuple(dims or ())),
            data="pairs",
            steps=steps_of["contrastive"],
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
                    in_loss=Weights(unified_dense_loss, unified_sparse_loss, unified_multi_loss),
                    of_sum=unified_sum_loss,
                    distilled=1.0 if unified_self_distillation else 0.0,
                    in_distilled=None
                    if unified_distillation_weights is None
                    else Weights.parse(unified_distillation_weights),
                    distil=unified_distil,
                    distil_weight=unified_distil_weight,
                    teacher_temperature=unified_teacher_temperature,
                ),
                distil_after=unified_distil_after,
                dims=tuple(dims or ()),
            ),
            data="examples",
            steps=steps_of["unified"],
            batch_size=unified_batch_size,
            negatives=unified_negatives,
            learning_rate=unified_learning_rate,
            warmup=WARMUP,
            refresh=_refresh(unified_refresh_steps, unified_refresh_by, trained, summed),
            patience=unified_patience,
            batching="bge-m3-finetune-80gb" if batching == "bge-m3-80gb" else batching,
            length_edges=edges,
            **shuffles,
        ),
    }
    wanted = chosen(built, stages)
    if unified_train == "heads" and [stage.name for stage in wanted] != ["unified"]:
        raise RecipeError(
            "unified_train=heads trains nothing in the other stages; set stages to unified as well"
        )
    return Recipe(
        name="bge-m3",
        model=Model(
            base=model,
            attention=attention,
            pooling=pooling,
            kinds=tuple(kind for kind in KINDS if kind in {"dense", *trained}),
            multi_dim=multi_dim,
            cls_every=cls_every,
            freeze_backbone=unified_train == "heads",
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

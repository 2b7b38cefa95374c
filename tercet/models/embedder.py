"""The embedder: texts in, vectors out, with all settings saved beside the weights."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tercet.errors import RecipeError
from tercet.files.progress import bar
from tercet.kinds import Kind
from tercet.models.choices import Activation, Attention, DenseSettings, PoolingName, Window
from tercet.models.devices import encoded_tokens
from tercet.models.encode_loop import (
    Step,
    batch_by_batch,
    on_host,
    text_vectors,
    token_states,
    word_states,
)
from tercet.models.formats.parts import ModelParts
from tercet.models.formats.sentence_transformer_module import as_sentence_transformer
from tercet.models.formats.tercet_folder import load_parts, save_adapter, save_parts
from tercet.models.network.backbone import Backbone
from tercet.models.network.cpu.int8 import int8_layers
from tercet.models.network.dense_layers import DenseLayers
from tercet.models.network.fingerprints import add_weights
from tercet.models.network.heads import Heads, SpecialIds
from tercet.models.network.latent_attention import AttentionLayer, build_layer
from tercet.models.network.pooling import POOLINGS, cls_mean, weighted_mean
from tercet.models.network.reader import Network, Reader, Readers
from tercet.models.network.words import Words
from tercet.models.settings import Settings, changed
from tercet.models.texts import checked_sentences, checked_texts, role_of
from tercet.models.tokens import Tokenizer, Tokens
from tercet.segments import Packed
from tercet.types import Role, RoleName, Sentences, Texts
from tercet.vectors import Vectors

__all__ = ["Embedder", "Settings"]

# Settings added after the first indexes: with their default value they leave fingerprints alone.
_LATER: Final = (
    "suffixes",
    "pool_suffix",
    "pool_special",
    "echo",
    "on_empty",
    "layer",
    "append_end",
    "kinds",
    "multi_dim",
    "cls_every",
    "default_prompt",
    "rules",
    "dense_layers",
)
_NOT_IN_VECTORS: Final = (
    "weights",
    "ranges",
    "shares_space_with",
    "distilled_as",
)  # settings that change no vector

log = logging.getLogger("tercet")


class EncodeOptions(TypedDict, total=False):
    """Options of :meth:`Embedder.encode`, which explains them."""

    task: str | None
    dims: int | None
    progress: bool
    attention: Attention | None
    pooling: PoolingName | None
    echo: bool | None


class Embedder(nn.Module):
    """A backbone, a pooling, and the settings that the model was trained with.

    Use ``load`` for a saved model. Made directly, it takes a ``tokenizer`` of transformers, the
    ``layer`` that ``settings.layer`` describes, the ``heads`` of ``settings.kinds`` and the
    ``dense_layers`` of these settings; None makes new ones with random weights, to be trained.

    Examples:
        >>> embedder = Embedder.load("minilm")
        >>> queries = embedder.encode(["edit text in a terminal"], "query")
        >>> documents = embedder.encode(["a small editor", "a web server"])
        >>> scores = queries @ documents.T  # [1, 2]: cosines
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any,
        settings: Settings,
        layer: AttentionLayer | None = None,
        heads: Heads | None = None,
        dense_layers: DenseLayers | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if layer is None and settings.layer is not None:
            layer = build_layer(settings.layer, backbone.hidden)
        weight = next(backbone.parameters())
        self.layer = None if layer is None else layer.to(weight.device, weight.dtype)
        if heads is None:
            heads = Heads(backbone.hidden, settings.kinds, settings.multi_dim)
        self.heads = heads.to(weight.device, weight.dtype)
        if dense_layers is None:
            dense_layers = DenseLayers(backbone.hidden, settings.dense_layers)
        self.dense_layers = dense_layers.to(weight.device, weight.dtype)
        self.tokenizer = Tokenizer(tokenizer, append_end=settings.ends)
        limit = backbone.max_tokens
        self.settings = replace(
            settings,
            query_tokens=min(settings.query_tokens, limit),
            document_tokens=min(settings.document_tokens, limit),
        )
        self._batch_tokens: int | None = None  # None: what suits the device
        self._readers = Readers()
        self.about: Mapping[str, Any] = {}  # how it was made, saved with it: stages, data, seed
        self._cuts_reported: set[Role] = set()
        self.train(backbone.training)

    # ---- for training ------------------------------------------------------------------------

    def forward(self, texts: Packed) -> Float[Tensor, "texts dim"]:
        """Return pooled vectors, not normalized: a loss scales each width by itself."""
        return self.dense_layers(pooled(self.states(texts), texts, self.settings))

    def vectors(self, texts: Packed, kinds: Sequence[Kind] | None = None) -> Vectors:
        """Return vectors of these kinds, or of all that the model makes, for a loss.

        Dense vectors are not normalized, token vectors are. A sparse vector has a weight for each
        pooled token that is not special, so the same token id may occur several times.
        """
        wanted = self.kinds if kinds is None else kinds
        network = self._network
        return self._vectors(network.states(texts), texts, wanted, network)

    def _vectors(
        self, states: Tensor, texts: Packed, kinds: Sequence[Kind], network: Network
    ) -> Vectors:
        if unknown := set(kinds) - {*self.kinds, "dense"}:
            raise RecipeError(
                f"the model makes no {' and no '.join(sorted(unknown))} vectors; it makes "
                f"{', '.join(self.kinds)}"
            )
        inserted = self.settings.cls_every is not None
        special = SpecialIds.of(self.tokenizer.stock, inserted=inserted)
        dense = None
        if "dense" in kinds:
            dense = network.dense_layers(pooled(states, texts, self.settings))
        return Vectors(
            dense,
            network.heads.terms(states, texts, special) if "sparse" in kinds else None,
            network.heads.rows(states, texts, special) if "multi" in kinds else None,
        )

    def states(self, texts: Packed) -> Float[Tensor, "tokens hidden"]:
        """Return one state per token, which the pooling and the heads read."""
        return self._network.states(texts)

    @property
    def _network(self) -> Network:
        return Network(self.backbone, self.layer, self.heads, self.dense_layers)

    def train(self, mode: bool = True) -> "Embedder":
        """Set the mode as in torch; training frees what was kept for inference."""
        if mode:
            self._readers.clear()
        return super().train(mode)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of vectors that the model makes: dense, sparse, multi."""
        return self.settings.kinds

    @property
    def dim(self) -> int:
        """The full width of a dense vector: that of the states, or of the last dense layer."""
        return self.dense_layers.width

    def add_dense_layer(
        self, width: int, *, activation: Activation = "identity", bias: bool = False
    ) -> None:
        """Append a new dense layer to those after the pooling, to be trained.

        Its weight is orthogonal, so a wider space keeps all cosines until it is trained. What the
        settings say of the vectors before is dropped: shorter widths, ranges of codes, a teacher.

        Raises:
            RecipeError: for a width or an activation that a layer cannot have.

        Examples:
            >>> student = Embedder.load("minilm")  # 384 coordinates
            >>> student.add_dense_layer(768)
        """
        self.dense_layers.add(DenseSettings(width=width, activation=activation, bias=bias))
        self.dense_layers.to(self.device, next(self.backbone.parameters()).dtype)
        self.settings = replace(
            self.settings,
            dense_layers=self.dense_layers.settings,
            dims=(),
            ranges={},
            shares_space_with=(),
            distilled_as=(),
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.backbone.device

    @property
    def batch_tokens(self) -> int:
        """Tokens that are encoded together; assign a number to set it.

        By default 2,048 on a CPU. On a GPU it depends on the free memory and on the model, of which
        a small one needs more tokens to keep the GPU busy.
        """
        if self._batch_tokens is not None:
            return self._batch_tokens
        return encoded_tokens(self.backbone.model, self.device)

    @batch_tokens.setter
    def batch_tokens(self, tokens: int | None) -> None:
        self._batch_tokens = tokens

    def tokenize(
        self,
        texts: Texts,
        role: RoleName,
        prompts: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        *,
        cuts: Literal["start", "end"] | None = None,
    ) -> Tokens:
        """Return token ids of texts after their prompts; None takes the role's prompt and limit.

        ``cuts`` says which part of too long texts is left out; None: what the tokenizer says.

        Raises:
            TextError: if texts are not a list of strings of valid Unicode.
            RecipeError: for an unknown role.
        """
        of, settings = role_of(role), self.settings
        before = settings.prompt(role) if prompts is None else prompts
        longest = max_tokens or settings.max_tokens(of)
        form = settings.form(of) if cuts is None else replace(settings.form(of), cuts=cuts)
        return self.tokenizer(checked_texts(texts), longest, before, form)

    # ---- encoding ----------------------------------------------------------------------------

    @overload
    def encode(
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        output: Literal["texts"] = "texts",
        **options: Unpack[EncodeOptions],
    ) -> Float[np.ndarray, "texts dim"]: ...

    @overload
    def encode(
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        output: Literal["tokens", "words"],
        **options: Unpack[EncodeOptions],
    ) -> list[np.ndarray]: ...

    def encode(  # noqa: PLR0913 (independent choices, each with a default)
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
        attention: Attention | None = None,
        pooling: PoolingName | None = None,
        echo: bool | None = None,
        output: Literal["texts", "tokens", "words"] = "texts",
    ) -> Float[np.ndarray, "texts dim"] | list[np.ndarray]:
        """Return dense vectors of texts as a float32 array, in the order given.

        Texts are sorted by length and run in batches of ``batch_tokens`` tokens. The first time
        that texts of a role are cut to the model's limit, a warning says how many. Any number of
        threads may encode at the same time. Vectors do not depend on autocast.

        Args:
            texts: any number of texts; the role's prompt is put before each.
            role: "query" for what is searched with, "document" for what is found, or a synonym
                such as "passage". "default" takes the model's default prompt, if it has one, and is
                "document" otherwise.
            task: take the prompt of this task, or the prompt of this name, instead of the role's.
            dims: keep only this many leading coordinates, scaled to unit length again.
            progress: show a progress bar.
            attention: read a decoder in this direction, in this call only.
            pooling: use this pooling instead of the model's, in this call only.
            echo: read each text twice and pool the second copy (arXiv 2402.15449), or not, in this
                call only.
            output: "texts" for one vector per text; "tokens" for the states of each text's pooled
                tokens, or "words" for the mean state of each word between white space, both not
                normalized and before any dense layer.

        Returns:
            An array of shape [texts, dim], of unit length if ``settings.normalize``; for "tokens"
            and "words" a list with one array of shape [tokens or words, dim] per text.

        Raises:
            TextError: if ``texts`` is not a list of strings of valid Unicode; it names the row.
            RecipeError: for an unknown role, task or pooling, ``dims`` out of range, or an empty
                text if ``settings.on_empty`` is "error".
            ModelError: if a vector holds NaN or infinity, an encoder is asked to be causal, or the
                tokenizer lacks an end-of-text token that is needed.

        Examples:
            >>> vectors = embedder.encode(["a small editor"], dims=128)  # [1, 128], float32
        """
        of_tokens = output != "texts"
        width = self._width(dims, of_tokens=of_tokens)
        given = {"pooling": pooling, "echo": echo}
        settings = changed(self.settings, {k: v for k, v in given.items() if v is not None})
        texts, words = checked_texts(texts), output == "words"
        with (
            self.reading(attention) as reader,
            self._batches(reader, texts, role, settings, task, progress, spans=words) as steps,
        ):
            if output == "tokens":
                return token_states(steps, len(texts), width)
            if words:
                return word_states(steps, [Words.of(text) for text in texts], width)
            unit, network = settings.normalize or dims is not None, reader.network
            found = np.empty((len(texts), width), dtype=np.float32)

            def finished(step: Step) -> Vectors:
                vectors = network.dense_layers(pooled(step.states, step.texts, settings))
                vectors = vectors[:, :width].float()
                return Vectors(F.normalize(vectors, dim=1) if unit else vectors)

            for step, vectors in on_host((step, finished(step)) for step in steps):
                step.require_finite(~vectors.not_finite())
                assert vectors.dense is not None, "it was just made"
                found[step.rows] = vectors.dense.numpy()
            return found

    def encode_vectors(
        self,
        texts: Texts,
        role: RoleName = "default",
        *,
        kinds: Sequence[Kind] | None = None,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
    ) -> Vectors:
        """Return vectors of several kinds, for which each text is read only once.

        Args:
            texts: any number of texts; the role's prompt is put before each.
            role: "query" for what is searched with, "document" for what is found.
            kinds: of vectors; None takes all that the model makes.
            task: take the prompt of this task instead of the model's default prompt.
            dims: keep only this many leading coordinates of dense vectors, scaled to unit length.
            progress: show a progress bar.

        Returns:
            Vectors on the CPU in float32. Dense ones have unit length if ``settings.normalize``,
            token vectors always; a sparse vector has each of its token ids once, ascending.

        Raises:
            TextError: if ``texts`` is not a list of strings of valid Unicode; it names the row.
            RecipeError: for a kind that the model does not make, an unknown role or task, ``dims``
                out of range, or an empty text if ``settings.on_empty`` is "error".
            ModelError: if a vector holds NaN or infinity.

        Examples:
            >>> vectors = embedder.encode_vectors(texts, kinds=["dense", "sparse"])
            >>> vectors.dense, vectors.sparse.ids, vectors.sparse.weights
        """
        wanted, texts = tuple(self.kinds if kinds is None else kinds), checked_texts(texts)
        width = self._width(dims)
        unit = self.settings.normalize or dims is not None

        def finished(step: Step) -> Vectors:
            made = self._vectors(step.states, step.texts, wanted, reader.network)
            dense, sparse = made.dense, made.sparse
            if dense is not None:
                dense = dense[:, :width].float()
                dense = F.normalize(dense, dim=1) if unit else dense
            return Vectors(dense, sparse, made.multi)

        nothing = Vectors.of_nothing(wanted, width, self.heads.width)
        with (
            self.reading() as reader,
            self._batches(reader, texts, role, self.settings, task, progress) as steps,
        ):
            return text_vectors(steps, finished, nothing)

    def encode_packed(
        self, texts: Packed, kinds: Sequence[Kind]
    ) -> tuple[Vectors, Float[Tensor, "tokens hidden"]]:
        """Return vectors and token states of texts that are packed already, in one batch.

        Dense vectors are as pooled, neither shortened nor scaled, since texts of one batch may be
        wanted in several widths.

        Args:
            texts: token ids of :meth:`tokenize`, on any device.
            kinds: of vectors.

        Returns:
            Vectors and states on the model's device, which may hold NaN.
        """
        texts = texts.to(self.device)
        with self.reading() as reader:
            states = reader.states(texts)
            return self._vectors(states, texts, kinds, reader.network), states

    def encode_words(self, sentences: Sentences, *, predictor: bool = False) -> list[np.ndarray]:
        """Return one vector for each word of each sentence.

        A sentence is read as its words joined by spaces, without a prompt. A word's vector is the
        mean state of the tokens that share a character with it, not normalized.

        Args:
            sentences: each a sequence of words.
            predictor: average the states one token earlier, from which a model after masked
                next-token prediction predicts the word (arXiv 2404.05961, appendix D.1.3). The
                first token keeps its own state if the tokenizer puts none before it.

        Returns:
            One float32 array of shape [words, hidden] per sentence. A word that does not fit into
            ``settings.document_tokens`` has no row; a warning says how many there were.

        Raises:
            TextError: if a sentence is a string, or a word is not one.
            ModelError: if a vector holds NaN or infinity.
        """
        sentences = checked_sentences(sentences)
        words = [Words.joined(sentence) for sentence in sentences]
        texts = [" ".join(sentence) for sentence in sentences]
        limit = self.settings.document_tokens

        def tokenize(part: Sequence[str]) -> Tokens:
            return self.tokenizer(part, limit, spans=True)

        with (
            self.reading() as reader,
            closing(
                batch_by_batch(reader.states, self.device, texts, tokenize, self.batch_tokens)
            ) as steps,
        ):
            return word_states(steps, words, self.backbone.hidden, predictor=predictor)

    def _width(self, dims: int | None, *, of_tokens: bool = False) -> int:
        most = self.backbone.hidden if of_tokens else self.dim
        width = most if dims is None else dims
        if not 0 < width <= most:
            raise RecipeError(f"dims must be between 1 and the model's {most}; got {dims}")
        return width

    @contextmanager
    def _batches(  # noqa: PLR0913 (all that one pass needs)
        self,
        reader: Reader,
        texts: Sequence[str],
        name: RoleName,
        settings: Settings,
        task: str | None,
        progress: bool,
        *,
        spans: bool = False,
    ) -> Iterator[Iterator[Step]]:
        """Offer the states of texts batch by batch, then report how many texts were cut."""
        role = role_of(name)
        prompt, form = settings.prompt(name, task), settings.form(role)
        limit = settings.max_tokens(role)
        asked = enumerate(texts, start=1) if settings.on_empty == "error" else ()
        if empty := next((number for number, text in asked if not text.strip()), None):
            raise RecipeError(
                f"text {empty} of {len(texts)} is empty, and the model's settings refuse that; "
                'leave it out, or set on_empty to "all"'
            )
        cut = 0

        def tokenize(part: Sequence[str]) -> Tokens:
            nonlocal cut
            tokens = self.tokenizer(part, limit, prompt, form, spans=spans)
            cut += tokens.truncated
            return tokens

        with (
            bar("encode", len(texts), shown=progress) as advance,
            closing(
                batch_by_batch(
                    reader.states, self.device, texts, tokenize, self.batch_tokens, advance
                )
            ) as steps,
        ):
            yield steps
        if cut and role not in self._cuts_reported:
            self._cuts_reported.add(role)
            log.warning("%d of %d %s texts were cut to %d tokens", cut, len(texts), role, limit)

    def freeze(self) -> "Embedder":
        """Expect no change of the weights from now on, and return this object.

        Otherwise each call first compares all weights with the copies that it multiplies by, or
        does without copies for a few words. On a frozen model two words take about half the time.
        Steps of torch's optimizers, loaded states and replaced parameters are still followed;
        changes through ``weight.data``, by a fused optimizer or through an array that shares the
        memory are not.

        Examples:
            >>> embedder = Embedder.load("minilm").freeze()
        """
        self._readers.freeze()
        return self

    @contextmanager
    def reading(self, attention: Attention | None = None) -> Iterator[Reader]:
        """Offer the network for inference, without changing this one: see :class:`Readers`.

        Raises:
            ModelError: if an encoder is asked to be causal, or a decoder fails the probe.
        """
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            yield self._readers.of(self._network, attention)

    # ---- folders -----------------------------------------------------------------------------

    @staticmethod
    def load(
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        attention: Attention | None = None,
        window: Window | None = None,
        keep_layers: int | None = None,
        **changes: Any,
    ) -> "Embedder":
        """Load a model, ready to encode, on the CPU.

        Settings come from the folder's ``tercet.json``, else from its sentence-transformers files,
        else from the zoo, else they are the defaults.

        Args:
            source: a name from ``tercet list-models``, a folder saved by tercet, transformers,
                sentence-transformers, FlagEmbedding (BGE-M3) or NVIDIA (NV-Embed), a GGUF file or
                a hub id.
            dtype: of the weights.
            attention: "causal" or "bidirectional" for a decoder; None keeps the model's direction.
            window: "keep" or "full" for sliding windows; see :class:`Backbone`.
            keep_layers: load only this many of the network's layers, the first ones.
            **changes: new values of single settings, such as ``pooling="last"``; see
                :class:`Settings`.

        Raises:
            ModelError: if the folder is incomplete or damaged, or the model cannot be packed.
            RecipeError: for an unknown setting or a value that it cannot have.

        Examples:
            >>> embedder = Embedder.load("run/model", dtype=torch.bfloat16, query_tokens=64)
        """
        parts = load_parts(
            source,
            changes,
            dtype=dtype,
            attention=attention,
            window=window,
            keep_layers=keep_layers,
        )
        embedder = Embedder(
            parts.backbone,
            parts.tokenizer,
            parts.settings,
            parts.layer,
            parts.heads,
            parts.dense_layers,
        )
        embedder.about = parts.about
        return embedder.eval()

    @property
    def parts(self) -> ModelParts:
        """What a folder of this model holds."""
        return ModelParts(
            backbone=self.backbone,
            tokenizer=self.tokenizer.stock,
            settings=self.settings,
            layer=self.layer,
            heads=self.heads,
            dense_layers=self.dense_layers,
            about=self.about,
        )

    def save(self, folder: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write a folder that tercet and sentence-transformers load; LoRA is merged first.

        The folder appears whole or not at all, and replaces an older model. If
        sentence-transformers cannot express the settings (such as a suffix or echo), its files are
        left out, with a warning, and only tercet loads the folder.

        Args:
            folder: where to write; made if missing.
            about: how the model was made, for people to read (base, data, seed, stages); None keeps
                what it was loaded with.

        Raises:
            StorageError: if the disk refuses; the old folder is still there then.
            ModelError: if the folder holds something that is not a model.
        """
        save_parts(self.parts, Path(folder), self.about if about is None else about)

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Write the LoRA adapter without its base, with the direction it was trained in.

        Args:
            folder: where to write; an older folder is replaced.
            base: the zoo name, folder or hub id of the model that the adapter belongs to.

        Raises:
            ModelError: if the embedder has no LoRA, or is a bidirectional decoder on a base that
                does not say so: other libraries would read it causally.
            StorageError: if the disk refuses; the old folder is still there then.
        """
        save_adapter(self.parts, Path(folder), base)

    def as_sentence_transformer(self) -> Any:
        """Return the same embedder as a ``SentenceTransformer`` that shares the weights in memory.

        Training one trains the other. It reads padded batches with the attention of transformers,
        so it is slower. It stays on this embedder's device: move the embedder first. It needs no
        ``trust_remote_code``; its ``save`` writes the folder that :meth:`save` writes.

        Raises:
            MissingExtraError: if sentence-transformers is not installed.
            ModelError: if it cannot express the settings, or LoRA is not merged yet.

        Examples:
            >>> scores = mteb.evaluate(embedder.as_sentence_transformer(), tasks)
        """
        return as_sentence_transformer(self.parts).train(self.training)

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """Return a fingerprint by which an index recognizes its model.

        It changes with weights and their type, settings, direction of attention, windows, and
        tokens. Reads only both ends of each weight and some of the tokens, so that it costs nothing
        for large models. With a ``dtype`` it is that of the same model loaded in this type.
        """
        usual, settings = Settings(), asdict(self.settings)
        if "multi" not in self.kinds:  # a head that is still to be trained makes no vectors
            settings["multi_dim"] = None
        if self.settings.pooling != "last" and self.settings.pool_prompt:  # then rules agree
            settings["rules"] = usual.rules
        for name in (*_LATER, *_NOT_IN_VECTORS):
            if name in _NOT_IN_VECTORS or settings[name] == getattr(usual, name):
                del settings[name]
        kind = dtype or next(self.backbone.parameters()).dtype
        read = [str(kind), *self.backbone.facts(), *self.tokenizer.sample()]
        digest = hashlib.blake2b(repr((sorted(settings.items()), read)).encode(), digest_size=8)
        weights = self.backbone.model.state_dict()
        if self.layer is not None:
            weights |= {f"layer.{name}": weight for name, weight in self.layer.state_dict().items()}
        weights |= {
            f"heads.{name}": weight
            for name, weight in self.heads.state_dict().items()
            if name.split(".")[0] in self.kinds
        }
        weights |= {f"dense.{name}": each for name, each in self.dense_layers.state_dict().items()}
        for name, _, grid in int8_layers(self.backbone.model):
            weights |= {f"{name}.int8.{what}": each for what, each in grid.tensors().items()}
        add_weights(digest, weights, dtype)
        return digest.hexdigest()

    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprints by which indexes of any type of weights recognize the model."""
        if self.backbone.has_int8:
            return (self.fingerprint(),)
        return self.fingerprint(torch.float32), self.fingerprint(torch.bfloat16)


def pooled(
    states: Float[Tensor, "tokens hidden"], texts: Packed, settings: Settings
) -> Float[Tensor, "texts hidden"]:
    """Return one vector per text, in at least float32 and not normalized."""
    if settings.cls_every is not None:
        return cls_mean(states, texts, settings.cls_every)
    if settings.pooling == "weighted_mean" and settings.rules == "sentence_transformers":
        return weighted_mean(states, texts, from_start=True)
    return POOLINGS[settings.pooling](states, texts)

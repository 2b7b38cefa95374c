"""The embedder: texts in, vectors out; all it needs for that is saved beside its weights."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tercet.errors import RecipeError
from tercet.files.progress import bar
from tercet.kinds import Kind
from tercet.models.encode_loop import Step, batch_by_batch, text_vectors, token_states, word_states
from tercet.models.formats.parts import ModelParts
from tercet.models.formats.sentence_transformer_module import as_sentence_transformer
from tercet.models.formats.tercet_folder import load_parts, save_adapter, save_parts
from tercet.models.network.backbone import Attention, Backbone, Window
from tercet.models.network.fingerprints import add_weights
from tercet.models.network.heads import Heads, SpecialIds
from tercet.models.network.latent_attention import AttentionLayer, build_layer
from tercet.models.network.pooling import POOLINGS, PoolingName, cls_mean
from tercet.models.network.prepacked import Prepacked
from tercet.models.network.words import Words
from tercet.models.settings import Settings, changed
from tercet.models.tokens import Form, Tokenizer, Tokens
from tercet.types import Packed, Role
from tercet.vectors import Vectors

__all__ = ["Embedder", "Settings"]

# Settings that came after the first indexes: at their usual value they leave fingerprints alone.
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
)
_NOT_IN_VECTORS: Final = ("weights", "ranges")  # settings that change no vector

log = logging.getLogger("tercet")


class Embedder(nn.Module):
    """A backbone, a pooling, and the settings to use them the way they were trained.

    ``layer`` are the weights of ``settings.layer``, and ``heads`` those of ``settings.kinds``;
    None draws new ones, to be trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any,
        settings: Settings,
        layer: AttentionLayer | None = None,
        heads: Heads | None = None,
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
        self.tokenizer = Tokenizer(tokenizer, append_end=settings.ends)
        limit = backbone.max_tokens
        self.settings = replace(
            settings,
            query_tokens=min(settings.query_tokens, limit),
            document_tokens=min(settings.document_tokens, limit),
        )
        self.batch_tokens = (
            16_384 if backbone.device.type == "cuda" else 2_048
        )  # of one encode step
        parts: list[nn.Module] = [backbone]
        if self.layer is not None:  # of a folded layer only the feed-forward runs
            folds = self.layer.folds
            parts += [self.layer.ff_in, self.layer.ff_out] if folds else [self.layer]
        self._prepacked = Prepacked(nn.ModuleList(parts))
        self.about: Mapping[str, Any] = {}  # what made it, as saved with it: stages, data, seed
        self._told: set[Role] = set()  # for which roles it was said that texts were cut
        self.train(backbone.training)

    # ---- vectors -----------------------------------------------------------------------------

    def forward(self, texts: Packed) -> Float[Tensor, "texts dim"]:
        """Pooled vectors as they are, not scaled: a loss scales each width by itself."""
        return pooled(self.states(texts), texts, self.settings)

    def vectors(self, texts: Packed, kinds: Sequence[Kind] | None = None) -> Vectors:
        """The vectors of these kinds, or of all that the model makes, for a loss.

        Dense ones are as they are, not scaled. Of a sparse one each pooled token that is not
        special has its own weight, so that a token may occur several times. Those of tokens have
        unit length.
        """
        return self._vectors(self.states(texts), texts, self.kinds if kinds is None else kinds)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of vectors that the model makes."""
        return self.settings.kinds

    def _vectors(self, states: Tensor, texts: Packed, kinds: Sequence[Kind]) -> Vectors:
        if unknown := set(kinds) - {*self.kinds, "dense"}:
            raise RecipeError(
                f"the model makes no {' and no '.join(sorted(unknown))} vectors; it makes "
                f"{', '.join(self.kinds)}"
            )
        special = self._special
        return Vectors(
            pooled(states, texts, self.settings) if "dense" in kinds else None,
            self.heads.terms(states, texts, special) if "sparse" in kinds else None,
            self.heads.rows(states, texts, special) if "multi" in kinds else None,
        )

    @property
    def _special(self) -> SpecialIds:
        inserted = self.settings.cls_every is not None
        return SpecialIds.of(self.tokenizer.stock, inserted=inserted)

    def states(self, texts: Packed) -> Float[Tensor, "tokens hidden"]:
        """One state a token, as it goes into the pooling."""
        states = self.backbone(texts)
        return states if self.layer is None else self.layer(states, texts)

    @property
    def dim(self) -> int:
        """The full width of a vector."""
        return self.backbone.hidden

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.device

    def tokenize(
        self,
        texts: Sequence[str],
        role: Role,
        prompts: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> Tokens:
        """Token ids of texts after their prompts; None takes what the model has for the role."""
        settings = self.settings
        before = settings.prompt(role) if prompts is None else prompts
        longest = max_tokens or settings.max_tokens(role)
        return self.tokenizer(texts, longest, before, settings.form(role))

    @overload
    def encode(
        self,
        texts: Sequence[str],
        role: Role = "document",
        *,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
        attention: Attention | None = None,
        pooling: PoolingName | None = None,
        echo: bool | None = None,
        output: Literal["texts"] = "texts",
    ) -> Float[np.ndarray, "texts dim"]: ...

    @overload
    def encode(
        self,
        texts: Sequence[str],
        role: Role = "document",
        *,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
        attention: Attention | None = None,
        pooling: PoolingName | None = None,
        echo: bool | None = None,
        output: Literal["tokens", "words"],
    ) -> list[np.ndarray]: ...

    def encode(  # noqa: PLR0913 (each is a choice of its own, with a default)
        self,
        texts: Sequence[str],
        role: Role = "document",
        *,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
        attention: Attention | None = None,
        pooling: PoolingName | None = None,
        echo: bool | None = None,
        output: Literal["texts", "tokens", "words"] = "texts",
    ) -> Float[np.ndarray, "texts dim"] | list[np.ndarray]:
        """Vectors of texts, float32, in the order given.

        The model's prompt for the role (or for the task and role) is put before each text. Texts
        are sorted by length and run in batches of ``batch_tokens`` tokens. ``dims`` keeps that
        many leading coordinates, scaled to unit length again. That texts were too long and cut is
        logged, with their number, the first time.

        For this call only, ``attention`` reads a decoder that way, and ``pooling`` and ``echo``
        take the place of the model's settings. ``output`` "tokens" gives the states of each
        text's pooled tokens, and "words" the mean state of each of its words (what stands between
        white space; see :meth:`encode_words`): one array a text, not scaled to any length.

        Raises:
            RecipeError: for an unknown task or pooling, ``dims`` out of range, or an empty text
                where the settings refuse them.
            ModelError: for an encoder asked to be causal, or for an end-of-text token that the
                tokenizer does not have.
            TypeError: when ``texts`` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts; put a single text into a list")
        width = self._width(dims)
        given = {"pooling": pooling, "echo": echo}
        settings = changed(self.settings, {k: v for k, v in given.items() if v is not None})
        prompt, form = settings.prompt(role, task), settings.form(role)
        if settings.on_empty == "error":
            _refuse_empty(texts)
        tokenize = _Cutting(self, role, prompt, form, spans=output == "words")
        with (
            self._inferring(attention),
            bar("encode", len(texts), shown=progress) as advance,
        ):
            steps = batch_by_batch(
                self.states, self.device, texts, tokenize, self.batch_tokens, advance
            )
            if output == "texts":
                unit = settings.normalize or dims is not None
                found = np.empty((len(texts), width), dtype=np.float32)
                for step in steps:
                    vectors = pooled(step.states, step.texts, settings)[:, :width].float()
                    vectors = F.normalize(vectors, dim=1) if unit else vectors
                    found[step.rows] = vectors.cpu().numpy()
            elif output == "tokens":
                found = token_states(steps, len(texts), width)
            else:
                found = word_states(steps, [Words.of(text) for text in texts], width)
        tokenize.tell()
        return found

    def encode_vectors(
        self,
        texts: Sequence[str],
        role: Role = "document",
        *,
        kinds: Sequence[Kind] | None = None,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
    ) -> Vectors:
        """The vectors of all these kinds from one reading of each text, on the CPU in float32.

        None takes all that the model makes. Dense vectors have unit length (where the settings
        say so), and those of tokens too; a sparse one has each of its tokens once, by ascending
        id. ``dims`` keeps that many leading coordinates of the dense ones.

        Raises:
            RecipeError: for a kind that the model does not make, an unknown task, or ``dims`` out
                of range.
        """
        wanted = tuple(self.kinds if kinds is None else kinds)
        width = self._width(dims)
        unit = self.settings.normalize or dims is not None

        def finished(step: Step) -> Vectors:
            made = self._vectors(step.states, step.texts, wanted)
            dense, sparse = made.dense, made.sparse
            if dense is not None:
                dense = dense[:, :width].float()
                dense = F.normalize(dense, dim=1) if unit else dense
            return Vectors(dense, None if sparse is None else sparse.merged(), made.multi)

        prompt, form = self.settings.prompt(role, task), self.settings.form(role)
        tokenize = _Cutting(self, role, prompt, form)
        if self.settings.on_empty == "error":
            _refuse_empty(texts)
        with self._inferring(), bar("encode", len(texts), shown=progress) as advance:
            steps = batch_by_batch(
                self.states, self.device, texts, tokenize, self.batch_tokens, advance
            )
            found = text_vectors(
                steps, finished, Vectors.of_nothing(wanted, width, self.heads.width)
            )
        tokenize.tell()
        return found

    def encode_words(
        self, sentences: Sequence[Sequence[str]], *, predictor: bool = False
    ) -> list[np.ndarray]:
        """One vector for each word of each sentence: arrays of words and hidden, in float32.

        A sentence is read as its words with a space between, without a prompt, and character
        offsets tell which tokens are part of a word. Its vector is the mean of their states; with
        ``predictor``, of the states that they are predicted from, one token earlier (for a model
        after masked next-token prediction; arXiv 2404.05961, appendix D.1.3). The first token
        keeps its own state where the tokenizer puts none before it. A word that does not fit into
        ``document_tokens``, wholly, has no row; how many there were is logged.
        """
        words = [Words.joined(sentence) for sentence in sentences]
        texts = [" ".join(sentence) for sentence in sentences]
        limit = self.settings.document_tokens

        def tokenize(part: Sequence[str]) -> Tokens:
            return self.tokenizer(part, limit, spans=True)

        with self._inferring():
            steps = batch_by_batch(self.states, self.device, texts, tokenize, self.batch_tokens)
            return word_states(steps, words, self.dim, predictor=predictor)

    def _width(self, dims: int | None) -> int:
        width = self.dim if dims is None else dims
        if not 0 < width <= self.dim:
            raise RecipeError(
                f"dims is {dims}, but the model's vectors have {self.dim} coordinates"
            )
        return width

    def say_once(self, role: Role, cut: int, texts: int) -> None:
        """Log how many texts of a role were cut, the first time that any was."""
        if cut and role not in self._told:
            self._told.add(role)
            limit = self.settings.max_tokens(role)
            log.warning("%d of %d %s texts were cut to %d tokens", cut, texts, role, limit)

    @contextmanager
    def _inferring(self, attention: Attention | None = None) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            with (
                torch.inference_mode(),
                self._prepacked.in_use(),
                self.backbone.reading(attention),
            ):
                yield
        finally:
            self.train(training)

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
        """Load a zoo name, a saved folder, a sentence-transformers folder or a bare backbone.

        Settings come from the folder's ``tercet.json``, or from its sentence-transformers files,
        or from the zoo; ``changes`` replace single ones (see :class:`Settings`). ``keep_layers``
        drops all but the first layers of the network.

        Raises:
            ModelError: when the folder is incomplete or the model cannot be packed.
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
            parts.backbone, parts.tokenizer, parts.settings, parts.layer, parts.heads
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
            about=self.about,
        )

    def save(self, folder: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write a folder that tercet and sentence-transformers load; LoRA is merged first.

        The folder appears whole or not at all. ``about`` is kept for people to read (base, data,
        seed, stages); None keeps what the model was loaded with. Where sentence-transformers has no
        words for the settings (a suffix, echo), its files are left out, with a warning, and the
        folder is tercet's alone.

        Raises:
            StorageError: when the disk refuses; what was there before is still there.
            ModelError: when the folder holds something that is not a model.
        """
        save_parts(self.parts, Path(folder), self.about if about is None else about)

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Write the low-rank updates alone, with the direction that they were trained in.

        Raises:
            ModelError: when the embedder has no LoRA, or is a decoder that reads both ways on a
                base that does not say so: other libraries would read it one way again.
        """
        save_adapter(self.parts, Path(folder), base)

    def as_sentence_transformer(self) -> Any:
        """The same embedder as a ``SentenceTransformer``, with the same weights in memory.

        It needs no ``trust_remote_code``; see
        ``tercet.models.formats.sentence_transformer_module``.
        """
        return as_sentence_transformer(self.parts).train(self.training)

    def fingerprint(self) -> str:
        """Changes when weights or settings do: what an index remembers of its model.

        Reads the two ends of each weight only, so that it costs nothing for large models.
        """
        usual, settings = Settings(), asdict(self.settings)
        if "multi" not in self.kinds:  # a head that is still to be trained makes no vectors
            settings["multi_dim"] = None
        for name in (*_LATER, *_NOT_IN_VECTORS):
            if name in _NOT_IN_VECTORS or settings[name] == getattr(usual, name):
                del settings[name]
        digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=8)
        weights = self.backbone.model.state_dict()
        if self.layer is not None:
            weights |= {f"layer.{name}": weight for name, weight in self.layer.state_dict().items()}
        weights |= {
            f"heads.{name}": weight
            for name, weight in self.heads.state_dict().items()
            if name.split(".")[0] in self.kinds
        }
        add_weights(digest, weights)
        return digest.hexdigest()


class _Cutting:
    """Tokenizes parts of a corpus, and remembers how many texts were cut."""

    def __init__(
        self, embedder: Embedder, role: Role, prompt: str, form: Form, *, spans: bool = False
    ) -> None:
        self.embedder, self.prompt, self.form = embedder, prompt, form
        self.role: Role = role
        self.spans, self.cut, self.texts = spans, 0, 0

    def __call__(self, part: Sequence[str]) -> Tokens:
        embedder = self.embedder
        limit = embedder.settings.max_tokens(self.role)
        tokens = embedder.tokenizer(part, limit, self.prompt, self.form, spans=self.spans)
        self.cut += tokens.truncated
        self.texts += len(part)
        return tokens

    def tell(self) -> None:
        """Log the number, the first time for this role."""
        self.embedder.say_once(self.role, self.cut, self.texts)


def pooled(
    states: Float[Tensor, "tokens hidden"], texts: Packed, settings: Settings
) -> Float[Tensor, "texts hidden"]:
    """One vector a text, in at least float32 and not scaled."""
    if settings.cls_every is not None:
        return cls_mean(states, texts, settings.cls_every)
    return POOLINGS[settings.pooling](states, texts)


def _refuse_empty(texts: Sequence[str]) -> None:
    row = next((i for i, text in enumerate(texts) if not text.strip()), None)
    if row is not None:
        raise RecipeError(
            f"text {row + 1} of {len(texts)} is empty, and the model's settings refuse that; leave "
            'it out, or set on_empty to "all"'
        )

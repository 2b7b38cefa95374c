"""The embedder: texts in, vectors out; all it needs for that is saved beside its weights."""

import hashlib
import json
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

from tercet import zoo
from tercet.data.tokens import Form, Tokenizer, Tokens, load_tokenizer
from tercet.errors import ModelError, RecipeError
from tercet.files import replacing_folder
from tercet.interop.nv_embed import is_nv_embed
from tercet.interop.sentence_transformers import write_modules
from tercet.nn.adapters import merge_adapter
from tercet.nn.backbone import Attention, Backbone, Window, probe
from tercet.nn.layer import AttentionLayer, build_layer, save_layer
from tercet.nn.pooling import POOLINGS, PoolingName
from tercet.nn.prepacked import Prepacked
from tercet.nn.reading import batch_by_batch, token_states, word_states
from tercet.nn.settings import (
    FILE,
    VERSION,
    Settings,
    as_st_folder,
    changed,
    known_settings,
    named_prompts,
    read_settings,
    with_layer,
)
from tercet.nn.words import Words
from tercet.progress import bar
from tercet.types import Packed, Role

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
)

log = logging.getLogger("tercet")


class Embedder(nn.Module):
    """A backbone, a pooling, and the settings to use them the way they were trained.

    ``layer`` are the weights of ``settings.layer``; None draws new ones, to be trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any,
        settings: Settings,
        layer: AttentionLayer | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if layer is None and settings.layer is not None:
            layer = build_layer(settings.layer, backbone.hidden)
        weight = next(backbone.parameters())
        self.layer = None if layer is None else layer.to(weight.device, weight.dtype)
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
        return POOLINGS[self.settings.pooling](self.states(texts), texts)

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
        self, texts: Sequence[str], role: Role, prompts: str | Sequence[str] | None = None
    ) -> Tokens:
        """Token ids of texts after their prompts; None takes the model's prompt for the role."""
        settings = self.settings
        before = settings.prompt(role) if prompts is None else prompts
        return self.tokenizer(texts, settings.max_tokens(role), before, settings.form(role))

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
        width = self.dim if dims is None else dims
        if not 0 < width <= self.dim:
            raise RecipeError(
                f"dims is {dims}, but the model's vectors have {self.dim} coordinates"
            )
        given = {"pooling": pooling, "echo": echo}
        settings = changed(self.settings, {k: v for k, v in given.items() if v is not None})
        prompt, form = settings.prompt(role, task), settings.form(role)
        if settings.on_empty == "error":
            _refuse_empty(texts)
        limit, cut = settings.max_tokens(role), 0

        def tokenize(part: Sequence[str]) -> Tokens:
            nonlocal cut
            tokens = self.tokenizer(part, limit, prompt, form, spans=output == "words")
            cut += tokens.truncated
            return tokens

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
                    pooled = POOLINGS[settings.pooling](step.states, step.texts)[:, :width].float()
                    pooled = F.normalize(pooled, dim=1) if unit else pooled
                    found[step.rows] = pooled.cpu().numpy()
            elif output == "tokens":
                found = token_states(steps, len(texts), width)
            else:
                found = word_states(steps, [Words.of(text) for text in texts], width)
        if cut and role not in self._told:
            self._told.add(role)
            log.warning("%d of %d %s texts were cut to %d tokens", cut, len(texts), role, limit)
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
        place = zoo.resolve(str(source))
        folder = Path(place)
        if is_nv_embed(folder):
            from tercet.nn.nv_embed import load_nv_embed  # which makes an embedder

            if keep_layers is not None:
                raise ModelError(
                    f"{source}: a published NV-Embed folder is loaded whole; save it with tercet "
                    "first to keep some of its layers only"
                )
            return load_nv_embed(folder, dtype, attention=attention, window=window, changes=changes)
        saved = read_settings(folder) if folder.is_dir() else None
        if saved is not None and "adapter_of" in saved:
            how = {"dtype": dtype, "keep_layers": keep_layers}
            how |= {"attention": attention or saved["attention"]}
            how |= {"window": window or saved["window"]}
            return _load_adapter(folder, saved, how, changes)
        if saved is not None:
            attention = attention or saved["attention"]
            window = window or saved["window"]
        settings = known_settings(source, folder) if saved is None else saved["settings"]
        settings = changed(settings, changes)
        backbone = Backbone.load(
            place, attention=attention, window=window, dtype=dtype, keep_layers=keep_layers
        )
        settings, layer = with_layer(folder, settings, changes, backbone.hidden, dtype)
        embedder = Embedder(backbone, load_tokenizer(place), settings, layer)
        embedder.about = saved.get("about", {}) if saved is not None else {}
        embedder.eval()
        return embedder

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
        folder = Path(folder)
        holds = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if holds and not holds & {FILE, "config.json", "adapter_config.json"}:
            raise ModelError(
                f"{folder}: is not a model and would be overwritten; choose another folder"
            )
        self.backbone.merge_lora()
        unheard_of = self.settings.only_ours()
        with replacing_folder(folder) as fresh:
            self.backbone.model.save_pretrained(fresh)
            self.tokenizer.stock.save_pretrained(fresh)
            if self.layer is not None:
                save_layer(fresh, self.layer)
            if unheard_of is None:
                write_modules(fresh, settings=as_st_folder(self.settings, self.dim))
            self._write_settings(fresh, {"about": dict(self.about if about is None else about)})
        if unheard_of is not None:
            log.warning(
                "%s: load it with tercet; sentence-transformers cannot express %s, so no "
                "modules.json was written",
                folder,
                unheard_of,
            )
            return
        miscounted = self._miscounted_prompts()
        for name, prompt in miscounted[:1]:
            more = f" and {len(miscounted) - 1} more" if len(miscounted) > 1 else ""
            log.warning(
                "%s: sentence-transformers leaves prompts out of a vector by counting their tokens "
                "alone, and miscounts the %s prompt %r%s, whose end joins the text in one token; "
                "end it with a line break to have its vectors equal",
                folder,
                name,
                prompt,
                more,
            )

    def _miscounted_prompts(self) -> list[tuple[str, str]]:
        """Prompts, with their names, that have other tokens alone than before a text.

        The code of a layer, which is saved with it, looks at the ids and does not miscount.
        """
        settings = self.settings
        if settings.pool_prompt or settings.layer is not None:
            return []
        off = []
        for name, prompt in named_prompts(settings):
            alone = self.tokenizer([prompt], 1 << 30, form=Form(pool_special=False))
            tail_start, tail_end = alone.left_out[0]  # a special token at the end is not counted
            counted = alone.lengths[0] - (tail_end - tail_start)
            (skipped,) = self.tokenizer(["a"], 1 << 30, prompt, Form(pool_prompt=False)).skipped
            if prompt and counted != skipped:
                off.append((name, prompt))
        return off

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Write the low-rank updates alone, with the direction that they were trained in.

        Raises:
            ModelError: when the embedder has no LoRA, or is a decoder that reads both ways on a
                base that does not say so: other libraries would read it one way again.
        """
        if not self.backbone.has_lora:
            raise ModelError("there is no LoRA on this model; save() writes it whole")
        turned = self.backbone.is_decoder and self.backbone.attention == "bidirectional"
        if turned and not _says_bidirectional(base):
            raise ModelError(
                f'{base}: does not say that it reads both ways ("is_causal": false in its '
                "config.json), so other libraries would read this adapter one way; write the model "
                'whole with save(), or write Embedder.load(base, attention="bidirectional") with '
                "save() first and name that folder as the base"
            )
        for adapter in self.backbone.model.peft_config.values():
            adapter.base_model_name_or_path = base
        with replacing_folder(Path(folder)) as fresh:
            self.backbone.model.save_pretrained(fresh)
            self.tokenizer.stock.save_pretrained(fresh)
            if self.layer is not None:
                save_layer(fresh, self.layer)
            self._write_settings(fresh, {"adapter_of": base})

    def as_sentence_transformer(self) -> Any:
        """The same embedder as a ``SentenceTransformer``, with the same weights in memory.

        It needs no ``trust_remote_code``; see :func:`tercet.nn.stock.as_sentence_transformer`.
        """
        from tercet.nn.stock import as_sentence_transformer  # which takes an embedder

        return as_sentence_transformer(self)

    def fingerprint(self) -> str:
        """Changes when weights or settings do: what an index remembers of its model.

        Reads the two ends of each weight only, so that it costs nothing for large models.
        """
        usual, settings = Settings(), asdict(self.settings)
        for name in _LATER:
            if settings[name] == getattr(usual, name):
                del settings[name]
        digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=8)
        weights = self.backbone.model.state_dict()
        if self.layer is not None:
            weights |= {f"layer.{name}": weight for name, weight in self.layer.state_dict().items()}
        for name, weight in weights.items():
            flat = weight.detach().flatten()
            ends = torch.cat([flat[:256], flat[-256:]]).float().cpu()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + ends.numpy().tobytes())
        return digest.hexdigest()

    def _write_settings(self, folder: Path, more: Mapping[str, Any]) -> None:
        record = {
            "version": VERSION,
            "attention": self.backbone.attention,
            "window": self.backbone.window,
            "settings": asdict(self.settings),
            **more,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def _refuse_empty(texts: Sequence[str]) -> None:
    row = next((i for i, text in enumerate(texts) if not text.strip()), None)
    if row is not None:
        raise RecipeError(
            f"text {row + 1} of {len(texts)} is empty, and the model's settings refuse that; leave "
            'it out, or set on_empty to "all"'
        )


# ---- loading ---------------------------------------------------------------------------------


def _says_bidirectional(source: str) -> bool:
    """Whether a base's own config says that it reads both ways, for any library to see."""
    path = Path(zoo.resolve(source)) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = [config, config.get("text_config") or {}]
    return any(
        part.get("is_causal") is False or part.get("use_bidirectional_attention") for part in parts
    )


def _load_adapter(
    folder: Path, saved: dict[str, Any], how: Mapping[str, Any], changes: Mapping[str, Any]
) -> Embedder:
    base = Backbone.load(saved["adapter_of"], **how)
    merge_adapter(base, folder)
    settings = changed(saved["settings"], changes)
    settings, layer = with_layer(folder, settings, changes, base.hidden, how["dtype"])
    embedder = Embedder(base, load_tokenizer(folder), settings, layer)
    embedder.about = saved.get("about", {})
    embedder.eval()
    probe(base)
    return embedder

"""The embedder: texts in, vectors out; all it needs for that is saved beside its weights."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer

from tercet import zoo
from tercet.data.tokens import Tokenizer, Tokens
from tercet.errors import ModelError, RecipeError
from tercet.files import replacing_folder
from tercet.interop.sentence_transformers import StFolder, read_modules, write_modules
from tercet.nn.backbone import Attention, Backbone, Window, probe
from tercet.nn.pooling import POOLINGS, PoolingName
from tercet.nn.prepacked import Prepacked
from tercet.progress import bar
from tercet.types import Packed, Role

VERSION: Final = 1
FILE: Final = "tercet.json"
_WINDOW_OF_TEXTS: Final = 50_000  # texts tokenized and sorted by length at a time

log = logging.getLogger("tercet")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How texts become vectors, apart from the weights. Saved with the model."""

    pooling: PoolingName = "mean"
    normalize: bool = True  # vectors of unit length, so that a dot product is a cosine
    prompts: Mapping[str, str] = field(default_factory=dict)  # role -> what is put before a text
    task_prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # task -> the same
    pool_prompt: bool = True  # false: a prompt is read, but not part of the vector
    query_tokens: int = 512  # a longer text is cut
    document_tokens: int = 512
    dims: tuple[int, ...] = ()  # shorter widths that were trained to work alone (Matryoshka)

    def prompt(self, role: Role, task: str | None = None) -> str:
        """What is put before a text of this role.

        Raises:
            RecipeError: for a task that the model has no prompts for.
        """
        if task is None:
            return self.prompts.get(role, "")
        if task not in self.task_prompts:
            known = ", ".join(sorted(self.task_prompts)) or "none"
            raise RecipeError(f"the model has no prompt for the task {task!r}; it knows: {known}")
        return self.task_prompts[task].get(role, "")

    def max_tokens(self, role: Role) -> int:
        """The length at which texts of this role are cut, special tokens and prompt included."""
        return self.query_tokens if role == "query" else self.document_tokens


class Embedder(nn.Module):
    """A backbone, a pooling, and the settings to use them the way they were trained."""

    def __init__(self, backbone: Backbone, tokenizer: Any, settings: Settings) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = Tokenizer(tokenizer, append_end=settings.pooling == "last")
        limit = backbone.max_tokens
        self.settings = replace(
            settings,
            query_tokens=min(settings.query_tokens, limit),
            document_tokens=min(settings.document_tokens, limit),
        )
        self.batch_tokens = (
            16_384 if backbone.device.type == "cuda" else 2_048
        )  # of one encode step
        self._prepacked = Prepacked(backbone)
        self._told: set[Role] = set()  # for which roles it was said that texts were cut
        self.train(backbone.training)

    # ---- vectors -----------------------------------------------------------------------------

    def forward(self, texts: Packed) -> Float[Tensor, "texts dim"]:
        """Pooled vectors as they are, not scaled: a loss scales each width by itself."""
        return POOLINGS[self.settings.pooling](self.backbone(texts), texts)

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
        before = self.settings.prompt(role) if prompts is None else prompts
        limit = self.settings.max_tokens(role)
        return self.tokenizer(texts, limit, before, pool_prompt=self.settings.pool_prompt)

    def encode(
        self,
        texts: Sequence[str],
        role: Role = "document",
        *,
        task: str | None = None,
        dims: int | None = None,
        progress: bool = False,
    ) -> Float[np.ndarray, "texts dim"]:
        """Vectors of texts, float32, in the order given.

        The model's prompt for the role (or for the task and role) is put before each text. Texts
        are sorted by length and run in batches of ``batch_tokens`` tokens. ``dims`` keeps that
        many leading coordinates, scaled to unit length again. That texts were too long and cut is
        logged, with their number, the first time.

        Raises:
            RecipeError: for an unknown task, or ``dims`` out of range.
            TypeError: when ``texts`` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts; put a single text into a list")
        width = self.dim if dims is None else dims
        if not 0 < width <= self.dim:
            raise RecipeError(
                f"dims is {dims}, but the model's vectors have {self.dim} coordinates"
            )
        prompt = self.settings.prompt(role, task)
        vectors, cut = np.empty((len(texts), width), dtype=np.float32), 0
        training = self.training
        self.eval()
        with (
            torch.inference_mode(),
            self._prepacked.in_use(),
            bar("encode", len(texts), shown=progress) as advance,
        ):
            for start in range(0, len(texts), _WINDOW_OF_TEXTS):
                part = texts[start : start + _WINDOW_OF_TEXTS]
                tokens = self.tokenize(part, role, prompt)
                cut += tokens.truncated
                for rows in _batches(tokens.lengths, self.batch_tokens):
                    pooled = self(tokens.pack(rows).to(self.device))[:, :width].float()
                    if self.settings.normalize or dims is not None:
                        pooled = F.normalize(pooled, dim=1)
                    vectors[start + np.array(rows)] = pooled.cpu().numpy()
                    advance(len(rows))
        self.train(training)
        if cut and role not in self._told:
            self._told.add(role)
            limit = self.settings.max_tokens(role)
            log.warning("%d of %d %s texts were cut to %d tokens", cut, len(texts), role, limit)
        return vectors

    # ---- folders -----------------------------------------------------------------------------

    @staticmethod
    def load(
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        attention: Attention | None = None,
        window: Window | None = None,
        **changes: Any,
    ) -> "Embedder":
        """Load a zoo name, a saved folder, a sentence-transformers folder or a bare backbone.

        Settings come from the folder's ``tercet.json``, or from its sentence-transformers files,
        or from the zoo; ``changes`` replace single ones (see :class:`Settings`).

        Raises:
            ModelError: when the folder is incomplete or the model cannot be packed.
        """
        place = zoo.resolve(str(source))
        folder = Path(place)
        saved = _read_settings(folder) if folder.is_dir() else None
        if saved is not None and "adapter_of" in saved:
            return _load_adapter(folder, saved, dtype, changes)
        if saved is not None:
            attention = attention or saved["attention"]
            window = window or saved["window"]
        settings = _known_settings(source, folder, saved)
        backbone = Backbone.load(place, attention=attention, window=window, dtype=dtype)
        embedder = Embedder(backbone, _load_tokenizer(place), _changed(settings, changes))
        embedder.eval()
        return embedder

    def save(self, folder: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write a folder that tercet and sentence-transformers load; LoRA is merged first.

        The folder appears whole or not at all. ``about`` is kept for people to read: base, data,
        seed, versions.

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
        with replacing_folder(folder) as fresh:
            self.backbone.model.save_pretrained(fresh)
            self.tokenizer.stock.save_pretrained(fresh)
            write_modules(fresh, settings=self._as_st_folder())
            self._write_settings(fresh, {"about": dict(about or {})})

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Write the low-rank updates alone, with the direction that they were trained in.

        Raises:
            ModelError: when the embedder has no LoRA.
        """
        if not self.backbone.has_lora:
            raise ModelError("there is no LoRA on this model; save() writes it whole")
        with replacing_folder(Path(folder)) as fresh:
            self.backbone.model.save_pretrained(fresh)
            self.tokenizer.stock.save_pretrained(fresh)
            self._write_settings(fresh, {"adapter_of": base})

    def fingerprint(self) -> str:
        """Changes when weights or settings do: what an index remembers of its model.

        Reads the two ends of each weight only, so that it costs nothing for large models.
        """
        digest = hashlib.blake2b(
            repr(sorted(asdict(self.settings).items())).encode(), digest_size=8
        )
        for name, weight in self.backbone.model.state_dict().items():
            flat = weight.detach().flatten()
            ends = torch.cat([flat[:256], flat[-256:]]).float().cpu()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + ends.numpy().tobytes())
        return digest.hexdigest()

    def _as_st_folder(self) -> StFolder:
        settings = self.settings
        return StFolder(
            pooling=settings.pooling,
            dim=self.dim,
            max_tokens=max(settings.query_tokens, settings.document_tokens),
            prompts={role: prompt for role, prompt in settings.prompts.items() if prompt},
            include_prompt=settings.pool_prompt,
            normalize=settings.normalize,
        )

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


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Texts in batches of at most ``max_tokens`` tokens, the longest first."""
    batch: list[int] = []
    size = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and size + lengths[i] > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += lengths[i]
    if batch:
        yield batch


def _read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / FILE
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        version = saved["version"]
        _ = saved["attention"], saved["window"], saved["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: not a tercet settings file ({error}); save the model again"
        ) from error
    if version > VERSION:
        raise ModelError(f"{path}: written by a newer tercet (format {version}); upgrade tercet")
    return saved


def _known_settings(source: str | Path, folder: Path, saved: dict[str, Any] | None) -> Settings:
    if saved is not None:
        return _changed(Settings(), saved["settings"])
    stock = read_modules(folder) if folder.is_dir() else None
    from_zoo = next((model for model in zoo.MODELS if model.name == str(source)), None)
    if stock is not None:
        return Settings(
            pooling=stock.pooling,
            normalize=stock.normalize,
            prompts=stock.prompts,
            pool_prompt=stock.include_prompt,
            query_tokens=stock.max_tokens,
            document_tokens=stock.max_tokens,
        )
    if from_zoo is not None:
        return Settings(
            pooling=from_zoo.pooling,
            prompts=dict(from_zoo.prompts),
            query_tokens=from_zoo.max_tokens,
            document_tokens=from_zoo.max_tokens,
        )
    return Settings()


def _changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    known = {f.name for f in fields(Settings)}
    unknown = set(changes) - known
    if unknown:
        raise RecipeError(f"no such setting: {', '.join(sorted(unknown))}; known: {sorted(known)}")
    given = dict(changes)
    if given.get("pooling", settings.pooling) not in POOLINGS:
        known_poolings = ", ".join(POOLINGS)
        raise RecipeError(f"no such pooling: {given['pooling']}; choose from {known_poolings}")
    if "dims" in given:
        given["dims"] = tuple(given["dims"])
    return replace(settings, **given)


def _load_tokenizer(place: str | Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError, KeyError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0].strip(" :.")
        raise ModelError(
            f"{place}: the tokenizer cannot be loaded ({line}); is tokenizer.json there and whole?"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what is made up where none was saved
        raise ModelError(
            f"{place}: has no tokenizer (tokenizer.json); copy it there from the model's origin"
        )
    return tokenizer


def _load_adapter(
    folder: Path, saved: dict[str, Any], dtype: torch.dtype, changes: Mapping[str, Any]
) -> Embedder:
    from peft import PeftModel

    base = Backbone.load(
        saved["adapter_of"], attention=saved["attention"], window=saved["window"], dtype=dtype
    )
    try:
        base.model = PeftModel.from_pretrained(base.model, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{folder}: the adapter cannot be loaded: {line}") from error
    settings = _changed(_changed(Settings(), saved["settings"]), changes)
    embedder = Embedder(base, _load_tokenizer(folder), settings)
    embedder.eval()
    base.merge_lora()
    probe(base)
    return embedder

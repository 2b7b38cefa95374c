"""Refuses model folders whose files name Python code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tercet.errors import ModelError
from tercet.files.artifacts import read_json
from tercet.files.console import shortened

_OURS: Final = "tercet.json"  # beside a network that transformers' own code read when it was saved


def refuse_code(place: str | Path, *names: str) -> None:
    """Raise if these files of a model's folder name Python code; no such code is ever run.

    ``trust_remote_code=False`` alone is not enough: where transformers has an architecture of the
    same name, it is taken instead, whose network may be another one (a decoder that is causal).

    Raises:
        ModelError: if one does: an ``auto_map``, or an attention that is loaded from the hub.
    """
    folder = Path(place)
    for name in names if not (folder / _OURS).is_file() else ():
        refuse_code_in(f"{folder}: its {name}", _read(folder / name))


def refuse_code_in(what: str, config: Mapping[str, Any]) -> None:
    """Raise if a config, ``what`` of a message, names code; see :func:`refuse_code`."""
    code = _code_named_in(config)
    if code is not None:
        raise ModelError(
            f"{what} names custom code ({code}), which tercet never runs; use a model whose "
            "architecture transformers itself has"
        )


def _code_named_in(config: Mapping[str, Any]) -> str | None:
    """Return the first mention of custom code in a config, nested parts included, or None.

    Older releases of transformers ask whether to run it, also that of a part.
    """
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            if part.get("auto_map"):
                return f'"auto_map": {shortened(str(part["auto_map"]))}'
            for name in ("attn_implementation", "_attn_implementation"):
                if "/" in str(part.get(name)):
                    return f'"{name}": {shortened(str(part[name]))}'
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return None


def _read(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; empty if it has none, which whoever loads it reports."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}

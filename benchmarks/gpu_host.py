"""What the host does for a GPU: time of 24 layers, and launches, waits and copies of a step.

Nothing here runs on a GPU. Time: CPU seconds of a forward and a backward of a network so narrow
that little but the host's own work is left, for one chunk of texts of different lengths. The peer
makes one attention call for each length; ours calls one kernel for all, which is replaced by a
function that does nothing but return the right shape, since there is no such kernel on a CPU.

Launches, waits and copies: counted on a pretended device (``tests/pretend.py``), for each step of a
recipe. ``peer`` is another commit, whose counts ``--before`` reads; make them in a worktree of it:

    python -m benchmarks.gpu_host --counts before.json
    python -m benchmarks.gpu_host --before before.json
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as t
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface

from benchmarks.common import Row, interleaved, write_results
from tercet.models.embedder import Embedder
from tercet.models.network import attention, backbone
from tercet.models.network.backbone import Backbone
from tercet.training import loop
from tercet.training.recipe import Run
from tests import toy
from tests.every_recipe import Workplace, workplace
from tests.pretend import Log, pretended_cuda, quiet

LAYERS = 24
RECIPES = ("finetune an encoder", "finetune a decoder", "LoRA", "bge_m3", "llm2vec")
STEPS = (2, 4)  # of each stage, in two runs whose difference is counted


class NoKernel(torch.autograd.Function):
    """A kernel that only has the right shape, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return something of the queries' shape."""
        ctx.save_for_backward(key, value)
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        """Return something of the shapes of queries, keys and values."""
        return gradient, *(torch.empty_like(x) for x in ctx.saved_tensors)


def one_kernel(module: nn.Module, *rows: Tensor, layout: Any = None, **options: Any) -> Any:
    """Do what ``attend`` does on a GPU under autocast, but for the kernel."""
    layout = layout or attention.layout_in_force()
    rule = attention._rule_of(module, options, layout.dropout)
    q, k, v = (x.to(x.dtype) for x in rows[:3])
    return attention._attend_row(q, k, v, layout, rule)[None], None


@functools.wraps(varlen.varlen_attn)
def no_kernel(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Take the place of ``varlen_attn``."""
    return NoKernel.apply(query, key, value)  # pyright: ignore


def host_time(repeats: int) -> list[Row]:
    """Time both forms in turn, for chunks of one, ten and seventy lengths."""
    torch.set_num_threads(1)
    small: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    config = t.XLMRobertaConfig(**small, num_hidden_layers=LAYERS, vocab_size=300, pad_token_id=1)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    network = Backbone(toy.random_model(config)).train()
    rows: list[Row] = []
    for count in (1, 10, 70):
        lengths = [1 + i % count for i in range(70)]
        texts = toy.pack(*toy.random_texts(*lengths))

        def step(texts: Any = texts) -> None:
            network.zero_grad()
            network(texts).sum().backward()

        def ours(step: Any = step) -> None:
            with (
                mock.patch.object(varlen, "varlen_attn", no_kernel),
                mock.patch.dict(AttentionInterface._global_mapping, {attention.NAME: one_kernel}),
            ):
                step()

        spent = interleaved({"ours": ours, "peer": step}, repeats)
        best = {name: 1_000 * min(seconds) for name, seconds in spent.items()}
        rows.append(
            {
                "name": f"{LAYERS} layers, forward and backward, {_lengths(count)}",
                **best,
                "unit": "ms of the host",
                "ratio": best["peer"] / best["ours"],
                "target": "ratio >= 6" if count == 70 else None,
                "error": None,
            }
        )
    return rows


def _lengths(count: int) -> str:
    return "1 length" if count == 1 else f"{count} lengths"


def counts() -> dict[str, dict[str, float]]:
    """Return launches, waits and copies of a step of each recipe, the mean over its stages."""
    place = workplace(Path(tempfile.mkdtemp()))
    found = {}
    for name in RECIPES:
        short, long = (_of_run(place, name, steps) for steps in STEPS)
        stages = len(place.recipe(name, 1).stages)
        steps = stages * (STEPS[1] - STEPS[0])
        found[name] = {what: (long[what] - short[what]) / steps for what in short}
        print(name, found[name], flush=True)
    return found


def _of_run(place: Workplace, name: str, steps: int) -> dict[str, int]:
    recipe = place.recipe(name, steps)
    run = Run(device="cuda", dtype="bfloat16", show_progress=False, chunk_tokens=256, memory_gb=1.0)
    with ExitStack() as stack:
        stack.enter_context(_once_is_not_counted())
        log: Log = stack.enter_context(pretended_cuda())
        loop.train(recipe, place.data(recipe), Path(tempfile.mkdtemp()) / "run", run=run)
    return {
        "launches": log.kernels,
        "waits": sum(log.waits.values()),
        "blocking copies": sum(log.copies.values()),
        "copies that do not block": sum(log.uploads.values()),
    }


@contextmanager
def _once_is_not_counted() -> Iterator[None]:
    def silent(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            with quiet():
                return function(*args, **options)

        return run

    with ExitStack() as stack:
        for owner, name in ((backbone, "_probe"), (loop, "forecast_stages"), (Embedder, "save")):
            stack.enter_context(mock.patch.object(owner, name, silent(getattr(owner, name))))
        yield


def rows_of(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[Row]:
    """Put the counts of two commits side by side."""
    return [
        {
            "name": f"{what} a step, {recipe}",
            "ours": number,
            "peer": before.get(recipe, {}).get(what),
            "unit": "a step",
            "ratio": None,
            "target": {"waits": "at most 1", "blocking copies": "0"}.get(what),
            "error": None,
        }
        for recipe, numbers in now.items()
        for what, number in numbers.items()
    ]


def main() -> None:
    """Count and time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=Path, help="Only count, and write the counts there.")
    parser.add_argument("--before", type=Path, help="Counts of another commit.")
    parser.add_argument("--repeats", type=int, default=5, help="Repeats of the two times.")
    given = parser.parse_args()
    if given.counts is not None:
        given.counts.write_text(json.dumps(counts(), indent=2))
        return
    rows = host_time(given.repeats)
    before = {} if given.before is None else json.loads(given.before.read_text())
    write_results("gpu_host", [*rows, *rows_of(counts(), before)])


if __name__ == "__main__":
    main()

"""Training, encoding, losses and search on a GPU, beside sentence-transformers on the same texts.

Weights and token ids are random, at the shape of BGE-M3: only shapes and lengths count, and nothing
is downloaded. Numbers are checked first: the kernel for texts of varying length, forwards and
backwards, against attention in float32. Seconds are those of a clock, after ``synchronize``.

    python -m benchmarks.gpu --quick --out gpu.json    # about 3 minutes on an H100 or H200
    python -m benchmarks.gpu                           # more repeats, larger batches
    python -m benchmarks.gpu --tiny                    # a dry run on a CPU: measures nothing

``share`` is the part of the measured peak of matrix products that the useful products of a row
take.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

from benchmarks.common import Row, write_results
from tercet.data.batches.relation import relation_of
from tercet.losses.info_nce import info_nce
from tercet.losses.tokens import Head, next_token_loss
from tercet.models.embedder import Embedder
from tercet.models.network.attention import Layout, attend
from tercet.models.network.chunked import Chunks, backward_in_chunks
from tercet.rank.scoring import late_interaction
from tercet.rank.topk import top_k
from tercet.segments import Packed, batches_by_length, offsets_of
from tercet.vectors import TokenRows
from tests import toy


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    pairs: int
    chunk: int  # tokens
    product: int  # rows of the square matrices whose product is the peak
    contrast: int  # vectors on each side
    late: int  # texts on each side
    places: int  # predicted tokens
    searched: int  # vectors
    repeats: int
    device: torch.device

    @property
    def token_flops(self) -> int:
        """Of the products of a token, forwards."""
        return 2 * self.layers * (4 * self.width**2 + 2 * self.width * self.inner)


BASE = {"layers": 24, "width": 1_024, "inner": 4_096, "heads": 16, "vocabulary": 250_002}
LARGE = {"chunk": 16_384, "product": 8_192, "contrast": 32_768, "places": 4_096}
FULL = Size(
    **BASE,
    **LARGE,
    pairs=2_048,
    late=1_024,
    searched=1_000_000,
    repeats=5,
    device=torch.device("cuda"),
)
QUICK = replace(FULL, pairs=512, late=256, searched=200_000, repeats=2)
TINY = Size(
    layers=2,
    width=32,
    inner=64,
    heads=4,
    vocabulary=400,
    pairs=8,
    chunk=256,
    product=64,
    contrast=64,
    late=8,
    places=32,
    searched=500,
    repeats=1,
    device=torch.device("cpu"),
)


class Clock:
    """Times calls on the device and makes rows of them."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.rows: list[Row] = []
        self.peak = 0.0  # products a second, in bfloat16

    def seconds(self, call: Callable[[], Any], repeats: int | None = None) -> float:
        """Return the least of the seconds of some calls, after one that is not counted."""
        call()
        best = float("inf")
        for _ in range(repeats or self.size.repeats):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            best = min(best, time.perf_counter() - began)
        return best

    def _wait(self) -> None:
        if self.size.device.type == "cuda":
            torch.cuda.synchronize()

    def row(self, name: str, seconds: float, count: int, unit: str, **facts: Any) -> Row:
        """Keep a row of a measurement in which ``count`` items took ``seconds``."""
        row: Row = {"name": name, "ours": count / seconds, "peer": None, "unit": unit}
        row |= {"ratio": None, "target": None, "error": None, "seconds": seconds}
        if flops := facts.pop("flops", 0):
            row["share"] = flops / seconds / self.peak
        if self.size.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        self.rows.append(row | facts)
        print(f"{name}: {row['ours']:,.0f} {unit}, share {row.get('share', 0):.1%}", flush=True)
        return self.rows[-1]


def check_numbers(clock: Clock) -> None:
    """Compare attention in 16 bits, forwards and backwards, with float32 on the CPU."""
    device, width = clock.size.device, 64
    lengths = (70, 5, 33, 1, 128)
    module = nn.Module()
    for heads, shared in ((4, 4), (4, 2)):
        for causal in (False, True):
            for window in (None, 16, 512):
                module.config = SimpleNamespace(sliding_window=window)  # pyright: ignore
                rule = {"is_causal": causal, "sliding_window": window, "scaling": width**-0.5}
                counts = (heads, shared, shared, heads)
                rows = [torch.randn(1, n, sum(lengths), width).bfloat16() for n in counts]

                def result(where: torch.device, dtype: torch.dtype, rows: Any, rule: Any) -> Any:
                    given = [x.detach().to(where, dtype).requires_grad_() for x in rows[:3]]
                    texts = toy.pack(*toy.random_texts(*lengths)).to(where)
                    states, _ = attend(module, *given, layout=Layout(texts), **rule)
                    states.backward(rows[3].transpose(1, 2).to(where, dtype))
                    return [x.detach().float().cpu() for x in (states, *(x.grad for x in given))]

                got = result(device, torch.bfloat16, rows, rule)
                expected = result(torch.device("cpu"), torch.float32, rows, rule)
                worst = max(
                    float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)
                )
                name = f"attention, {heads}/{shared} heads, causal {causal}, window {window}"
                clock.rows.append({"name": name, "error": worst, "target": "error < 0.02"})
                assert worst < 0.02, f"{name}: {worst:.1%} away from float32"


def texts_of(size: Size) -> tuple[Packed, list[int]]:
    """Return queries of about 10 tokens and documents of about 90, at most 512."""
    rng = np.random.default_rng(0)
    sizes: list[int] = []
    for median in (10, 90):
        drawn = rng.lognormal(np.log(median), 0.45, size.pairs)
        sizes += np.clip(drawn, 4, 512).astype(int).tolist()
    return toy.pack(*toy.random_texts(*sizes)), sizes


def model_folder(size: Size, dropout: float) -> Path:
    """Write a random model of this size."""
    place = Path(tempfile.mkdtemp())
    config = t.XLMRobertaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.inner,
        pad_token_id=1,
        max_position_embeddings=8_194,
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    t.AutoModel.from_config(config).save_pretrained(place)
    toy.wordpiece(padding=1).save_pretrained(place)
    return place


def padded(texts: Packed, members: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Return these texts as sentence-transformers wants them."""
    bounds = texts.offsets.tolist()
    rows = [texts.ids[bounds[i] : bounds[i + 1]] for i in members]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    return {"input_ids": ids.to(device), "attention_mask": (ids != 1).long().to(device)}


def encoding(clock: Clock, peer: Any) -> None:
    """Encode in bfloat16; the peer gets the same batches, sorted by length."""
    size, (texts, sizes) = clock.size, texts_of(clock.size)
    place, tokens = model_folder(size, 0.0), sum(sizes)
    ours = Embedder.load(place, dtype=torch.bfloat16).to(size.device).eval()
    on, chunks = texts.to(size.device), batches_by_length(sizes, size.chunk)
    flops = tokens * size.token_flops
    with torch.inference_mode():
        took = clock.seconds(lambda: [ours(on.take(chunk)) for chunk in chunks])
        row = clock.row("encode, bfloat16 weights", took, tokens, "tokens/s", flops=flops)
        row["target"] = "share >= 0.55, ratio >= 2.5"
        if peer is None:
            return
        stock = peer(str(place), device=str(size.device), model_kwargs={"dtype": torch.bfloat16})
        batches = [padded(texts, chunk, size.device) for chunk in chunks]
        slots = sum(batch["input_ids"].numel() for batch in batches)
        theirs = clock.seconds(lambda: [stock.eval()(dict(batch)) for batch in batches])
        got = ours(on.take(chunks[0])).float()
        other = stock.eval()(dict(batches[0]))["sentence_embedding"].float()
        error = float(1 - F.cosine_similarity(got, other).min())
    row |= {"peer": tokens / theirs, "ratio": theirs / took, "error": error}
    row["padding_factor"] = slots / tokens


def training(clock: Clock, peer: Any) -> None:
    """Take forward and backward of a contrastive step under autocast, without the optimizer."""
    size, (texts, sizes) = clock.size, texts_of(clock.size)
    tokens, count = sum(sizes), size.pairs
    names = [f"q{i}" for i in range(count)], [(f"d{i}",) for i in range(count)]
    relation = relation_of(*names, [()] * count)

    def loss_of(vectors: Tensor) -> dict[str, Tensor]:
        return {"loss": info_nce(vectors[:count], vectors[count:], relation, 0.05)}

    for dropout in (0.0, 0.1):
        place, on = model_folder(size, dropout), texts.to(size.device)
        ours = Embedder.load(place).to(size.device).train()

        def step(ours: Embedder = ours, on: Packed = on) -> None:
            ours.zero_grad()
            with torch.autocast(size.device.type, dtype=torch.bfloat16):
                backward_in_chunks(ours, on, loss_of, chunks=Chunks(size.chunk))

        took = clock.seconds(step)
        flops = 3 * tokens * size.token_flops
        row = clock.row(f"training step, dropout {dropout}", took, tokens, "tokens/s", flops=flops)
        row["target"] = "share >= 0.5, ratio >= 2.5"
        del ours, step
        gc.collect()
        if peer is not None:
            theirs = _their_step(clock, peer, place, texts)
            row |= {"peer": tokens / theirs, "ratio": theirs / took} if theirs else {}


def _their_step(clock: Clock, peer: Any, place: Path, texts: Packed) -> float | None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    size = clock.size
    model = peer(str(place), device=str(size.device)).train()
    loss_of = MultipleNegativesRankingLoss(model)
    members = range(size.pairs), range(size.pairs, 2 * size.pairs)
    columns = [padded(texts, each, size.device) for each in members]
    labels = torch.arange(size.pairs, device=size.device)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(size.device.type, dtype=torch.bfloat16):
            value = loss_of([dict(column) for column in columns], labels)
        value.backward()

    with suppress(torch.OutOfMemoryError):
        return clock.seconds(step)
    return None


def losses(clock: Clock) -> None:
    """Take InfoNCE, late interaction, and masked tokens of a large vocabulary, with gradients."""
    size, n, device = clock.size, clock.size.contrast, clock.size.device
    relation = relation_of([f"{i}" for i in range(n)], [(f"d{i}",) for i in range(n)], [()] * n)
    drawn = (torch.randn(n, size.width, device=device) for _ in range(2))
    q, d = (F.normalize(x, dim=1).requires_grad_() for x in drawn)
    took = clock.seconds(lambda: info_nce(q, d, relation, 0.05).backward())
    clock.row(f"InfoNCE of {n:,}", took, n, "pairs/s", flops=6 * n * n * size.width)

    many, width = size.late, 128
    rows = []
    for tokens in (32, 100):
        x = F.normalize(torch.randn(many * tokens, width, device=device), dim=1).requires_grad_()
        rows.append(TokenRows(x, offsets_of(torch.full((many,), tokens))))
    took = clock.seconds(lambda: late_interaction(*rows).sum().backward())
    flops = 2 * many * 32 * many * 100 * width
    clock.row(f"late interaction of {many:,} x {many:,}", took, many, "queries/s", flops=flops)

    states = torch.randn(size.places, size.width, device=device, requires_grad=True)
    weight = torch.randn(size.vocabulary, size.width, device=device)
    answers = torch.randint(size.vocabulary, (size.places,), device=device)

    def masked() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, _ = next_token_loss(states, answers, Head(weight), total=size.places)
        loss.backward()

    flops = 4 * size.places * size.vocabulary * size.width
    name = f"masked tokens, vocabulary {size.vocabulary:,}"
    clock.row(name, clock.seconds(masked), size.places, "places/s", flops=flops)


def search(clock: Clock) -> None:
    """Search exactly: ours runs on the CPU; the peer is a product and topk on the device."""
    size = clock.size
    docs = F.normalize(torch.randn(size.searched, 256), dim=1)
    queries = F.normalize(torch.randn(256, 256), dim=1)
    took = clock.seconds(lambda: top_k(queries.numpy(), docs.numpy(), 10), 1)
    row = clock.row(f"exact search in {size.searched:,}, on the CPU", took, 256, "queries/s")
    on, asked = docs.to(size.device), queries.to(size.device)
    theirs = clock.seconds(lambda: (asked @ on.T).topk(10), 1)
    row |= {"peer": 256 / theirs, "ratio": theirs / took}


def measure(size: Size) -> list[Row]:
    """Run everything, and return the rows."""
    torch.manual_seed(0)
    clock, n = Clock(size), size.product
    check_numbers(clock)
    a, b = (torch.randn(n, n, device=size.device, dtype=torch.bfloat16) for _ in range(2))
    took = clock.seconds(lambda: a @ b, 10 * size.repeats)
    clock.peak = 2 * n**3 / took
    clock.row(f"product of {n:,} x {n:,} in bfloat16", took, 2 * n**3, "FLOP/s", flops=2 * n**3)
    peer = None
    try:
        from sentence_transformers import SentenceTransformer as peer  # noqa: N813
    except ImportError:
        print("sentence-transformers is not installed: nothing is compared with it")
    for part in (lambda: encoding(clock, peer), lambda: training(clock, peer)):
        part()
        gc.collect()
        if size.device.type == "cuda":
            torch.cuda.empty_cache()
    losses(clock)
    search(clock)
    return clock.rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Fewer texts and repeats.")
    parser.add_argument("--tiny", action="store_true", help="A dry run on a CPU.")
    parser.add_argument("--out", type=Path, help="File for the results.")
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU is here; --tiny tries the benchmark on a CPU")
    rows = measure(TINY if given.tiny else QUICK if given.quick else FULL)
    if given.tiny:
        rows = [row | {"target": None, "note": "a dry run on a CPU: not measured"} for row in rows]
    out = given.out or (Path(tempfile.mkdtemp()) / "gpu.json" if given.tiny else None)
    print(write_results("gpu", rows, out=out))


if __name__ == "__main__":
    main()

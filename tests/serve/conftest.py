from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.models.settings import save_ranges
from tercet.rank.quantized import Ranges, truncated
from tests.serving import Running, serving
from tests.toy import SENTENCES

PROMPTS = {"query": "find : ", "document": "file : "}


@pytest.fixture(scope="session")
def hybrid_folder(tmp_path_factory, encoder_folder) -> Path:
    """A tiny model of three kinds, with prompts, tuned weights, and ranges for 64 and 16 dims."""
    folder = tmp_path_factory.mktemp("served") / "hybrid"
    embedder = Embedder.load(
        encoder_folder,
        kinds=KINDS,
        multi_dim=8,
        prompts=PROMPTS,
        task_prompts={"clustering": {"query": "group : ", "document": "group : "}},
        weights={"": Weights(1.0, 0.5, 2.0)},
        query_tokens=32,
        document_tokens=64,
    )
    torch.manual_seed(3)
    for weight in embedder.heads.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    embedder.save(folder)
    vectors = embedder.encode(SENTENCES, "document")
    save_ranges(folder, {dims: Ranges.learned(truncated(vectors, dims)) for dims in (64, 16)})
    return folder


@pytest.fixture(scope="session")
def server(hybrid_folder, encoder_folder) -> Iterator[Running]:
    """A server of the models "hybrid" (the first), with three kinds, and "plain", without prompts.

    It serves all tests of a process: no test may change it.
    """
    with serving({"hybrid": hybrid_folder, "plain": encoder_folder}) as running:
        yield running

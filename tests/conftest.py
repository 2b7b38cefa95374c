import os
import shutil

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

from tests import toy


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    """A tiny random BERT with a real WordPiece tokenizer."""
    return toy.save_model(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory) -> Path:
    """A tiny random Llama with a real byte-level BPE tokenizer."""
    return toy.save_model(tmp_path_factory.mktemp("decoder"), "llama")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for converted models."""
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "models"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # pytest would keep half a gigabyte


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

import pytest
import torch

from tercet.errors import ModelError
from tercet.models import fastest
from tercet.models.embedder import Embedder
from tercet.models.fastest import fastest_type
from tests.toy import save_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """Pretend that this CPU has instructions for bfloat16, and that small models are worth it."""
    monkeypatch.setattr(fastest, "has_bfloat16", lambda: True)
    monkeypatch.setattr(fastest, "_WORTH", 0)


def measured(monkeypatch, loss):
    """Let the loss be this one, and count how often it is measured."""
    asked = []
    monkeypatch.setattr(fastest, "_loss_of_bfloat16", lambda source: asked.append(source) or loss)
    return asked


def test_a_cpu_without_instructions_for_bfloat16_takes_float32(encoder_folder, monkeypatch):
    monkeypatch.setattr(fastest, "has_bfloat16", lambda: False)
    asked = measured(monkeypatch, 0.0)
    assert fastest_type(str(encoder_folder), CPU) == "float32"
    assert not asked


@pytest.mark.parametrize(
    ("loss", "expected"), [(9e-5, "bfloat16"), (1.1e-4, "float32"), (None, "float32")]
)
def test_the_loss_decides_and_is_measured_once(
    encoder_folder, monkeypatch, fast_bfloat16, loss, expected
):
    asked, said = measured(monkeypatch, loss), []
    for _ in range(2):
        assert fastest_type(str(encoder_folder), CPU, said.append) == expected
    assert asked == [str(encoder_folder)]
    assert len(said) == (expected == "bfloat16")
    assert all("at least 0.99991" in line and "--dtype float32" in line for line in said)


def test_changed_files_are_measured_again(encoder_folder, tmp_path, monkeypatch, fast_bfloat16):
    asked, folder = measured(monkeypatch, 9e-5), tmp_path / "model"
    embedder = Embedder.load(encoder_folder)
    for _ in range(2):
        embedder.save(folder)
        fastest_type(str(folder), CPU)
    assert len(asked) == 2


def test_the_loss_is_that_of_the_worst_text(encoder_folder, fast_bfloat16):
    exact, rounded = (
        Embedder.load(encoder_folder, dtype=dtype).encode(fastest._TEXTS)
        for dtype in (torch.float32, torch.bfloat16)
    )
    expected = 1 - (exact.astype("f8") * rounded).sum(1).min()
    assert fastest._loss_of_bfloat16(str(encoder_folder)) == pytest.approx(expected, abs=2e-7)
    assert expected > 1e-7


def test_small_models_and_models_of_several_kinds_stay_in_float32(tmp_path, monkeypatch):
    folder = str(save_model(tmp_path / "model", "bert"))
    assert fastest._loss_of_bfloat16(folder) is None  # too small to gain
    monkeypatch.setattr(fastest, "_WORTH", 0)
    assert fastest._loss_of_bfloat16(folder) is not None
    embedder = Embedder.load(folder, kinds=("dense", "sparse"))
    embedder.save(tmp_path / "kinds")
    assert fastest._loss_of_bfloat16(str(tmp_path / "kinds")) is None


def test_a_missing_model_is_named(tmp_path, fast_bfloat16):
    with pytest.raises(ModelError, match="no such folder"):
        fastest_type(str(tmp_path / "nothing"), CPU)


def test_a_cache_that_cannot_be_written_costs_only_time(
    encoder_folder, monkeypatch, tmp_path, fast_bfloat16
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "file"))
    asked = measured(monkeypatch, 9e-5)
    for _ in range(2):
        assert fastest_type(str(encoder_folder), CPU) == "bfloat16"
    assert len(asked) == 2

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


def measured(monkeypatch, cosines):
    """Let the cosines be these, and count how often they are measured."""
    asked = []
    monkeypatch.setattr(
        fastest, "_cosines_of_bfloat16", lambda source: asked.append(source) or cosines
    )
    return asked


def test_a_cpu_without_instructions_for_bfloat16_takes_float32(encoder_folder, monkeypatch):
    monkeypatch.setattr(fastest, "has_bfloat16", lambda: False)
    asked = measured(monkeypatch, [1.0])
    assert fastest_type(str(encoder_folder), CPU) == "float32"
    assert not asked


@pytest.mark.parametrize(
    ("cosines", "expected"),
    [([0.99985, 0.99999], "bfloat16"), ([0.99985, 0.9999], "float32"), (None, "float32")],
)
def test_the_mean_cosine_decides_and_is_measured_once(
    encoder_folder, monkeypatch, fast_bfloat16, cosines, expected
):
    asked, said = measured(monkeypatch, cosines), []
    for _ in range(2):
        assert fastest_type(str(encoder_folder), CPU, said.append) == expected
    assert asked == [str(encoder_folder)]
    assert len(said) == (expected == "bfloat16")
    assert all("0.99992 on average and at least 0.99985" in line for line in said)


@pytest.mark.parametrize("file", ["config.json", "1_Pooling/config.json"])
def test_changed_files_are_measured_again(
    encoder_folder, tmp_path, monkeypatch, fast_bfloat16, file
):
    asked, folder = measured(monkeypatch, [1.0]), tmp_path / "model"
    Embedder.load(encoder_folder).save(folder)
    fastest_type(str(folder), CPU)
    (folder / file).write_text((folder / file).read_text() + "\n")
    fastest_type(str(folder), CPU)
    assert len(asked) == 2


def test_cosines_are_those_of_texts_read_alone(encoder_folder, fast_bfloat16, caplog):
    exact, rounded = (
        Embedder.load(encoder_folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    found = fastest._cosines_of_bfloat16(str(encoder_folder))
    assert found is not None and not caplog.messages  # also no note that texts were cut
    for text, cosine in zip(fastest._TEXTS, found, strict=True):
        expected = exact.encode([text])[0] @ rounded.encode([text])[0]
        assert cosine == pytest.approx(expected, abs=1e-6)
    assert min(found) < 1


def test_small_models_and_models_of_several_kinds_stay_in_float32(tmp_path, monkeypatch):
    folder = str(save_model(tmp_path / "model", "bert"))
    assert fastest._cosines_of_bfloat16(folder) is None  # too small to gain
    monkeypatch.setattr(fastest, "_WORTH", 0)
    assert fastest._cosines_of_bfloat16(folder) is not None
    embedder = Embedder.load(folder, kinds=("dense", "sparse"))
    embedder.save(tmp_path / "kinds")
    assert fastest._cosines_of_bfloat16(str(tmp_path / "kinds")) is None


def test_an_adapter_stays_in_float32(tmp_path, monkeypatch, fast_bfloat16):
    asked = measured(monkeypatch, [1.0])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert fastest_type(str(tmp_path / "adapter"), CPU) == "float32"
    assert not asked


def test_a_missing_model_is_named(tmp_path, fast_bfloat16):
    with pytest.raises(ModelError, match="no such folder"):
        fastest_type(str(tmp_path / "nothing"), CPU)


def test_a_cache_that_cannot_be_written_costs_only_time(
    encoder_folder, monkeypatch, tmp_path, fast_bfloat16
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "file"))
    asked = measured(monkeypatch, [1.0])
    for _ in range(2):
        assert fastest_type(str(encoder_folder), CPU) == "bfloat16"
    assert len(asked) == 2

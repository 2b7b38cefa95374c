"""Each example trains, or searches, with a toy model and prints figures before and after."""

import importlib
import re
from pathlib import Path

import pytest
import transformers as t

from tests import toy

FIGURE = r"0\.\d{3} \[0\.\d{3}, \d\.\d{3}\]"
CHANGE = r"[+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\]"


def printed(capsys, name, out, model, **numbers):
    importlib.import_module(f"examples.{name}").main(out=out, model=str(model), **numbers)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A decoder with the head that predicts tokens, which masked prediction needs."""
    path = toy.save_model(tmp_path_factory.mktemp("language-model"), "llama")
    t.LlamaForCausalLM(toy.DECODERS["llama"]).save_pretrained(path)  # pyright: ignore
    return path


def test_finetune(capsys, tmp_path, encoder_folder):
    said = printed(
        capsys, "finetune", tmp_path, encoder_folder, rows=64, batch=2, steps=2, tests=10
    )
    assert re.search(f"nDCG@10 before  {FIGURE}\nnDCG@10 after   {FIGURE}\n", said)
    assert re.search(f"difference      {CHANGE}\n", said)
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_llm2vec(capsys, tmp_path, language_model):
    said = printed(capsys, "llm2vec", tmp_path, language_model, rows=40, steps=(1, 1, 1), tests=10)
    assert re.search(f"nDCG@10 before  {FIGURE}\nnDCG@10 after   {FIGURE}\n", said)
    assert {path.name for path in (tmp_path / "run").glob("[0-9]-*")} == {
        "1-mntp",
        "2-simcse",
        "3-supervised",
    }


@pytest.mark.slow
def test_nv_embed(capsys, tmp_path, decoder_folder, encoder_folder):
    teacher = str(encoder_folder)
    numbers = {"rows": 60, "steps": 2, "tests": 10, "teacher": teacher}
    said = printed(capsys, "nv_embed", tmp_path, decoder_folder, **numbers)
    assert re.search(f"nDCG@10 before  {FIGURE}\nnDCG@10 after   {FIGURE}\n", said)


@pytest.mark.slow
def test_bge_m3(capsys, tmp_path, encoder_folder):
    said = printed(capsys, "bge_m3", tmp_path, encoder_folder, rows=40, steps=2, tests=10)
    kinds = re.findall(rf"trained, ([a-z+]+) +{FIGURE}  difference {CHANGE}\n", said)
    assert kinds == [
        *("dense", "sparse", "multi"),
        *("dense+sparse", "dense+multi", "sparse+multi", "dense+sparse+multi"),
    ]


@pytest.mark.slow
def test_arctic_embed(capsys, tmp_path, encoder_folder):
    numbers = {"rows": 80, "steps": 4, "tests": 10, "widths": (64, 32)}
    said = printed(capsys, "arctic_embed", tmp_path, encoder_folder, **numbers)
    figures = rf"(\w\w), (\d\d) coordinates: before {FIGURE}, after {FIGURE}, difference {CHANGE}\n"
    assert re.findall(f"nDCG@10, {figures}", said) == [
        ("en", "64"),
        ("en", "32"),
        ("ko", "64"),
        ("ko", "32"),
    ]


def test_search(capsys, tmp_path, encoder_folder):
    said = printed(capsys, "search", tmp_path, encoder_folder, documents=20, queries=10)
    found = re.findall(r"(\w+): the right text among the first 10 for [\d.]+% of", said)
    assert found == ["float32", "int4"]
    assert said.count("\n  ") == 6  # three hits of two questions


@pytest.mark.parametrize(
    "name", ["finetune", "llm2vec", "nv_embed", "bge_m3", "arctic_embed", "search"]
)
def test_an_example_uses_the_public_names_only(name):
    lines = Path("examples", f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) tercet\.", lines, re.MULTILINE)
    assert len(lines.splitlines()) < 100

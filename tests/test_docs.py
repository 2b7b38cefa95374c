"""What README and docs name exists, and what they show runs."""

import ast
import gzip
import importlib
import json
import pkgutil
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer

from tercet import metrics
from tercet.cli.app import app
from tercet.cli.study import app_of
from tercet.data.files.examples import parse_example
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import DataError
from tercet.models.embedder import Embedder
from tercet.models.network import pooling
from tercet.recipes import finetune
from tercet.training import log
from tercet.training.loop import train
from tercet.training.recipe import Model, Run
from tercet.types import Example
from tests.toy import SENTENCES

ROOT = Path(__file__).parent.parent
GENERATED = [ROOT / "docs/reference" / name for name in ("commands.md", "settings.md")]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
    if page not in GENERATED  # by tests/site.py, at each build
]
# Looked up, not read from beginning to end, so they may be longer than a page to read.
REFERENCE = ("architecture", "log", "traps", "benchmarks/speed", "evidence", "CHANGELOG")
FOLDERS = ("tercet", "tests", "docs", "benchmarks", "examples")
FILES_OF_OURS = ("tercet.json",)  # looks like a module, and is a file


def of_each_page(pattern: str) -> list[Any]:
    """Page and text of everything that the pattern's group finds, once."""
    found = {(page, text) for page in PAGES for text in re.findall(pattern, page.read_text())}
    return [pytest.param(*pair, id=f"{pair[0].name}:{pair[1]}") for pair in sorted(found)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("page", "name"), of_each_page(r"\btercet(?:\.\w+)+"))
def test_every_module_function_and_class_named_exists(page, name):
    if name not in FILES_OF_OURS:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize(("page", "link"), of_each_page(r"\]\(([^)#\s]+)"))
def test_every_link_to_a_file_leads_somewhere(page, link):
    target = (page.parent / link).resolve()
    assert link.startswith("https://") or target in GENERATED or target.exists()


@pytest.mark.parametrize(("page", "path"), of_each_page(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`"))
def test_every_path_named_exists(page, path):
    assert "NAME" in path or (ROOT / path).exists()


HISTORY = ("CHANGELOG.md", "log.md")  # commands there had other names when they were run


SHOWN = r"^ *(?:torchrun .*-m )?tercet (.*)$"


def commands() -> Iterator[tuple[str, str]]:
    """Page and command line, from code blocks and from code inside a sentence."""
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            for line in re.findall(SHOWN, block.replace("\\\n", " "), re.MULTILINE):
                yield page.name, line.partition("#")[0]
        for line in re.findall(r"`(?:torchrun [^`]*-m )?tercet ([^`]*)`", text):
            if page.name not in HISTORY:
                yield page.name, line


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_shown_has_its_verb_and_flags(page, line):
    verb: Any = typer.main.get_command(app)
    words = [word for word in shlex.split(line) if word not in ("COMMAND", "...")]
    while words and hasattr(verb, "get_command") and not words[0].startswith("-"):
        verb = verb.get_command(None, words.pop(0))
    if verb.name == "study" and words:  # its flags are in the file
        file = ROOT / words[0]
        if not file.exists():
            return
        verb = typer.main.get_command(app_of(file))
    known = {flag for option in verb.params for flag in (*option.opts, *option.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known | {"--help"}


def is_missing(module: str) -> bool:
    """Whether it is of a framework that is not installed; tests/serve/test_clients_page.py."""
    package = module.partition(".")[0]
    return package.startswith(("langchain", "llama_index", "haystack")) and not find_spec(package)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_shown_is_python_and_its_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and not is_missing(node.module or ""):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_readmes_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = blocks(ROOT / "README.md", "python")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "runs/mine/model/config.json").exists()
    assert "0." in capsys.readouterr().out


EXTENDING = blocks(ROOT / "docs/extending.md", "python")


def shown(beginning: str, **names: Any) -> dict[str, Any]:
    """What the example that contains these words defines, run with these names known."""
    (example,) = [block for block in EXTENDING if beginning in block]
    module = ModuleType("shown")  # dataclasses look their module up
    sys.modules[module.__name__] = module
    module.__dict__.update(names)
    exec(compile(example, "docs/extending.md", "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture
def pairs(tmp_path) -> Source:
    examples = [Example(f"{text} {i}", (text,)) for i, text in enumerate(SENTENCES)]
    write_examples(tmp_path / "pairs.jsonl", examples)
    return open_source(tmp_path / "pairs.jsonl")


def test_the_objective_in_the_extending_page_trains(tmp_path, encoder_folder, pairs):
    recipe = shown("stage = Stage", **shown("class Uniform"))["recipe"]
    stage = replace(recipe.stages[0], steps=3, batch_size=6, learning_rate=1e-3)
    small = replace(recipe, model=Model(base=str(encoder_folder)), stages=(stage,))
    train(small, [pairs], tmp_path / "run", run=Run(device="cpu", show_progress=False))
    losses = [record["loss"] for record in log.read(tmp_path / "run/log.jsonl")]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < 0


def test_the_other_objects_in_the_extending_page_work(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    texts = embedder.tokenize(["one", "a longer text"], "document").pack()
    vectors = shown("def maximum", **vars(pooling))["maximum"](embedder.states(texts), texts)
    assert vectors.shape == (2, embedder.dim)
    recipe = shown("def short_vectors")["short_vectors"]()
    assert recipe.stages[0].objective.dims == (64, 128)
    precision = shown("def precision", **vars(metrics))["precision"]
    judgements = metrics.Judgements.of([{0: 1, 2: 1}, {1: 1}])
    assert precision(np.array([[0, 1], [2, 0]]), judgements, 2).tolist() == [0.5, 0.0]


def test_the_run_in_the_extending_page_runs(tmp_path, encoder_folder, pairs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "finetune", partial(finetune.finetune, str(encoder_folder)))
    (example,) = [block for block in EXTENDING if "runs/mine" in block]
    short = example.replace('model="minilm", steps=100', "steps=2")
    exec(compile(short, "docs/extending.md", "exec"), {})
    assert (tmp_path / "runs/mine/model/config.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_to_read_has_at_most_1500_words(page):
    name = page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")
    text = page.read_text()
    if name == "README":
        assert len(text.split()) <= 700
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert name in REFERENCE or len(prose.split()) <= 1_500


def test_no_folder_of_the_docs_has_more_than_15_files():
    folders = [ROOT / "docs", *(path for path in ROOT.glob("docs/**/*") if path.is_dir())]
    sizes = {folder.name: sum(path.is_file() for path in folder.iterdir()) for folder in folders}
    assert max(sizes.values()) <= 15, sizes


def test_every_page_of_the_docs_is_in_the_menu_of_the_site():
    menu = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    named = set(re.findall(r"[\w/]+\.md", json.dumps(menu)))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    generated = {page.relative_to(ROOT / "docs").as_posix() for page in GENERATED}
    assert named == pages | generated


@pytest.mark.parametrize(("page", "test"), of_each_page(r"`(tests/[^`]+::\w+)`"))
def test_every_test_named_exists(page, test):
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_the_layout_in_the_architecture_names_every_module():
    layout = next(b for b in blocks(ROOT / "docs/architecture.md", "") if "types.py" in b)
    modules = [path for path in (ROOT / "tercet").rglob("*.py") if not path.stem.startswith("__")]
    named = set(re.findall(r"\w+\.py\b", layout)) - {"__init__.py"}
    assert named == {module.name for module in modules}


def test_the_order_of_the_layers_is_that_of_the_contract():
    contract = re.search(
        r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M
    )
    assert contract is not None
    order = re.findall(r"\w+", contract[1])
    shown = next(b for b in blocks(ROOT / "docs/architecture.md", "") if "cli > " in b)
    assert re.findall(r"\w+", shown) == order


def test_the_examples_in_the_data_page_are_examples():
    lines = blocks(ROOT / "docs/data/pairs.md", "json")[0].splitlines()
    assert [parse_example(json.loads(line), "task").negatives for line in lines] == [
        (),
        ("Plays draughts.",),
    ]


GOOD = b'{"query": "a", "positives": ["b"]}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.doc", b"a,b"),
        ("pairs.jsonl", gzip.compress(b"a", mtime=0)),
        ("pairs.jsonl", "{}".encode("utf-16")),
        ("pairs.csv", b"a,b"),
        ("pairs.jsonl", b""),
        ("pairs.jsonl", GOOD + b'{"query":\n'),
        ("pairs.jsonl", GOOD + b'{"text": "x"}\n'),
        ("pairs.jsonl", GOOD + b'{"query": " ", "positives": ["b"]}\n'),
        ("pairs.jsonl", GOOD + b'{"query": "x", "positives": [3]}\n'),
        ("pairs.jsonl", GOOD + b'{"query": "x", "positives": ["b"], "pos": ["c"]}\n'),
        ("pairs.jsonl", b'{"query": "x", "positives": ["b"], "positive_scores": [1, 2]}\n'),
        ("pairs.jsonl", GOOD + b'{"query":"\xe9","positives": ["b"]}\n'),
        ("pairs.jsonl", b'{"query": "\\ud83d", "positives": ["b"]}\n'),
    ],
)
def test_messages_in_the_data_page_are_those_that_users_get(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(name)
    assert f"| `{caught.value}` |" in (ROOT / "docs/data/limits.md").read_text()

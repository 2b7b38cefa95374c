"""The structure of the package: small folders, no import cycles, light starts."""

import ast
import inspect
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import grimp
import networkx
import pytest

import tercet

PACKAGE = Path(__file__).parent.parent / "tercet"
HEAVY = ("torch", "transformers")
MOST_FILES = 15
MOST_AMBIGUOUS = 9


def test_no_modules_import_each_other_also_not_inside_functions():
    graph = grimp.build_graph("tercet", cache_dir=None)
    imports = networkx.DiGraph(
        (module, other)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
    )
    cycles = [c for c in networkx.strongly_connected_components(imports) if len(c) > 1]
    assert cycles == []


def test_no_folder_has_more_than_fifteen_files():
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    sizes = {str(f.relative_to(PACKAGE)): len(list(f.glob("*.py"))) for f in folders}
    assert {name: size for name, size in sizes.items() if size > MOST_FILES} == {}


def test_few_class_names_stand_for_several_things():
    places = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].add(path.name)
    ambiguous = sorted(name for name, found in places.items() if len(found) > 1)
    assert len(ambiguous) <= MOST_AMBIGUOUS, ambiguous


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["models"],
        ["serach"],
        ["search", "--topk", "3"],
        ["encode", "--dimensions", "3"],
        ["train", "finetune", "--epoch", "3"],
    ],
    ids=" ".join,
)
def test_a_command_that_only_prints_imports_nothing_heavy(words):
    imported = _imported_by(f"from tercet.cli import main; main({words!r})")
    assert [name for name in HEAVY if name in imported] == []


def test_importing_the_package_imports_nothing_heavy():
    assert [name for name in HEAVY if name in _imported_by("import tercet")] == []


def test_public_names_are_found_where_the_face_says_and_are_explained():
    assert sorted(tercet._MODULES) == sorted(tercet.__all__)
    for name, module in tercet._MODULES.items():
        found = getattr(tercet, name)
        assert found is getattr(import_module(module), name)
        assert inspect.getdoc(found), name


def test_public_functions_say_what_goes_wrong_and_show_an_example():
    for name, module in tercet._MODULES.items():
        found = getattr(tercet, name)
        # The parameters of a recipe are explained in their annotations.
        if inspect.isfunction(found) and not module.startswith("tercet.recipes."):
            text = inspect.getdoc(found) or ""
            lacking = [part for part in ("Args:", "Raises:", "Example") if part not in text]
            assert lacking == [], name


def _imported_by(code: str) -> set[str]:
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('imported', *sys.modules, file=sys.stderr))\n" + code
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    line = next(line for line in ended.stderr.splitlines() if line.startswith("imported "))
    return set(line.split())

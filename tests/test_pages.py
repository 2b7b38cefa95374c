"""Every command and Python block of README and docs runs, on tiny files and models.

Each page runs from top to bottom in a folder of its own. Files that all pages share are made here
under the names that the pages use; models of the zoo are tiny random ones; trainings are a few
steps long (``SHORT``). What cannot run here is listed with its reason (``NOT_RUN``); its flags are
checked by ``tests/test_docs.py``.
"""

import inspect
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.cli.app import main
from tercet.models.zoo import zoo
from tercet.recipes.catalog import RECIPES
from tests.answering import completion, endpoint, written
from tests.cli.lines import write
from tests.test_docs import PAGES, ROOT
from tests.toy import SENTENCES

NOT_RUN = {
    r"(make|pip|git|cd|source) ": "set-up",
    r"\.venv/bin/python -m benchmarks": "takes minutes to hours",
    r"\.venv/bin/python -m pytest -o addopts= -m gpu": "a GPU: tests marked gpu",
    r"torchrun ": "several processes: tests/training/test_two_processes.py",
    r"tercet serve": "runs until it is stopped: tests/serve/test_command.py",
    r"curl ": "a running server: tests/serve",
    r"tercet demo": "minutes: tests/cli/test_demo.py",
    r"tercet study": "flags are the file's: tests/studies",
    r".* --runner ray": "a cluster: tests marked ray",
    r".* --url http://localhost:6333": "a Qdrant server: tests/search",
}
PYTHON_ELSEWHERE = {
    "clients.md": "tests/serve/test_clients_page.py runs it with a server",
    "README.md": "tests/test_docs.py runs it with a real model",
    "extending.md": "tests/test_docs.py and tests/studies/test_cells.py run its parts",
}
# Appended to trainings, unless the line says something else of the same setting.
SHORT = {
    "finetune": {"steps": 2, "batch_size": 4},
    "llm2vec": {
        "steps": 3,
        "mntp.batch_size": 2,
        "mntp.block_tokens": 64,
        "simcse.batch_size": 4,
        "supervised.batch_size": 4,
        "lora_rank": 2,
    },
    "nv-embed": {"steps": 2, "batch_size": 4, "latents": 4, "heads": 2, "lora_rank": 2},
    "bge-m3": {
        "steps": 3,
        "retromae.batch_size": 2,
        "retromae.max_tokens": 64,
        "contrastive.batch_size": 4,
        "unified.batch_size": 4,
    },
    "distil": {"steps": 2, "batch_size": 4},
    "arctic-embed": {
        "steps": 2,
        "pretraining.batch_size": 4,
        "finetuning.batch_size": 4,
        "dims": 8,
    },
}
# Numbers that tiny models and files do not have.
SMALLER = {
    "dims=256,128": "dims=16,8",
    "multi_dim=128": "multi_dim=8",
    "--dims 256": "--dims 16",
    "dims=256": "dims=16",
    "--keep-layers 3": "--keep-layers 2",
    "steps=100": "steps=2",
    "statistics string ": "statistics",
    "numpy numpy.linalg numpy.random pyarrow pyarrow.compute": "",
    "torch torch.nn torch.nn.functional": "",
    "http://localhost:8000/v1": "ENDPOINT",
    "--model smollm2 --check-model": "--model smollm2 --url ENDPOINT --check-model",
}


class Block(NamedTuple):
    """A block of code of a page."""

    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that can run, in order."""
    found = re.findall(r"^( *)```(sh|python|toml)\n(.*?)^\1```", page.read_text(), re.M | re.S)
    return [Block(language, dedent(code)) for _, language, code in found]


def lines_of(code: str) -> Iterator[str]:
    """The commands of a block of shell, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


def reason(line: str) -> str | None:
    """Why a line is not run."""
    return next((why for what, why in NOT_RUN.items() if re.match(what, line)), None)


PAGES_THAT_RUN = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and blocks_of(page)]
PAGES_THAT_RUN.append(ROOT / "README.md")


def shortened(words: list[str]) -> list[str]:
    """A training of a few steps."""
    if words[0] != "train" or "--explain" in words:
        return words
    if "--steps" in words:
        at = words.index("--steps")
        words = [*words[:at], *words[at + 2 :]]
    given = dict(word.split("=", 1) for flag, word in itertools.pairwise(words) if flag == "--set")
    parameters = inspect.signature(RECIPES[words[1]].function).parameters
    stages = given.get("stages") or (parameters["stages"].default if "stages" in parameters else "")
    for name, value in SHORT[words[1]].items():
        stage, dot, _ = name.partition(".")
        if name not in given and (not dot or stage in stages):
            words = [*words, "--set", f"{name}={value}"]
    return words


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """The files that pages read."""
    folder = tmp_path_factory.mktemp("pages")
    known, unseen = SENTENCES[:8], SENTENCES[8:]  # no text of a test in training
    rows, tests = (
        [
            {"query": f"{text.split()[-1]} {i}", "positives": [f"{text} {i}"], "lang": "en"}
            for i in range(3)
            for text in texts
        ]
        for texts in (known, unseen)
    )
    for name, part in (("pairs", rows), ("dev", tests), ("test", tests)):
        write(folder / f"{name}.jsonl", *({k: r[k] for k in ("query", "positives")} for r in part))
    texts = [f"page {i} " + " ".join(SENTENCES[(i + j) % 12] for j in range(4)) for i in range(24)]
    documents = [
        {"id": f"d{i}", "title": text[:12], "text": f"{text}\n\n{text}", "section": "web"}
        for i, text in enumerate(texts)
    ]
    write(folder / "docs.jsonl", *documents)
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    labels = [
        {"text": f"{text} {i}", "label": "ab"[n % 2], "split": ("train", "test")[i]}
        for i in range(2)
        for n, text in enumerate(known)
    ]
    write(folder / "labelled.jsonl", *labels)
    scores = [
        {"text1": a, "text2": b, "score": float(i % 6)}
        for i, (a, b) in enumerate(itertools.pairwise(SENTENCES))
    ]
    write(folder / "scored.jsonl", *scores)
    (folder / "sources/faq/lang=fr").mkdir(parents=True)
    write(folder / "sources/faq/lang=fr/0.jsonl", *({**row, "lang": "fr"} for row in rows[:12]))
    write(folder / "sources/news.jsonl", *({**r, "lang": "de"} for r in rows[:12]), *rows[12:24])
    (folder / "sets").mkdir()
    for language in ("de", "en", "ko"):
        write(folder / f"sets/{language}.jsonl", *({**r, "lang": language} for r in tests))
    for name, part in (("train", SENTENCES[:8]), ("test", SENTENCES[8:])):
        sentences = ("".join(f"{w}\t{'XY'[len(w) % 2]}\n" for w in s.split()) for s in part)
        (folder / f"{name}.conll").write_text("\n".join(sentences))
    foreign = [
        {"query": f"q {i}", "pos": [SENTENCES[i]], "neg": [SENTENCES[i + 1]]} for i in range(6)
    ]
    (folder / "data/sts").mkdir(parents=True)
    write(folder / "data/sts/a.jsonl", *foreign)
    write(folder / "data/nq.jsonl", *foreign)
    write_tables(folder / "tables")
    return folder


def write_tables(folder: Path) -> None:
    """Write texts as Arctic-Embed's code has them."""
    folder.mkdir()
    ids, half = list(range(12)), list(range(6))
    queries = {"QUERY_ID": half, "QUERY_TEXT": [f"query {i}" for i in half]}
    documents = {"DOCUMENT_ID": ids, "DOCUMENT_TEXT": list(SENTENCES)}
    labels = {"QUERY_ID": half, "DOCUMENT_ID": half}
    mined = {"QUERY_ID": half, "DOCUMENT_ID": [i + 6 for i in half], "RELEVANCE": [-1] * 6}
    for name, columns in (
        ("queries", queries),
        ("documents", documents),
        ("labels", labels),
        ("mined", mined),
    ):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def run(*words: str) -> None:
    """Run a command in this process, and expect success."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert not end.value.code, words


@pytest.fixture(scope="session")
def writer_folder(tmp_path_factory) -> Path:
    """A tiny random decoder with its language-model head."""
    return written(tmp_path_factory.mktemp("writer"))


@pytest.fixture(scope="session")
def made(shared, encoder_folder, writer_folder, tmp_path_factory) -> dict[str, Callable[[], None]]:
    """How to make what a page uses and another page has made, by the path that pages name."""
    m3 = tmp_path_factory.mktemp("m3") / "run"

    def three_kinds() -> None:
        if not m3.exists():
            settings = [f"{k}={v}" for k, v in SHORT["bge-m3"].items() if k.startswith("unified")]
            options = [word for setting in settings for word in ("--set", setting)]
            run(
                "train",
                "bge-m3",
                "--data",
                "pairs.jsonl",
                "--model",
                str(encoder_folder),
                "--set",
                "stages=unified",
                "--steps",
                "2",
                *options,
                "--out",
                str(m3),
            )
        shutil.copytree(m3 / "model", "runs/m3/model")

    return {
        "runs/mine/model": lambda: copy(encoder_folder, "runs/mine/model"),
        "runs/plain/model": lambda: copy(encoder_folder, "runs/plain/model"),
        "runs/arctic/model": lambda: copy(encoder_folder, "runs/arctic/model"),
        "runs/l2v/1-mntp/model": lambda: copy(writer_folder, "runs/l2v/1-mntp/model"),
        "runs/l2v/model": lambda: copy(writer_folder, "runs/l2v/model"),
        "runs/nv/model": lambda: copy(writer_folder, "runs/nv/model"),
        "runs/m3/model": three_kinds,
        "mined.jsonl": lambda: copy(Path("pairs.jsonl"), "mined.jsonl"),
        "questions.jsonl": lambda: copy(Path("pairs.jsonl"), "questions.jsonl"),
        "filtered/pairs": lambda: copy(Path("sources"), "filtered/pairs"),
        "index": lambda: run("index", "docs.jsonl", "--model", "minilm", "--out", "index"),
    }


def copy(what: Path, where: str) -> None:
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if what.is_dir() else shutil.copyfile)(what, where)


@pytest.fixture
def tiny_zoo(encoder_folder, writer_folder, monkeypatch) -> None:
    """Models of the zoo are tiny random ones."""
    folders = {"smollm2": writer_folder, "gemma3": writer_folder}
    monkeypatch.setattr(
        zoo, "_resolve_zoo", lambda model, report: folders.get(model.name, encoder_folder)
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, shared, made, tiny_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    blocks = blocks_of(page)
    commands = [line for block in blocks if block.language == "sh" for line in lines_of(block.code)]
    outputs = {f"{out}/" for out in re.findall(r"--out (\S+)", "\n".join(commands))}
    words = set(re.split(r"[\s\"'=]+", "\n".join(block.code for block in blocks)))
    for path, make in made.items():
        if path in words and not any(f"{path}/".startswith(out) for out in outputs):
            make()
    names: dict[str, Any] = {"__name__": "page"}
    with endpoint(lambda body, n: completion(f"What does page {n} say of it?")) as served:
        for block in blocks:
            run_block(block, names, served.url, page)


def run_block(block: Block, names: dict[str, Any], url: str, page: Path) -> None:
    code = block.code
    for large, small in SMALLER.items():
        code = code.replace(large, small).replace("ENDPOINT", url)
    if block.language == "python" and page.name not in PYTHON_ELSEWHERE:
        exec(compile(code, str(page), "exec"), names)
    elif block.language == "toml":
        Path(code.splitlines()[0].removeprefix("# ")).write_text(code)
    elif block.language == "sh":
        for line in lines_of(code):
            assert line.startswith("tercet ") or reason(line), f"who runs this? {line}"
            if not reason(line):
                run(*shortened(shlex.split(line)[1:]))


def test_what_is_not_run_is_on_some_page():
    lines = [
        line
        for page in PAGES_THAT_RUN
        for block in blocks_of(page)
        if block.language == "sh"
        for line in lines_of(block.code)
    ]
    unused = [what for what in NOT_RUN if not any(re.match(what, line) for line in lines)]
    assert not unused, json.dumps(unused)

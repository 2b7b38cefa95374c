from dataclasses import dataclass
from pathlib import Path

import pytest

from tercet.cli.app import main
from tests.cli.lines import write
from tests.toy import SENTENCES


@dataclass
class Ended:
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def tercet(capsys):
    """Run a command in this process."""

    def run(*words: str | Path) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        assert isinstance(end.value.code, int | None)
        return Ended(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def refused(tercet):
    """Run a command that a user got wrong; what it says about it, in one line."""

    def run(*words: str | Path) -> str:
        ended = tercet(*words)
        assert ended.status == 2, ended
        lines = [line for line in ended.err.splitlines() if line.startswith("tercet: ")]
        assert len(lines) == 1 and ended.err.endswith(f"{lines[0]}\n"), ended.err
        assert "Traceback" not in ended.err and ended.out == ""
        return lines[0].removeprefix("tercet: ")

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory, encoder_folder):
    """A user's folder: training pairs, documents, texts, and an index made with the model."""
    folder = tmp_path_factory.mktemp("files")
    pairs = [
        {"query": f"{text.split()[-1]} {i}", "positives": [f"{text} {i}"]}
        for i in range(2)
        for text in SENTENCES
    ]
    documents = [
        {"id": f"d{i}", "title": text[:12], "text": text} for i, text in enumerate(SENTENCES)
    ]
    write(folder / "pairs.jsonl", *pairs)
    write(folder / "docs.jsonl", *documents)
    (folder / "texts.txt").write_text("\n".join(SENTENCES) + "\n")
    (folder / "empty.jsonl").touch()
    (folder / "pairs.csv").write_text("query,positive\n")
    (folder / "folder").mkdir()
    (folder / "incomplete").mkdir()
    config = (encoder_folder / "config.json").read_text()
    (folder / "incomplete/config.json").write_text(config)
    command = ["index", folder / "docs.jsonl", "--model", encoder_folder, "--out", folder / "index"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command])
    assert end.value.code == 0
    return folder


@pytest.fixture
def train(encoder_folder, files):
    """The words of a short training."""

    def words(out: Path, *more: str | Path, base: Path | str = encoder_folder) -> list[str | Path]:
        start = ["train", "finetune", "--model", base, "--out", out, "--set", "batch_size=8"]
        data = [] if "--data" in more else ["--data", files / "pairs.jsonl"]
        return [*start, *data, "--device", "cpu", *more]

    return words

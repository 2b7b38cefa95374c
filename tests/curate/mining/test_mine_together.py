from functools import partial
from pathlib import Path

import pytest

from tercet.curate.jobs.runners import LOOP, Runner
from tercet.curate.mining import document_pools as mining_documents
from tercet.curate.mining import mine_together as together
from tercet.curate.mining.mine_together import SharedMining
from tercet.curate.mining.miner import Mining, mine
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.sources import open_source, write_examples
from tercet.models.embedder import Embedder
from tercet.types import Example
from tests.processes import ROOT
from tests.toy import SENTENCES


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(mining_documents, "SHARD", 4)
    monkeypatch.setattr(together, "SHARD", 4)


@pytest.fixture
def sources(tmp_path):
    """Two files: seven pairs, and four with their own prompt."""
    words = [sentence.split() for sentence in SENTENCES]
    pairs = [
        Example(" ".join(some[:3]), (text,)) for some, text in zip(words, SENTENCES, strict=True)
    ]
    write_examples(tmp_path / "a.jsonl", pairs[:7])
    write_examples(tmp_path / "b.jsonl", pairs[7:11])
    return [open_source(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]


def shared(encoder_folder: Path, sources, work: Path, **settings) -> SharedMining:
    mining = Mining(negatives=2, depth=6, **settings)
    load = partial(Embedder.load, str(encoder_folder))
    texts = ("a text that answers nothing", SENTENCES[11])
    return SharedMining(load=load, sources=sources, mining=mining, documents=texts, work=work)


@pytest.mark.parametrize("rule", [MiningRule(kind="naive"), MiningRule(kind="quantile", value=0.9)])
@pytest.mark.parametrize("name", ["all.jsonl", "all.parquet", "folder"])
def test_blocks_that_are_joined_are_what_one_process_mines(
    encoder_folder, sources, tmp_path, rule, name
):
    how = shared(encoder_folder, sources, tmp_path / "work", rule=rule)
    alone, joined = tmp_path / "alone" / name, tmp_path / "joined" / name
    expected = mine(
        Embedder.load(encoder_folder),
        sources,
        alone,
        mining=how.mining,
        documents=how.documents,
        work=tmp_path / "other",
    )
    found = together.mine_together(how, joined, LOOP)
    files = sorted(alone.rglob("*")) if name == "folder" else [alone]
    for file in files:
        assert file.read_bytes() == (joined / file.relative_to(alone)).read_bytes()
    assert [report.dropped for report in found] == [report.dropped for report in expected]
    assert [report.negatives for report in found] == [report.negatives for report in expected]
    assert sum(report.negatives for report in found) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.positive_score == pytest.approx(other.positive_score, abs=1e-9)
    assert not list((tmp_path / "work").glob("parts-*"))


def test_two_processes_mine_the_same_bytes(encoder_folder, sources, tmp_path):
    pytest.importorskip("daft")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    together.mine_together(shared(encoder_folder, sources, tmp_path / "a"), one, LOOP)
    runner = Runner(engine="daft", workers=2)
    together.mine_together(shared(encoder_folder, sources, tmp_path / "b"), two, runner)
    assert one.read_bytes() == two.read_bytes()


def test_a_mining_that_was_killed_goes_on_with_the_blocks_that_are_missing(
    encoder_folder, sources, tmp_path, monkeypatch
):
    how = shared(encoder_folder, sources, tmp_path / "work")
    together.mine_together(how, tmp_path / "whole.jsonl", LOOP)
    done: list[str] = []
    do = together.MineBlocksJob._do

    def stopping(self, miner, unit):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit.name)
        return do(self, miner, unit)

    monkeypatch.setattr(together.MineBlocksJob, "_do", stopping)
    with pytest.raises(KeyboardInterrupt):
        together.mine_together(how, tmp_path / "again.jsonl", LOOP)
    assert not (tmp_path / "again.jsonl").exists()
    done.clear()
    together.mine_together(how, tmp_path / "again.jsonl", LOOP)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert done == ["1/000000000000"]  # the third of three blocks

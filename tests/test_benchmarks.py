"""The benchmarks that nobody can run in full here still run."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import encode_peer, encode_speed, gpu
from tests.pretend import pretended_cuda


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peer
def test_the_benchmark_of_a_gpu_runs_on_a_cpu_and_calls_nothing_measured(tmp_path):
    gpu.main(["--tiny", "--out", str(tmp_path / "gpu.json")])
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert {"commit", "machine", "versions", "rows"} <= facts.keys()
    assert all("not measured" in row["note"] for row in facts["rows"])
    names = " ".join(row["name"] for row in facts["rows"])
    for part in ("attention", "product", "encode", "dropout 0.0", "dropout 0.1", "InfoNCE", "late"):
        assert part in names
    assert "masked tokens" in names and "exact search" in names
    encode = next(row for row in facts["rows"] if row["name"].startswith("encode"))
    assert encode["error"] < 0.01  # the vectors are those of the peer


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_mixes_no_devices(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pretended_cuda() as log:
        rows = gpu.measure(replace(gpu.TINY, device=torch.device("cuda", 0)))
    assert len(rows) > 18 and log.launches["varlen_attn"] > 0


def test_without_a_gpu_the_benchmark_says_what_can_be_done(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--quick"])
    assert "no GPU is here; --tiny tries the benchmark on a CPU" in capsys.readouterr().err


def test_rows_that_are_not_measured_again_keep_the_commit_that_measured_them(tmp_path):
    file = tmp_path / "encode_speed.json"
    old = [{"name": "minilm, sorted: a / b", "ours": 1}, {"name": "XLM-R, sorted: a / b"}]
    file.write_text(json.dumps({"commit": "before", "rows": old}))
    measured = {"minilm, sorted": [{"name": "minilm, sorted: a / b", "ours": 2}]}
    new, kept = encode_speed.with_kept(measured, file)
    assert new["ours"] == 2 and new["commit"] == encode_speed.commit()
    assert kept == {"name": "XLM-R, sorted: a / b", "commit": "before"}


def test_batches_of_a_peer_are_sorted_and_of_equal_length_if_asked_for():
    lengths = [3, 9, 3, 9, 5]
    assert list(encode_peer.groups(lengths, "equal")) == [[1, 3], [4], [0, 2]]
    assert list(encode_peer.groups(lengths, "32")) == [[1, 3, 4, 0, 2]]
    assert [len(batch) for batch in encode_peer.groups([7] * 40, "equal")] == [32, 8]


def test_a_padded_batch_marks_its_tokens():
    ids, mask = encode_peer.padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]

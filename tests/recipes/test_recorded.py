"""Losses of short runs with a fixed seed, recorded before the modules were moved."""

import json

import pytest

from tercet.cli.app import main
from tests.toy import SENTENCES

RUNS = {
    "finetune": ("encoder", "steps=3 batch_size=4", [2.02097, 3.62883, 1.61489]),
    "llm2vec": (
        "decoder",
        "stages=simcse simcse.steps=2 simcse.batch_size=4 lora_rank=2",
        [0.08411, 0.02023],
    ),
    "nv-embed": (
        "decoder",
        "stages=retrieval steps=2 batch_size=4 latents=8 heads=2",
        [13.12166, 7.40251],
    ),
    "bge-m3": (
        "encoder",
        "stages=contrastive,unified steps=4 contrastive.batch_size=4 unified.batch_size=4 "
        "multi_dim=8",
        [3.83385, 2.85703, 1.58341, 3.26522],
    ),
    "arctic-embed": (
        "encoder",
        "stages=pretraining steps=2 pretraining.batch_size=4 dims=16",
        [3.24082, 3.70274],
    ),
}


@pytest.mark.parametrize("recipe", RUNS)
def test_a_run_with_a_fixed_seed_has_the_recorded_losses(
    recipe, encoder_folder, decoder_folder, tmp_path
):
    base, words, recorded = RUNS[recipe]
    rows = [
        {"query": text.split()[-1], "positives": [text], "negatives": [SENTENCES[number - 1]]}
        for number, text in enumerate(SENTENCES)
    ]
    data = tmp_path / "pairs.jsonl"
    if recipe == "llm2vec":
        data = tmp_path / "texts.txt"
        data.write_text("\n".join(SENTENCES * 4))
    else:
        data.write_text("\n".join(map(json.dumps, rows)))
    folder = encoder_folder if base == "encoder" else decoder_folder
    out = tmp_path / "run"
    flags = ["--model", str(folder), "--data", str(data), "--out", str(out), "--device", "cpu"]
    flags += [f"--set={word}" for word in words.split()]
    with pytest.raises(SystemExit) as end:
        main(["train", recipe, *flags])
    assert end.value.code in (None, 0)
    records = [
        json.loads(line)
        for log in sorted(out.rglob("log.jsonl"))
        for line in log.read_text().splitlines()
    ]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses == pytest.approx(recorded, rel=1e-3)

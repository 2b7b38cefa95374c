"""Every damage to the checkpoints of a run is refused, or changes no weight."""

from pathlib import Path

import pytest
import torch

from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError
from tercet.recipes.finetune import finetune
from tercet.training.loop import train
from tercet.training.recipe import Run
from tercet.types import Example
from tests.damage import unnoticed
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, eval_steps=1)


@pytest.fixture
def run(tmp_path, encoder_folder):
    """Train for three steps, of which the first is the best on the dev set; return the weights."""
    write_examples(tmp_path / "pairs.jsonl", [Example(t.split()[-1], (t,)) for t in SENTENCES])
    recipe = finetune(model=str(encoder_folder), batch_size=4, steps=3)

    def trained() -> dict[str, torch.Tensor]:
        scores = iter((0.1, 0.9, 0.5, 0.4))
        data = [open_source(tmp_path / "pairs.jsonl")]
        model = train(recipe, data, tmp_path / "run", run=QUIET, score=lambda _: next(scores))
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    return trained


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_damage_to_a_checkpoint_is_refused_or_changes_no_weight(run, tmp_path: Path):
    wanted = run()
    assert (tmp_path / "run/best.pt").exists()
    assert not unnoticed(
        tmp_path / "run",
        "*.pt",
        ask=run,
        same=lambda found: equal(found, wanted),
        refusals=RecipeError,
        count=15,
    )


def test_another_bit_in_a_weight_of_a_checkpoint_is_refused_with_what_to_do(run, tmp_path: Path):
    wanted, path = run(), tmp_path / "run/checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        run()
    assert str(caught.value) == (
        f"{path}: this file of an earlier run is gone or damaged; delete {path.parent} to start "
        "again, or give another --out"
    )
    path.unlink()
    (tmp_path / "run/best.pt").unlink()
    assert equal(run(), wanted)


def test_a_checkpoint_of_an_earlier_version_is_checked_by_the_members_of_its_archive(
    run, tmp_path: Path
):
    wanted, path = run(), tmp_path / "run/checkpoint.pt"
    torch.save(torch.load(path, weights_only=True), path)
    assert equal(run(), wanted)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"gone or damaged"):
        run()

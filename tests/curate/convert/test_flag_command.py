import shlex

import pytest

from tercet.curate.convert.flag_command import arguments, translated
from tercet.errors import RecipeError

SCRIPT = r"""
export WANDB_MODE=disabled
# --learning_rate 3 of an old run
model_args="\
    --model_name_or_path my/m3 \
    --colbert_dim 64 \
"
data_args="\
    --train_data ./a.jsonl ./b \
    --train_group_size 6 --query_max_len 512 --passage_max_len 1024 \
    --query_instruction_for_retrieval 'Find it: ' \
    --pad_to_multiple_of 8 --same_dataset_within_batch True \
"
cmd="torchrun --nproc_per_node 2 \
    -m FlagEmbedding.finetune.embedder.encoder_only.m3 \
    $model_args $data_args \
"
training_args="\
    --output_dir ./out --learning_rate 1e-5 --bf16 --num_train_epochs 3 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 3 \
    --temperature 0.01 --kd_loss_type m3_kd_loss --knowledge_distillation True \
    --unified_finetuning True \
    --use_self_distill True --self_distill_start_step 99 --fix_position_embedding True \
"
eval $cmd
"""


def flags_of(script: str) -> dict[str, str]:
    """The value of each flag; several are joined by spaces."""
    found: dict[str, str] = {}
    name = ""
    for word in translated(script).flags:
        if word.startswith("--"):
            name, found[word[2:]] = word[2:], found.get(word[2:], "")
        else:
            found[name] = f"{found[name]} {word}".strip()
    return found


def test_a_script_is_translated_flag_by_flag():
    """The batch is 4 texts x 3 accumulated x 2 processes; a group of 6 has 5 negatives."""
    assert flags_of(SCRIPT) == {
        "base": "my/m3",
        "multi-dim": "64",
        "data": "./a.jsonl ./b",
        "negatives": "5",
        "query-tokens": "512",
        "document-tokens": "1024",
        "query-prompt": "Find it:",
        "out": "./out",
        "learning-rate": "1e-5",
        "precision": "bfloat16",
        "batch-size": "24",
        "temperature": "0.01",
        "teacher": "listwise",
        "stages": "unified",
        "kinds": "dense,sparse,multi",
        "distil-after": "100",
        "pooling": "first",
        "seed": "42",
    }


def test_the_prompt_keeps_its_spaces_and_its_form():
    told = "--train_data a --query_instruction_for_retrieval ' x ' "
    assert " x " in translated(told).flags
    form = r"--query_instruction_format 'Instruct: {}\nQuery: {}'"
    assert "Instruct:  x \nQuery: " in translated(told + form).flags


def test_what_has_no_counterpart_is_told():
    notes = "\n".join(translated(SCRIPT).notes)
    for said in (
        "--num_train_epochs 3: give --steps",
        "--gradient_accumulation_steps: its batches become one",
        "--pad_to_multiple_of: nothing is padded here",
        "--same_dataset_within_batch: say it of the data",
        "--fix_position_embedding: has no counterpart",
        "--train_data ./b: make one file of it",
    ):
        assert said in notes
    assert "learning_rate" not in notes and "a.jsonl" not in notes


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", {"kinds": "dense", "stages": "unified", "learning-rate": "5e-5", "negatives": "7"}),
        ("--unified_finetuning", {"kinds": "dense,sparse,multi", "no-self-distillation": ""}),
        ("--unified_finetuning --use_self_distill", {"distil-after": "0"}),
        ("--sentence_pooling_method=last_token", {"pooling": "last", "query-tokens": "32"}),
        ("--use_mrl True --mrl_dims 64 128", {"dims": "64 128"}),
        ("--fix_encoder True", {"train": "heads"}),
        ("--max_steps 7 --shuffle_ratio 0.002", {"steps": "7", "shuffle-segments": "0.002"}),
    ],
)
def test_absent_flags_mean_the_references_defaults(more, expected):
    found = flags_of(f"--model_name_or_path x {more}")
    assert {name: found.get(name) for name in expected} == expected


def test_arguments_are_found_wherever_they_stand():
    text = '--a 1 2 --b=x "--c" "two words" --a 3'
    assert arguments(text) == {"a": ["3"], "b": ["x"], "c": ["two words"]}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo hello", "no --model_name_or_path and no --train_data"),
        ("--train_data 'a", "are its quotes closed"),
        ("--train_data a --train_group_size $G", "--train_group_size is '\\$G'"),
        ("--train_data a --sentence_pooling_method max", "no such pooling: max"),
        ("--train_data a --unified_finetuning --kd_loss_type mse", "no such kd_loss_type: mse"),
    ],
)
def test_what_cannot_be_read_is_refused(script, message):
    with pytest.raises(RecipeError, match=message):
        translated(script)


def test_the_command_can_be_given_to_a_shell():
    words = shlex.split(translated(SCRIPT).command)
    assert words[:3] == ["tercet", "train", "bge-m3"]
    assert "Find it: " in words

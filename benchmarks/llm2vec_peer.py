"""The peer of ``llm2vec_speed``: llm2vec 0.2.3, in an environment of its own, driven by lines.

It needs an old transformers, so it runs as a process of another Python, without tercet:

    python3.11 -m venv peer
    peer/bin/pip install torch==2.13.0
    peer/bin/pip install transformers==4.44.2 llm2vec==0.2.3 peft==0.12.0 accelerate==0.34.2
    peer/bin/python -m benchmarks.llm2vec_peer

One JSON object a line goes in, one comes out; whatever else is printed goes to standard error.
``texts`` is always the path of a file with a JSON list of strings.

    {"do": "make", "folder": F, "texts": T, "vocabulary": 8000}
        writes a random Llama (d 256, 4 layers, 704 inside the MLP, half as many key heads) with a
        byte-level tokenizer trained on the texts, which old and new releases can read
        -> {"parameters": n}
    {"do": "encode_start", "folder": F, "adapter": F or null, "texts": T}
    {"do": "encode", "save": "vectors.npy" or null}
        -> spent; "tokens" read, padding not counted
    {"do": "mntp_start", "folder": F, "texts": T, "blocks": 4, "length": 512, "seed": 0}
        -> {"trained": parameters, "blocks": how many the texts fill}
    {"do": "mntp"}
        -> spent; "tokens", "loss"; "collate": the part of "seconds" for choosing and masking
    {"do": "simcse_start", "folder": F, "texts": T, "batch": 128, "length": 128, "seed": 0}
        -> {"trained": parameters}
    {"do": "simcse"}
        -> spent; "tokens" of both views, padding not counted, "loss", "collate": tokenizing
    {"do": "versions"} -> versions of the packages by name

Spent is ``{"seconds": CPU seconds, "peak": bytes of memory at most meanwhile}``. A start
replaces what was there; each step takes the next texts, in a circle.

From the package: the models, ``LLM2Vec`` with its tokenizing, pooling and encoding, and the loss.
From transformers: the masking collator. Written here after the project's two training scripts,
which the package does not contain: blocks, LoRA on the bare decoder (the head of MNTP stays
trainable, as it does there), the pairs of SimCSE, and the step: AdamW without decay, gradients
clipped at 1. In favour of the peer: the scripts' gradient checkpointing and the Trainer's own work
are left out.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain, cycle
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from llm2vec import LLM2Vec  # pyright: ignore[reportMissingImports]
from llm2vec.loss.utils import load_loss  # pyright: ignore[reportMissingImports]
from llm2vec.models import LlamaBiForMNTP  # pyright: ignore[reportMissingImports]
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.sides import Answer, serve, spent

MODULES = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: str, texts: str, vocabulary: int) -> Answer:
    """Write a random Llama and a tokenizer for it."""
    torch.manual_seed(0)
    fast = Tokenizer(models.BPE())
    pieces: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.pre_tokenizer = pieces
    fast.train_from_iterator(
        read(texts),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    beginning: Any = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.post_processor = beginning
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def start_encode(folder: str, texts: str, adapter: str | None = None) -> Callable[..., Answer]:
    """A call of ``encode``, with the package's defaults."""
    model = LLM2Vec.from_pretrained(folder, adapter, merge_peft=adapter is not None)
    lines = read(texts)
    tokens = sum(len(ids) for ids in model.tokenizer(lines)["input_ids"])

    def step(save: str | None = None) -> Answer:
        vectors = []

        def once() -> Answer:
            vectors.append(model.encode(lines, show_progress_bar=False, convert_to_numpy=True))
            return {"tokens": tokens}

        answer = spent(once)
        if save:
            np.save(save, vectors[0])
        return answer

    return step


def start_mntp(
    folder: str, texts: str, blocks: int, length: int, seed: int = 0
) -> tuple[Callable[[], Answer], Answer]:
    """A step on ``blocks`` blocks of ``length`` tokens: masks of the kind "default", p 0.2."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = "_"
    model = LlamaBiForMNTP.from_pretrained(folder, attn_implementation="sdpa")
    model.set_model_for_peft(with_lora(model.get_model_for_peft()))
    lines = tokenizer(read(texts), return_special_tokens_mask=True)
    rows = {key: list(chain(*values)) for key, values in lines.items()}
    starts = range(0, len(rows["input_ids"]) - length + 1, length)
    found = [{key: row[at : at + length] for key, row in rows.items()} for at in starts]
    collate = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.2)
    batches = taken(found, blocks)
    update = optimizer(model, 5e-5)
    model.train()

    def once() -> Answer:
        begin = time.process_time()
        batch = collate(next(batches))
        ready = time.process_time() - begin
        loss = model(**batch).loss
        update(loss)
        return {"loss": loss.item(), "tokens": batch["input_ids"].numel(), "collate": ready}

    return lambda: spent(once), {"trained": trained(model), "blocks": len(found)}


def start_simcse(
    folder: str, texts: str, batch: int, length: int, seed: int = 0
) -> tuple[Callable[[], Answer], Answer]:
    """A step on ``batch`` sentences, each read twice with dropout."""
    torch.manual_seed(seed)
    model = LLM2Vec.from_pretrained(
        folder,
        enable_bidirectional=True,
        max_length=length,
        attn_implementation="sdpa",
        attention_dropout=0.3,
    )
    model.model = with_lora(model.model)
    compare = load_loss("HardNegativeNLLLoss", scale=20.0)
    sentences = taken(read(texts), batch)
    update = optimizer(model, 3e-5)
    model.train()

    def once() -> Answer:
        begin = time.process_time()
        chosen = next(sentences)
        views = [model.tokenize(chosen) for _ in range(2)]
        tokens = sum(int(view["attention_mask"].sum()) for view in views)
        ready = time.process_time() - begin
        loss = compare(*(model(view) for view in views))
        update(loss)
        return {"loss": loss.item(), "tokens": tokens, "collate": ready}

    return lambda: spent(once), {"trained": trained(model)}


def with_lora(model: Any) -> Any:
    """The numbers of every stage."""
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=MODULES, lora_dropout=0.05, bias="none", task_type=None
    )
    return get_peft_model(model, config)


def optimizer(model: torch.nn.Module, rate: float) -> Callable[[torch.Tensor], None]:
    """What follows a loss: backward, clip, update."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        model.zero_grad()

    return update


def trained(model: torch.nn.Module) -> int:
    """How many parameters are trained."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def read(path: str) -> list[str]:
    """The strings of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def taken(rows: list[Any], count: int) -> Iterator[list[Any]]:
    """So many rows at a time, for ever."""
    if len(rows) < count:
        raise SystemExit(f"the texts give {len(rows)} rows, and a step takes {count}")
    endless = cycle(rows)
    while True:
        yield [next(endless) for _ in range(count)]


def main() -> None:
    """Read commands, answer them, until the input ends."""
    torch.set_num_threads(1)
    steps: dict[str, Callable[..., Answer]] = {}

    def answer(do: str, **numbers: Any) -> Answer:
        told: Answer = {}
        if do == "make":
            return make(**numbers)
        if do == "versions":
            packages = ("torch", "transformers", "llm2vec", "peft", "tokenizers", "numpy")
            return {package: version(package) for package in packages}
        if do == "encode_start":
            steps["encode"] = start_encode(**numbers)
        elif do == "mntp_start":
            steps["mntp"], told = start_mntp(**numbers)
        elif do == "simcse_start":
            steps["simcse"], told = start_simcse(**numbers)
        else:
            return steps[do](**numbers)
        return told

    serve(answer)


if __name__ == "__main__":
    main()

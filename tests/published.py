"""A tiny random model in a folder laid out as NV-Embed's are, and the reference formula, slowly."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as t
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from tests.toy import SENTENCES

HIDDEN, LATENTS, HEADS, HEAD_SIZE = 32, 7, 3, 20
INSTRUCTION = "Instruct: find the program\nQuery: "
TEXTS = (*SENTENCES[:5], "maps", "7 days of music", "", "the editor " * 9)
TEXT_CONFIG = {
    "model_type": "bidir_mistral",
    "architectures": ["MistralModel"],
    "vocab_size": 290,
    "hidden_size": HIDDEN,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "sliding_window": 4,  # the reference's mask ignores it
    "torch_dtype": "bfloat16",
}
CONFIG: dict[str, Any] = {
    "model_type": "nvembed",
    "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},  # code that is not there
    "architectures": ["NVEmbedModel"],
    "text_config": TEXT_CONFIG,
    "latent_attention_config": {
        "model_type": "latent_attention",
        "num_latents_value": LATENTS,
        "num_cross_heads": HEADS,
        "cross_dim_head": HEAD_SIZE,
        "hidden_dim": HIDDEN,
        "latent_dim": HIDDEN,
        "output_normalize": True,
    },
    "padding_side": "right",
    "is_mask_instruction": True,
    "add_eos": True,
    "mask_type": "b",
}
INSTRUCTIONS = {
    "Programs": {"query": "find the program", "corpus": ""},
    "Sections": "name the section",
}


def sentencepiece(*, bos: bool = True) -> t.PreTrainedTokenizerFast:
    """As Mistral's cuts: the space goes with the next word, but not with a digit or a newline."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    fast.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex("[\n:]"), "isolated"),
        ]
    )
    fast.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<unk>", "<s>", "</s>"]
    lines = [*SENTENCES, *[INSTRUCTION] * 9, "\n", "0123456789"]
    fast.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=290, special_tokens=special))
    if bos:
        fast.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_weights() -> dict[str, torch.Tensor]:
    """All weights of a published folder, by the names that they have there."""
    torch.manual_seed(5)
    config = t.MistralConfig(**{k: v for k, v in TEXT_CONFIG.items() if k != "model_type"})
    backbone = t.MistralModel(config).state_dict()
    weights = {f"embedding_model.{name}": torch.randn_like(w) for name, w in backbone.items()}
    inner = HEADS * HEAD_SIZE
    attention, feed = "cross_attend_blocks.0", "cross_attend_blocks.1"
    shapes = {
        "latents": (LATENTS, HIDDEN),
        f"{attention}.norm.weight": (HIDDEN,),
        f"{attention}.norm.bias": (HIDDEN,),
        f"{attention}.norm_context.weight": (HIDDEN,),
        f"{attention}.norm_context.bias": (HIDDEN,),
        f"{attention}.fn.to_q.weight": (inner, HIDDEN),
        f"{attention}.fn.to_kv.weight": (2 * inner, HIDDEN),
        f"{attention}.fn.to_out.weight": (HIDDEN, inner),
        f"{feed}.norm.weight": (HIDDEN,),
        f"{feed}.norm.bias": (HIDDEN,),
        f"{feed}.fn.net.0.weight": (8 * HIDDEN, HIDDEN),
        f"{feed}.fn.net.0.bias": (8 * HIDDEN,),
        f"{feed}.fn.net.2.weight": (HIDDEN, 4 * HIDDEN),
        f"{feed}.fn.net.2.bias": (HIDDEN,),
    }
    pooler = {f"latent_attention_model.{n}": torch.randn(*shape) for n, shape in shapes.items()}
    return {name: weight * 0.2 for name, weight in {**weights, **pooler}.items()}


def publish(folder: Path, *, shards: int = 2, **changes: Any) -> Path:
    """Write such a folder; ``changes`` replace parts of its configuration, None takes one away."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: part for name, part in {**CONFIG, **changes}.items() if part is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "instructions.json").write_text(json.dumps(INSTRUCTIONS))
    sentencepiece().save_pretrained(folder)
    weights = random_weights()
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    places = {name: f"model-{i % shards + 1:05}.safetensors" for i, name in enumerate(names)}
    for file in {*places.values()}:
        part = {name: weights[name] for name in names if places[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def published_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by their published names."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


@torch.no_grad()
def reference(
    folder: Path, texts: list[str], instruction: str = "", max_tokens: int = 4096
) -> torch.Tensor:
    """The vectors of one padded batch, step by step as the spec has the reference."""
    tokenizer: Any = t.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    batch = tokenizer(
        [instruction + text + tokenizer.eos_token for text in texts],
        max_length=max_tokens,
        truncation=True,
        padding=True,
        return_tensors="pt",
    )
    attended = batch["attention_mask"]
    weights = published_weights(folder)
    config = t.MistralConfig(**{k: v for k, v in TEXT_CONFIG.items() if k != "model_type"})
    config._attn_implementation = "eager"
    model: Any = t.MistralModel(config).eval()
    prefix = "embedding_model."
    model.load_state_dict(
        {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    )
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(len(texts), 1, attended.shape[1], attended.shape[1])
    mask = mask.masked_fill(attended[:, None, None, :] == 0, lowest)
    states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    states = torch.stack([latent_attention(row, weights) for row in states])
    pooled = attended.clone()
    pooled[:, : len(tokenizer.tokenize(instruction)) if instruction else 0] = 0
    pooled = pooled[:, :, None].float()
    return F.normalize((states * pooled).sum(1) / pooled.sum(1), dim=-1)


def latent_attention(states: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Section 5.1 for one text, a head and a token at a time."""
    w = {n.removeprefix("latent_attention_model."): x for n, x in weights.items()}
    a, f = "cross_attend_blocks.0", "cross_attend_blocks.1"
    width = states.shape[1:]
    query = F.layer_norm(states, width, w[f"{a}.norm.weight"], w[f"{a}.norm.bias"])
    query = query @ w[f"{a}.fn.to_q.weight"].T
    context = w[f"{a}.norm_context.weight"], w[f"{a}.norm_context.bias"]
    both = F.layer_norm(w["latents"], width, *context) @ w[f"{a}.fn.to_kv.weight"].T
    keys, values = both[:, : HEADS * HEAD_SIZE], both[:, HEADS * HEAD_SIZE :]
    rows = []
    for one in query:
        heads = []
        for h in range(HEADS):
            part = slice(h * HEAD_SIZE, (h + 1) * HEAD_SIZE)
            scores = torch.stack([one[part] @ key[part] for key in keys]) / HEAD_SIZE**0.5
            heads.append(scores.softmax(0) @ values[:, part])
        rows.append(torch.cat(heads) @ w[f"{a}.fn.to_out.weight"].T)
    states = states + torch.stack(rows)
    wide = F.layer_norm(states, width, w[f"{f}.norm.weight"], w[f"{f}.norm.bias"])
    wide = wide @ w[f"{f}.fn.net.0.weight"].T + w[f"{f}.fn.net.0.bias"]
    value, gate = wide[:, : 4 * width[0]], wide[:, 4 * width[0] :]
    gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    return states + (value * gelu) @ w[f"{f}.fn.net.2.weight"].T + w[f"{f}.fn.net.2.bias"]

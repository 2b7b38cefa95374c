"""Stand-ins built in code: tiny random models of real architectures, tokenizers trained here."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.processors import TemplateProcessing

from tercet.segments import Packed, offsets_of

SENTENCES = (
    "a small web server for static files",
    "play music from the command line",
    "the editor for programs and prose",
    "draw maps of rivers and mountains",
    "read mail in a terminal window",
    "a compiler for the language of the moon",
    "count words, lines and bytes in files",
    "make photographs sharper and brighter",
    "keep passwords in an encrypted file",
    "chess against a strong opponent",
    "learn to type with ten fingers",
    "the weather of tomorrow in your panel",
)

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
_GROUPED: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_EVERY_SECOND: dict[str, Any] = {"sliding_window_pattern": 2}  # read, but not declared
_GLOBAL_SECOND: dict[str, Any] = {"global_attn_every_n_layers": 2}

DECODERS: dict[str, t.PreTrainedConfig] = {
    "llama": t.LlamaConfig(**_GROUPED, **_SPECIAL),
    "qwen3": t.Qwen3Config(**_GROUPED, **_SPECIAL, head_dim=16),
    "mistral": t.MistralConfig(**_GROUPED, **_SPECIAL, sliding_window=4),
    "gemma2": t.Gemma2Config(**_GROUPED, **_SPECIAL, head_dim=16, sliding_window=4),
    "gemma3": t.Gemma3TextConfig(
        **_GROUPED, **_SPECIAL, head_dim=16, sliding_window=4, **_EVERY_SECOND
    ),
    "phi3": t.Phi3Config(**_GROUPED, **_SPECIAL),
}
ENCODERS: dict[str, t.PreTrainedConfig] = {
    "bert": t.BertConfig(**_SMALL, pad_token_id=0),
    "xlm-roberta": t.XLMRobertaConfig(**_SMALL, pad_token_id=1),
    "modernbert": t.ModernBertConfig(
        **_SMALL,
        **_SPECIAL,
        local_attention=8,
        **_GLOBAL_SECOND,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "gemma3 both ways": t.Gemma3TextConfig(
        **_GROUPED,
        **_SPECIAL,
        head_dim=16,
        sliding_window=8,
        **_EVERY_SECOND,
        use_bidirectional_attention=True,
    ),
}


def random_model(config: t.PreTrainedConfig) -> Any:
    """A model with weights large enough that attention matters."""
    torch.manual_seed(1)
    model = t.AutoModel.from_config(deepcopy(config), attn_implementation="eager").eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def pack(*texts: torch.Tensor) -> Packed:
    """Texts of token ids, all pooled."""
    ids = torch.cat(texts)
    offsets = offsets_of(torch.tensor([len(text) for text in texts]))
    return Packed(ids, offsets, torch.ones_like(ids, dtype=torch.bool))


def random_texts(*lengths: int, vocabulary: int = 300) -> list[torch.Tensor]:
    return [torch.randint(5, vocabulary, (length,)) for length in lengths]


def wordpiece(*, padding: int = 0) -> t.PreTrainedTokenizerFast:
    """A WordPiece tokenizer with [CLS] and [SEP] that knows the words of the sentences above.

    Its vocabulary is listed and not trained: the trainer breaks ties differently in each process.
    """
    special = ["[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    special.insert(padding, "[PAD]")
    words = sorted({word for text in SENTENCES for word in text.replace(",", " , ").split()})
    letters = sorted(set("".join(words)))
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    fast = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # pyright: ignore
    fast.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    fast.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1 - padding), ("[SEP]", 2)]
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def byte_bpe() -> t.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as decoders have it: no special token around a text."""
    special = ["<pad>", "<s>", "</s>"]
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    fast.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    fast.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_model(folder: Path, kind: str) -> Path:
    """Write a tiny random model and its tokenizer, as a hub folder would be."""
    config = {**DECODERS, **ENCODERS}[kind]
    random_model(config).save_pretrained(folder)
    align(folder / "model.safetensors")
    padding = config.pad_token_id  # RoBERTa counts positions from it, so it must not be [CLS]
    (wordpiece(padding=padding) if kind in ENCODERS else byte_bpe()).save_pretrained(folder)
    return folder


def align(file: Path) -> None:
    """Let weights begin at multiples of 64 bytes, where they are mapped into memory.

    Products of some CPUs round in another way where weights lie elsewhere, as in most files. So
    equal weights give equal bits only if both sides are aligned.
    """
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    room = -begin % 64
    length = (begin - 8 + room).to_bytes(8, "little")
    file.write_bytes(length + content[8:begin] + b" " * room + content[begin:])


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """The system refuses to write files that are larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

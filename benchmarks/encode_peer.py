"""The peers of ``encode_speed``, in separate environments, driven by lines of JSON.

    python3.11 -m venv peers llama    # two of them
    peers/bin/pip install torch==2.13.0 sentence-transformers==6.2.0 openvino==2026.4.1
    peers/bin/pip install nncf==3.4.0 onnxruntime==1.32.0 onnx==1.23.2 onnxscript==0.7.2
    llama/bin/pip install llama-cpp-python numpy    # is built there, by a C++ compiler

    peers/bin/python -m benchmarks.encode_peer

Commands and answers are those of ``encode_speed``'s own side:

    {"do": "start", "engine": E, "folder": F, "precision": P, "scratch": S, "calibration": T,
     "limit": 256}
        loads or makes the model; E is a name of ENGINES, limit the tokens of a text at most
    {"do": "encode", "requests": R, "grouping": "32" or "equal", "save": "vectors.npy" or null}
        -> spent of ``timed``; with "save" also "slots" and "tokens" that the model read
    {"do": "versions"} -> versions of the packages by name

- ``sentence-transformers``: ``encode``, which sorts, in batches of 32, its default.
- ``OpenVINO``: ``convert_model`` of the stock module with its pooling, any shape; bfloat16 by
  INFERENCE_PRECISION_HINT; int8 by ``nncf.quantize`` with texts of the train split.
- ``ONNX Runtime``: ``torch.onnx.export`` of the same module; int8 by ``quantize_dynamic``.
- ``llama.cpp``: ``Llama.embed`` of a GGUF file, whose weights llama.cpp converts to the precision;
  Q4_1 is the file. It packs a batch, so nothing is padded. With int8 and Q4_1 it runs without its
  AMX kernels, which ended with an illegal instruction where this was measured.

OpenVINO and ONNX Runtime sort the texts of a request by tokens, and read them in batches of 32 that
are padded or in groups of exactly equal length.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import Answer, memory, serve, timed

PACKAGES = "torch transformers sentence-transformers tokenizers numpy openvino nncf onnxruntime"
PACKAGES += " onnx llama-cpp-python"
BATCH = 32
Texts = list[str]
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids and mask of a batch to vectors


class Engine(ABC):
    """A library with its model."""

    slots = tokens = 0
    counting = False  # what the model reads; it costs a little

    @abstractmethod
    def encode(self, texts: Texts, grouping: str) -> np.ndarray:
        """Vectors of texts, in the order given."""

    def count(self, slots: int, tokens: int) -> None:
        """Add up what was read."""
        self.slots, self.tokens = self.slots + slots, self.tokens + tokens


# ---- sentence-transformers -----------------------------------------------------------------------


class SentenceTransformers(Engine):
    """sentence-transformers, as a user calls it."""

    def __init__(self, folder: str, precision: str, limit: int, **_: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(1)
        dtype = {"dtype": getattr(torch, precision)}
        self.model = SentenceTransformer(folder, device="cpu", model_kwargs=dtype)
        self.model.max_seq_length = limit
        last = type(self.model[-1]).__name__
        self.more: dict[str, Any] = {} if last == "Normalize" else {"normalize_embeddings": True}
        first: Any = self.model[0]
        read = first.forward

        def counted(features: Any, **options: Any) -> Any:
            if self.counting:
                mask = features["attention_mask"]
                self.count(mask.numel(), int(mask.sum()))
            return read(features, **options)

        first.forward = counted

    def encode(self, texts: Texts, grouping: str) -> np.ndarray:
        """Vectors by its own ``encode``."""
        found = self.model.encode(
            texts, convert_to_tensor=True, show_progress_bar=False, **self.more
        )
        return found.float().numpy()


# ---- graphs --------------------------------------------------------------------------------------


class Graph(Engine):
    """A network as a graph with its pooling: tokenizer, batches and padding are ours."""

    def __init__(self, folder: str, limit: int, run: Run) -> None:
        self.tokenizer, self.run = tokenizer_of(folder, limit), run

    def encode(self, texts: Texts, grouping: str) -> np.ndarray:
        """Vectors of texts, sorted into batches of 32 or groups of one length."""
        ids = [each.ids for each in self.tokenizer.encode_batch_fast(texts)]
        found: list[Any] = [None] * len(texts)
        for rows in groups([len(each) for each in ids], grouping):
            read, mask = padded([ids[row] for row in rows])
            if self.counting:
                self.count(mask.size, int(mask.sum()))
            for row, vector in zip(rows, self.run(read, mask), strict=True):
                found[row] = vector
        return np.stack(found)


def tokenizer_of(folder: str, limit: int) -> Any:
    """The tokenizer of a model, which cuts longer texts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return tokenizer


def groups(lengths: Sequence[int], grouping: str) -> Iterator[list[int]]:
    """Rows of each batch: longest first, at most 32, of equal length if asked for."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batch: list[int] = []
    for row in order:
        if batch and (
            len(batch) == BATCH or (grouping == "equal" and lengths[row] != lengths[batch[0]])
        ):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def padded(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a batch."""
    shape = len(ids), max(map(len, ids))
    read, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, row in enumerate(ids):
        read[i, : len(row)], mask[i, : len(row)] = row, 1
    return read, mask


def stock(folder: str, attention: str = "sdpa") -> Any:
    """The stock module with mean pooling and unit length."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(1)

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = AutoModel.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention
            ).eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.network(input_ids=input_ids, attention_mask=attention_mask)[0]
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            means = (states * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(means, dim=1)

    return Pooled().eval()


def example() -> tuple[Any, Any]:
    """Ids and mask that show a converter what is read; one text has padding."""
    import torch

    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[1, 17:] = 0
    return torch.randint(5, 1_000, (3, 24)) * mask, mask


def openvino(folder: str, precision: str, limit: int, scratch: str, calibration: str) -> Engine:
    """OpenVINO; precision is float32, bfloat16, int8 or int8-bfloat16: int8, rest in bfloat16."""
    import openvino as ov  # pyright: ignore[reportMissingImports]

    int8 = precision.startswith("int8")
    file = Path(scratch, "openvino-int8.xml" if int8 else "openvino.xml")
    if not file.exists():
        with_ids, with_mask = example()
        # of fused attention, padding that no window reaches would become NaN
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        attention = "eager" if config["model_type"] == "modernbert" else "sdpa"
        made = ov.convert_model(
            stock(folder, attention),
            example_input={"input_ids": with_ids, "attention_mask": with_mask},
        )
        made.reshape({port.get_any_name(): [-1, -1] for port in made.inputs})
        if int8:
            import nncf  # pyright: ignore[reportMissingImports]

            tokenizer, items = tokenizer_of(folder, limit), []
            for text in json.loads(Path(calibration).read_text(encoding="utf-8")):
                ids, mask = padded([tokenizer.encode(text).ids])
                items.append({"input_ids": ids, "attention_mask": mask})
            kind = nncf.ModelType.TRANSFORMER
            made = nncf.quantize(made, nncf.Dataset(items), model_type=kind)
        ov.save_model(made, file, compress_to_fp16=False)
    half = precision.endswith("bfloat16")
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
    }
    request = ov.Core().compile_model(file, "CPU", settings).create_infer_request()

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": ids, "attention_mask": mask}
        return np.array(request.infer(given, share_inputs=True)[0])

    return Graph(folder, limit, run)


def onnx(folder: str, precision: str, limit: int, scratch: str, **_: str) -> Engine:
    """ONNX Runtime in float32, or with int8 weights and activations quantized at each call."""
    import onnxruntime  # pyright: ignore[reportMissingImports]
    import torch

    file = Path(scratch, "model.onnx")
    if not file.exists():
        shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        torch.onnx.export(
            stock(folder),
            example(),
            file,
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_shapes=(shape, shape),
            dynamo=True,
            verbose=False,
        )
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore

        exact, file = file, Path(scratch, "model-int8.onnx")
        if not file.exists():
            quantize_dynamic(exact, file, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    return Graph(folder, limit, run)


# ---- llama.cpp -----------------------------------------------------------------------------------


class LlamaCpp(Engine):
    """llama.cpp by its Python package; mean pooling of states that see what is before them."""

    def __init__(self, folder: str, precision: str, limit: int, scratch: str, **_: str) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        made = Path(folder)
        if precision != "Q4_1":
            made = Path(scratch, f"{precision}.gguf")
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.allow_requantize, settings.nthread = True, 1
            settings.ftype = {
                "float32": llama_cpp.LLAMA_FTYPE_ALL_F32,
                "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
                "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
            }[precision]
            llama_cpp.llama_model_quantize(folder.encode(), str(made).encode(), settings)
        if precision in ("int8", "Q4_1"):
            without_extra_buffers(llama_cpp.llama_cpp)
        self.model = llama_cpp.Llama(
            str(made),
            embedding=True,
            pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
            n_ctx=limit,
            n_batch=limit,
            n_ubatch=limit,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
        )

    def encode(self, texts: Texts, grouping: str) -> np.ndarray:
        """Vectors by its own ``embed``."""
        return np.array(self.model.embed(texts, normalize=True), np.float32)


def without_extra_buffers(library: Any) -> None:
    """Take llama.cpp's plain kernels, without repacked weights.

    Its AMX kernels ended with an illegal instruction where this was measured.
    """
    defaults = library.llama_model_default_params

    def plain() -> Any:
        settings = defaults()
        settings.use_extra_bufts = False
        return settings

    library.llama_model_default_params = plain


# ---- both sides' commands ------------------------------------------------------------------------

ENGINES: dict[str, Callable[..., Engine]] = {
    "sentence-transformers": SentenceTransformers,
    "OpenVINO": openvino,
    "ONNX Runtime": onnx,
    "llama.cpp": LlamaCpp,
}


def versions() -> dict[str, str]:
    """Versions of the packages that are installed here."""
    found = {}
    for package in PACKAGES.split():
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    """Read commands, answer them, until the input ends."""
    engines: list[Engine] = []

    def answer(do: str, **given: Any) -> Answer:
        if do == "versions":
            return versions()
        if do == "start":
            engines.append(ENGINES[given.pop("engine")](**given))
            return {}
        engine, requests = engines[0], json.loads(Path(given["requests"]).read_text("utf-8"))
        grouping, save = given["grouping"], given["save"]
        if save:
            engine.counting, engine.slots, engine.tokens = True, 0, 0
            np.save(save, np.concatenate([engine.encode(texts, grouping) for texts in requests]))
            engine.counting = False
            return {"slots": engine.slots, "tokens": engine.tokens, "peak": memory("VmHWM")}
        return timed(requests, lambda texts: engine.encode(texts, grouping))

    serve(answer)


if __name__ == "__main__":
    main()

"""A CUDA device that is pretended on a CPU: real numbers, and everything that a GPU would refuse.

``Pretend`` wraps a CPU tensor and says that it lies on ``cuda:0``. Autograd works as ever. What an
operation costs or forbids on a GPU is seen where it happens:

- a tensor of the CPU beside one of the GPU raises, as CUDA does (0-dimensional ones may; CPU
  indices may too, and are counted as a blocking copy);
- every wait of the host for the device is counted, with the line that asks for it: ``item``,
  ``tolist``, ``bool``, ``nonzero``, masks as indices, ``unique``, ``repeat_interleave`` without
  ``output_size``, copies to the CPU, ``synchronize`` of an event, a stream or the device;
- a copy to the device blocks unless it is ``non_blocking`` and comes from pinned memory;
- a ``non_blocking`` copy to the CPU has wrong numbers until an event, a stream or the device is
  waited for;
- operations that would launch a kernel are counted.

Python code sees ``device``, ``is_cuda``; C++ sees the CPU, so autocast is that of the CPU. Nothing
here says anything about time, memory, streams that overlap, or random numbers of a GPU.
"""

# A tensor subclass overrides what torch's types call final.
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from inspect import signature
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

import tercet

GPU = torch.device("cuda", 0)
_VIEWS = set(
    "view _unsafe_view t transpose permute expand select slice unsqueeze squeeze split "
    "split_with_sizes detach alias as_strided unbind diagonal _reshape_alias unfold view_as "
    "lift_fresh reshape empty_like new_empty empty new_empty_strided empty_strided "
    "_has_compatible_shallow_copy_type is_same_size sym_size unsafe_split chunk unflatten "
    "is_pinned record_stream".split()
)
_WAITS = set(
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal "
    "is_nonzero bincount _assert_async".split()
)
_PACKAGE = f"{Path(tercet.__file__).parent}/"
_SCALARS = ("_local_scalar_dense", "equal", "is_nonzero")


class Log:
    """What a GPU would have been asked for, and by which line."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()  # host to device, blocking
        self.uploads: Counter[tuple[str, str]] = Counter()  # host to device, not blocking
        self.by_place: Counter[str] = Counter()
        self.pinned: dict[int, Tensor] = {}  # by the address of the storage, which thus stays
        self.on_the_way: list[tuple[Tensor, Tensor]] = []  # to the host, not blocking
        self.arrived = 0

    @property
    def kernels(self) -> int:
        return sum(self.launches.values())

    def launch(self, name: str, count: int = 1) -> None:
        self.launches[name] += count
        self.by_place[place()] += count

    def wait(self, name: str, until: int | None = None) -> None:
        self.waits[name, place()] += 1
        self.arrive(until)

    def arrive(self, until: int | None = None) -> None:
        """Complete the copies to the host that were begun first."""
        end = len(self.on_the_way) if until is None else until
        for target, value in self.on_the_way[self.arrived : end]:
            target.detach().copy_(value)
        self.arrived = max(self.arrived, end)

    def upload(self, name: str, source: Tensor, *, non_blocking: bool) -> None:
        kept = self.uploads if non_blocking and self.is_pinned(source) else self.copies
        kept[name, place()] += 1

    def pin(self, x: Tensor) -> Tensor:
        if not self.is_pinned(x):
            x = x.detach().clone()
            self.pinned[x.untyped_storage().data_ptr()] = x
        return x

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.pinned


_LOG: Log | None = None


def place() -> str:
    """The innermost line of tercet (or else of the caller) that is at work."""
    frame = sys._getframe(1)
    other = "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return f"{name.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        if other == "?" and name != __file__ and not any(p in name for p in ("/torch/", "mock.py")):
            other = f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class Pretend(Tensor):
    """A tensor that says it lies on the GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "Pretend":
        assert not isinstance(inner, Pretend)
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
            requires_grad=requires_grad,
        )

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    device: Any = property(lambda self: GPU)
    is_cuda: Any = property(lambda self: True)
    is_cpu: Any = property(lambda self: False)

    def __repr__(self) -> str:
        return f"Pretend({self.inner})"

    def untyped_storage(self) -> torch.UntypedStorage:
        """What tells one weight from another when a model is saved."""
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: Any) -> "Pretend":
        made = Pretend(self.inner.clone())
        made.requires_grad_(self.requires_grad)
        memo[id(self)] = made
        return made

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Pretend(inner["inner"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        _look(name, args, kwargs)
        if name == "record_stream":
            return None
        if name == "copy_" and not isinstance(args[0], Pretend):
            return _to_host(args[0], args[1], *args[2:], **kwargs)
        out = func(*_mapped(_bare, args), **_mapped(_bare, kwargs))
        if name in _SCALARS:
            return out
        wrapped = _mapped(Pretend, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _bare(x: Any) -> Any:
    return x.inner if isinstance(x, Pretend) else x


def _mapped(function: Callable[[Tensor], Any], x: Any) -> Any:
    """Apply to all tensors in lists, tuples and dicts; torch's tree_map is three times slower."""
    if isinstance(x, Tensor):
        return function(x)
    if type(x) in (list, tuple):
        return type(x)(_mapped(function, each) for each in x)
    return {k: _mapped(function, v) for k, v in x.items()} if type(x) is dict else x


def _to_host(target: Tensor, source: Pretend, non_blocking: bool = False) -> Tensor:
    """Copy to the CPU; what does not block arrives when somebody waits."""
    log = _LOG
    if log is not None and non_blocking and log.is_pinned(target):
        log.on_the_way.append((target, source.inner.detach().clone()))
        return target.fill_(_wrong(target))
    if log is not None:
        log.wait("copy_")
    return target.copy_(source.inner)


def _wrong(x: Tensor) -> float | int:
    """What is read too early: not a number, or the smallest one."""
    if x.is_floating_point():
        return float("nan")
    return 1 if x.dtype == torch.bool else torch.iinfo(x.dtype).min


def _look(name: str, args: Any, kwargs: Any) -> None:
    """Refuse a mixture of devices; count what the operation costs."""
    flat: list[Tensor] = []
    _mapped(flat.append, (args, kwargs))
    here = [x for x in flat if not isinstance(x, Pretend) and x.ndim > 0]
    if here:
        _look_at_mixture(name, args, kwargs, here)
    log = _LOG
    if log is None:
        return
    wait = name in _WAITS
    if name.startswith(("index", "_index_put")) and isinstance(args[1], (list, tuple)):
        wait = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        name = f"{name}[mask]" if wait else name
    if name == "repeat_interleave":
        wait = kwargs.get("output_size") is None
    if wait:
        log.wait(name)
    if name.split("[")[0] not in _VIEWS:
        log.launch(name)


def _look_at_mixture(name: str, args: Any, kwargs: Any, here: list[Tensor]) -> None:
    log = _LOG
    if name == "copy_":
        if isinstance(args[0], Pretend) and log is not None:
            waits = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            log.upload("copy_", args[1], non_blocking=waits)
        return
    if name.startswith(("index", "_index_put")) and isinstance(args[0], Pretend):
        indices = args[1] if isinstance(args[1], (list, tuple)) else []
        inside = [x for x in indices if isinstance(x, Tensor) and not isinstance(x, Pretend)]
        if len(inside) == len(here):
            if log is not None:
                log.copies["index from the CPU", place()] += len(inside)
            return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"cuda:0 and cpu! (aten::{name} at {place()})"
    )


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Pretend(x.detach())

    @staticmethod
    def backward(ctx, gradient):
        return _bare(gradient)


class _Here(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        return Pretend(gradient)


def there(x: Tensor, *, by: str = "to", non_blocking: bool = False) -> Any:
    """Copy to the GPU."""
    if isinstance(x, Pretend):
        return x
    if _LOG is not None:
        _LOG.upload(by, x, non_blocking=non_blocking)
    return _There.apply(x)


def here(x: Tensor, *, by: str = "cpu", non_blocking: bool = False) -> Any:
    """Copy to the CPU; what does not block comes into pinned memory, as torch does it."""
    if not isinstance(x, Pretend):
        return x
    log = _LOG
    if log is None:
        return _Here.apply(x)
    if non_blocking:
        target = log.pin(x.inner.detach().clone())
        return _to_host(target, x, non_blocking=True)
    log.wait(by)
    return _Here.apply(x)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Mode(TorchFunctionMode):
    """Functions that name a device, or read numbers into Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        moves = {Tensor.cpu: here, Tensor.cuda: there}
        if func in moves:
            return moves[func](args[0])
        if func is Tensor.to:
            return self._to(args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], Pretend):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist and isinstance(args[0], Pretend):
            if _LOG is not None:
                _LOG.wait("tolist")
            return args[0].inner.detach().tolist()
        if func is Tensor.share_memory_:
            return args[0]
        if kwargs.pop("pin_memory", False):
            made = func(*args, **kwargs)
            return made if _LOG is None else _LOG.pin(made)
        if _is_gpu(kwargs.get("device")):
            return self._made(func, args, kwargs)
        if kwargs.get("device") is not None and args and isinstance(args[0], Pretend):
            args = (args[0].inner, *args[1:])  # new_zeros(..., device="cpu")
        return func(*args, **kwargs)

    def _made(self, func, args, kwargs):
        kwargs["device"] = torch.device("cpu")
        if any(isinstance(a, Pretend) for a in args):  # new_zeros, empty_like
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            made = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            return there(made, by="tensor(list, device)")
        if _LOG is not None and func is not torch.empty:
            _LOG.launch(func.__name__)
        return Pretend(made.detach()).requires_grad_(made.requires_grad)

    def _to(self, args, kwargs):
        x, *rest = args
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        non_blocking, copy = kwargs.get("non_blocking", False), kwargs.get("copy", False)
        flags = []
        for each in rest:
            if isinstance(each, Tensor):
                device, dtype = each.device, each.dtype
            elif isinstance(each, bool):
                flags.append(each)
            elif isinstance(each, (torch.device, str, int)):
                device = each
            elif isinstance(each, torch.dtype):
                dtype = each
        non_blocking, copy = (*flags, *(non_blocking, copy)[len(flags) :])
        if device is not None and "clip_grad" in sys._getframe(2).f_code.co_filename:
            device = None  # torch groups gradients by device in C++, which sees the CPU
        if _is_gpu(device):
            x = there(x, non_blocking=non_blocking)
        elif device is not None and torch.device(device).type == "cpu":
            x = here(x, by="to(cpu)", non_blocking=non_blocking)
        plain = dtype is None and not copy
        return x if plain else Tensor.to(x, dtype or x.dtype, copy=copy)


def to_gpu(module: nn.Module) -> nn.Module:
    """What ``module.to("cuda")`` does."""
    seen: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not isinstance(p, Pretend):
                if id(p) not in seen:
                    seen[id(p)] = nn.Parameter(Pretend(p.detach()), requires_grad=p.requires_grad)
                part._parameters[name] = seen[id(p)]
        for name, b in part._buffers.items():
            if b is not None and not isinstance(b, Pretend):
                part._buffers[name] = Pretend(b)
    return module


def to_cpu(module: nn.Module) -> nn.Module:
    """What ``module.to("cpu")`` does."""
    seen: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if isinstance(p, Pretend):
                if id(p) not in seen:
                    seen[id(p)] = nn.Parameter(p.inner.detach(), requires_grad=p.requires_grad)
                part._parameters[name] = seen[id(p)]
        for name, b in part._buffers.items():
            part._buffers[name] = _bare(b)
    return module


_ASKS_FOR_GROUPS = "enable_gqa" in signature(varlen.varlen_attn).parameters  # not in torch 2.11


def _refuse(rows: Any, places: Any, options: Any) -> None:
    """Fail as the kernel does."""
    q, k, _ = rows
    for x in rows:
        assert isinstance(x, Pretend), "a tensor of the GPU"
        assert x.dtype in (torch.float16, torch.bfloat16), f"supports fp16/bf16, not {x.dtype}"
        assert x.dtype == q.dtype, "query and key must have the same dtype"
        assert x.ndim == 3 and x.stride(-1) == 1, "must have a contiguous last dimension"
        assert x.shape[-1] == q.shape[-1] <= 256 and x.shape[-1] % 8 == 0, f"head {x.shape[-1]}"
    bounds, of_keys, longest, longest_key = places
    for each in (bounds, of_keys):
        assert isinstance(each, Pretend) and each.dtype == torch.int32 and each.is_contiguous()
    assert type(longest) is int and type(longest_key) is int, "the longest is no int"
    assert isinstance(options["window_size"], tuple), "the window is no tuple"
    assert options["scale"] is None or isinstance(options["scale"], float), "the scale is no float"
    if not options["enable_gqa"] and _ASKS_FOR_GROUPS:
        assert q.shape[1] == k.shape[1], "query and key/value must have the same number of heads"
    assert q.shape[1] % k.shape[1] == 0
    assert int(bounds.inner[-1]) == len(q), "the last bound is not the end of the row"
    assert int(bounds.inner.diff().max()) == longest, "not the longest text"


def _varlen_reference(rows, places, options):
    """Attend inside each text, as the documentation of varlen_attn says it, on the CPU."""
    query, key, _ = rows
    bounds = places[0].inner.tolist()
    lengths = [end - begin for begin, end in pairwise(bounds)]
    group = query.shape[1] // key.shape[1]
    left, right = options["window_size"]
    scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    done = []
    for rows_of_text in zip(*(x.float().split(lengths) for x in rows), strict=True):
        q, k, v = (x.transpose(0, 1) for x in rows_of_text)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) * scale
        if left >= 0 or right >= 0:
            at = torch.arange(q.shape[1])
            ahead = at[None, :] - at[:, None]  # of the key
            hidden = (ahead < -left) & (left >= 0) | (ahead > right) & (right >= 0)
            scores = scores.masked_fill(hidden, float("-inf"))
        done.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(done).to(query.dtype)


class _Varlen(torch.autograd.Function):
    """One kernel forwards and three backwards, whatever the reference does inside."""

    @staticmethod
    def forward(ctx, query, key, value, places, options):
        _refuse((query, key, value), places, options)
        ctx.save_for_backward(query, key, value)
        ctx.rest = places, options
        if _LOG is not None:
            _LOG.launch("varlen_attn")
        rows = query.inner, key.inner, value.inner
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return Pretend(_varlen_reference(rows, places, options))

    @staticmethod
    def backward(ctx, gradient):
        if _LOG is not None:
            _LOG.launch("varlen_attn_backward", 3)
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            given = [x.inner.detach().requires_grad_() for x in ctx.saved_tensors]
            out = _varlen_reference(given, *ctx.rest)
            found = torch.autograd.grad(out, given, gradient.inner)
        return (*map(Pretend, found), None, None)


@functools.wraps(varlen.varlen_attn)
def _varlen_attn(  # noqa: PLR0913
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options
):
    unknown = options.keys() - signature(varlen.varlen_attn).parameters.keys()
    if unknown:
        raise TypeError(f"varlen_attn() got an unexpected keyword argument {min(unknown)!r}")
    options = {"scale": None, "window_size": (-1, -1), "enable_gqa": False, **options}
    return _Varlen.apply(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), options)


@contextmanager
def quiet() -> Iterator[None]:
    """Count nothing for a while, as a test that looks at numbers wants it."""
    global _LOG
    held, _LOG = _LOG, None
    try:
        yield
    finally:
        _LOG = held


class _Event:
    """An event of a stream; what was copied before it has arrived when it is waited for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.until = 0

    def record(self, stream: Any = None) -> None:
        self.until = 0 if _LOG is None else len(_LOG.on_the_way)

    def synchronize(self) -> None:
        if _LOG is not None:
            _LOG.wait("Event.synchronize", self.until)

    def query(self) -> bool:
        if _LOG is not None:
            _LOG.arrive(self.until)
        return True

    def wait(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Stream:
    """A stream; all of them run in the order of the calls."""

    device = GPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        if _LOG is not None:
            _LOG.wait("Stream.synchronize")

    def query(self) -> bool:
        if _LOG is not None:
            _LOG.arrive()
        return True


class _Device(nullcontext[None]):
    """The device in whose context work is done."""


def _synchronize(device: Any = None) -> None:
    if _LOG is not None:
        _LOG.wait("synchronize")


def _of_cuda(free: float) -> dict[str, Any]:
    """The functions of torch.cuda, by name."""
    properties = SimpleNamespace(
        name="pretended", total_memory=int(free), major=9, minor=0, multi_processor_count=132
    )
    return {
        "is_current_stream_capturing": lambda: False,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": _Device,
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "mem_get_info": lambda device=None: (int(free), int(free)),
        "get_per_process_memory_fraction": lambda device=None: 1.0,
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": _synchronize,
        "Event": _Event,
        "Stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
    }


@contextmanager
def pretended_cuda(free: float = 80e9) -> Iterator[Log]:
    """CUDA is here for a while; yields the log of what it would have cost."""
    global _LOG
    was_enabled, was_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    generator, was_pinned = torch.Generator, Tensor.is_pinned
    mode, engine = _Mode(), torch.autograd._engine_run_backward
    held, log = _LOG, Log()

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:  # what is computed again in a backward is on the GPU too
            return engine(*args, **kwargs)

    with ExitStack() as stack:
        products = torch.get_float32_matmul_precision()  # which the choice of a GPU changes
        stack.callback(torch.set_float32_matmul_precision, products)

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(varlen, "varlen_attn", _varlen_attn)
        patch(torch.autocast, "__init__", _autocast(torch.autocast.__init__))
        patch(torch, "is_autocast_enabled", lambda d="cpu": was_enabled(_seen_by_c(d)))
        patch(torch, "get_autocast_dtype", lambda d: was_dtype(_seen_by_c(d)))
        patch(torch, "Generator", lambda device="cpu": generator("cpu"))
        for name, function in _of_cuda(free).items():
            patch(torch.cuda, name, function)
        patch(Tensor, "pin_memory", lambda x, device=None: log.pin(x))
        patch(Tensor, "is_pinned", lambda x, device=None: log.is_pinned(x) or was_pinned(x))
        patch(torch, "inference_mode", torch.no_grad)  # wrappers have no version there
        patch(nn.Module, "to", _module_to(nn.Module.to))
        patch(nn.Module, "cuda", lambda module, device=None: to_gpu(module))
        patch(nn.Module, "cpu", to_cpu)
        patch(torch, "save", _saved(torch.save))
        patch(torch.autograd, "_engine_run_backward", run_backward)
        patch(threading.Thread, "run", _on_the_gpu(threading.Thread.run))
        stack.enter_context(mode)
        _LOG = log
        try:
            yield log
        finally:
            _LOG = held


def _seen_by_c(device: str) -> str:
    return "cpu" if device == "cuda" else device


def _autocast(original: Callable[..., None]) -> Callable[..., None]:
    def init(self, device_type, *args, **kwargs):
        original(self, _seen_by_c(device_type), *args, **kwargs)

    return init


def _on_the_gpu(original: Callable[..., None]) -> Callable[..., None]:
    def run(self):
        with _Mode():  # a mode belongs to one thread
            original(self)

    return run


def _module_to(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def to(self, *args, **kwargs):
        device = kwargs.pop("device", None)
        if args and isinstance(args[0], (str, torch.device, int)):
            device, *args = args
        if device is not None:
            (to_gpu if _is_gpu(device) else to_cpu)(self)
        return original(self, *args, **kwargs) if args or kwargs else self

    return to


def _saved(original: Callable[..., None]) -> Callable[..., None]:
    def save(value, *args, **kwargs):
        return original(tree_map(lambda x: _bare(x), value), *args, **kwargs)

    return save

"""The pretended device refuses and counts what a GPU would refuse and wait for."""

import threading
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from tests.pretend import Pretend, pretended_cuda, quiet, to_gpu

WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask as an index": lambda x: x[x > 0],
    "a mask as a place": lambda x: x.index_put_((x > 0,), torch.zeros((), device="cuda")),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: x.equal(x),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.empty(4).copy_(x),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "an event": lambda x: torch.cuda.Event().synchronize(),
    "repeats without a size": lambda x: x.repeat_interleave(x.long()),
}
MIXTURES = {
    "a sum": lambda there, here: there + here,
    "a product": lambda there, here: there @ here,
    "cat": lambda there, here: torch.cat([there, here]),
    "an index": lambda there, here: here[there.long()],
    "index_select": lambda there, here: there.index_select(0, here.long()),
    "an addition in place": lambda there, here: there.add_(here),
}
BLOCKING = {
    "pageable memory": lambda x: x.to("cuda"),
    "pageable memory, however it is asked": lambda x: x.to("cuda", non_blocking=True),
    "pinned memory, waited for": lambda x: x.pin_memory().to("cuda"),
    "cuda()": lambda x: x.cuda(),
    "a list": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "copy_": lambda x: torch.empty(4, device="cuda").copy_(x),
    "copy_ from pageable memory": lambda x: torch.empty(4, device="cuda").copy_(
        x, non_blocking=True
    ),
    "an index of the CPU": lambda x: torch.ones(4, device="cuda")[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted_with_the_line_that_asks(name):
    with pretended_cuda() as log:
        x = torch.arange(4.0, device="cuda")
        assert not log.waits
        WAITS[name](x)
    assert sum(log.waits.values()) == 1, log.waits
    ((_, place),) = log.waits
    assert place.startswith("test_pretend.py:")


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_devices_is_refused(name):
    with pretended_cuda(), pytest.raises(RuntimeError, match="on the same device, but found"):
        MIXTURES[name](torch.ones(4, device="cuda"), torch.ones(4))


def test_a_mixture_is_refused_in_a_backward_too():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):  # pyright: ignore
            return gradient * torch.ones(4)

    with pretended_cuda(), pytest.raises(RuntimeError, match="on the same device, but found"):
        Wrong.apply(torch.ones(4, device="cuda", requires_grad=True)).sum().backward()  # pyright: ignore


def test_numbers_of_the_gpu_are_no_array():
    with pretended_cuda(), pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(4, device="cuda").numpy()


@pytest.mark.parametrize("name", BLOCKING)
def test_a_blocking_copy_is_counted(name):
    with pretended_cuda() as log:
        BLOCKING[name](torch.ones(4))
    assert sum(log.copies.values()) == 1 and not log.uploads, (log.copies, log.uploads)


def test_a_copy_from_pinned_memory_that_does_not_block_is_no_blocking_copy():
    with pretended_cuda() as log:
        pinned = torch.arange(4.0).pin_memory()
        assert pinned.is_pinned() and not torch.ones(4).is_pinned()
        one = pinned.to("cuda", non_blocking=True)
        part = pinned[1:3].to("cuda", torch.bfloat16, non_blocking=True)  # a view is pinned too
        made = torch.empty(4, pin_memory=True)
        two = torch.empty(4, device="cuda").copy_(made.fill_(3), non_blocking=True)
        assert not log.copies and not log.waits and sum(log.uploads.values()) == 3
        assert one.tolist() == [0, 1, 2, 3] and part.tolist() == [1, 2] and two.tolist() == [3] * 4


def test_what_comes_back_without_blocking_is_wrong_until_an_event_is_waited_for():
    with pretended_cuda() as log:
        x, event = torch.arange(4.0, device="cuda"), torch.cuda.Event()
        early = x.to("cpu", non_blocking=True)
        target = torch.empty(4, dtype=torch.int64, pin_memory=True)
        target.copy_(x.long(), non_blocking=True)
        event.record()
        late = (x + 1).to("cpu", non_blocking=True)
        assert not log.waits
        assert early.isnan().all() and (target < 0).all() and late.isnan().all()
        event.synchronize()
        assert early.tolist() == target.tolist() == [0, 1, 2, 3] and late.isnan().all()
        torch.cuda.synchronize()
        assert late.tolist() == [1, 2, 3, 4]
        assert sum(log.waits.values()) == 2


def test_an_operation_is_a_launch_and_a_view_is_none():
    with pretended_cuda() as log:
        x = torch.ones(4, 2, device="cuda")
        before = log.kernels
        assert x.t()[0].unsqueeze(0).shape == (1, 4)
        assert log.kernels == before
        assert (x @ x.t()).is_cuda
        assert log.kernels == before + 1


def test_gradients_are_those_of_the_cpu_and_lie_on_the_device():
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    layer(x).square().sum().backward()
    expected = layer.weight.grad
    layer.zero_grad()
    assert expected is not None
    with pretended_cuda():
        to_gpu(layer)(x.to("cuda")).square().sum().backward()
        got = layer.weight.grad
        assert isinstance(got, Pretend)
        with quiet():
            assert got.device == torch.device("cuda", 0)
    torch.testing.assert_close(got.inner, expected)


def test_a_thread_sees_the_device_and_its_waits_are_counted():
    with pretended_cuda() as log:

        def work() -> None:
            torch.ones(4).pin_memory().to("cuda", non_blocking=True).tolist()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert sum(log.waits.values()) == sum(log.uploads.values()) == 1 and not log.copies


def kernel(q, k, v, *, lengths=(3, 2), longest=None, **options) -> Any:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    most = longest or max(lengths)
    return varlen.varlen_attn(q, k, v, bounds, bounds, most, most, **options)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dtype": torch.float32}, "supports fp16/bf16"),
        ({"width": 12}, "head 12"),
        ({"longest": 4}, "not the longest"),
        ({"scale": 1}, "scale is no float"),
    ],
)
def test_the_kernel_refuses_what_the_real_one_refuses(changes, problem):
    dtype, width = changes.pop("dtype", torch.bfloat16), changes.pop("width", 16)
    with pretended_cuda():
        rows = [torch.randn(5, 2, width, device="cuda", dtype=dtype) for _ in range(3)]
        with pytest.raises(AssertionError, match=problem):
            kernel(*rows, **changes)


def test_the_kernel_is_one_launch_forwards_and_three_backwards():
    with pretended_cuda() as log:
        rows = [torch.randn(5, 2, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        rows = [row.requires_grad_() for row in rows]
        kernel(*rows, window_size=(1, 0)).sum().backward()
    assert log.launches["varlen_attn"] == 1 and log.launches["varlen_attn_backward"] == 3
    assert all(row.grad is not None and row.grad.is_cuda for row in rows)


def test_nothing_is_left_of_the_device_afterwards():
    with pretended_cuda():
        pass
    assert not torch.cuda.is_available() and "pin_memory" not in vars(torch.Tensor)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device="cuda")

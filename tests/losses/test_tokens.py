import pytest
import torch
import torch.nn.functional as F

from tercet.losses.tokens import Head, next_token_loss

PLACES, HIDDEN, VOCABULARY = 7, 5, 11


def plain(states, tokens, head, total):
    """The formula as it is written, with all logits at once."""
    logits = head.scale * (states @ head.weight.T + (0 if head.bias is None else head.bias))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    loss = F.cross_entropy(logits, tokens, reduction="sum") / total
    return loss, (logits.argmax(1) == tokens).sum()


def inputs(dtype=torch.float64):
    states = torch.randn(PLACES, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True)
    return states, weight, bias, torch.randint(VOCABULARY, (PLACES,))


@pytest.mark.parametrize("block", [1, 3, 7, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_loss_and_all_gradients_equal_the_plain_formula(block, softcap, scale):
    states, weight, bias, tokens = inputs()
    head = Head(weight, bias, scale, softcap)
    loss, right = next_token_loss(states, tokens, head, total=9, block=block)
    expected, expected_right = plain(states, tokens, head, 9)
    torch.testing.assert_close(loss, expected)
    assert right == expected_right
    got = torch.autograd.grad(3 * loss, [states, weight, bias])
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, [states, weight, bias]))


def test_a_frozen_head_gets_no_gradient():
    states, weight, _, tokens = inputs()
    loss, _ = next_token_loss(states, tokens, Head(weight.detach()), total=PLACES)
    loss.backward()
    expected, _ = plain(states, tokens, Head(weight.detach()), PLACES)
    torch.testing.assert_close(states.grad, torch.autograd.grad(expected, states)[0])


def test_parts_of_a_batch_add_up_to_its_mean():
    states, weight, _, tokens = inputs()
    whole, right = next_token_loss(states, tokens, Head(weight), total=PLACES)
    parts = [
        next_token_loss(states[part], tokens[part], Head(weight), total=PLACES)
        for part in (slice(0, 3), slice(3, 7))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    assert parts[0][1] + parts[1][1] == right


def test_bfloat16_states_are_summed_in_float32():
    states, weight, bias, tokens = inputs(torch.float32)
    narrow = states.detach().bfloat16().requires_grad_()
    head = Head(weight.detach().bfloat16().float(), bias.detach())
    loss, _ = next_token_loss(narrow, tokens, head, total=1)
    assert loss.dtype == torch.float32
    expected, _ = plain(narrow.float(), tokens, head, 1)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    loss.backward()
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16


def test_without_gradients_there_is_a_loss_all_the_same():
    states, weight, _, tokens = inputs()
    with torch.no_grad():
        loss, _ = next_token_loss(states, tokens, Head(weight), total=PLACES)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(states, tokens, Head(weight), PLACES)[0].detach())


def test_no_places_have_no_loss():
    states, weight, _, tokens = inputs()
    loss, right = next_token_loss(states[:0], tokens[:0], Head(weight), total=1)
    loss.backward()
    assert loss == 0 and right == 0 and states.grad is not None and not states.grad.any()


def test_under_autocast_the_product_is_bfloat16_and_the_gradient_float32():
    states, weight, _, tokens = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = next_token_loss(states, tokens, Head(weight), total=1)
    loss.backward()
    expected, _ = plain(states, tokens, Head(weight), 1)
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert states.grad is not None and states.grad.dtype == torch.float32

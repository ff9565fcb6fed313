"""Cross-entropy of masked words against loops."""

from __future__ import annotations

import pytest
import torch

from mmref.losses import reconstruction_loss


def literal(logits, words):
    """Sum over masked words of -log softmax at the word."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, word in zip(logits, words.tolist()):
        total = total - torch.log(torch.exp(row[word]) / sum(torch.exp(x) for x in row))
    return total


def test_value_and_gradient_equal_the_loops():
    twin = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    words = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    expected = literal(twin, words)
    expected.backward()
    own = twin.detach().float().requires_grad_()
    loss = reconstruction_loss(own, words)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(own.grad.double(), twin.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_a_sum_that_does_not_depend_on_the_cut(cut):
    logits, words = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)), torch.arange(7)
    parts = reconstruction_loss(logits[:cut], words[:cut]) + reconstruction_loss(logits[cut:], words[cut:])
    assert parts.item() == pytest.approx(reconstruction_loss(logits, words).item(), rel=1e-6)


def test_no_masked_word_is_zero_and_keeps_the_graph():
    layer = torch.nn.Linear(4, 11)
    loss = reconstruction_loss(layer(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0.0 and loss.requires_grad
    loss.backward()
    assert layer.weight.grad is not None and (layer.weight.grad == 0).all()

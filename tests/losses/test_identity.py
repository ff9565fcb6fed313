"""Identity classification against loops."""

from __future__ import annotations

import pytest
import torch

from mmref.losses import identity_loss


def test_value_and_gradients_equal_the_loops():
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    objects = torch.tensor([5, 0, 3, 3])
    total = sum(torch.log(torch.exp(x[i]).sum()) - x[i, y] for x in (image, text) for i, y in enumerate(objects.tolist()))
    total.backward()
    own = [x.detach().float().requires_grad_() for x in (image, text)]
    loss = identity_loss(*own, objects)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(total.item(), rel=1e-6)
    for a, b in zip(own, (image, text)):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-6, rtol=1e-5)


def test_half_precision_logits_are_summed_in_fp32():
    x = torch.randn(3, 5).bfloat16()
    objects = torch.tensor([0, 1, 2])
    assert identity_loss(x, x, objects).item() == pytest.approx(identity_loss(x.double(), x.double(), objects).item())

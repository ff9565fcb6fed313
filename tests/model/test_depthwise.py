import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmref.model.depthwise import MOST_CELLS, DepthwiseConv2d, use_depthwise
from mmref.model.flops import flop_counter


def grads(conv, x, autocast=False):
    """The output, and the gradients of input, kernel and bias."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = conv(x)
    y.float().backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y.detach(), x.grad, *(p.grad for p in conv.parameters())]


@pytest.mark.parametrize("height, width, kernel, bias", [
    (2, 2, 7, True), (4, 4, 7, False), (6, 3, (3, 5), True), (8, 8, 7, True), (1, 1, 3, True), (14, 14, 5, True),
])  # fmt: skip
def test_values_and_gradients_are_those_of_conv2d(height, width, kernel, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, kernel, padding="same", groups=6, bias=bias).double()
    ours = nn.Sequential(copy.deepcopy(plain))
    use_depthwise(ours)
    assert type(ours[0]) is DepthwiseConv2d
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(5, 6, height, width, dtype=torch.double).to(memory_format=layout)
        plain.zero_grad(), ours.zero_grad()
        for found, expected in zip(grads(ours, x), grads(plain, x), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_it_computes_in_bf16_where_convolutions_do():
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, 7, padding=3, groups=6)
    ours = nn.Sequential(copy.deepcopy(plain))
    use_depthwise(ours)
    x = torch.randn(64, 6, 4, 4)
    found, expected = grads(ours, x, autocast=True), grads(plain, x, autocast=True)
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    for f, e in zip(found, expected, strict=True):
        assert (f.float() - e.float()).norm() < 0.02 * e.float().norm()


def test_only_what_it_computes_is_replaced():
    def conv(channels=4, out=4, kernel=3, **values):
        return nn.Conv2d(channels, out, kernel, **{"padding": 1, "groups": 4} | values)

    others = [conv(stride=2), conv(groups=1), conv(padding=0), conv(out=8),
              conv(kernel=4, padding=2), conv(dilation=2, padding=2), conv(padding_mode="reflect")]  # fmt: skip
    tower = nn.Sequential(conv(), *others)
    names = list(tower.state_dict())
    use_depthwise(tower)
    assert [type(m) is DepthwiseConv2d for m in tower] == [True] + [False] * len(others)
    assert list(tower.state_dict()) == names


def test_large_maps_and_maps_without_gradients_are_left_to_pytorch(monkeypatch):
    tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    use_depthwise(tower)
    monkeypatch.setattr("mmref.model.depthwise._Depthwise.apply", lambda *_: pytest.fail("computed by products"))
    tower(torch.randn(1, 4, MOST_CELLS + 1, 1))
    with torch.no_grad():
        tower(torch.randn(1, 4, 2, 2))


def test_following_shapes_alone_leaves_nothing_behind():
    """`mmref sizing` runs a step on tensors without memory, and a training may follow in the same process."""
    conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3))
    use_depthwise(conv)
    with FakeTensorMode(allow_non_fake_inputs=True):
        conv(torch.zeros(2, 3, 5, 11)).sum().backward()
    conv.zero_grad()
    conv(torch.ones(2, 3, 5, 11)).sum().backward()
    assert conv[0].weight.grad.flatten().tolist() == [2.0 * n for n in (40, 44, 40, 50, 55, 50, 40, 44, 40)] * 3


def test_flops_of_a_depthwise_gradient_are_counted_by_its_groups():
    conv = nn.Conv2d(48, 48, 7, padding=3, groups=48)
    x = torch.randn(2, 48, 16, 16, requires_grad=True)
    with flop_counter() as counter:
        conv(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 49 * 48 * 256 * 2
    dense = nn.Conv2d(3, 8, 4, stride=4)
    with flop_counter() as counter:  # no gradient of the input
        dense(torch.randn(2, 3, 16, 16)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (3 * 8 * 16) * 16 * 2

"""The objective in its own room: which losses there are, what they weigh, and that nothing else decides it."""

from __future__ import annotations

import pytest
import torch

from mmref.config import LossConfig, ReferenceConfig
from mmref.losses import infonce, reference_loss, sigmoid, triplet_alignment
from mmref.losses.objective import LOSSES, TOTAL, References, Share, loss_weights, objective, pack, unpack


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def share(first=0, n=6):
    """Samples first .. first + n - 1 of a global batch of six samples of three objects."""
    image, text, objects = unit(6, 8), unit(6, 8, seed=1), torch.tensor([4, 4, 7, 7, 9, 9])
    own = slice(first, first + n)
    bias, labels = torch.tensor([-2.0]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    return Share(image[own], text[own], objects[own], image, text, objects, torch.tensor([5.0]), bias=bias, labels=labels[own])


def references(first=0, n=6, learn=False):
    return References(unit(3, 2, 8, seed=2).requires_grad_(learn), torch.tensor([0, 0, 1, 1, 2, 2])[first : first + n])


def test_each_loss_is_its_own_function():
    s, r = share(), references(learn=True)
    found = objective(s, r, LossConfig(), ReferenceConfig(), 1.0)
    align = infonce(s.image, s.all_text, s.objects, s.all_objects, 5.0) + infonce(
        s.text, s.all_image, s.objects, s.all_objects, 5.0
    )
    both, targets = torch.cat([s.image, s.text]), r.targets.repeat(2)
    expected = reference_loss(both, r.rows, targets, 1 / 0.07)
    torch.testing.assert_close(found["loss_align"], align / 2)
    torch.testing.assert_close(found["loss_guide"], expected.detach())
    torch.testing.assert_close(found["loss_fuse"], expected)
    assert not found["loss_guide"].requires_grad and found["loss_fuse"].requires_grad


@pytest.mark.parametrize("align", ["infonce", "sdm", "sigmoid", "rde"])
def test_the_mean_over_shares_is_the_whole_batch(align):
    loss = LossConfig(align=align)
    whole = objective(share(), references(), loss, ReferenceConfig(), 0.5)
    parts = [objective(share(i, 2), references(i, 2), loss, ReferenceConfig(), 0.5) for i in (0, 2, 4)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, value)


def test_sigmoid_counts_each_pair_once():
    s = share()
    expected = sigmoid(s.image, s.all_text, s.objects, s.all_objects, 5.0, -2.0)
    torch.testing.assert_close(objective(s, None, LossConfig(align="sigmoid"), ReferenceConfig(), 1.0)["loss_align"], expected)


def test_rde_counts_clean_pairs_alone_by_their_captions_weights():
    loss, weights = LossConfig(align="rde", rde_tau=0.2, rde_margin=0.4), torch.tensor([1.5, 1.0, 0.5, 1.0, 1.0, 1.0])
    s = share()._replace(weights=weights, all_weights=weights)
    given = s.objects, s.all_objects, 0.2, 0.4
    both = triplet_alignment(s.image, s.all_text, *given) + triplet_alignment(s.text, s.all_image, *given)
    expected = (both * s.labels * weights).sum() / 6
    torch.testing.assert_close(objective(s, None, loss, ReferenceConfig(), 1.0)["loss_align"], expected)
    undivided = objective(s._replace(labels=None), None, loss, ReferenceConfig(), 1.0)
    assert torch.equal(undivided["loss_align"], objective(s, None, LossConfig(), ReferenceConfig(), 1.0)["loss_align"])


def test_a_margin_is_on_fusion_and_guidance():
    s, r, margin = share(), references(learn=True), ReferenceConfig(margin=0.3)
    found = objective(s, r, LossConfig(), margin, 1.0)
    expected = reference_loss(torch.cat([s.image, s.text]), r.rows, r.targets.repeat(2), 1 / 0.07, margin=0.3)
    torch.testing.assert_close(found["loss_fuse"], expected)
    torch.testing.assert_close(found["loss_guide"], expected.detach())


@pytest.mark.parametrize("given, loss, names", [
    (None, {}, {"loss_align"}), (references(), {}, {"loss_align", "loss_guide"}),
    (references(learn=True), {"w_guide": 0.0}, {"loss_align", "loss_fuse"}),
    (references(), {"w_guide": 0.0}, {"loss_align"}),
])  # fmt: skip
def test_what_is_off_is_absent(given, loss, names):
    assert set(objective(share(), given, LossConfig(**loss), ReferenceConfig(), 1.0)) == names


def test_every_loss_has_a_weight_and_a_place():
    assert set(loss_weights(LossConfig(), 1.0)) | {TOTAL} == set(LOSSES) and next(iter(LOSSES)) == TOTAL
    assert loss_weights(LossConfig(w_guide=0.5), 0.4)["loss_guide"] == pytest.approx(0.2)


def test_packing_goes_by_name():
    given = {name: torch.tensor(float(i)) for i, name in enumerate(reversed(list(LOSSES)))}
    assert unpack(pack(given)) == {name: float(value) for name, value in given.items()}
    assert unpack(pack({TOTAL: torch.tensor(2.0)}))["loss_rec"] == 0.0


def test_references_are_used_by_whatever_weighs_on_them():
    off = {"w_guide": 0.0, "w_fuse": 0.0, "w_rec": 0.0}
    assert not LossConfig(**off).uses_references
    for name in ("w_guide", "w_fuse", "w_rec", "caption_weight"):
        assert LossConfig(**{**off, name: 0.1}).uses_references

"""RDE's division: numbers of pairs, what is kept of their losses, and the labels made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.plain_training import PlainTraining

from mmref.errors import ConfigError, TooFewPairsError
from mmref.train.division import Division

RDE = {"loss.align": "rde", "loss.rde_tau": 0.1, "loss.rde_margin": 0.3, "loss.w_guide": 0.0, "loss.w_fuse": 0.0}


def division(captions=4, start=2, every=3):
    return Division(np.full(25, captions, np.int32), start, every, 0, "cpu")


def seen(made, losses):
    """All pairs at once, with losses (pairs, 2)."""
    everyone = torch.arange(len(losses))
    made.note(everyone, everyone, losses)


def two_groups(wrong_by_image, wrong_by_text):
    """Losses (100, 2) that are high where each direction says wrong."""
    noise = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) / 10
    return noise + torch.stack([wrong_by_image, wrong_by_text], 1)


def test_each_caption_of_each_image_is_a_pair():
    made = Division(np.array([2, 1, 13], np.int32), 0, 1, 0, "cpu")
    assert made.pairs(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 0, 0, 12])).tolist() == [0, 1, 2, 3, 15]


def test_pairs_are_clean_by_both_directions_wrong_by_both_and_a_coin_between():
    made = division()
    at = torch.arange(100)
    seen(made, two_groups((at < 40).float(), ((at < 20) | (at >= 80)).float()))
    assert made.begin(2)
    labels = made.label(at)
    assert (labels[:20] == 0).all() and (labels[40:80] == 1).all()
    coins = torch.cat([labels[20:40], labels[80:]])
    assert 8 < coins.sum() < 32, "heads and tails"
    again = division()
    again.load_state_dict(made.state_dict())
    again.begin(2)
    assert torch.equal(again.labels, made.labels), "the coins of a step are always the same"
    again.begin(5)
    assert not torch.equal(again.labels, made.labels), "and others in the next epoch"
    assert torch.equal(again.labels[:20], made.labels[:20]) and torch.equal(again.labels[40:80], made.labels[40:80])


def test_it_is_refreshed_once_in_an_epoch():
    made = division()
    at = torch.arange(100)
    assert not made.begin(0) and not made.begin(1)
    seen(made, two_groups((at < 40).float(), (at < 40).float()))
    for step in (2, 3, 4, 5):
        assert made.begin(step)
        if step == 2:  # what comes now counts at step 5
            seen(made, two_groups((at >= 60).float(), (at >= 60).float()))
        assert (made.label(at) == 0).nonzero()[:, 0].tolist() == list(range(40) if step < 5 else range(60, 100))


def test_losses_are_kept_as_deviations_within_their_step():
    made = division()
    made.note(torch.tensor([7, 9]), torch.tensor([2, 1]), torch.tensor([[9.0, 1.0], [1.0, 1.0], [5.0, 1.0]]))
    spread = np.std([9.0, 1.0, 5.0])
    torch.testing.assert_close(made.losses[7], torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(made.losses[9], torch.tensor([-4 / spread, 0.0]).float())
    assert int(made.losses.isnan().any(1).sum()) == 98 and made.clean_share == 1


def test_pairs_that_were_not_seen_are_clean():
    made = division()
    half = torch.arange(50)
    made.note(half, half, two_groups((torch.arange(100) < 25).float(), (torch.arange(100) < 25).float())[:50])
    made.begin(2)
    assert (made.labels[:25] == 0).all() and (made.labels[25:] == 1).all() and made.clean_share == 0.5


def test_named_errors(make_config):
    with pytest.raises(TooFewPairsError, match=r"at least 16, found 6\. Train on more pairs"):
        Division(np.array([1, 2, 3], np.int32), 0, 1, 0, "cpu")
    with pytest.raises(ConfigError, match=r"`loss\.learn_tau` has no temperature to learn"):
        make_config({"loss.align": "rde", "loss.learn_tau": True})


def test_a_run_without_it_has_none(make_config):
    assert PlainTraining(make_config({})).division is None


def test_infonce_comes_first_and_wrong_pairs_then_count_nothing(make_config):
    """Before `rde_from` the losses are InfoNCE's to the last bit; losses of pairs are noted all the while."""
    run = PlainTraining(make_config({**RDE, "loss.rde_from": 0.1, "train.max_steps": 20}))
    plain = PlainTraining(make_config({**RDE, "loss.align": "infonce", "train.max_steps": 20}))
    assert run.division is not None
    assert torch.equal(run.step(0), plain.step(0)) and torch.equal(run.step(1), plain.step(1))
    assert not run.division.losses.isnan().all()
    run.division.every, run.division.start = 100, 1  # from here on with the labels as they are
    every = float(run.step(2)[0])
    run.division.labels[::2] = 0
    some = float(run.step(2)[0])
    run.division.labels[:] = 0
    assert 0 < some < every
    assert float(run.step(2)[0]) == 0 and all((g == 0).all() for g in run.gradients().values())


def test_what_a_step_notes_are_the_losses_of_its_pairs_alone(make_config):
    run = PlainTraining(make_config(RDE))
    batch = run.reader.read_step(0)
    run.step(0)
    pairs = run.division.pairs(batch["image_index"], batch["caption_number"])
    assert sorted(set(pairs.tolist())) == (~run.division.losses[:, 0].isnan()).nonzero()[:, 0].tolist()

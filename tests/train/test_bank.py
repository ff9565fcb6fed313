"""The reference bank in one process: updates against loops, selection of rows, rows saved by other world sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmref.config import ReferenceConfig
from mmref.model.reference_rows import initial_rows
from mmref.train import collectives
from mmref.train.bank import ReferenceBank

OBJECTS, DIM = 7, 4


def bank(update="gradient", per_object=2, objects=OBJECTS, object_ids=None, **fields):
    config = ReferenceConfig(update=update, per_object=per_object, **fields)
    return ReferenceBank(objects, DIM, config, seed=3, object_ids=object_ids)


def rows(made, objects):
    return made.rows_of(np.asarray(objects))


def follow(made, image, text, objects):
    """All samples of a batch on one rank."""
    batch = rows(made, objects)
    made.follow(image, text, batch, torch.from_numpy(batch.targets(objects.numpy())).to(made.device))


class LiteralAdam:
    """Adam of one row: first moment per number, one second moment for the row; the row stays a unit vector."""

    def __init__(self, row):
        self.row, self.m, self.v, self.t = [float(x) for x in row], [0.0] * len(row), 0.0, 0

    def update(self, grad, lr):
        grad, self.t = [float(x) for x in grad], self.t + 1
        self.m = [0.9 * m + 0.1 * g for m, g in zip(self.m, grad)]
        self.v = 0.999 * self.v + 0.001 * sum(g * g for g in grad) / len(grad)
        second = math.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8
        row = [r - lr * m / (1 - 0.9**self.t) / second for r, m in zip(self.row, self.m)]
        self.row = [r / math.sqrt(sum(x * x for x in row)) for r in row]


@pytest.mark.parametrize("per_object", [1, 3])
def test_gradient_updates_equal_a_literal_adam(per_object):
    made = bank(per_object=per_object)
    twins = [[LiteralAdam(row) for row in rows] for rows in made.rows.double().tolist()]
    g = torch.Generator().manual_seed(0)
    for step in range(12):
        active = torch.randperm(OBJECTS, generator=g)[:4].sort().values
        grad = torch.randn(4, per_object, DIM, generator=g) * 10.0 ** (step % 3 - 1)
        grad[1] = 0  # an object that got no gradient is left alone: moments, count and row
        lr = 0.05 / (1 + step)
        made.apply_gradient(rows(made, active), grad, lr)
        for i, row in enumerate(active.tolist()):
            for k in range(per_object):
                if i != 1:
                    twins[row][k].update(grad[i, k], lr)
        torch.testing.assert_close(made.rows, torch.tensor([[t.row for t in rows] for rows in twins]))
    assert made.updates.tolist() == [rows[0].t for rows in twins] and len(set(made.updates.tolist())) > 1


def test_no_gradient_changes_nothing():
    made = bank()
    before = made.rows.clone()
    made.apply_gradient(made.everyone, None, 0.1)
    made.apply_gradient(made.everyone, torch.zeros(OBJECTS, 2, DIM), 0.1)
    assert torch.equal(made.rows, before) and (made.updates == 0).all()


def literal_follow(rows, image, text, objects, momentum, modality):
    """Features one at a time: the slot is chosen by the references as they were before the step."""
    groups = {}
    for features, is_text in ((image, False), (text, True)):
        for feature, row in zip(features, objects.tolist()):
            slots = [k for k in range(rows.shape[1]) if not modality or k % 2 == int(is_text)]
            fresh = [k for k in slots if rows[row, k].abs().max() == 0]
            cosines = [torch.nn.functional.cosine_similarity(feature, rows[row, k], dim=0).item() for k in slots]
            slot = fresh[0] if fresh else slots[cosines.index(max(cosines))]
            groups.setdefault((row, slot), []).append(feature)
    new = rows.clone()
    for (row, slot), features in groups.items():
        mean = torch.stack(features).mean(0)
        seen = rows[row, slot].abs().max() > 0
        new[row, slot] = momentum * rows[row, slot] + (1 - momentum) * mean if seen else mean
    return new


@pytest.mark.parametrize("per_object, assign", [(1, "nearest"), (3, "nearest"), (2, "modality"), (4, "modality")])
def test_following_equals_the_loop(per_object, assign):
    made = bank("moving_average", per_object, momentum=0.7, assign=assign)
    assert (made.rows == 0).all(), "nothing has been seen"
    g = torch.Generator().manual_seed(1)
    for _ in range(6):
        objects = torch.randint(0, OBJECTS - 1, (8,), generator=g)
        image, text = torch.nn.functional.normalize(torch.randn(2, 8, DIM, generator=g), dim=-1)
        expected = literal_follow(made.rows.clone(), image, text, objects, 0.7, assign == "modality")
        follow(made, image, text, objects)
        torch.testing.assert_close(made.rows, expected)
    assert (made.rows[:-1].abs().amax((1, 2)) > 0).all()
    assert (made.rows[-1] == 0).all(), "an object that never came stays unseen"


def test_selected_rows():
    objects = np.array([5, 2, 2, 5, 0])
    some = bank(negatives="batch").select(objects, 0)
    assert some.numbers.tolist() == [0, 2, 5] and some.targets(objects).tolist() == [2, 1, 1, 2, 0]
    assert bank(negatives="all").select(objects, 0).numbers.tolist() == list(range(OBJECTS))
    made = bank(negatives="sampled", sampled_negatives=20, objects=1000)
    drawn = made.select(objects, 4).numbers.tolist()
    assert {0, 2, 5} <= set(drawn) and 15 < len(drawn) <= 23
    assert drawn == sorted(set(drawn)) and made.select(objects, 4).numbers.tolist() == drawn
    assert made.select(objects, 5).numbers.tolist() != drawn, "other negatives at another step"


@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_each_of_some_rows_has_one_owner(monkeypatch, world):
    seen = []
    for rank in range(world):
        made = as_rank(monkeypatch, rank, world)
        some = rows(made, [6, 1, 4, 1])
        assert (made.first + some.own).tolist() == some.numbers[some.at].tolist()
        seen += some.numbers[some.at].tolist()
    assert seen == [1, 4, 6]


@pytest.mark.parametrize("update", ["gradient", "moving_average"])
def test_fetched_rows_collect_gradients_but_do_not_share_memory_with_a_graph(update):
    made = bank(update)
    some = made.fetch(rows(made, [1, 4]))
    assert torch.equal(some.detach(), made.rows[[1, 4]]) and some.is_leaf
    assert some.requires_grad == (update == "gradient")
    assert torch.equal(made.fetch(made.everyone).detach(), made.rows) and not made.rows.requires_grad


def as_rank(monkeypatch, rank, world, **fields):
    """The bank that a rank of a larger world would make."""
    monkeypatch.setattr(collectives, "rank", lambda: rank)
    monkeypatch.setattr(collectives, "world_size", lambda: world)
    return bank(**fields)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_ranks_own_every_row_once(monkeypatch, world):
    """With 9 ranks for 7 objects two own nothing."""
    shares = [as_rank(monkeypatch, rank, world) for rank in range(world)]
    owned = [row for made in shares for row in range(made.first, made.first + made.count)]
    assert owned == list(range(OBJECTS))
    torch.testing.assert_close(torch.cat([made.rows for made in shares]), initial_rows(0, OBJECTS, 2, DIM, 3))


NAMES = [f"o{7 * i % 11}" for i in range(11)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    update=st.sampled_from(["gradient", "moving_average"]),
    wrote=st.integers(1, 9), reads=st.integers(1, 9),
    old=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    new=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
)  # fmt: skip
def test_rows_are_found_by_object_id_whoever_saved_them(monkeypatch, update, wrote, reads, old, new):
    """Any number of ranks on either side, objects added, removed and in another order; unknown ones keep fresh rows."""
    pieces = []
    for rank in range(wrote):
        made = as_rank(monkeypatch, rank, wrote, update=update, objects=len(old), object_ids=old)
        for name, tensor in made.state_dict().items():
            for i, object_id in enumerate(made.object_ids.to_pylist()):
                tensor[i] = 100 * (1 + NAMES.index(object_id)) + len(name)
        pieces.append((made.object_ids, {k: v.clone() for k, v in made.state_dict().items()}))
    for rank in range(reads):
        made = as_rank(monkeypatch, rank, reads, update=update, objects=len(new), object_ids=new)
        fresh = {k: v.clone() for k, v in made.state_dict().items()}
        for object_ids, state in pieces:
            made.load_rows(made.find(object_ids), state)
        assert made.object_ids.to_pylist() == new[made.first : made.first + made.count]
        for name, tensor in made.state_dict().items():
            for i, object_id in enumerate(made.object_ids.to_pylist()):
                if object_id in old:
                    assert (tensor[i] == 100 * (1 + NAMES.index(object_id)) + len(name)).all(), (name, object_id)
                else:
                    assert torch.equal(tensor[i], fresh[name][i])


def test_description_has_what_must_fit():
    assert bank(per_object=3).describe() == {"objects": OBJECTS, "per_object": 3, "dim": DIM}


@pytest.mark.parametrize("update", ["gradient", "moving_average"])
def test_bf16_rows_stay_close_to_fp32_rows(update):
    """bf16 keeps 8 bits: directions differ by less than 1 % after some updates, and take half the memory."""
    full, half = bank(update), bank(update, row_dtype="bf16")
    assert half.rows.dtype == torch.bfloat16 and half.rows.nbytes * 2 == full.rows.nbytes
    g = torch.Generator().manual_seed(2)
    for _ in range(10):
        objects = torch.randint(0, OBJECTS, (8,), generator=g)
        active = objects.unique()
        if update == "gradient":
            grad = torch.randn(len(active), 2, DIM, generator=g)
            for made in (full, half):
                made.apply_gradient(rows(made, active), grad, 0.05)
        else:
            image, text = torch.nn.functional.normalize(torch.randn(2, 8, DIM, generator=g), dim=-1)
            for made in (full, half):
                follow(made, image, text, objects)
    expected, found = full.fetch(full.everyone), half.fetch(half.everyone)
    assert found.dtype == torch.float32
    seen = expected.abs().amax(-1) > 0
    cosine = torch.nn.functional.cosine_similarity(expected[seen], found[seen], dim=-1)
    assert cosine.min() > 0.99 and not torch.equal(expected, found)


@pytest.mark.parametrize("update", ["gradient", "moving_average"])
def test_sampled_steps_touch_only_their_rows(update):
    """What a step may read and write: the batch's rows and the sampled ones, whatever the number of objects."""
    made = bank(update, objects=50_000, negatives="sampled", sampled_negatives=16)
    before = made.rows.clone()
    objects = torch.tensor([3, 49_999, 3, 77])
    active = made.select(objects.numpy(), 0)
    fetched = made.fetch(active)
    assert len(fetched) == len(active.numbers) <= 3 + 16
    if update == "gradient":
        made.apply_gradient(active, torch.ones_like(fetched), 0.1)
        touched = active.numbers.tolist()
    else:
        features = torch.nn.functional.normalize(torch.ones(4, DIM), dim=-1)
        follow(made, features, features, objects)
        touched = [3, 77, 49_999]
    changed = (made.rows != before).any(-1).any(-1).nonzero()[:, 0]
    assert changed.tolist() == touched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="rows in host memory differ from the device's on a GPU only")
@pytest.mark.parametrize("update", ["gradient", "moving_average"])
def test_rows_in_host_memory_are_the_same(update):
    config = ReferenceConfig(update=update, per_object=2)
    near = ReferenceBank(OBJECTS, DIM, config, 3, "cuda")
    far = ReferenceBank(OBJECTS, DIM, ReferenceConfig(update=update, per_object=2, rows_on="host"), 3, "cuda")
    assert far.rows.device.type == "cpu"
    g = torch.Generator().manual_seed(2)
    for _ in range(5):
        objects = torch.randint(0, OBJECTS, (8,), generator=g)
        active = objects.unique()
        if update == "gradient":
            grad = torch.randn(len(active), 2, DIM, generator=g).cuda()
            for made in (near, far):
                made.apply_gradient(rows(made, active), grad, 0.05)
        else:
            image, text = torch.nn.functional.normalize(torch.randn(2, 8, DIM, generator=g), dim=-1).cuda()
            for made in (near, far):
                follow(made, image, text, objects)
        torch.testing.assert_close(near.fetch(rows(near, active)), far.fetch(rows(far, active)))


def test_references_that_were_never_set_do_not_replace_random_ones():
    """Rows of zeros would get no gradient: `train.start_from` leaves those that it finds."""
    config = ReferenceConfig(update="gradient", per_object=2)
    bank = ReferenceBank(3, 4, config, seed=0)
    before, saved = bank.rows.clone(), torch.ones(2, 2, 4)
    saved[1, 1] = 0
    bank.load_rows(torch.tensor([2, 0]), {"rows": saved}, keep_unset=True)
    assert torch.equal(bank.rows[2], saved[0]) and torch.equal(bank.rows[1], before[1])
    assert torch.equal(bank.rows[0, 0], saved[1, 0]) and torch.equal(bank.rows[0, 1], before[0, 1])
    bank.load_rows(torch.tensor([-1, 0]), {"rows": saved})
    assert (bank.rows[0, 1] == 0).all(), "a run that resumes has what it had"

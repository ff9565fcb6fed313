"""One training step: independent of accumulation, equal to the losses written out, and 20 steps as they always were.

`python tests/train/test_step.py --update` writes tests/golden/losses.json anew: for a change that is meant to alter
results, and only then.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # pytest's conftest does this otherwise
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.plain_training import AT, CLOSE, VARIANTS, PlainTraining, assert_gradients_close, train, train_adam
from support.tiny_set import BERT, VIT, damage_image, tiny_config

from mmref.losses import agreement, agreement_weights, infonce, reference_loss, sdm, soft_targets
from mmref.losses.objective import LOSSES, TOTAL, pack, ramp, unpack
from mmref.randomness import draw
from mmref.train import collectives
from mmref.train.engine import learning_rate

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
BUNDLED = Path(__file__).parents[2] / "data_shards" / "emoji"
GOLDEN_STEPS = 20


@pytest.fixture(autouse=True)
def one_thread():
    """Sums on several threads may be added in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_gives_the_same_losses_gradients_and_references(make_config, variant):
    results = [train(make_config({**VARIANTS[variant], "train.accumulation": a}), steps=3) for a in (1, 2, 4)]
    whole = results[0]
    assert whole.gradients[-1] and torch.isfinite(whole.losses).all()
    for cut in results[1:]:
        torch.testing.assert_close(cut.losses, whole.losses, **CLOSE)
        for a, b in zip(cut.references, whole.references, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        for a, b in zip(cut.gradients, whole.gradients, strict=True):
            assert_gradients_close(a, b)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_engine_is_told_of_every_micro_batch(make_config, accumulation):
    run = PlainTraining(make_config({"train.accumulation": accumulation}))
    run.step(0)
    assert run.boundaries == accumulation


def with_dropout():
    return {
        "model.vision_config": {**VIT, "hidden_dropout_prob": 0.3},
        "model.text_config": {**BERT, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    }


def test_both_passes_of_accumulation_see_the_same_dropout(make_config):
    run = PlainTraining(make_config({**with_dropout(), "train.accumulation": 2, "loss.w_rec": 0.3}))
    seen = []
    run.model.register_forward_hook(lambda _, __, out: seen.append((out.image.detach(), out.text.detach())))
    run.step(0)
    assert len(seen) == 4
    for first, second in ((0, 2), (1, 3)):
        for a, b in zip(seen[first], seen[second]):
            assert torch.equal(a, b)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_dropout_depends_on_seed_and_step_alone(make_config):
    """A resumed run draws what the undisturbed one would have drawn."""
    config = make_config(with_dropout())
    run, resumed = PlainTraining(config), PlainTraining(config)
    torch.manual_seed(123)
    losses = run.step(7)
    torch.rand(5)
    assert torch.equal(resumed.step(7), losses)
    assert not torch.equal(PlainTraining(make_config({**with_dropout(), "train.seed": 1})).step(7), losses)


def test_ranks_drop_out_differently(make_config, monkeypatch):
    run, draws = PlainTraining(make_config()), []
    for rank in range(3):
        monkeypatch.setattr(collectives, "rank", lambda r=rank: r)
        run.runner._seed_dropout(5)
        draws.append(torch.rand(4).tolist())
    assert draws[0] != draws[1] != draws[2] != draws[0]


@pytest.mark.parametrize("negatives", ["all", "sampled"])
def test_references_follow_the_object_that_was_read(make_config, own_set, negatives):
    """Another object stands in for one whose only image is broken: its reference moves, and the other's does not."""
    config = make_config({"reference.negatives": negatives, "reference.sampled_negatives": 3}, root=own_set)
    run = PlainTraining(config)
    damage_image(own_set, 0)  # the first object has one image
    step = next(step for step in range(9) if 0 in run.reader.plan(step).objects)
    batch = run.reader.read_step(step)
    assert torch.isfinite(run.step(step)).all()
    followed = run.references().abs().amax((1, 2)).nonzero()[:, 0].tolist()
    assert followed == sorted(set(batch["object"].tolist())) and 0 not in followed


# -- the losses written out ------------------------------------------------------------------------------------------


def inputs(run, step):
    """Pixels, ids, mask, objects, masked ids and masked positions of a step of one rank."""
    (micro,) = run.runner.prepare(step, run.reader.read_step(step)).micro
    return micro


def written_out(run, step, references):
    """Loss of a step as the sum of its four terms, each with its own stop-gradients and its own pass."""
    c, m = run.config, inputs(run, step)
    image = torch.nn.functional.normalize(run.model.backbone.encode_image(m.pixels)[0], dim=-1)
    text = torch.nn.functional.normalize(run.model.backbone.encode_text(m.ids, m.mask)[0], dim=-1)
    scale, y = run.model.log_scale.exp(), m.objects
    align = (infonce(image, text, y, y, scale) + infonce(text, image, y, y, scale)) / 2
    both, rows = torch.cat([image, text]), y.repeat(2)
    of_references = (1 / c.reference.tau, c.reference.score)
    fuse = reference_loss(both.detach(), references, rows, *of_references)
    guide = reference_loss(both, references.detach(), rows, *of_references)
    loss = align + c.loss.w_fuse * fuse + c.loss.w_guide * guide
    rec = torch.zeros(())
    if m.masked is not None:
        states = run.model.backbone.encode_text(m.masked.ids, m.mask)[1]
        own = torch.nn.functional.normalize(references[y], dim=-1)
        logits = run.model.reconstruct(states, m.mask, own, torch.arange(m.ids.numel()))
        per_word = torch.nn.functional.cross_entropy(logits, m.ids.flatten(), reduction="none")
        rec = per_word[m.masked.at].mean()
        loss = loss + c.loss.w_rec * rec
    values = {TOTAL: loss, "loss_align": align, "loss_fuse": fuse, "loss_rec": rec, "loss_guide": guide}
    return loss, pack(values)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("per_object, score", [(1, "max"), (2, "lme")])
def test_a_step_is_the_sum_of_its_losses(make_config, accumulation, per_object, score):
    overrides = {
        "reference.update": "gradient", "reference.per_object": per_object, "reference.score": score,
        "loss.w_fuse": 0.7, "loss.w_guide": 0.4, "loss.w_rec": 0.3, "loss.learn_tau": True,
    }  # fmt: skip
    whole = PlainTraining(make_config(overrides))
    config = make_config({**overrides, "train.accumulation": accumulation})
    run = PlainTraining(config)
    references = whole.references().requires_grad_()
    loss, values = written_out(whole, 3, references)
    loss.backward()
    asked = []
    run.bank.apply_gradient = lambda rows, grad, lr: asked.append((rows, grad, lr))
    torch.testing.assert_close(run.step(3), values, **CLOSE)
    expected, found = whole.gradients(), run.gradients()
    assert_gradients_close(found, expected)
    ((rows, grad, lr),) = asked
    assert rows.numbers.tolist() == list(range(14))
    torch.testing.assert_close(grad, references.grad, **CLOSE)
    assert lr == pytest.approx(config.reference.lr * learning_rate(3, config.train) / config.train.lr)


IRRA = {
    "loss.align": "sdm", "loss.w_guide": 0.0, "loss.w_fuse": 0.0, "loss.w_id": 0.7, "loss.w_mlm": 0.3, "loss.mlm_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
def test_irra_s_objective_is_the_sum_of_its_three_losses(make_config, accumulation):
    whole = PlainTraining(make_config(IRRA))
    run = PlainTraining(make_config({**IRRA, "train.accumulation": accumulation}))
    c, m, model = whole.config.loss, inputs(whole, 3), whole.model
    (image, tokens), y = model.backbone.encode_image(m.pixels), m.objects
    text = model.backbone.encode_text(m.ids, m.mask)[0]
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (image, text)]
    align = sdm(*unit, y, y, 1 / c.tau) + sdm(*unit[::-1], y, y, 1 / c.tau)
    logits = [model.classify(x) for x in (image, text)]  # of features as they are, not normalised
    identity = sum(torch.nn.functional.cross_entropy(x, y) for x in logits) / 2
    states = model.backbone.encode_text(m.masked.ids, m.mask)[1]
    seen, read = model.backbone.in_shared_space(tokens, states)
    words = model.image_words(read, m.mask, seen, torch.arange(m.ids.numel()))
    mlm = torch.nn.functional.cross_entropy(words, m.ids.flatten(), reduction="none")[m.masked.at].mean()
    loss = align + c.w_id * identity + c.w_mlm * mlm
    loss.backward()
    values = {TOTAL: loss, "loss_align": align, "loss_id": identity, "loss_mlm": mlm}
    torch.testing.assert_close(run.step(3), pack(values), **CLOSE)
    expected, found = whole.gradients(), run.gradients()
    assert {n for n, _ in model.named_parameters()} - set(expected) == {"log_scale"}
    assert_gradients_close(found, expected)
    assert (run.bank.rows == 0).all(), "no references are kept"


OPTIONS = {
    "on text": {"loss.guide_on": "text"},
    "on images": {"loss.guide_on": "image"},
    "own temperature": {"loss.guide_tau": 0.2},
    "soft targets": {"loss.guide_soft": 0.3},
    "weighted captions": {"loss.caption_weight": 2.0},
    "weighted captions, sdm": {"loss.caption_weight": 2.0, "loss.align": "sdm"},
    "everything": {
        "loss.guide_on": "text", "loss.guide_tau": 0.2, "loss.guide_soft": 0.3, "loss.caption_weight": 2.0,
        "reference.per_object": 2, "reference.score": "lme",
    },
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_guidance_written_out(make_config, option):
    whole, run = (PlainTraining(make_config({"loss.w_guide": 0.4, **OPTIONS[option]})) for _ in range(2))
    for training in (whole, run):  # an epoch of the 14 objects: all but those of one step have references
        for step in (0, 1, 3):
            training.step(step)
        training.model.zero_grad()
    c, r, m, rows = whole.config.loss, whole.config.reference, inputs(whole, 4), whole.references()
    out, y = whole.model(m.pixels, m.ids, m.mask), m.objects
    weights = None
    if c.caption_weight:
        weights = agreement_weights(agreement(out.text, rows, y, r.score), c.caption_weight)
        assert weights.std() > 0.01
    loss = infonce if c.align == "infonce" else sdm
    align = loss(out.image, out.text, y, y, out.scale, other_weights=weights)
    align = align + loss(out.text, out.image, y, y, out.scale, weights)
    align = align / 2 if c.align == "infonce" else align
    soft = soft_targets(rows, y, c.guide_soft, 1 / r.tau) if c.guide_soft else None
    per_modality = {
        name: reference_loss(features, rows, y, 1 / (c.guide_tau or r.tau), r.score, soft, weight)
        for name, features, weight in (("image", out.image, None), ("text", out.text, weights))
    }
    guide = sum(per_modality.values()) / 2 if c.guide_on == "both" else per_modality[c.guide_on]
    (align + c.w_guide * guide).backward()
    found = run.step(4)
    values = {TOTAL: align + c.w_guide * guide, "loss_align": align, "loss_guide": guide}
    torch.testing.assert_close(found, pack(values), **CLOSE)
    expected = whole.gradients()
    for name, gradient in run.gradients().items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_references_learn_less_from_captions_that_disagree(make_config):
    config = make_config({"loss.w_guide": 0.4, "loss.caption_weight": 5.0, "reference.update": "gradient"})
    run = PlainTraining(config)
    run.step(0)
    m, references = inputs(run, 1), run.references().requires_grad_()
    out = run.model(m.pixels, m.ids, m.mask)
    weights = agreement_weights(agreement(out.text, references, m.objects), 5.0)
    assert weights.max() > 2 * weights.min()
    both = torch.cat([out.image, out.text]).detach()
    each = torch.cat([torch.ones_like(weights), weights])
    fuse = reference_loss(both, references, m.objects.repeat(2), 1 / config.reference.tau, weights=each)
    (config.loss.w_fuse * fuse).backward()
    asked = []
    run.bank.apply_gradient = lambda rows, grad, lr: asked.append(grad)
    torch.testing.assert_close(run.step(1)[AT["loss_fuse"]], fuse.detach(), **CLOSE)
    torch.testing.assert_close(asked[0], references.grad, **CLOSE)


def test_options_of_guidance_change_something(make_config):
    configs = {name: make_config({"loss.w_guide": 0.4, **changed}) for name, changed in {**OPTIONS, "none": {}}.items()}
    losses = {name: train(config, steps=6).losses[-1, AT[TOTAL]].item() for name, config in configs.items()}
    assert len({round(value, 5) for value in losses.values()}) == len(losses)


@pytest.mark.parametrize("per_object", [1, 2])
def test_reconstruction_teaches_no_reference_that_is_not_set_yet(make_config, per_object):
    """A row of zeros has no direction, whose derivative would be without bounds: it becomes the mean at its first visit."""
    overrides = {
        "reference.update": "gradient", "reference.init": "mean", "reference.per_object": per_object, "loss.w_rec": 0.3,
        "loss.guide_from": 0.0, "loss.guide_full": 0.0,
    }  # fmt: skip
    run, without = (PlainTraining(make_config({**overrides, "loss.w_rec": weight})) for weight in (0.3, 0.0))
    for each in (run, without):
        each.step(0)
    torch.testing.assert_close(run.references(), without.references(), **CLOSE)
    for step in range(1, 4):
        run.step(step)
        assert run.runner.reference_norm < 100
    assert run.bank.exp_avg_sq.max() < 1


def test_learned_references_may_start_from_the_mean_of_their_object(make_config):
    """They follow until guidance begins, then each is learned; one that comes up later starts from its first features."""
    overrides = {
        "reference.update": "gradient", "reference.init": "mean", "loss.guide_from": 0.15, "loss.guide_full": 0.15,
        "reference.momentum": 0.5,
    }  # fmt: skip
    run = PlainTraining(make_config(overrides))
    follows = PlainTraining(make_config({**overrides, "reference.update": "moving_average"}))
    assert (run.references() == 0).all()
    for step in (0, 1, 2):  # of 20 steps, with 12 of the 14 objects
        losses = run.step(step)
        torch.testing.assert_close(losses, follows.step(step), **CLOSE)
    torch.testing.assert_close(run.references(), follows.references(), **CLOSE)
    before, seen = run.references(), run.references().abs().amax((1, 2)) > 0
    assert seen.any() and not seen.all()
    m = inputs(run, 3)
    out = run.model(m.pixels, m.ids, m.mask)
    run.step(3)
    after = run.references()
    learned = set(m.objects.tolist()) & set(seen.nonzero()[:, 0].tolist())
    assert learned and (run.bank.updates > 0).any()
    torch.testing.assert_close(after[list(learned)].norm(dim=-1), torch.ones(len(learned), 1), **CLOSE)
    assert not torch.equal(after[list(learned)], before[list(learned)])
    assert set(m.objects.tolist()) - learned
    for row in set(m.objects.tolist()) - learned:
        mine = m.objects == row
        mean = torch.cat([out.image[mine], out.text[mine]]).mean(0).detach()
        torch.testing.assert_close(after[row, 0], mean, **CLOSE)


@pytest.mark.parametrize("align, loss, factor", [("infonce", infonce, 0.5), ("sdm", sdm, 1.0)])
def test_alignment_is_the_mean_of_both_directions_or_their_sum_as_in_irra(make_config, align, loss, factor):
    run = PlainTraining(make_config({"loss.align": align, "loss.w_guide": 0.0, "loss.w_fuse": 0.0}))
    m = inputs(run, 0)
    out, y = run.model(m.pixels, m.ids, m.mask), m.objects
    both = loss(out.image, out.text, y, y, out.scale) + loss(out.text, out.image, y, y, out.scale)
    assert run.step(0)[AT["loss_align"]].item() == pytest.approx(factor * both.item(), rel=1e-5)


def test_align_only_equals_references_that_do_not_guide_yet(make_config):
    """Under moving_average nothing but the guidance reaches the encoders, and it ramps in."""
    alone = train(make_config({"loss.w_guide": 0.0, "loss.w_fuse": 0.0}), steps=4)
    later = train(make_config({"loss.guide_from": 0.2, "loss.guide_full": 0.2}), steps=5)  # full from step 4 of 20
    total, align, fuse, guide = (later.losses[:, AT[n]] for n in (TOTAL, "loss_align", "loss_fuse", "loss_guide"))
    torch.testing.assert_close(align[:4], alone.losses[:, AT["loss_align"]], **CLOSE)
    for a, b in zip(later.gradients[:4], alone.gradients):
        for name in b:
            torch.testing.assert_close(a[name], b[name], **CLOSE)
    assert (total[:4] == align[:4]).all()
    assert (fuse == 0).all(), "references that follow are not fused by a loss"
    assert total[4].item() == pytest.approx((align[4] + 0.5 * guide[4]).item(), rel=1e-5)


def test_fusion_by_gradient_alone_leaves_the_encoders_as_they_are(make_config):
    """So that align-only may have the references beside it that refine it (tune/rows/)."""
    alone = train(make_config({"loss.w_guide": 0.0, "loss.w_fuse": 0.0}), steps=4)
    fused = train(make_config({"loss.w_guide": 0.0, "loss.w_fuse": 1.0, "reference.update": "gradient"}), steps=4)
    fuse, align = AT["loss_fuse"], AT["loss_align"]
    assert (fused.losses[:, fuse] > 0).all() and not torch.equal(fused.references[0], fused.references[-1])
    assert torch.equal(fused.losses[:, align], alone.losses[:, align])
    for a, b in zip(fused.gradients, alone.gradients):
        assert a.keys() == b.keys()
        for name in b:
            assert torch.equal(a[name], b[name]), name


def test_what_is_switched_off_is_logged_as_0_and_any_seed_will_do(make_config):
    for seed in (1_763_800_000, -322_000_000):
        losses = PlainTraining(make_config({"loss.w_guide": 0.0, "reference.update": "gradient", "train.seed": seed})).step(0)
        assert losses[AT["loss_guide"]] == 0 and losses[AT["loss_fuse"]] > 0


def test_without_any_use_of_references_none_are_kept(make_config):
    run = PlainTraining(make_config({"loss.w_guide": 0.0, "loss.w_fuse": 0.0}))
    losses = unpack(run.step(0))
    assert (run.bank.rows == 0).all() and losses[TOTAL] == losses["loss_align"]
    assert not any(value for name, value in losses.items() if name not in (TOTAL, "loss_align"))


def test_references_follow_the_features_of_the_step(make_config):
    run = PlainTraining(make_config({"reference.momentum": 0.0}))
    m = inputs(run, 0)
    out = run.model(m.pixels, m.ids, m.mask)
    run.step(0)
    for row in m.objects.unique().tolist():
        mine = m.objects == row
        mean = torch.cat([out.image[mine], out.text[mine]]).mean(0).detach()
        torch.testing.assert_close(run.bank.rows[row, 0], mean, **CLOSE)


def test_masks_do_not_depend_on_the_partition_and_change_with_the_step(make_config):
    config = make_config({"loss.w_rec": 0.3})
    whole = inputs(PlainTraining(config), 2)
    parts = [inputs(PlainTraining(config, rank, 4), 2) for rank in range(4)]
    assert torch.equal(torch.cat([p.masked.ids for p in parts]), whole.masked.ids)
    assert torch.equal(torch.cat([p.masked.words for p in parts]), whole.masked.words)
    at = torch.cat([p.masked.at + i * parts[0].ids.numel() for i, p in enumerate(parts)])
    assert torch.equal(at, whole.masked.at)
    run = PlainTraining(config)
    assert torch.equal(whole.ids.flatten()[at], whole.masked.words)
    special = torch.as_tensor(run.reader.tokens.special_ids)
    assert (at // whole.ids.shape[1]).unique().tolist() == list(range(len(whole.ids))), "a word of each caption"
    assert not torch.isin(whole.masked.words, special).any()
    assert not torch.equal(at, inputs(run, 3).masked.at)


def test_a_rank_draws_for_its_own_samples_alone(make_config, monkeypatch):
    """Masks and augmentation cost what the share costs, whatever the global batch."""
    drawn = []

    def count(*parts):
        found = draw(*parts)
        drawn.append(found.size)
        return found

    config = make_config({"loss.w_rec": 0.3})
    monkeypatch.setattr("mmref.randomness.draw", count)
    sizes = {}
    for world in (1, 4):
        run = PlainTraining(config, 0, world)
        batch = run.reader.read_step(2)
        drawn.clear()
        run.runner.prepare(2, batch)
        sizes[world] = sum(drawn)
    assert sizes[1] == 4 * sizes[4] > 0


def test_a_loss_that_is_not_finite_shows_in_what_is_returned(make_config):
    run = PlainTraining(make_config())
    with torch.no_grad():
        run.model.backbone.text_projection.weight.fill_(float("nan"))
    losses = run.step(0)
    assert len(losses) == len(LOSSES) and not torch.isfinite(losses[AT[TOTAL]])


# -- golden losses ---------------------------------------------------------------------------------------------------


def golden_run() -> dict[str, list[list[float]]]:
    """Losses of 20 steps of a tiny model on the bundled data, with the defaults and with everything switched on."""
    base = {
        "data.image_height": 32, "data.image_width": 32, "data.max_tokens": 12, "data.crop_padding": 4,
        "model.vision_config": {**VIT, "image_size": 32}, "model.text_config": {**BERT, "vocab_size": 4000},
        "loss.guide_from": 0.2, "loss.guide_full": 0.4, "train.global_batch": 32, "train.max_steps": GOLDEN_STEPS,
        "train.lr": 2e-3,
    }  # fmt: skip
    everything = {
        "reference.update": "gradient", "reference.per_object": 2, "reference.score": "lme", "loss.w_rec": 0.3,
        "loss.learn_tau": True, "train.accumulation": 2, "data.erase": 0.3, "data.colour_jitter": 0.2,
    }  # fmt: skip
    return {
        "defaults": train_adam(tiny_config(BUNDLED, base), GOLDEN_STEPS),
        "everything": train_adam(tiny_config(BUNDLED, base | everything), GOLDEN_STEPS),
    }


def test_losses_are_the_golden_ones():
    golden, found = json.loads(GOLDEN.read_text()), golden_run()
    known = len(golden["names"])  # parts that came later are off here, and 0
    assert golden["names"] == list(LOSSES)[:known] and set(golden["runs"]) == set(found)
    for name, losses in found.items():
        assert (torch.tensor(losses)[:, known:] == 0).all()
        torch.testing.assert_close(
            torch.tensor(losses)[:, :known], torch.tensor(golden["runs"][name]), rtol=1e-4, atol=1e-6,
            msg=lambda m, n=name: f"{n}: the losses changed. If that is meant: python {Path(__file__).name} --update\n{m}",
        )  # fmt: skip


def update_golden() -> None:
    torch.set_num_threads(1)
    runs = {name: [[round(x, 7) for x in step] for step in losses] for name, losses in golden_run().items()}
    lines = [
        f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(step)}" for step in losses) + "\n  ]" for name, losses in runs.items()
    ]
    text = f'{{\n "names": {json.dumps(list(LOSSES))},\n "runs": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(text)
    print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update_golden()


def test_ramp():
    weights = [ramp(step, 100, 0.2, 0.4) for step in (0, 19, 20, 25, 30, 40, 99)]
    assert weights == pytest.approx([0, 0, 0, 0.25, 0.5, 1, 1])
    assert ramp(0, 100, 0.0, 0.0) == 1.0 and ramp(49, 100, 0.5, 0.5) == 0.0 and ramp(50, 100, 0.5, 0.5) == 1.0
    assert ramp(0, 0, 0.2, 0.4) == 0.0

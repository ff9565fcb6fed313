"""Tokens of frozen towers on disk: the same features, each input encoded once, other weights never mixed up."""

from __future__ import annotations

import multiprocessing
import sqlite3

import numpy as np
import pytest
import torch
from support.tiny_set import BERT
from transformers import BertConfig, BertModel

from mmref.config import config_hash
from mmref.errors import ConfigError, StorageError
from mmref.model.frozen import FrozenTokens, TokenFile, described
from mmref.model.mmref import Masked, build_model
from mmref.model.word_decoder import places_of


@pytest.fixture
def cached(make_config, foreign_towers, tmp_path):
    def build(**overrides):
        return build_model(make_config({**foreign_towers, "model.feature_cache": str(tmp_path / "cache"), **overrides}), 80)

    return build


def inputs(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 80, (n, 10), generator=g)
    mask = (torch.arange(10)[None] < torch.arange(10, 10 - n, -1)[:, None]).long()
    return torch.randn(n, 3, 16, 16, generator=g), ids * mask, mask


def files(tmp_path):
    return sorted((tmp_path / "cache").glob("*.sqlite"))


def entries(tmp_path):
    return sorted(sqlite3.connect(f).execute("SELECT count(*) FROM tokens").fetchone()[0] for f in files(tmp_path))


def test_features_are_those_without_a_cache_up_to_half_precision(cached, make_config, foreign_towers):
    plain, kept = build_model(make_config(foreign_towers), 80), cached()
    batch = inputs()
    expected = plain(*batch)
    for _ in range(2):
        found = kept(*batch)
        torch.testing.assert_close(found.image, expected.image, atol=2e-3, rtol=0)
        torch.testing.assert_close(found.text, expected.text, atol=2e-3, rtol=0)


def test_each_input_is_encoded_once_and_later_the_same(cached, tmp_path):
    model = cached()
    tower = model.backbone.vision_model
    pixels, ids, mask = inputs()
    first = model(pixels, ids, mask)
    assert tower.rows == 4 and entries(tmp_path) == [4, 4]
    again = model(pixels, ids, mask)
    assert tower.rows == 4, "nothing is encoded twice"
    assert torch.equal(first.image, again.image) and torch.equal(first.text, again.text)
    mixed = torch.cat([pixels[2:], inputs(seed=1)[0][:1], pixels[:1], inputs(seed=1)[0][:1]])
    out = model(mixed)
    assert tower.rows == 5, "one is new, though it comes twice"
    torch.testing.assert_close(out.image[[0, 1, 3]], first.image[[2, 3, 0]])
    assert torch.equal(out.image[2], out.image[4])


def test_another_process_finds_them(cached, tmp_path):
    batch = inputs()
    first = cached()(*batch)
    model = cached()
    again = model(*batch)
    assert model.backbone.vision_model.calls == 0 and torch.equal(first.image, again.image)
    assert torch.equal(first.text, again.text)


def test_the_width_of_padding_is_no_part_of_a_caption(cached, tmp_path):
    model = cached()
    _, ids, mask = inputs()
    text = model(None, ids, mask).text
    shorter = model(None, ids[1:, :9], mask[1:, :9]).text
    torch.testing.assert_close(shorter, text[1:])
    assert entries(tmp_path) == [4]


def test_the_words_of_captions_padded_on_the_left_are_kept(make_config, tmp_path):
    """Beside those of the same captions padded on the right, which stand at other positions."""
    tower = {**BERT, "model_type": "convbert", "num_attention_heads": 4, "embedding_size": 16}
    frozen = {"data.padding": "left", "model.text_config": tower, "model.freeze_backbone": True, "data.crop_padding": 0}
    kept = build_model(make_config({**frozen, "model.feature_cache": str(tmp_path / "cache")}), 80).eval()
    plain = build_model(make_config(frozen), 80).eval()
    _, ids, mask = inputs()
    shifted = [torch.stack([row.roll(10 - n) for row, n in zip(x, mask.sum(1).tolist())]) for x in (ids, mask)]
    assert shifted[1][-1].tolist() == [0] * 3 + [1] * 7
    for given in ((ids, mask), shifted, shifted):
        torch.testing.assert_close(kept(None, *given).text, plain(None, *given).text, atol=2e-3, rtol=0)


def test_other_weights_have_other_entries(cached, tmp_path):
    model, batch = cached(), inputs()
    before = model(*batch).image
    with torch.no_grad():
        model.backbone.vision_model.conv.weight.mul_(-1.0)
    after = model(*batch).image
    assert not torch.allclose(before, after) and model.backbone.vision_model.calls == 2
    assert len(files(tmp_path)) == 3  # two states of the vision tower, one of the text tower


def test_another_config_of_the_same_weights_has_other_entries():
    def tower(**changes):
        return described(BertModel(BertConfig(**{**BERT, "vocab_size": 80, **changes})))

    assert tower() == tower() == tower(name_or_path="elsewhere")
    assert len({tower(), tower(hidden_act="relu"), tower(layer_norm_eps=1e-5), tower(num_attention_heads=1)}) == 4


def test_bf16_has_entries_of_its_own(cached, tmp_path):
    batch = inputs()
    cached()(*batch)
    model = cached(**{"train.precision": "bf16"})
    model(*batch)
    assert model.backbone.vision_model.calls == 1 and len(files(tmp_path)) == 4


def test_masked_captions_are_not_kept(cached, tmp_path):
    model = cached(**{"loss.w_rec": 0.5})
    _, ids, mask = inputs()
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, 2] = True
    references = torch.nn.functional.normalize(torch.ones(4, 1, 8), dim=-1)
    model(None, None, mask, Masked(ids.masked_fill(at, 4), places_of(at), ids[at], references)).rec_sum.backward()
    assert files(tmp_path) == []


def test_adapters_learn_from_kept_tokens_what_they_learn_without(cached, make_config, foreign_towers):
    batch, grads = inputs(), []
    for model in (build_model(make_config(foreign_towers), 80), cached(), cached()):
        out = model(*batch)
        (out.image * out.text).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=5e-3, rtol=5e-2)
        torch.testing.assert_close(grads[1][name], grads[2][name], atol=0, rtol=0)


def test_a_file_that_is_no_cache_is_a_named_error(tmp_path):
    tower = torch.nn.Linear(2, 2)
    kept = FrozenTokens(str(tmp_path), tower, 1.0)
    x = torch.randn(2, 3, 2)
    kept(x, None, lambda rows: tower(x[rows]))
    file = next(tmp_path.glob("*.sqlite"))
    for other in tmp_path.glob("*.sqlite-*"):
        other.unlink()
    file.write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match=rf"{file.name}.*Remove the file"):
        FrozenTokens(str(tmp_path), tower, 1.0)(x, None, lambda rows: tower(x[rows]))


def _open_and_write(folder, barrier, n):
    for i in range(n):
        barrier.wait(10)
        file = TokenFile(f"{folder}/{i}.sqlite", 1.0)
        file.write({b"key": np.ones((2, 3), np.float16)})
        assert file.read([b"key"])[b"key"].shape == (2, 3)


def test_processes_that_make_the_same_file_at_once_wait_for_each_other(tmp_path):
    """Without a lock, SQLite fails one of them about every tenth time."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_open_and_write, args=(tmp_path, barrier, 60)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_full_file_keeps_what_it_has_and_nothing_stops(tmp_path, caplog):
    tower, calls = torch.nn.Linear(64, 64), []

    def run(x):
        return lambda rows: (calls.append(len(rows)), tower(x[rows]))[1]

    kept = FrozenTokens(str(tmp_path), tower, limit_gb=60e-6)  # 8 kB an entry
    batches = [torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    first = [kept(x, None, run(x)) for x in batches]
    again = [kept(x, None, run(x)) for x in batches]
    for a, b, x in zip(first, again, batches):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
        torch.testing.assert_close(a, tower(x).detach(), atol=2e-3, rtol=0)
    assert calls == [4, 4, 4, 4, 4], "one batch was kept, the others had no place"
    (file,) = tmp_path.glob("*.sqlite")
    assert file.stat().st_size <= 60_000
    assert [r.message.count("feature_cache_gb") for r in caplog.records] == [1], "said once"


@pytest.mark.parametrize("overrides, said", [
    ({"model.feature_cache_gb": 0.0}, "feature_cache_gb"),
    ({"model.freeze_backbone": False}, "freeze_backbone"), ({"data.crop_padding": 2}, "data.crop_padding: 0"),
    ({"data.erase": 0.5, "data.colour_jitter": 0.1}, "data.erase: 0, data.colour_jitter: 0"),
    ({"model.adapter_layers": 0, "model.pool": "auto"}, "model.pool"), ({"train.zero_stage": 3}, "stages 0 to 2"),
])  # fmt: skip
def test_where_it_cannot_work_it_is_refused(cached, overrides, said):
    with pytest.raises(ConfigError, match=said):
        cached(**overrides)


def test_one_locked_tower_keeps_its_tokens(cached, tmp_path):
    """Crops make every image new, and are no matter to captions."""
    overrides = {"model.freeze_backbone": False, "train.lock_text": "all", "data.crop_padding": 2}
    model = cached(**overrides)
    tower = model.backbone.vision_model
    for _ in range(2):
        model(*inputs())
    assert tower.calls == 2 and entries(tmp_path) == [4]


def test_it_changes_no_result_and_no_hash(make_config, foreign_towers):
    one, other = (make_config({**foreign_towers, "model.feature_cache": folder}) for folder in ("", "/tmp/x"))
    assert config_hash(one) == config_hash(other)

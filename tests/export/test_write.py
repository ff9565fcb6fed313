"""Exported folders: the run's own features and scores, in mmref and in plain transformers, whole or absent."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.tiny_run import UNSEEN, make_run
from support.tiny_set import BERT, VIT
from transformers import AutoModel, AutoTokenizer

import mmref
from mmref.cli import main
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import load_tokens
from mmref.errors import ExportError, ModelError, RunDirectoryError, SampleError, StorageError
from mmref.evaluate.features import Encoder, read_pixels, read_queries
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, refined_scores
from mmref.export import write as exporting
from mmref.run.models import find_model, has_references

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 80, "max_position_embeddings": 16}


def towers(tiny_set: Path) -> dict[str, dict]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_set / "tokenizer")
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    none = {"model.vision_config": None, "model.text_config": None, "model.pool": "auto"}
    clip = {"model_type": "clip", "projection_dim": 12, "vision_config": VISION, "text_config": {**TEXT, **ends}}
    siglip = {"model_type": "siglip", "vision_config": VISION, "text_config": {**TEXT, "projection_size": 16}}
    return {
        "clip": {**none, "model.dual_config": clip},
        "clip with a mask token of its own": {**none, "model.dual_config": {
            **clip, "text_config": {**clip["text_config"], "vocab_size": len(tokenizer) - 1}}},
        "siglip": {**none, "model.dual_config": siglip, "loss.align": "sigmoid", "loss.learn_tau": True},
        "pair": {"model.vision_config": VIT, "model.text_config": BERT, "loss.w_rec": 0.2},
        "pair with its own pooler": {"model.pool": "auto"},
    }  # fmt: skip


KINDS = ("clip", "clip with a mask token of its own", "siglip", "pair", "pair with its own pooler")


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def exported(make_config, tiny_set, tmp_path, request):
    """(folder, config, the run's own model) of a run on one kind of towers."""
    kind, refinement = getattr(request, "param", ("pair", {}))
    config = make_config({"data.image_height": 16, "data.image_width": 24, **towers(tiny_set)[kind]})
    model = make_run(config, str(tmp_path / "run"), refinement)
    return exporting.export_run(str(tmp_path / "run"), str(tmp_path / "out")), config, model


def own_features(config, model, split="val"):
    """Images and texts of a split through the run's own encoder."""
    index = ShardSet.open(config.data.root).index(split)
    encoder = Encoder(model, model, config.data, load_tokens(config), torch.device("cpu"))
    pixels, _ = read_pixels(SampleReader(index), range(len(index)), config.data)
    texts = read_queries(index).texts
    with encoder:
        return pixels, encoder.images(pixels), texts, encoder.texts(texts)


@pytest.mark.parametrize("exported", [(k, {}) for k in KINDS], indirect=True, ids=KINDS)
def test_features_are_those_of_the_run_here_and_in_plain_transformers(exported, tiny_set):
    folder, config, model = exported
    pixels, images, texts, text = own_features(config, model)
    loaded = mmref.load(folder)
    np.testing.assert_allclose(loaded.encode_images(list(pixels)), images, atol=1e-6)
    np.testing.assert_allclose(loaded.encode_text(texts, batch=3), text, atol=1e-6)
    assert loaded.dim == images.shape[1] and images.dtype == np.float32

    plain = folder / "transformers"
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.data.image_mean, config.data.image_std))
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    dual = config.model.dual_config is not None
    tokenizer = AutoTokenizer.from_pretrained(plain if dual else plain / "text")
    options = {"padding": "max_length", "truncation": True, "max_length": config.data.max_tokens}
    tokens = tokenizer(texts, return_tensors="pt", **options)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    with torch.no_grad():
        if dual:
            whole = AutoModel.from_pretrained(plain).eval()
            found = whole.get_image_features(pixel_values=x, interpolate_pos_encoding=True).pooler_output
            masks = {} if config.model.dual_config["model_type"] == "siglip" else {"attention_mask": mask}
            said = whole.get_text_features(input_ids=ids, **masks).pooler_output
            assert whole.logit_scale.exp().item() == pytest.approx(model.log_scale.exp().item(), rel=1e-6)
            if model.logit_bias is not None:
                assert whole.logit_bias.item() == loaded.module.logit_bias.item() == model.logit_bias.item() != -10
        else:
            projections = load_file(plain / "projections.safetensors")
            vision, reader = (AutoModel.from_pretrained(plain / tower).eval() for tower in ("vision", "text"))
            out = vision(pixel_values=x, interpolate_pos_encoding=True)
            words = reader(input_ids=ids, attention_mask=mask)
            if config.model.pool == "mean":
                pooled = out.last_hidden_state.mean(1)
                weight = mask[..., None].float()
                read = (words.last_hidden_state * weight).sum(1) / weight.sum(1)
            else:
                pooled, read = out.pooler_output, words.pooler_output
            found = pooled @ projections["visual_projection.weight"].T
            said = read @ projections["text_projection.weight"].T
    for own, plain_ in ((images, found), (text, said)):
        np.testing.assert_allclose(torch.nn.functional.normalize(plain_, dim=-1).numpy(), own, atol=1e-5)


def test_it_needs_neither_run_nor_shard_set_nor_tower_directory(make_config, tiny_set, own_set, tmp_path):
    """Towers given as a directory are spelt out in the export."""
    from transformers import AutoConfig

    source = tmp_path / "clip"
    AutoModel.from_config(AutoConfig.for_model(**towers(tiny_set)["clip"]["model.dual_config"])).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_set / "tokenizer").save_pretrained(source)
    overrides = {**towers(tiny_set)["clip"], "model.dual_config": None, "model.dual": str(source)}
    fit = {"resize": "area", "resample": "bicubic", "resize_edge": 16, "padding": "right"}  # no image processor says so
    overrides |= {f"data.{k}": v for k, v in (fit | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}).items()}
    config = make_config(overrides, own_set)
    model = make_run(config, str(tmp_path / "run"), {})
    _, _, texts, text = own_features(config, model)
    folder = exporting.export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    for gone in (source, own_set, tmp_path / "run"):
        shutil.rmtree(gone)
    np.testing.assert_allclose(mmref.load(folder).encode_text(texts), text, atol=1e-6)


def test_references_keep_their_objects_and_untrained_ones_stay_behind(exported):
    folder, config, _ = exported
    loaded = mmref.load(folder)
    ids = ShardSet.open(config.data.root).train_object_ids()
    assert loaded.object_ids == ids[UNSEEN:] and len(loaded.references) == len(ids) - UNSEEN
    assert np.abs(loaded.references).max((1, 2)).min() > 0
    assert not any(name.startswith("reconstruct") for name in load_file(folder / "model.safetensors"))


REFINEMENTS = [
    ("pair", {"top_p": 3}), ("pair", {}), ("pair", {"kind": "dense"}), ("pair", {"kind": "expansion"}), ("pair", {"weight": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize("exported", REFINEMENTS, indirect=True, ids=str)
def test_scores_are_those_of_the_evaluation(exported):
    folder, config, model = exported
    _, images, _, text = own_features(config, model)
    loaded = mmref.load(folder)
    settings = RefinementSettings(**json.loads((folder / "config.json").read_text())["refinement"])
    assert loaded.refinement == settings
    initial = text @ images.T
    rows = slice(0, len(text))
    expected = refined_scores(ReferenceSpace(loaded.references), settings, text, images)(rows, initial.copy())
    scores = loaded.refine(text, images)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (scores != initial).any() == (settings.weight > 0)
    prepared = loaded.gallery(images)
    one = np.concatenate([loaded.refine(text[i : i + 1], prepared) for i in range(len(text))])
    np.testing.assert_allclose(one, scores, atol=1e-5, err_msg="one sentence at a time scores as all together")


def test_images_come_as_files_bytes_pil_and_arrays(exported, tmp_path):
    loaded = mmref.load(exported[0])
    array = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    data = path.read_bytes()
    held = [data, bytearray(data), memoryview(data), io.BytesIO(data)]
    kinds = [str(path), path, *held, open(path, "rb"), Image.open(path), array]
    features = loaded.encode_images(kinds, batch=2)
    assert features.shape == (9, loaded.dim)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(features, np.repeat(features[:1], 9, 0), atol=1e-6)
    assert loaded.encode_images([]).shape == loaded.encode_text([]).shape == (0, loaded.dim)
    assert loaded.refine(loaded.encode_text([]), features).shape == (0, 9)
    text = loaded.encode_text(["red"])
    np.testing.assert_array_equal(loaded.refine(torch.from_numpy(text), features.tolist()), loaded.refine(text, features))
    for wrong in (["red"], text[0], text[:, 1:], None, text[0, 0], [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"text must be features \(n, 8\)"):
            loaded.refine(wrong, features)
        with pytest.raises(ValueError, match=r"images must be features \(n, 8\)"):
            loaded.gallery(wrong)
    for wrong, said in ((tmp_path / "none.png", "none.png: cannot be read"), (b"", "image 0: the image is empty"),
                        (array[..., 0], r"array must be RGB .* found \(40, 31\)"),
                        (array[:0], "image 0: the image is empty: it has 31x0 pixels"),
                        (Image.new("RGB", (0, 31)), "it has 0x31 pixels"),
                        (open(path), "image 0: the open file cannot be read as bytes"),
                        (io.StringIO("x"), "image 0: the open file cannot be read as bytes"),
                        (5, "image 0 is a int: give a file or URL, its bytes")):  # fmt: skip
        with pytest.raises(SampleError, match=said):
            loaded.encode_images([wrong])
    for single in (path, str(path), data, io.BytesIO(data), Image.open(path), array, None):
        with pytest.raises(TypeError, match="encode_images takes a list"):
            loaded.encode_images(single)
    assert loaded.encode_images(np.stack([array, array])).shape == (2, loaded.dim)
    for single in ("a bird", b"a bird", np.array("a bird"), None):
        with pytest.raises(TypeError, match="encode_text takes a list"):
            loaded.encode_text(single)
    for text, said in ((None, "text 1 is None, which is no text"), (("a", "b"), "text 1 is .* no text"),
                       ("caf\udce9", "text 1, .*udce9.*, is no text that UTF-8")):  # fmt: skip
        with pytest.raises(SampleError, match=said):
            loaded.encode_text(["a bird", text])
    with pytest.raises(ValueError, match="batch is 0: give at least 1"):
        loaded.encode_text(["a bird"], batch=0)


def test_the_card_holds_the_metrics_and_its_three_lines_work(exported, tmp_path, monkeypatch):
    folder, _, _ = exported
    card = (folder / "README.md").read_text()
    assert "| val | 40.0 | 60.0 | 70.0 | 45.0 |" in card and "| test, refined | 42.5 | 62.5 | 72.5 | 47.5 |" in card
    assert "33.0 to 51.0" in card and "CC0-1.0" in card
    lines = card.split("```python\n")[1].split("```")[0].replace('"DIR"', repr(str(folder)))
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(lines, found)
    assert found["scores"].shape == (1, 2)
    lines = card.split("```python\n")[2].split("```")[0].replace("DIR/", f"{folder}/")
    exec(lines, found)
    assert not [n for n in folder.rglob("*") if n.suffix in (".bin", ".pt", ".pkl")], "nothing is pickled"


def test_what_is_close_goes_with_the_model(make_config, tmp_path):
    run = tmp_path / "run"
    make_run(make_config({}), str(run), {})
    assert mmref.load(exporting.export_run(str(run), str(tmp_path / "old")), "cpu").close_cosine is None
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["close_match"] = {"cosine": 0.25, "missed": 0.04, "n_queries": 50}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert mmref.load(exporting.export_run(str(run), str(tmp_path / "new")), "cpu").close_cosine == 0.25


BY_RECONSTRUCTION = {"reference.update": "gradient", "loss.w_fuse": 0.0}


@pytest.mark.parametrize("learned", [{}, BY_RECONSTRUCTION, {**BY_RECONSTRUCTION, "loss.caption_weight": 2.0}], ids=str)
def test_heads_of_training_stay_behind(make_config, tmp_path, learned):
    """Every loss with a head switched on: what an export holds is what features need.

    Also where reconstruction alone trains the references: its config without the head would be none to train with.
    """
    config = make_config({"loss.w_rec": 0.2, "loss.w_mlm": 0.2, "loss.w_id": 0.2, **learned})
    make_run(config, str(tmp_path / "run"), {})
    folder = exporting.export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    kept = load_file(folder / "model.safetensors")
    assert not [name for name in kept if not name.startswith(("backbone.", "log_scale"))]
    loaded = mmref.load(folder)
    assert loaded.module.image_words is None and loaded.module.reconstruct is None and loaded.module.classify is None
    assert loaded.encode_text(["red"]).shape == (1, loaded.dim)


def test_a_tower_whose_batch_norms_count_no_batches(make_config, foreign_towers, tmp_path):
    """torch adds the counts to a state that it loads, and then knows nothing of them."""
    vision = {**foreign_towers["model.vision_config"], "counts": False}
    make_run(make_config({**foreign_towers, "model.vision_config": vision}), str(tmp_path / "run"), {})
    folder = exporting.export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    assert mmref.load(folder).encode_text(["red"]).any()
    save_file({**load_file(folder / "model.safetensors"), "stray": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"unknown \['stray'\]"):
        mmref.load(folder)


def test_an_export_is_whole_or_absent(make_config, tmp_path, monkeypatch):
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    make_run(make_config(), run, {})

    def crash(*_):
        raise KeyboardInterrupt

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def second(*_):
        exporting.export_run(run, out)

    for fault, error, message in [
        (crash, KeyboardInterrupt, None),
        (full, StorageError, f"no space left for {out}"),
        (second, ExportError, f"{out} is in use: process {os.getpid()} on "),
    ]:
        monkeypatch.setattr(exporting, "write_transformers", fault)
        with pytest.raises(error, match=message):
            exporting.export_run(run, out)
        assert os.listdir(tmp_path) == ["run"]
    monkeypatch.setattr(exporting, "write_transformers", lambda *_: None)
    (tmp_path / "out.partial" / "new").mkdir(parents=True)  # as a killed export leaves them
    (tmp_path / "out.partial" / ".lock").touch()
    exporting.export_run(run, out)
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_damaged_files_of_an_export_are_named(exported, tmp_path):
    """As a copy that was interrupted leaves them; asked for anew they are named too."""
    folder = exported[0]
    for name in ("model.safetensors", "references.safetensors", "config.json", "config.yaml", "tokenizer/tokenizer.json"):
        whole = (folder / name).read_bytes()
        cut = whole.index(b"{") + 1 if name == "config.yaml" else len(whole) // 2  # half a YAML text may be one
        for left in (whole[:cut], b"", b"\xff" + whole):
            (folder / name).write_bytes(left)
            with pytest.raises(ModelError, match=rf"{folder}.*(Export|Write|copy)"):
                mmref.load(folder)
            if name in ("config.json", "references.safetensors"):
                with pytest.raises(ModelError, match=rf"{folder}.*(Export|Write)"):
                    has_references(find_model(str(folder)))
        (folder / name).write_bytes(whole)
    _check_what_does_not_fit(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json is damaged: it holds no names and values, but a list. Export the run"):
        mmref.load(folder)


def _check_what_does_not_fit(folder):
    """Files that can be read, and do not belong together, as parts of two exports in one folder."""
    for name, change, said in (
        ("model.safetensors", lambda found: found | {min(found): found[min(found)][1:]}, "other sizes"),
        ("references.safetensors", lambda found: found | {"rows": found["rows"][1:]}, "references of .* objects, and the ids of"),
        ("references.safetensors", lambda found: {"rows": found["rows"]}, "has no tensor object_id_bytes"),
    ):
        whole = (folder / name).read_bytes()
        save_file(change(load_file(folder / name)), folder / name)
        with pytest.raises(ModelError, match=rf"(?i){folder}/{name}.*{said}.*export"):
            mmref.load(folder)
        (folder / name).write_bytes(whole)
    whole = (folder / "config.json").read_bytes()
    card = json.loads(whole)
    for refinement in (None, {"kind": "fancy"}, {"newer": 1}):
        (folder / "config.json").write_text(json.dumps({**card, "refinement": refinement}))
        with pytest.raises(ModelError, match=r"config.json is damaged: its refinement cannot be read.*Export"):
            mmref.load(folder)
    (folder / "config.json").write_bytes(whole)


def test_what_cannot_be_exported_is_said(make_config, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(make_config(), str(run), {})
    metrics = run / "metrics.json"
    metrics.write_text(metrics.read_text().replace("step-00000020-a", "step-00000010-b"))
    with pytest.raises(ExportError, match=r"step-00000020-a, and metrics.json is of .*step-00000010-b.*mmref evaluate"):
        exporting.export_run(str(run), str(out))
    metrics.write_text("[]")
    with pytest.raises(RunDirectoryError, match=r"metrics.json is damaged: it holds no names and values, but a list. Remove it"):
        exporting.export_run(str(run), str(out))
    metrics.unlink()
    with pytest.raises(ExportError, match=r"metrics.json is of none"):
        exporting.export_run(str(run), str(out))
    out.mkdir()
    assert main(["export", str(run), "--out", str(out)]) == 1
    assert f"ExportError: {out} exists already" in capsys.readouterr().err
    with pytest.raises(ModelError, match="is none of these: a run directory"):
        mmref.load(out)


def test_the_command(make_config, tmp_path, capsys):
    make_run(make_config(), str(tmp_path / "run"), {})
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "deep" / "out")]) == 0
    assert "exported to" in capsys.readouterr().out
    assert (tmp_path / "deep" / "out" / "config.json").exists()

"""The config tree: YAML and flags, errors that help, help that is complete, what a hash covers."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from mmref.config import (
    Config,
    build_parser,
    check_batch,
    check_config,
    config_hash,
    dump_yaml,
    from_dict,
    from_saved,
    known_keys,
    load_config,
    to_dict,
)
from mmref.config.option import options
from mmref.errors import BatchArithmeticError, ConfigError

MODEL = {"vision_config": {"model_type": "vit", "hidden_size": 16}, "text_config": {"model_type": "bert"}}


@pytest.fixture
def file(tmp_path):
    """Writes a YAML file with a usable model and the given content; returns its path."""

    def write(**values):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"model": MODEL, **values}))
        return str(path)

    return write


def test_defaults_then_yaml_then_flags(file):
    path = file(train={"global_batch": 64, "lr": 5e-4}, loss={"align": "sdm"})
    flags = ["--train.global_batch", "32", "--train.workers=2", "--run_dir", "there"]
    for argv in (["--config", path, *flags], [f"--config={path}", *flags]):
        config = load_config(argv)
        assert (config.train.global_batch, config.train.workers, config.run_dir) == (32, 2, "there")
        assert (config.train.lr, config.loss.align, config.loss.tau) == (5e-4, "sdm", 0.07)
        assert config.model.vision_config == MODEL["vision_config"]
        assert isinstance(config, Config) and dataclasses.is_dataclass(config.train)


def test_values_have_the_types_of_their_fields(file):
    flags = ["--loss.learn_tau", "true", "--data.image_mean", "[0,1,0]"]
    config = load_config(["--config", file(train={"lr": 1}), *flags])
    assert config.loss.learn_tau is True and config.data.image_mean == [0, 1, 0] and config.train.lr == 1
    config = load_config(["--config", file(), "--train.lr", "1e-4", "--model.vision_config.hidden_size", "32"])
    assert config.train.lr == 1e-4
    assert config.model.vision_config == {"model_type": "vit", "hidden_size": 32}


@pytest.mark.parametrize("content, found, meant", [
    ({"train": {"max_step": 3}}, "train.max_step", "train.max_steps"),
    ({"trian": {"lr": 3}}, "trian", "`train`"),
    ({"loss": {"w_guid": 3}}, "loss.w_guid", "loss.w_guide"),
    ({"global_batch": 3}, "global_batch", "train.global_batch"),
    ({"xyzzy": 3}, "xyzzy", "--help"),
    ({"train.lr": 3}, "train.lr", "in its section: `train:` and, indented below, `lr: ...`"),
])  # fmt: skip
def test_unknown_key_in_a_file_names_the_file_and_the_nearest(file, content, found, meant):
    path = file(**content)
    with pytest.raises(ConfigError) as raised:
        load_config(["--config", path])
    assert path in str(raised.value) and f"`{found}`" in str(raised.value) and meant in str(raised.value)


@pytest.mark.parametrize("flag, meant", [
    ("--train.max_step", "train.max_steps"), ("--max_steps", "train.max_steps"), ("--workers", "train.workers"),
    ("--train.w_rec", "loss.w_rec"), ("--rundir", "run_dir"), ("--trian.lr", "train.lr"),
    ("--lr", "train.lr"), ("--reference.memontum", "reference.momentum"), ("--train.LR", "train.lr"),
])  # fmt: skip
def test_unknown_flag_names_the_nearest(file, flag, meant):
    for argv in ([flag, "3"], [f"{flag}=3"]):
        with pytest.raises(ConfigError) as raised:
            load_config(["--config", file(), *argv])
        assert f"`{flag[2:]}`" in str(raised.value) and f"Did you mean `{meant}`?" in str(raised.value)


def test_a_section_is_no_flag(file):
    with pytest.raises(ConfigError, match=r"unknown config key `train`. It is a section: .*`--train.FIELD VALUE`"):
        load_config(["--config", file(), "--train", "lr=1"])


@pytest.mark.parametrize("argv", [["--train.seed", "010"], ["--train.seed=010"], ["--train.max_steps", "1:30"]])
def test_a_number_that_yaml_takes_for_another_is_refused(file, argv):
    """Seeds out of `seq -w` would be others, and 010 the same as 8."""
    with pytest.raises(ConfigError, match=r"--train\.(seed|max_steps): `(010|1:30)` in line 1 is the number (8|90) to YAML"):
        load_config(["--config", file(), *argv])


@pytest.mark.parametrize("argv", [
    ["--train.workers", "two"], ["--train.lr", "fast"], ["--loss.align", "triplet"], ["--train.zero_stage", "4"],
    ["--train.gpu", "perhaps"], ["--model.vision_config", "3"],
])  # fmt: skip
def test_wrong_type_is_an_error_that_names_the_field(file, argv):
    with pytest.raises(ConfigError) as raised:
        load_config(["--config", file(), *argv])
    assert argv[0][2:].rsplit(".", 1)[-1] in str(raised.value) and argv[1] in str(raised.value)


def test_wrong_type_in_a_file(file):
    with pytest.raises(ConfigError, match="many"):
        load_config(["--config", file(train={"workers": "many"})])
    with pytest.raises(ConfigError, match="`train` is a section"):
        load_config(["--config", file(train=3)])


@pytest.mark.parametrize("content, name", [
    ({"run_dir": None}, "run_dir"), ({"train": {"lr": None}}, "train.lr"), ({"data": {"mix": None}}, "data.mix"),
])  # fmt: skip
def test_a_field_without_a_value_is_named(file, content, name):
    """`run_dir: ~` is no home directory to YAML, and nothing behind a colon no default."""
    with pytest.raises(ConfigError, match=f"`{name}` has no value"):
        load_config(["--config", file(**content)])


def test_names_of_shard_sets_are_texts(file):
    with pytest.raises(ConfigError, match=r"`data.mix` names the shard set 2024, which YAML reads as a int: quote it"):
        load_config(["--config", file(data={"mix": {2024: 0.1}})])
    assert load_config(["--config", file(data={"mix": {"2024": 0.1}})]).data.mix == {"2024": 0.1}


@pytest.mark.parametrize("argv", [["--data.mix", "{a: 0.1, a: 0.2}"], ["--data.mix={a: 0.1, 'a': 0.2}"]])
def test_a_key_that_the_command_line_gives_twice(file, argv):
    with pytest.raises(ConfigError, match=r"--data\.mix: `a` is given twice"):
        load_config(["--config", file(), *argv])
    assert load_config(["--config", file(), "--data.mix", "{a: 0.1}"]).data.mix == {"a": 0.1}


@pytest.mark.parametrize("text, said", [("- a\n- b\n", "list"), ("a: [1", "not YAML"), (None, "cannot be read")])
def test_a_file_that_is_no_config_is_named(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}.*{said}"):
        load_config(["--config", str(path)])


def test_a_config_flag_without_a_file_is_an_error():
    with pytest.raises(ConfigError):
        load_config(["--config"])


def test_batch_arithmetic_shows_the_numbers():
    with pytest.raises(BatchArithmeticError) as raised:
        check_batch(100, workers=4, accumulation=2, images_per_object=2)
    for part in ("100", "4 workers", "2 accumulation", "8 micro-batches", "12.50", "96"):
        assert part in str(raised.value)
    with pytest.raises(BatchArithmeticError) as raised:
        check_batch(90, workers=3, accumulation=1, images_per_object=4)
    for part in ("90", "images_per_object 4", "96"):
        assert part in str(raised.value)
    check_batch(96, workers=4, accumulation=2, images_per_object=4)


@pytest.mark.parametrize("batch, workers, accumulation, images", [
    (100, 4, 2, 2), (3, 4, 1, 1), (7, 2, 2, 1), (90, 1, 1, 4), (2, 1, 1, 4), (100, 3, 1, 2), (98, 7, 1, 4),
    (102, 4, 1, 4),
])  # fmt: skip
def test_the_batch_that_is_proposed_divides(batch, workers, accumulation, images):
    with pytest.raises(BatchArithmeticError) as raised:
        check_batch(batch, workers, accumulation, images)
    near = int(re.findall(r"\d+", str(raised.value))[-1])
    check_batch(near, workers, accumulation, images)
    assert near > 0


def test_derived_sizes():
    config = from_dict({"model": MODEL, "train": {"global_batch": 48, "workers": 2, "accumulation": 3}})
    assert (config.objects_per_step, config.micro_batch) == (24, 8)


@pytest.mark.parametrize("name, value", [
    ("train.workers", 0), ("train.max_steps", 0), ("train.images_per_object", -1), ("data.readers", 0),
    ("reference.per_object", 0), ("data.flip", 1.5), ("loss.mask_rate", -0.1), ("reference.momentum", 1.01),
    ("loss.tau", 0.0), ("loss.tau", 0.005), ("reference.tau", -1.0), ("train.lr", 0.0),
    ("data.image_height", 0), ("data.image_width", -16), ("data.crop_padding", -3), ("data.colour_jitter", -1.0),
    ("model.embed_dim", 0), ("train.seed", 2**63), ("data.image_std", [0.2, 0.0, 0.2]), ("data.image_std", [0.2]),
    ("data.image_mean", [0.5, 0.5]), ("data.image_mean", [float("nan"), 0.5, 0.5]),
])  # fmt: skip
def test_values_out_of_range_are_named(name, value):
    section, key = name.split(".")
    with pytest.raises(ConfigError, match=f"`{name}`.*{re.escape(str(value))}"):
        from_dict({"model": MODEL} | {section: (MODEL if section == "model" else {}) | {key: value}})


def test_combinations_that_cannot_work():
    with pytest.raises(ConfigError, match=r"guide_full.*0.1.*guide_from.*0.5"):
        from_dict({"model": MODEL, "loss": {"guide_from": 0.5, "guide_full": 0.1}})
    with pytest.raises(ConfigError, match=r"even `reference.per_object`"):
        from_dict({"model": MODEL, "reference": {"assign": "modality", "per_object": 3}})
    tower = MODEL["vision_config"]
    for model in (
        {},
        {"dual": "a", "dual_config": tower},
        {"vision": "a"},
        {"text": "a"},
        {**MODEL, "dual_config": tower},
    ):
        with pytest.raises(ConfigError, match=r"either one of `model.dual`"):
            from_dict({"model": model})
    for model in ({"dual": "a"}, {"dual_config": tower}, {"vision": "a", "text_config": tower}):
        assert check_config(from_dict({"model": model}))


def fields(cls=Config):
    """(dataclass, field name) of the whole tree."""
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            yield from fields(type(default))
        else:
            yield cls, f.name


def doc_lines(cls):
    """Field name -> the doc line below it in the source."""
    import inspect

    return dict(re.findall(r'^    (\w+): [^\n]*\n    """(.+?)"""$', inspect.getsource(cls), re.M | re.S))


def test_every_field_has_a_doc_line_that_is_its_help():
    text = "".join(build_parser().format_help().split())  # without the line breaks of the help
    seen = 0
    for cls, name in fields():
        doc = doc_lines(cls).get(name, "")
        assert len(doc) > 10 and doc.endswith("."), f"{cls.__name__}.{name} has no doc line"
        assert "".join(doc.split()) in text, f"the help does not say what {name} is"
        seen += 1
    assert seen == len(known_keys())
    for key in known_keys():
        assert f"--{key}" in text


def test_yaml_round_trip(file):
    config = load_config(["--config", file(), "--train.eps", "1e-7", "--reference.per_object", "4", "--run_dir", "a b"])
    again = from_dict(yaml.safe_load(dump_yaml(config)))
    assert again == config and to_dict(again) == to_dict(config)
    assert list(yaml.safe_load(dump_yaml(config))) == [f.name for f in dataclasses.fields(Config)]


def test_a_dumped_config_is_a_config_file(file, tmp_path):
    config = load_config(["--config", file(), "--train.lr", "3e-5", "--loss.align", "sdm"])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(["--config", str(path)]) == config


def test_from_dict_refuses_unknown_keys():
    with pytest.raises(ConfigError, match=r"saved: unknown config key `train.lrr`. Did you mean `train.lr`"):
        from_dict({"model": MODEL, "train": {"lrr": 1}}, "saved")


@pytest.mark.parametrize("text, said", [
    ("train: {workers: two}", "`train.workers` takes int, found 'two'"),
    ("train: {lr: fast}", "`train.lr` takes float, found 'fast'"),
    ("train: {lr: [1]}", r"`train.lr` takes float, found \[1\]"),
    ("train: {max_steps: 1.5}", "`train.max_steps` takes int, found 1.5"),
    ("train: {max_steps: true}", "`train.max_steps` takes int, found True"),
    ("train: {gpu: maybe}", "`train.gpu` takes auto or bool, found 'maybe'"),
    ("train: {zero_stage: true}", "`train.zero_stage` is one of 0, 1, 2, 3; found True"),
    ("train: {sinks: wandb}", r"`train.sinks` takes list\[str\], found 'wandb'"),
    ("reference: {per_object: 1e2}", "`reference.per_object` takes int, found '1e2'"),
    ("data: {image_height: big}", "`data.image_height` takes auto or int, found 'big'"),
    ("data: {image_mean: 5}", r"`data.image_mean` takes auto or list\[float\], found 5"),
    ("data: {image_mean: [a, b, c]}", r"`data.image_mean` takes auto or list\[float\], found \['a', 'b', 'c'\]"),
    ("data: {mix: [a]}", r"`data.mix` takes dict\[str, float\], found \['a'\]"),
    ("data: {mix: 5}", r"`data.mix` takes dict\[str, float\], found 5"),
    ("data: {mix: {a: x}}", "`data.mix` takes float, found 'x'"), ("data: {mix: {5: 0.1}}", "`data.mix` takes str, found 5"),
    ("data: {root: 5}", "`data.root` takes str, found 5"), ("run_dir: 5", "`run_dir` takes str, found 5"),
    ("loss: {align: foo}", "`loss.align` is one of infonce, sdm, sigmoid, rde; found 'foo'"),
    ("eval: {refine_kinds: [foo]}", "`eval.refine_kinds` is one of sparse, dense, expansion; found 'foo'"),
    ("eval: {refine_weights: 0.1}", r"`eval.refine_weights` takes list\[float\], found 0.1"),
    ("model: {vision_config: vit}", r"`model.vision_config` takes dict\[str, Any\] or null, found 'vit'"),
    ("train: {lr: -1.0}", "`train.lr` must be above 0, found -1.0"),
    ("train: {global_batch: 7}", "train.global_batch 7 is not a multiple"),
])  # fmt: skip
def test_what_is_wrong_in_a_saved_config_is_named_with_its_file(text, said):
    values = yaml.safe_load(text)
    values["model"] = {**MODEL, **values.get("model", {})}
    with pytest.raises(ConfigError, match=f"^runs/one/config.yaml: {said}"):
        from_saved(values, "runs/one/config.yaml")


def test_numbers_of_a_saved_config_are_read_as_the_command_line_does():
    text = "train: {lr: 1e-4, layer_decay: 1}\neval: {refine_weights: [1e-1, 2]}\ndata: {mix: {there: 1e-1}}\n"
    config = from_saved(yaml.safe_load(text) | {"model": MODEL}, "config.yaml")
    assert (config.train.lr, config.eval.refine_weights, config.data.mix) == (1e-4, [0.1, 2], {"there": 0.1})


def test_a_saved_config_keeps_its_hash():
    """JSON writes 1 and 1.0 in two ways, and programs have saved both."""
    for lr in (1, 1.0):
        values = to_dict(from_dict({"model": MODEL, "train": {"lr": lr}}))
        saved = from_saved(values, "config.yaml")
        assert saved == from_dict(values) and config_hash(saved) == config_hash(from_dict(values))


SCALE = {"run_dir": "x", "train.workers": 2, "train.accumulation": 2, "train.zero_stage": 3, "train.threads": 4,
         "train.log_every": 1, "train.eval_every": 7, "train.gradient_checkpointing": True, "data.readers": 3,
         "train.compile": True, "data.steps_per_task": 9, "eval.batch": 3, "train.max_failures": 0,
         "data.max_bad_fraction": 0.5}  # fmt: skip
RESULT = {"train.lr": 2e-3, "train.seed": 1, "train.global_batch": 64, "train.max_steps": 7, "loss.w_rec": 0.5,
          "reference.per_object": 2, "data.max_tokens": 9, "model.embed_dim": 4, "data.root": "other",
          "train.precision": "bf16"}  # fmt: skip


def changed(name, value):
    values = to_dict(from_dict({"model": MODEL}))
    *section, key = name.split(".")
    (values[section[0]] if section else values)[key] = value
    return config_hash(from_dict(values))


def test_hash_covers_what_changes_results_alone():
    base = config_hash(from_dict({"model": MODEL}))
    assert re.fullmatch(r"[0-9a-f]{12}", base)
    assert [n for n, v in SCALE.items() if changed(n, v) != base] == []
    hashes = [changed(n, v) for n, v in RESULT.items()]
    mixes = (
        {"/a/one": 0.2, "/b/two": 0.1},
        {"/b/two": 0.1, "/a/one": 0.2},
        {"/a/one": 0.2, "/b/one": 0.1},
        {"/b/one": 0.1},
    )
    hashes += [changed("data.mix", mix) for mix in mixes]
    assert base not in hashes and len(set(hashes)) == len(hashes)
    assert changed("data.mix", {"/c/one": 0.1}) == hashes[-1], "a set may be moved"


def test_a_field_that_came_later_leaves_the_hashes_of_published_results_as_they_are():
    root = Path(__file__).parents[2]
    config = load_config(["--config", str(root / "configs" / "emoji.yaml"), "--loss.guide_on", "both"])  # as they had it
    published = json.loads((root / "docs" / "results" / "emoji.json").read_text())["trainings"]
    assert config_hash(config) in {training["config_hash"] for training in published}
    later = [name for name, option, _ in options(config) if option.added]
    assert "loss.bias" in later
    config.loss.bias = -9.0
    assert config_hash(config) not in {training["config_hash"] for training in published}


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_of_the_project_load(path):
    config = load_config(["--config", str(path)])
    assert config.train.warmup_steps < config.train.max_steps
    assert config.run_dir == f"runs/{path.stem}"


def test_references_that_nothing_teaches_do_not_guide(file):
    random = ["--reference.update", "gradient", "--loss.w_fuse", "0"]
    with pytest.raises(ConfigError, match=r"guidance would follow random references. Set `loss.w_fuse`"):
        load_config(["--config", file(), *random])
    with pytest.raises(ConfigError, match=r"0: caption weights would follow random references"):
        load_config(["--config", file(), *random, "--loss.w_guide", "0", "--loss.caption_weight", "20"])
    for also in (
        ["--loss.w_guide", "0"],
        ["--loss.w_rec", "0.1"],
        ["--reference.init", "mean"],
        ["--train.start_from", "runs/one"],
    ):
        load_config(["--config", file(), *random, *also])


def test_a_pair_of_towers_over_a_config_that_names_a_dual_one(file):
    path = file(model={"dual": "openai/clip-vit-base-patch16"})
    pair = ["--model.vision", "facebook/dinov2-small", "--model.text", "sentence-transformers/all-MiniLM-L6-v2"]
    with pytest.raises(ConfigError, match=r"openai/clip-vit-base-patch16 and a pair .* add `--model.dual ''`"):
        load_config(["--config", path, *pair])
    assert load_config(["--config", path, *pair, "--model.dual", ""]).model.vision == "facebook/dinov2-small"


def test_every_number_says_its_bounds():
    """What has none is bound by what it is used with."""
    free = {name for name, option, value in options(Config()) if type(value) in (int, float) and not str(option)}
    assert free == {"train.zero_stage"}  # a type lists the stages


@pytest.mark.parametrize("field, value, said", [
    ("data.flip", 1.5, "`data.flip` is a share between 0 and 1, found 1.5"),
    ("data.flip", float("nan"), "`data.flip` is a share"), ("train.lr", 0.0, "`train.lr` must be above 0, found 0.0"),
    ("loss.tau", 0.001, "`loss.tau` must be at least 0.01, found 0.001"), ("loss.w_rec", float("nan"), "at least 0, found nan"),
    ("train.max_steps", 0, "`train.max_steps` must be at least 1, found 0"), ("data.image_height", 0, "at least 1"),
    ("model.feature_cache_gb", 0.0, "above 0"), ("data.cache_gb", -1.0, "at least 0"), ("reference.lr", -0.1, "above 0"),
    ("train.lr", float("inf"), "`train.lr` must be finite, found inf"),
    ("eval.refine_weights", [0.1, -0.1], "`eval.refine_weights` must be at least 0, found -0.1"),
    ("eval.refine_top_rs", [0], "at least 1"), ("eval.refine_taus", [0.0], "`eval.refine_taus` must be above 0, found 0.0"),
])  # fmt: skip
def test_a_value_out_of_bounds_is_named(field, value, said):
    section, name = field.split(".")
    with pytest.raises(ConfigError, match=said):
        from_dict({section: {name: value}, "model": {**MODEL, **({name: value} if section == "model" else {})}})


def test_help_tells_bounds_and_units():
    text = " ".join(build_parser().format_help().split())
    assert "that of `model.dual`, 64 without it. [at least 1 px]" in text
    assert "Probability of a horizontal flip in training. [from 0 to 1]" in text


def test_identity_is_what_changes_results():
    """Each field by itself: another value is another run, or it is not."""
    base = from_dict({"model": MODEL})
    same = {name for name, option, _ in options(base) if not option.identity}
    for name, value in (
        ("train.workers", 2),
        ("eval.batch", 7),
        ("run_dir", "elsewhere"),
        ("train.lr", 0.5),
        ("data.flip", 0.1),
    ):
        changed = from_dict({"model": MODEL})
        *section, last = name.split(".")
        setattr(getattr(changed, section[0]) if section else changed, last, value)
        covered = name in same or (bool(section) and section[0] in same)
        assert (config_hash(changed) == config_hash(base)) == covered, name

"""Configs by name, and a help that can be read."""

from __future__ import annotations

import pytest

from mmref.config import AUTO, Config, build_parser, known_keys, load_config
from mmref.config.files import SECTIONS
from mmref.config.presets import PRESETS, preset_file, with_files
from mmref.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_file_and_flags_after_it_win(name):
    config = load_config(["--preset", name])
    assert config == load_config([f"--config={preset_file(name)}"]) != Config()
    assert load_config([f"--preset={name}", "--train.lr", "0.5", "--run_dir", "x"]).train.lr == 0.5
    assert load_config(["--train.lr", "0.5", "--preset", name]).train.lr == config.train.lr


def test_presets_are_what_they_say():
    clip, siglip, irra = (load_config(["--preset", name]) for name in ("clip-finetune", "siglip-finetune", "irra"))
    assert "clip" in clip.model.dual and clip.loss.uses_references and clip.loss.align == "infonce"
    assert "siglip" in siglip.model.dual and siglip.loss.uses_references and siglip.loss.align == "sigmoid"
    for config in (clip, siglip):
        inputs = ("image_height", "image_width", "max_tokens", "image_mean", "image_std", "resize", "padding")
        assert {getattr(config.data, name) for name in inputs} == {AUTO}, "as the model has them"
        assert config.train.gpu == AUTO
    assert irra.loss.align == "sdm" and irra.loss.w_id and irra.loss.w_mlm and not irra.loss.uses_references


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"`--preset clip-finetun`: there is no such one, only .*Did you mean clip-finetune\?"):
        load_config(["--preset", "clip-finetun"])
    with pytest.raises(ConfigError, match="names no preset"):
        with_files(["--preset"])


def test_the_help_names_each_field_once_in_the_group_of_its_section():
    text = build_parser().format_help()
    usage, _, body = text.partition("\n\n")
    assert usage == "usage: mmref train [--preset NAME | --config FILE] [--run_dir DIR] [--SECTION.FIELD VALUE ...]"
    for key in known_keys():
        assert body.count(f"--{key} ") == 1 or f"--{key}+" in body, key
    places = [body.index(f"\n{section}: ") for section in SECTIONS]
    assert places == sorted(places)
    for section, start, end in zip(SECTIONS, places, [*places[1:], len(body)]):
        flags = {word.strip(",") for word in body[start:end].split() if word.startswith("--") and "." in word}
        assert flags and all(flag.startswith(f"--{section}.") for flag in flags), section
    assert "--data CONFIG" not in body and all(name in body for name in PRESETS)


def test_the_help_of_one_section(capsys):
    with pytest.raises(SystemExit) as left:
        load_config(["--help", "reference"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and "--reference.tau" in said and "--data." not in said and "--train." not in said


def test_a_printed_config_can_be_trained_with(capsys, tmp_path):
    with pytest.raises(SystemExit):
        load_config(["--preset", "emoji", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(["--config", str(tmp_path / "printed.yaml")]) == load_config(["--preset", "emoji"])

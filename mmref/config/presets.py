"""Configs to begin with, by name: `mmref train --preset clip-finetune`. Each is a file that comes with mmref."""

from __future__ import annotations

import difflib

from mmref.config.shipped import shipped
from mmref.errors import ConfigError

PRESETS = {
    "clip-finetune": "CLIP on a catalogue of your own, with references",
    "siglip-finetune": "SigLIP, likewise",
    "irra": "IRRA's objective and schedule on pictures of people, without references",
    "emoji": "a small model from random weights on the bundled drawings, on CPUs",
}


def preset_file(name: str) -> str:
    """Path of a preset's config. Raises ConfigError that lists the presets."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"`--preset {name}`: there is no such one, only {', '.join(PRESETS)}.{hint} `--config` takes any file.")
    return shipped(f"configs/{name.replace('-', '_')}.yaml")


def with_files(argv: list[str]) -> list[str]:
    """A command line with `--config FILE` in the place of `--preset NAME`. Raises ConfigError."""
    flag, words, rest = "--preset", [], iter(argv)
    for word in rest:
        if word == flag:
            if (name := next(rest, None)) is None:
                raise ConfigError(f"`{flag}` names no preset: give one of {', '.join(PRESETS)}.")
        elif word.startswith(f"{flag}="):
            name = word.removeprefix(f"{flag}=")
        else:
            words.append(word)
            continue
        words += ["--config", preset_file(name)]
    return words

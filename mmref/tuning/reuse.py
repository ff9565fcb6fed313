"""What an ablation keeps of each training in its ablation.json, and reading it in another ablation in place of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmref.config import Config, config_hash
from mmref.errors import ConfigError
from mmref.evaluate.choose import GRID
from mmref.storage.texts import read_text
from mmref.tuning.ablation_table import METRICS
from mmref.tuning.rows import Training
from mmref.tuning.space import get_value

EVERY = "train.eval_every"
CHOICES = (EVERY, "eval.metric", "eval.refine_in_training", *(f"eval.{name}" for name in GRID))
"""Fields that choose a checkpoint and its refinement: results are compared only where they agree."""
STATES = ("initial", "refined")
ENTRY = {"row": str, "seed": int, "config_hash": str, "choices": dict, "initial": dict, "by_caption_kind": dict}  # of a training


def choices(config: Config) -> dict[str, Any]:
    """How a training's checkpoint and refinement are chosen: the fields of CHOICES. What 0 stands for is said in steps."""
    return {name: get_value(config, name) for name in CHOICES} | {EVERY: config.train.steps_between_evaluations}


def chosen_otherwise(before: dict[str, Any], config: Config) -> str:
    """Words on the first of CHOICES in which a training `before` differs from what `config` asks for; empty where none does."""
    if before.get(EVERY) == 0:  # as files of earlier versions have it
        before = {**before, EVERY: replace(config.train, eval_every=0).steps_between_evaluations}
    for name, now in choices(config).items():
        if before.get(name) != now:
            return f"was trained with `{name}` {before.get(name)}, and is now asked for with {now}"
    return ""


def evaluated_for_less(metrics: dict[str, Any], config: Config) -> str:
    """Words on what `config` asks an evaluation for and metrics lack; empty where they have all."""
    if config.eval.class_protocol and "class_protocol" not in metrics:
        return "was evaluated without `eval.class_protocol`, which is asked for now"
    return ""


def record(training: Training, config: Config, metrics: dict[str, Any], data: str) -> dict[str, Any]:
    """What the tables take from a training, so that they can be made again, and compared with other rows, without it:

    {"row", "at", "seed", "config_hash", "data", "choices", "machine", "step_seconds", "initial", "refined", "by_caption_kind",
    "class_protocol" where it was evaluated}. Of one that was itself read from such a file, what the file has. `data`: as of
    `data_fingerprint`.
    """
    kinds = metrics["by_caption_kind"].items()
    return {
        "row": training.row,
        "at": training.point,
        "seed": training.seed,
        "config_hash": config_hash(config),
        "data": data,
        "choices": choices(config),
        "machine": metrics.get("machine"),
        "step_seconds": metrics["step_seconds"],
        **_scores(metrics),
        "by_caption_kind": {kind: _scores(scores) for kind, scores in kinds},
        **({"class_protocol": metrics["class_protocol"]} if "class_protocol" in metrics else {}),
    }


def _scores(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {state: {m: metrics[state][m] for m in METRICS} for state in STATES if state in metrics}


class Recorded:
    """Trainings of other ablations, by what they trained: config and seed, whatever the row was called."""

    def __init__(self, files: Sequence[str], split: str) -> None:
        """Raises ConfigError for a file that is no ablation.json, holds no trainings or is of another split."""
        # One hash may have several, since it does not say how checkpoint and refinement were chosen.
        self._found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self.seeds: set[int] = set()
        for path in files:
            for entry in _read(path, split):
                self.seeds.add(entry["seed"])
                self._found.setdefault(entry["config_hash"], []).append((path, entry))

    def get(self, config: Config, data: str, refined: bool) -> dict[str, Any] | None:
        """Metrics of the training of this config; None where there is none, or none after refinement where `refined` asks
        for them. Raises ConfigError where there are, but their shard set had other contents than `data` (as of
        `data_fingerprint`), checkpoint or refinement were chosen in another way, or they were evaluated for less."""
        wrong = ""
        for path, entry in self._found.get(config_hash(config), []):
            if refined and "refined" not in entry:
                continue
            found = f"{path}: `{entry['row']}`, seed {entry['seed']}, "
            if entry.get("data") != data:
                wrong = wrong or (
                    f"{found}was trained on shards with the fingerprint {entry.get('data')}, {config.data.root} has {data}. "
                    "Give the same shard set, or leave that file out of `--results`."
                )
            elif otherwise := chosen_otherwise(entry["choices"], config) or evaluated_for_less(entry, config):
                wrong = wrong or f"{found}{otherwise}. Give the same, or leave that file out of `--results`."
            else:
                return entry
        if wrong:
            raise ConfigError(wrong)
        return None


def _read(path: str, split: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(read_text(path, ConfigError))
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"`--results {path}`: {str(error).rstrip('.')}. It takes the ablation.json of an ablation.") from None
    if not isinstance(found, dict) or not isinstance(found.get("trainings"), list):
        raise ConfigError(f"`--results {path}` holds no `trainings`: it takes the ablation.json of an ablation.")
    if found.get("split") != split:
        raise ConfigError(f"`--results {path}` has the split `{found.get('split')}`, and `{split}` is reported here.")
    for number, entry in enumerate(found["trainings"]):
        wrong = [key for key, kind in ENTRY.items() if not isinstance(entry, dict) or not isinstance(entry.get(key), kind)]
        if wrong:
            raise ConfigError(
                f"`--results {path}`: training {number} is damaged, or of another version: no `{wrong[0]}` of it can be read."
            )
    return found["trainings"]

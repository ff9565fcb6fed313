"""Shows what a shard set holds: counts, kinds of captions, lengths, samples, and a contact sheet to look at."""

from __future__ import annotations

import io
import os
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmref.data.decode import decode_rgb
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import SampleError
from mmref.storage.whole_folder import write_output

READ_AT_MOST = 2000  # samples of a split that are read for the caption statistics
CELL_PX, GAP_PX, TITLE_PX = 96, 4, 14
SHEET_COLUMNS = 8  # images of one object


def split_summary(shards: ShardSet, split: str, samples: int = 3) -> dict[str, Any]:
    """Counts of a split, and from evenly spread samples: mean words a caption, shares of caption kinds, a few samples.

    Raises ShardSetError for an unknown split. Broken samples are counted under `broken`.
    """
    index = shards.index(split)
    reader = SampleReader(index)
    entry = shards.manifest["splits"][split]
    kinds: Counter[str] = Counter()
    words: list[int] = []
    shown: list[dict[str, Any]] = []
    broken = 0
    chosen = np.unique(np.linspace(0, len(index) - 1, min(len(index), READ_AT_MOST)).astype(int))
    show = set(chosen[:: max(1, len(chosen) // max(samples, 1))][:samples].tolist())
    for i in chosen.tolist():
        try:
            meta = reader.read_meta(i)
        except SampleError:
            broken += 1
            continue
        kinds.update(meta.get("caption_kinds") or ["(none)"] * len(meta["captions"]))
        words += [len(caption.split()) for caption in meta["captions"]]
        if i in show:
            shown.append(meta)
    reader.close()
    return {
        "objects": entry["objects"],
        "images": entry["images"],
        "captions": entry["captions"],
        "shards": len(entry["shards"]),
        "megabytes": sum(shard["bytes"] for shard in entry["shards"]) / 1e6,
        "images_per_object": entry["images"] / max(entry["objects"], 1),
        "captions_per_image": entry["captions"] / max(entry["images"], 1),
        "words_per_caption": float(np.mean(words)) if words else 0.0,
        "caption_kinds": dict(kinds.most_common()),
        "broken": broken,
        "samples": shown,
    }


def contact_sheet(shards: ShardSet, split: str, path: str, objects: int = 12) -> None:
    """Writes a picture, PNG unless the ending says another format: a row for each of some objects, its images and above them its
    id and first caption. Raises StorageError."""
    index = shards.index(split)
    reader = SampleReader(index)
    rows = np.unique(np.linspace(0, index.n_objects - 1, min(index.n_objects, objects)).astype(int))
    height = CELL_PX + TITLE_PX + GAP_PX
    sheet = Image.new("RGB", (SHEET_COLUMNS * (CELL_PX + GAP_PX), height * len(rows)), "#cccccc")
    draw = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows.tolist()):
        start, stop = index.object_start[row], index.object_start[row + 1]
        for column, i in enumerate(range(start, min(stop, start + SHEET_COLUMNS))):
            try:
                sample = reader.read(i)
                image = Image.fromarray(decode_rgb(sample.image_bytes))
            except SampleError:
                continue  # an empty cell shows it
            image.thumbnail((CELL_PX, CELL_PX))
            sheet.paste(image, (column * (CELL_PX + GAP_PX), line * height + TITLE_PX))
            if column == 0:  # the built-in font draws Latin-1 only
                title = f"{index.object_ids[row]}: {sample.meta['captions'][0]}".encode("latin-1", "replace")
                draw.text((2, line * height + 1), title.decode("latin-1")[:130], fill="black")
    reader.close()
    encoded = io.BytesIO()
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower(), "PNG")
    sheet.save(encoded, kind if kind in Image.SAVE else "PNG")  # some can only be read
    write_output("--sheet", path, encoded.getvalue())

"""Sources that an index shares with `mmref shards build`: a folder, rows of Parquet files that hold images, a dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmref.errors import SearchIndexError
from mmref.extras import missing
from mmref.shards.sources.hub_dataset import SAVED, SCHEME, DatasetSource
from mmref.shards.sources.listed import ListedSource
from mmref.shards.sources.parquet_images import DEFAULT_IMAGE, DEFAULT_OBJECT, ParquetImages, embedded_column
from mmref.storage.files import is_glob, matching_files
from mmref.storage.hub import hub_id
from mmref.storage.locations import absolute, folder_name, is_url, join
from mmref.storage.tables import parquet_files

TARS = (".tar", ".tar.gz", ".tgz")


def images_place(given: str) -> str:
    """A source of images as the same place in another directory. A name as of a repository that is no path here is a dataset
    of a hub, where `datasets` is installed."""
    named = not is_url(given) and hub_id(given) is not None and not os.path.lexists(os.path.expanduser(given))
    return f"{SCHEME}{given}" if named and not missing("hub", "datasets") else absolute(given)


def shared_source(place: str, columns: Any) -> ListedSource | None:
    """What lists the images of a dataset, or of Parquet files that hold them; None for another kind of source.

    Args:
        columns: `mmref.retrieval.images.TableColumns`.

    Raises SearchIndexError for files of tar, which need an index of their samples first.
    """
    if place.startswith(SCHEME) or any(os.path.isfile(os.path.join(place, name)) for name in SAVED):
        return _dataset(place, columns)
    single = place.lower().endswith(".parquet") or is_glob(place)
    if single and (files := parquet_files(place)) and embedded_column(files[0], columns.image):
        return _parquet(place, columns)
    if is_glob(place) or place.lower().endswith(TARS):
        refuse_tars(place, matching_files(place, TARS))
        if is_glob(place):
            raise SearchIndexError(f"{place} matches no Parquet files with images in them; of other files give the folder.")
    return None


def parquet_in(folder: str, columns: Any) -> ListedSource | None:
    """What lists the rows of the Parquet files in a folder, where they hold images."""
    files = parquet_files(folder)
    if not files or not embedded_column(files[0], columns.image):
        return None
    return _parquet(folder, columns)


def _parquet(place: str, columns: Any) -> ListedSource:
    return ParquetImages(
        place, columns.image, columns.object_id, image_root=columns.image_root, allow_outside=columns.allow_outside,
        strict=False, item_id=columns.item_id,
    )  # fmt: skip


def refuse_tars(place: str, files: Sequence[str]) -> None:
    """Raise SearchIndexError where a source is tars, and there are any."""
    if not files:
        return
    packed = sum(not file.lower().endswith(".tar") for file in files)
    first = (
        "Unpack those that end in .gz or .tgz (gzip -d): a sample inside cannot be read alone. Then run " if packed else "Run "
    )
    tars = place if is_glob(place) or os.path.isfile(place) else join(place, "*.tar")
    raise SearchIndexError(
        f"{place} holds {len(files):,} tars ({folder_name(files[0])}, ...), whose samples have to be found first. {first}"
        f"`mmref shards index {tars!r} --out SET`, which leaves them where they are, and give SET here."
    )


def _dataset(place: str, columns: Any) -> ListedSource:
    image = None if columns.image == DEFAULT_IMAGE else columns.image
    object_id = None if columns.object_id == DEFAULT_OBJECT else columns.object_id
    return DatasetSource(
        place, columns.config, image, None, object_id, keep=None, allow_outside=columns.allow_outside, download=True,
        strict=False,
    )  # fmt: skip

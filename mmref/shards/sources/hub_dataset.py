"""`mmref shards build dataset`: what the library `datasets` of Hugging Face opens, on this machine or by its id on a hub.

Images stay encoded. A folder of Parquet files and what `save_to_disk` wrote are read where they lie. Anything else on this
machine is read through the library's own cache. A dataset of a hub is streamed into a folder that is gone when the set is
built, or, for an index, which shows its images later, downloaded into that cache.
"""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmref.errors import HubTokenError, HubUnreachableError, MMRefError, SampleError, SourceError
from mmref.extras import need
from mmref.shards.samples import DEFAULT_FRACTIONS, check_kept
from mmref.shards.sources.image_columns import (
    ImageColumns,
    captions_if_plain,
    choose_captions,
    choose_image,
    kinds_of,
    require_columns,
)
from mmref.shards.sources.image_rows import ArrowPart, ImageRow, Pack, ParquetPart, Part, image_row, list_rows
from mmref.shards.sources.listed import ListedImage, ListedSource, split_name
from mmref.shards.sources.parquet_images import open_parts, pack_name
from mmref.storage.fetch import locate, locate_inside
from mmref.storage.locations import folder_name
from mmref.storage.tables import parquet_files
from mmref.terminal.progress import Counter, say

SCHEME = "hf://datasets/"
NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
PLACE = re.compile(rf"(?P<id>(?:{NAME}/)?{NAME})(?:@(?P<revision>[^\s@]+))?")
SAID = 400  # characters of an error of the library
OBJECT_COLUMN = "object_id"
SAVED = ("dataset_dict.json", "state.json")  # by which a folder of `save_to_disk` is known


class DatasetSource(ListedSource):
    """A row an image.

    Args:
        dataset: a folder, or `user/name`, `hf://datasets/user/name`, with `@revision` for a branch, a tag or a commit.
        config: where a dataset has several.
        image, captions: columns; None: the only one of images, the one of texts that is plainly meant.
        object_id: column; None: `object_id` where there is one, else each image is an object of its own.
        split_map: our split of each of the dataset's; "" leaves one out. Others keep their names, `validation` is val.
        limit: rows of each split; None: all.
        download: keep what comes from a hub, in the cache of `datasets`.
        strict: where no column of captions is plainly meant, it is an error; else there are none.
    """

    def __init__(
        self,
        dataset: str,
        config: str | None = None,
        image: str | None = None,
        captions: list[str] | None = None,
        object_id: str | None = None,
        split_map: Mapping[str, str] | None = None,
        keep: Iterable[str] | None = (),
        licence: str | None = None,
        min_images: int = 1,
        fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
        resplit: bool = False,
        allow_outside: bool = False,
        limit: int | None = None,
        download: bool = False,
        strict: bool = True,
    ) -> None:
        super().__init__("dataset", folder_name(dataset), licence or "not stated", min_images, fractions, resplit)
        self.dataset, self.config, self.image, self.captions, self.object_id = dataset, config, image, captions, object_id
        self.split_map, self.keep = dict(split_map or {}), None if keep is None else list(keep)
        self.locate = locate if allow_outside else locate_inside
        self.limit, self.download, self.strict = limit, download, strict
        self.scratch: str | None = None  # a folder for streamed images, which whoever builds the set gives
        self.asked_licence = licence
        self._seen: list[str] = []  # the dataset's own splits

    def images(self) -> Iterable[ListedImage]:
        """Rows in order. Raises SourceError, HubTokenError, HubUnreachableError."""
        need("hub", "a dataset of Hugging Face's `datasets`", "datasets")
        with _calm_library():
            with _asked(self.dataset):
                parts = self._parts()
            if unknown := [name for name in self.split_map if name not in self._seen]:
                known = ", ".join(self._seen) or "rows without any"
                raise SourceError(f"--split-map {unknown[0]}=: {self.dataset} has no such split, only {known}.")
            if not parts:
                raise SourceError(f"{self.dataset} has no rows.")
            columns = self._columns(parts[0].schema)
            images = list_rows(parts, columns, self, self.strict, self.limit)
        splits = {image.split for image in images}
        if len(splits) == 1 and None not in splits and not self.resplit and not self.split_map and not self.download:
            self.warnings.append(f"all of it is the split {splits.pop()!r}: --resplit divides the objects by --fractions")
        return images

    def _columns(self, schema: pa.Schema) -> ImageColumns:
        """The columns that are named, or plainly meant, which is said."""
        image = choose_image(self.dataset, schema, self.image)
        if self.object_id is None and OBJECT_COLUMN in schema.names:
            self.object_id = OBJECT_COLUMN
        named = [] if self.object_id is None else [self.object_id]
        require_columns(self.dataset, schema, dict.fromkeys(named, "--object-id") | dict.fromkeys(self.keep or (), "--keep"))
        check_kept(self.keep or (), self.object_id or "")
        needed = self.strict or self.captions
        captions = choose_captions(self.dataset, schema, self.captions) if needed else captions_if_plain(schema)
        found = ImageColumns(image, captions, self.object_id, None, self.keep, infinite=self.infinite)
        self.columns_left = found.left(schema)
        told = f"images: {image}; captions: {', '.join(captions) or 'none'}; object ids: {self.object_id or 'none'}"
        rest = [name for name in kinds_of(schema) if name not in (image, *captions, self.object_id)]
        say(f"columns of {self.dataset} taken as {told}" + (f"; there are also {', '.join(rest)}" if rest else ""))
        return found

    # -- where the rows are --

    def _parts(self) -> Sequence[Part]:
        place = self.dataset.removeprefix(SCHEME)
        if place == self.dataset:
            here = os.path.abspath(os.path.expanduser(place))
            if not os.path.isdir(here) and (files := parquet_files(here)):
                return open_parts(here, files, self.locate, scratch=self.scratch)
            if os.path.lexists(here):
                return self._here(here)
        found = PLACE.fullmatch(place)
        if found is None:
            raise SourceError(f"{place} is no folder here, and no name of a dataset on a hub, which is user/name.")
        return self._downloaded(found["id"], found["revision"]) if self.download else self._stream(found["id"], found["revision"])

    def _here(self, folder: str) -> Sequence[Part]:
        import datasets

        if not os.path.isdir(folder):
            raise SourceError(
                f"{folder} is neither a folder nor a Parquet file: of another table give `mmref shards build table`."
            )
        if any(os.path.exists(os.path.join(folder, name)) for name in SAVED):
            return self._arrow(datasets.load_from_disk(folder), folder)
        builder = datasets.load_dataset_builder(folder, self.config)
        files = builder.config.data_files
        if type(builder).__module__.endswith(".parquet") and files:
            return [
                ParquetPart(
                    str(file),
                    f"{theirs}-{number:05d}" if len(names) > 1 else str(theirs),
                    ours,
                    None,
                    self.locate,
                    pack_name(self.scratch, f"{theirs}-{number}"),
                )
                for theirs, names in files.items()
                if (ours := self._ours(str(theirs)))
                for number, file in enumerate(names)
            ]
        return self._arrow(datasets.load_dataset(folder, self.config), folder)

    def _downloaded(self, name: str, revision: str | None) -> Sequence[Part]:
        import datasets
        from huggingface_hub import constants

        say(f"{name}: downloading into {datasets.config.HF_DATASETS_CACHE}, where the index will show its images from")
        return self._arrow(datasets.load_dataset(name, self.config, revision=revision), constants.HF_HOME)

    def _arrow(self, loaded: Any, root: str) -> Sequence[Part]:
        """Files of `datasets`, whose paths may lie below `root`."""
        import datasets

        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        parts = []
        for theirs, rows in splits.items():
            self._take_licence(rows.info.license)
            first, ours = 0, self._ours(str(theirs))
            for file in rows.cache_files if ours else ():
                parts.append(ArrowPart(file["filename"], str(theirs), ours, root, first, self.locate))
                first += sum(batch.num_rows for batch in pa.ipc.open_stream(pa.memory_map(file["filename"])))
        return parts

    def _stream(self, name: str, revision: str | None) -> Sequence[Part]:
        import datasets
        import huggingface_hub

        if self.scratch is None:
            raise SourceError(f"{name} is streamed, and nobody gave a folder for its images.")
        splits = datasets.load_dataset(name, self.config, revision=revision, streaming=True)
        card = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, revision=revision).card_data
        self._take_licence(None if card is None else card.get("license"))
        parts: list[Part] = []
        for theirs, rows in splits.items():
            if ours := self._ours(str(theirs)):
                parts.append(StreamPart(name, rows, str(theirs), ours, pack_name(self.scratch, str(theirs)), self.limit))
        return parts

    def _ours(self, theirs: str) -> str:
        """Our split of one of theirs, "" where it is left out. Raises SourceError."""
        self._seen.append(theirs)
        try:
            return self.split_map[theirs] if theirs in self.split_map else split_name(theirs)
        except SourceError as error:
            raise SourceError(f"{self.dataset}: {error} --split-map {theirs}=OURS calls it something else.") from None

    def _take_licence(self, told: Any) -> None:
        if self.asked_licence is None and told:
            self.licence = ", ".join(told) if isinstance(told, list) else str(told)


class StreamPart:
    """A split as it comes from a hub, whose images are written end to end into a file of this machine."""

    def __init__(self, dataset: str, rows: Any, prefix: str, split: str, file: str, limit: int | None) -> None:
        known = rows if rows.features is not None else rows._resolve_features()
        self._dataset, self._rows, self.prefix, self._file = dataset, known, prefix, file
        self.split: str | None = split
        told = (rows.info.splits or {}).get(str(rows.split))
        self._total = limit or (told.num_examples if told is not None else 0)
        self.schema: pa.Schema = known.features.arrow_schema

    def rows(self, image: str, others: Sequence[str]) -> Iterator[ImageRow]:
        """Rows in order, each image written before it is given."""
        rows = self._rows.decode(False).select_columns([image, *others])  # in this order: the other decodes all the same
        with Pack(self._file) as pack, Counter(f"streaming {self.split}", self._total, "row") as progress:
            for number, row in enumerate(self._asked_for(rows), 1):
                progress.add(1)
                cells = {name: row[name] for name in others}
                value = row[image]
                data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                try:
                    data = data or _remote_bytes(path)
                except (SampleError, OSError) as error:
                    yield ImageRow(number, None, "", cells, str(error))
                    continue
                inside = pack.add(data) if data else None
                yield image_row(number, inside, path if inside else None, cells, os.path.dirname(self._file))

    def _asked_for(self, rows: Any) -> Iterator[Mapping[str, Any]]:
        """Rows of the library, its errors as ours. Raises SourceError, HubTokenError, HubUnreachableError."""
        found = iter(rows)
        while True:
            with _asked(self._dataset):
                row = next(found, None)
            if row is None:
                return
            yield row


def _remote_bytes(path: str | None) -> bytes | None:
    """A file that a streamed row names. Raises SampleError for one that is not of a hub: whoever made the dataset would choose
    which files of this machine are read."""
    if not path:
        return None
    if not path.split("::")[-1].startswith("hf://"):
        raise SampleError(f"{path} is no file of the hub")
    import fsspec

    with fsspec.open(path, "rb") as file:
        data: bytes = file.read()
    return data


@contextlib.contextmanager
def _calm_library() -> Iterator[None]:
    """Without the bars of `datasets` for each file it looks for; a long step has our own."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _asked(dataset: str) -> Iterator[None]:
    """Errors of the libraries as ours."""
    import datasets
    import httpx
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants, errors, get_token

    dataset = dataset.removeprefix(SCHEME)
    hub, token = datasets.config.HF_ENDPOINT, f"HF_TOKEN ({'set' if get_token() else 'not set'})"
    try:
        yield
    except errors.GatedRepoError:
        raise HubTokenError(f"{dataset} is gated on {hub}: ask for access on its page there, and set {token}.") from None
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise HubTokenError(f"{dataset} is gated on {hub}: ask for access on its page there, and set {token}.") from None
        if "revision" in str(error).lower():
            raise SourceError(f"{dataset}: the dataset on {hub} has no such revision.") from None
        raise SourceError(
            f"{dataset} is no folder here, and {hub} has no such dataset, or hides it: a private one needs {token}."
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.TransportError, ConnectionError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _said(error)
        raise HubUnreachableError(
            f"{dataset} is no folder here, and {hub} cannot be reached ({why}): look at the network, or give a folder."
        ) from None
    except errors.HfHubHTTPError as error:
        raise SourceError(f"{dataset}: {hub} fails: {_said(error)}. Try again later.") from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise SourceError(f"{dataset} cannot be opened: {_said(error)}.") from None
        raise SourceError(
            f"{dataset} is made by a script, which is not run. Its page may offer Parquet files: {hub}/datasets/{dataset} at the "
            f"revision refs/convert/parquet, {dataset}@refs/convert/parquet."
        ) from None
    except MMRefError:
        raise
    except Exception as error:  # the libraries raise what they meet in somebody's files
        hint = " --config names one of its configs." if "config" in str(error).lower() else ""
        raise SourceError(f"{dataset} cannot be opened: {_said(error)}.{hint}") from None


def _said(error: Exception) -> str:
    return textwrap.shorten(" ".join(str(error).split()).rstrip(".") or type(error).__name__, SAID, placeholder=" ...")

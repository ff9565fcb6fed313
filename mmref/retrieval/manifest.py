"""`manifest.json` of an index: what of its files is in force, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmref.errors import SearchIndexError
from mmref.retrieval.images import DEFAULT_COLUMNS, TableColumns
from mmref.storage.locations import below, endless
from mmref.storage.whole_folder import write_whole

VERSION = 1


@dataclass(frozen=True)
class Source:
    """Images of an index, and how they are listed."""

    images: str  # absolute path or URL
    split: str | None = None
    columns: TableColumns = DEFAULT_COLUMNS

    def to_dict(self) -> dict[str, Any]:
        """For the manifest, and to tell one command from another."""
        return {"images": self.images, "split": self.split, **asdict(self.columns)}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Source:
        """Of `to_dict`. Raises TypeError or KeyError for what is none."""
        columns = {name: value for name, value in options.items() if name not in ("images", "split")}
        return cls(str(options["images"]), options["split"], TableColumns(**columns))


@dataclass(frozen=True)
class Manifest:
    """What an index holds. `generation` rises with every change."""

    generation: int
    items: int
    dim: int
    next_uid: int
    segments: list[str]
    model: str  # fingerprint
    kind: str  # flat, ivf or hnsw
    vectors: dict[str, Any] = field(default_factory=dict)  # file, setting, recall and how it was measured
    sources: list[str] = field(default_factory=list)
    skipped: int = 0
    notes: list[str] = field(default_factory=list)  # what the last change passed over, renamed, found missing
    listed: list[dict[str, Any]] = field(default_factory=list)  # each `Source.to_dict`; of older versions none
    version: int = VERSION

    @classmethod
    def read(cls, index: Path) -> Manifest:
        """Raises SearchIndexError where there is no complete index of this version."""
        path = index / "manifest.json"
        if why := endless(str(path)):
            raise SearchIndexError(f"{why}: make the index again.")
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError:
            begun = Path(f"{index}.partial").exists()
            hint = "was begun and is not finished: run the same `mmref index` again" if begun else "is no index"
            raise SearchIndexError(f"{index} {hint}. Make one with `mmref index IMAGES --model RUN --out DIR`.") from None
        except ValueError as error:
            raise SearchIndexError(f"{path} is damaged ({error}): make the index again.") from None
        if not isinstance(values, dict) or "items" not in values or "splits" in values:
            raise SearchIndexError(f"{index} is no index, its manifest.json is of something else; give one of `mmref index`.")
        if (version := values.get("version")) != VERSION:
            raise SearchIndexError(f"{path} has version {version}, this program reads {VERSION}: make the index again.")
        try:
            found = cls(**values)
            found._check(str(index))
        except (TypeError, ValueError, KeyError) as error:
            raise SearchIndexError(f"{path} is damaged ({error}): make the index again.") from None
        return found

    def _check(self, index: str) -> None:
        """Raise what a manifest that no index of ours has leads to; whoever wrote it may not be a friend."""
        for name in ("generation", "items", "dim", "next_uid", "skipped"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r:.100}")
        if not self.segments:
            raise ValueError("it names no segments")
        folder = below(index, "segments")
        for segment in self.segments:
            below(folder, segment)
        if not isinstance(self.vectors, dict):
            raise ValueError(f"vectors is {self.vectors!r:.100}")
        for options in self.listed:
            Source.of(options)
        if self.kind != "flat":
            below(index, self.vectors["file"])
            int(self.vectors["setting"]), int(self.vectors.get("bytes", 0))

    def write(self, index: Path) -> None:
        """Replace the manifest as a whole."""
        write_whole(index / "manifest.json", encoded(json.dumps(asdict(self), indent=1, ensure_ascii=False)))


def stamp(index: Path) -> tuple[int, int]:
    """What changes with every manifest, and with another index in the same place; zeros where there is none."""
    try:
        found = (index / "manifest.json").stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def encoded(text: str) -> bytes:
    """JSON as UTF-8; of a path that is none JSON keeps \\udcNN."""
    return text.encode("utf-8", "backslashreplace")

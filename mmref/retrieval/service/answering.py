"""One index as the service sees it: batches of queries answered, the index followed as it changes."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from mmref.data.decode import decode_rgb, decoded, image_format
from mmref.data.fit import Fit, Fitted
from mmref.data.metadata import without_metadata
from mmref.errors import (
    DecodersBusyError,
    FilterError,
    MMRefError,
    PixelLimitError,
    QueryError,
    SampleError,
    StorageError,
    StoreError,
    UnknownColumnError,
)
from mmref.model.device import described
from mmref.retrieval.columns import to_plain
from mmref.retrieval.filters import Condition, kind_of
from mmref.retrieval.objects import Objects, rank_objects
from mmref.retrieval.results import ObjectResult, Query, Result, sorted_by
from mmref.retrieval.searcher import Searcher, Selection
from mmref.retrieval.service.examples import examples
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Problem, Refused, refuse
from mmref.retrieval.store_searcher import open_searcher
from mmref.storage.locations import is_url
from mmref.terminal.progress import say

log = logging.getLogger(__name__)

WATCH_S = 2.0  # between looks at the index on disk
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # of images that are searched with
LISTED_VALUES = 100  # columns with at most as many distinct values are offered as filters
EXACT = 2**53 - 1  # JavaScript rounds whole numbers beyond, and a rounded choice finds nothing
SHOWN = {  # by browsers
    "JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "AVIF": "image/avif",
}  # fmt: skip

Reply = tuple[Any, Problem | None]  # an answer, or why there is none


@dataclass(frozen=True)
class Ask:
    """A search as it was asked. Limits on text, bytes and top have been checked."""

    text: str | None = None
    image: bytes | None = None
    image_weight: float = 0.5
    top: int = 10
    refine: bool = True
    candidates: int | None = None
    where: tuple[Condition, ...] = ()
    images: int = 0  # of each object; 0: results are images
    offset: int = 0
    within: tuple[str, ...] | None = None  # ids of items; None: all
    sort: str | None = None

    @property
    def ranking(self) -> tuple[Any, ...]:
        """What queries that are ranked together have in common."""
        return self.top, self.refine, self.candidates, self.where, self.images, self.offset, self.within


@dataclass(frozen=True)
class Prepared:
    """An ask whose image is decoded, in the size that the model sees: whatever was sent, little waits."""

    ask: Ask
    query: Query


class Engine:
    """Answers from an index, and opens it again when it changes on disk: who is being answered keeps what was open.
    Thread-safe.

    Args:
        index: directory of `mmref index`.
        watch: follow changes on disk.
        store: URL of what finds candidates in place of the index.

    Raises:
        SearchIndexError: no complete index. StoreError.
    """

    def __init__(self, index: str, limits: Limits, watch: bool = True, store: str | None = None) -> None:
        self.limits = limits
        self._searcher = open_searcher(index, store=store)
        if self._searcher.device.type != "cpu":
            say(f"{Path(index).name}: queries are encoded on {described(self._searcher.device)}")
        self._info: tuple[Searcher, dict[str, Any]] | None = None
        self._remote = threading.Semaphore(limits.remote_images)
        self._closed = threading.Event()
        if watch:
            threading.Thread(target=self._watch, name=f"watch {index}", daemon=True).start()

    def close(self) -> None:
        """Follow the index no longer."""
        self._closed.set()

    def _watch(self) -> None:
        said = ""
        while not self._closed.wait(WATCH_S):
            try:
                self.refresh()
                problem = ""
            # The index is being replaced, or gone: what is open stays in use, and the next look may succeed.
            except Exception as error:
                problem = str(error) if isinstance(error, (MMRefError, OSError)) else repr(error)
            if problem and problem != said:
                log.warning("%s is not opened again: %s", self._searcher.index, problem)
            said = problem

    def refresh(self) -> bool:
        """Answer from the index as it is on disk now; whether it had changed."""
        if not self._searcher.outdated:
            return False
        self._searcher = self._searcher.reopened()
        log.warning("%s: now generation %d", self._searcher.index, self._searcher.manifest.generation)
        return True

    # -- searching ---------------------------------------------------------------------------------------------------

    def prepare(self, ask: Ask) -> Prepared:
        """Check an ask and decode its image, so that one that cannot be answered spoils no batch. Raises Refused."""
        if not (ask.text or "").strip() and ask.image is None:
            raise refuse(400, "EmptyQuery", "the query is empty.", "Give a sentence (text), an image, or both.")
        _select(self._searcher, ask)
        if ask.sort:
            _check_sort(self._searcher, ask.sort)
        if ask.images:
            _objects(self._searcher)
        pixels = None
        if ask.image is not None:
            pixels = Fitted(decode_query(ask.image, self.limits, Fit.of(self._searcher.model.config.data)))
        return Prepared(ask, Query(ask.text, pixels, ask.image_weight))

    def search(self, batch: Sequence[Prepared]) -> list[Reply]:
        """Answers in order. Queries are encoded together; those that ask for the same are ranked together."""
        searcher, clock = self._searcher, Clock()
        with clock.stage("encode"):
            encoded = searcher.encode([p.query for p in batch])
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, p in enumerate(batch):
            groups.setdefault(p.ask.ranking, []).append(i)
        found: list[tuple[Sequence[Result | ObjectResult], Problem | None]] = [([], None)] * len(batch)
        refined = [0] * len(batch)
        for members in groups.values():
            ask = batch[members[0]].ask
            try:
                chosen = _select(searcher, ask)
                objects = _objects(searcher) if ask.images else None
                for sort in {batch[i].ask.sort for i in members} - {None}:
                    _check_sort(searcher, str(sort))
                if not chosen.items:
                    continue
                some = encoded.take(members)
                most, last = self._candidates(searcher, ask.candidates, chosen.items), ask.offset + ask.top
                with clock.stage("rank"):
                    if objects:
                        ranked_objects = rank_objects(
                            searcher.ranker, objects, some, last, ask.images, ask.refine, most, chosen.rows
                        )
                    else:
                        ranked = searcher.ranked(some, min(last, len(searcher)), ask.refine, most, chosen)
            except Refused as refused:  # the index has changed since the query was prepared, or the store does not answer
                for i in members:
                    found[i] = [], refused.problem
                continue
            except StoreError as error:
                for i in members:
                    found[i] = [], _no_store(error).problem
                continue
            with clock.stage("describe"):
                answers: Sequence[Sequence[Any]] = (
                    searcher.object_results(some, ranked_objects, ask.offset)
                    if objects
                    else searcher.results(some, *ranked, first=ask.offset)
                )
                for i, results in zip(members, answers):
                    sort = batch[i].ask.sort
                    found[i] = sorted_by(results, sort) if sort else results, None
                    refined[i] = most if ask.refine and some.code is not None else 0
        shared = {
            "index": searcher.index.name,
            "items": len(searcher),
            "generation": searcher.manifest.generation,
            "identity": searcher.identity,
            "seconds": clock.seconds,
            "batch": len(batch),
        }
        replies: list[Reply] = []
        for p, n, (results, problem) in zip(batch, refined, found):
            own = {"candidates": n, "close_match": searcher.is_close(p.query, results), "results": [describe(r) for r in results]}
            replies.append((None if problem else shared | own, problem))
        return replies

    def _candidates(self, searcher: Searcher, asked: int | None, available: int) -> int:
        """How many are refined: where that would be all, as many as the limit allows."""
        return min(searcher.ranker.candidates(asked, available), max(1, self.limits.candidates))

    def explain(self, ask: Ask, item_id: str) -> dict[str, Any]:
        """Why an item ranks where it does. Raises Refused."""
        prepared, searcher = self.prepare(ask), self._searcher
        row = _row(searcher, item_id)
        try:
            found = searcher.explain(prepared.query, item_id, encoded=self._image_bytes(searcher, item_id))
        except (SampleError, StorageError) as error:
            raise _gone(item_id, error) from None
        encoded = searcher.encode([prepared.query])
        rows, cosine = np.array([[row]]), np.array([[found.cosine]], np.float32)
        score = cosine
        if encoded.code is not None:
            score = cosine + searcher.ranker.refinement.weight * searcher.ranker.similarity(encoded, rows)
        result = searcher.results(encoded, rows, score, cosine, np.ones((1, 1), np.int64))[0][0]
        answer: dict[str, Any] = {
            "index": searcher.index.name,
            "id": item_id,
            "cosine": found.cosine,
            "score": result.score,
            "gain": result.score - found.cosine,
            "heat": found.heat.tolist(),
            "shared": [asdict(reference) for reference in result.references],
        }
        for name in ("references", "query_references", "item_references"):
            answer[name] = [asdict(resemblance) for resemblance in getattr(found, name)]
        for named in (answer["shared"], *(answer[n] for n in ("references", "query_references", "item_references"))):
            for reference in named:
                reference["item_id"] = searcher.item_of(reference["object_id"])
        return answer

    # -- items -------------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What the index holds, and the columns it can be filtered by: values and how many items have each."""
        searcher = self._searcher
        if self._info is None or self._info[0] is not searcher:
            columns = [_column(searcher, name) for name in searcher.metadata_columns]
            self._info = (
                searcher,
                {
                    "name": searcher.index.name,
                    "items": len(searcher),
                    "objects": _object_count(searcher),
                    "generation": searcher.manifest.generation,
                    "identity": searcher.identity,
                    "kind": searcher.manifest.kind,
                    "model": searcher.manifest.model[:12],
                    "refinement": searcher.model.space is not None,
                    "columns": columns,
                    "examples": examples(searcher),
                },
            )
        return self._info[1]

    def health(self) -> None:
        """Read of the index what every search reads. Raises whatever keeps it from that."""
        searcher = self._searcher
        searcher.ranker.matrices[0][:1].sum()
        searcher.items.slice(0, 1).to_pylist()

    def item(self, item_id: str) -> dict[str, Any]:
        """Columns of an item; where its file lies is not told. Raises Refused."""
        searcher = self._searcher
        found = searcher.items.slice(_row(searcher, item_id), 1).to_pylist()[0]
        metadata = {name: to_plain(found[name]) for name in searcher.metadata_columns if found[name] is not None}
        return {name: found[name] for name in ("id", "object_id", "width", "height")} | {"metadata": metadata}

    def thumbnail(self, item_id: str) -> bytes:
        """WebP. Raises Refused."""
        searcher = self._searcher
        _row(searcher, item_id)
        return searcher.thumbnail(item_id)

    def image(self, item_id: str) -> tuple[bytes, str]:
        """The image as it was indexed, without metadata, and its media type; as PNG where browsers would not show it, or it has
        to be decoded to be without. Raises Refused."""
        searcher = self._searcher
        _row(searcher, item_id)
        try:
            data = self._image_bytes(searcher, item_id)
            kind = SHOWN.get(image_format(data) or "")
            shown = data if self.limits.keep_metadata or not kind else without_metadata(data)
            if kind and shown is not None:
                return shown, kind
            file = io.BytesIO()
            Image.fromarray(decode_rgb(data, item_id)).save(file, "PNG")
        except (SampleError, StorageError) as error:
            raise _gone(item_id, error) from None
        return file.getvalue(), "image/png"

    def _image_bytes(self, searcher: Searcher, item_id: str) -> bytes:
        """An image as it was indexed. One behind a URL has a moment to come: whoever waits for it holds a thread. Raises
        Refused, and as `Searcher.image_bytes`."""
        if not is_url(searcher.item(item_id)["path"]):
            return searcher.image_bytes(item_id)
        if not self._remote.acquire(blocking=False):
            raise refuse(429, "Busy", "too many images are being fetched.", "Ask again in a moment.", 1)
        fetched: Future[bytes] = Future()

        def fetch() -> None:
            try:
                fetched.set_result(searcher.image_bytes(item_id))
            except BaseException as error:
                fetched.set_exception(error)
            finally:
                self._remote.release()

        # The thread ends with its host's patience, not with ours. The process waits for no such thread when it ends.
        threading.Thread(target=fetch, name="mmref fetch", daemon=True).start()
        try:
            return fetched.result(self.limits.remote_s)
        except TimeoutError:
            log.warning("the image of %s: nothing within %g s", item_id, self.limits.remote_s)
            message = f"the image of {item_id!r} has not come from where it lies within {self.limits.remote_s:g} s."
            raise refuse(404, "ImageUnreachable", message, "Ask again later: its host is slow, or down.", 30) from None


class Clock:
    """Seconds of each stage, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def decode_query(data: bytes, limits: Limits, fit: Fit) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of an image that came with a request; its size is read first, so that a small file which
    unpacks to a huge image is refused. Raises Refused."""
    fix = f"Send a whole {', '.join(FORMATS)} file."
    try:
        if image_format(data) not in FORMATS:
            raise SampleError("the image cannot be read.")
        with decoded(data, "the image", limits.pixels, limits.decode_s) as rgb:
            return fit(rgb)
    except PixelLimitError as error:
        raise refuse(413, "ImageTooLarge", str(error), f"Shrink it to at most {limits.pixels:,} pixels.") from None
    except SampleError as error:
        raise refuse(400, "UnreadableImage", str(error), fix) from None
    except DecodersBusyError:
        raise refuse(429, "Busy", "too many large images are being decoded.", "Ask again in a moment.", 1) from None


def _select(searcher: Searcher, ask: Ask) -> Selection:
    """The items that an ask is of. Raises Refused."""
    try:
        return searcher.select(ask.where, ask.within)
    except StoreError as error:
        raise _no_store(error) from None
    except UnknownColumnError as error:
        raise _unknown_column(error) from None
    except FilterError as error:
        raise refuse(400, "BadFilter", str(error), "GET /indexes tells what each column holds.") from None
    except QueryError as error:
        fix = "Take ids from the results of a search; the item may have been removed since."
        raise refuse(404, "UnknownItem", str(error)[:500], fix) from None


def _check_sort(searcher: Searcher, sort: str) -> None:
    """Raise Refused."""
    try:
        searcher.check_sort(sort)
    except UnknownColumnError as error:
        raise _unknown_column(error) from None


def _unknown_column(error: UnknownColumnError) -> Refused:
    return refuse(400, "UnknownColumn", str(error), "Name one of its columns.")


def describe(result: Result | ObjectResult) -> dict[str, Any]:
    """A result for a client: where its file lies is not told."""
    found = result.to_dict()
    if isinstance(result, ObjectResult):
        return found | {"images": [describe(image) for image in result.images]}
    del found["path"]
    return found


def _no_store(error: StoreError) -> Refused:
    log.warning("%s", error)
    return refuse(503, "StoreUnavailable", "the store of the index does not answer.", "Ask again later.", 5)


def _objects(searcher: Searcher) -> Objects:
    """Which items are of which object. Raises Refused."""
    try:
        return searcher.objects
    except QueryError:
        message = f"{searcher.index.name} knows no objects."
        raise refuse(400, "NoObjects", message, "Leave `by` out: its images can be searched for.") from None


def _object_count(searcher: Searcher) -> int:
    """How many objects the index knows; 0: its images can be searched for alone."""
    try:
        return len(searcher.objects)
    except QueryError:
        return 0


def _row(searcher: Searcher, item_id: str) -> int:
    try:
        return searcher.row(item_id)
    except QueryError:
        name = searcher.index.name
        fix = "Take ids from the results of a search; the item may have been removed since."
        raise refuse(404, "UnknownItem", f"{name} has no item {item_id[:200]!r}.", fix) from None


def _gone(item_id: str, error: MMRefError) -> Refused:
    log.warning("the image of %s: %s", item_id, error)
    fix = "Its file has been moved or changed: put it back, or make the index again."
    return refuse(404, "ImageGone", f"the image of {item_id!r} cannot be read any more.", fix)


def _column(searcher: Searcher, name: str) -> dict[str, Any]:
    """What a client needs to filter by a column: its kind, its values where they are few, the lowest and highest of a number,
    date or time."""
    cells = searcher.items[name]
    kind = kind_of(cells.type)
    found = {"name": name, "kind": kind, "values": _values(cells)}
    if kind in ("number", "date", "time"):
        ends = pc.min_max(cells).as_py()
        found |= {"min": to_plain(ends["min"]), "max": to_plain(ends["max"])}
    return found


def _values(cells: Any) -> list[list[Any]] | None:
    """[value, items] of each value of a column, the frequent first; None where there are too many to choose from, or numbers
    that a page cannot hold as they are."""
    counted = pc.value_counts(cells.combine_chunks())
    if len(counted) > LISTED_VALUES:
        return None
    pairs = [(v["values"].as_py(), v["counts"].as_py()) for v in counted]
    if any(isinstance(value, int) and abs(value) > EXACT for value, _ in pairs):
        return None
    return [[to_plain(value), count] for value, count in sorted(pairs, key=lambda p: -p[1]) if value is not None]

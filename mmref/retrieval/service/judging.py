"""What clients judge: written to a file of each index by the process that answers them, wherever replicas run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

from mmref.errors import StorageError
from mmref.retrieval.feedback import Judgement, Judgements, read_judgement
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.pools import Pool
from mmref.retrieval.service.problems import refuse

log = logging.getLogger(__name__)


class Followed:
    """A file of judgements, which others may write too: each look reads what has been added, or all of it where it was edited.
    Not thread-safe."""

    def __init__(self, judgements: Judgements) -> None:
        self.judgements = judgements
        self._marks: dict[str, dict[str, bool]] = {}  # of items, by sentence
        self._file, self._read = 0, 0  # which, and how far
        self._last, self._changed = b"", 0  # the line before that, and when the file was changed

    def sentences(self) -> dict[str, dict[str, bool]]:
        """Items that are right or wrong, by sentence. Raises OSError."""
        path = self.judgements.path
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            self._begin(0)
            return self._marks
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or self._edited(file, found):
                self._begin(found.st_ino)
            self._changed = found.st_mtime_ns
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return self._with_last(line)
                self._read, self._last = self._read + len(line), line
                self._take(line)
        return self._marks

    def _with_last(self, line: bytes) -> dict[str, dict[str, bool]]:
        """The marks with a last line that has no end: somebody is writing it, or an editor left it so."""
        try:
            (text, item), judgement = read_judgement(line)
        except ValueError:  # half of one
            return self._marks
        marks = self._marks | {text: dict(self._marks.get(text, {}))}  # a copy: the line will be read again
        _mark(marks, text, item, judgement)
        return marks

    def _begin(self, file: int) -> None:
        self._marks, self._file, self._read, self._last, self._changed = {}, file, 0, b"", 0

    def _edited(self, file: BinaryIO, found: os.stat_result) -> bool:
        """Whether something else has happened to the file than that lines were added."""
        if found.st_size <= self._read:
            return found.st_size < self._read or found.st_mtime_ns != self._changed
        file.seek(self._read - len(self._last))
        return file.read(len(self._last)) != self._last

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            (text, item), judgement = read_judgement(line)
        except ValueError as error:
            log.warning("%s: a line before byte %d is no judgement: %s", self.judgements.path, self._read, error)
            return
        _mark(self._marks, text, item, judgement)


def _mark(sentences: dict[str, dict[str, bool]], text: str, item: str, judgement: Judgement | None) -> None:
    """Keep what was said of an item, or that it was taken back."""
    marks = sentences.setdefault(text, {})
    if judgement:
        marks[item] = judgement.relevant
    else:
        marks.pop(item, None)
    if not marks:
        del sentences[text]


class Judging:
    """Judgements by the names of their indexes, read and written one after the other on a thread of their own."""

    def __init__(self, files: Mapping[str, Judgements], limits: Limits) -> None:
        self.limits = limits
        self._files = {name: Followed(judgements) for name, judgements in files.items()}
        self._thread = Pool(1, "mmref judge")

    @property
    def on(self) -> bool:
        """Whether anybody may judge."""
        return bool(self._files)

    def check(self) -> None:
        """Raise Refused where nobody may."""
        if not self.on:
            message = "judging is off: this service writes nothing."
            raise refuse(403, "JudgingOff", message, "Whoever runs it turns it on: `mmref serve INDEX --judge`.")

    async def judged(self, index: str, text: str) -> dict[str, Any]:
        """What was judged of a sentence. Raises Refused."""
        return await self._thread.run(self._judged, index, text)

    def _judged(self, index: str, text: str) -> dict[str, Any]:
        marks = self._sentences(index)
        return {"judgements": dict(marks.get(text, {})), "sentences": len(marks)}

    async def judge(self, index: str, text: str, item: Mapping[str, Any], relevant: bool | None) -> dict[str, Any]:
        """Keep what somebody says of an item; None takes it back. Raises Refused."""
        return await self._thread.run(self._judge, index, text, item, relevant)

    def _judge(self, index: str, text: str, item: Mapping[str, Any], relevant: bool | None) -> dict[str, Any]:
        judgements = self._files[index].judgements
        if self._sentences(index).get(text, {}).get(item["id"]) != relevant:
            self._check_room(judgements)
            try:
                judgements.append(text, item["id"], item["object_id"], relevant)
            except StorageError as error:
                log.warning("%s", error)
                message = "the judgement could not be written."
                fix = "Whoever runs the service sees in its log why; --judgements FILE names another place."
                raise refuse(503, "NotWritten", message, fix) from None
        marks = self._sentences(index)
        return {"id": item["id"], "relevant": relevant, "judged": len(marks.get(text, {})), "sentences": len(marks)}

    def _sentences(self, index: str) -> dict[str, dict[str, bool]]:
        followed = self._files[index]
        try:
            return followed.sentences()
        except OSError as error:
            log.warning("%s cannot be read: %s", followed.judgements.path, error)
            raise refuse(503, "Unreadable", "the judgements cannot be read.", "Look into the log of `mmref serve`.") from None

    def _check_room(self, judgements: Judgements) -> None:
        most = self.limits.judgements_bytes
        if judgements.path.exists() and judgements.path.stat().st_size >= most:
            message = f"the file of judgements has reached {most:,} bytes."
            raise refuse(507, "JudgementsFull", message, "Whoever runs the service moves it away, and a new one begins.")

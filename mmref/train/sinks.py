"""Where people look besides TensorBoard: a run's numbers to W&B, MLflow, trackio, or a service of your own.

A sink is named in `train.sinks`. It gets the numbers of metrics.jsonl as they are written, and the config once. Those of mmref
are in BUILT_IN; a package adds others by an entry point of the group `mmref.sinks`, which names a class like `Sink`:

    [project.entry-points."mmref.sinks"]
    ours = "our_package:OurSink"            # train.sinks: [ours]

Each sink has a thread of its own on rank 0, so a service that is slow, or gone, costs the run no time. One that fails is said
once, in metrics.jsonl and on the terminal, and gets nothing more.
"""

from __future__ import annotations

import importlib
import os
import queue
import re
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from mmref.config import Config, config_hash, to_dict
from mmref.errors import SinkError
from mmref.extras import is_installed
from mmref.run.directory import RunDir
from mmref.storage.locations import folder_name

GROUP = "mmref.sinks"
BUILT_IN = {name: f"mmref.train.sink_{name}:make" for name in ("wandb", "mlflow", "trackio")}
ID = "sink_id"  # file of a run
PROJECT = "mmref"
PATIENCE_S = 60.0  # for what a sink has not sent when the run ends
NOT_PLAIN = re.compile(r"[^A-Za-z0-9_./-]")


@dataclass(frozen=True)
class SinkRun:
    """What a sink is told of the run when it is made."""

    id: str  # the same when the run is resumed, of no other run
    name: str  # the last part of its directory
    path: str  # its directory, local or a URL
    folder: str | None  # a folder for the sink's own files where the run is local
    start: int  # step that this process begins at; above 0 for one that is resumed
    config: dict[str, Any]  # nested, and under "config_hash" its hash


class Sink(Protocol):
    """A class or function that the entry point names is called with a `SinkRun`, in the sink's thread, and gives one of these.

    It may have an attribute `requires`, names of packages that it imports: a run that asks for it without them does not start.
    """

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers at a step: {"loss/align": 1.2, "val/mAP": 40.1}. Steps rise, except that a resumed run repeats some."""

    def close(self) -> None:
        """Send what is left: the run ends, or is interrupted."""


def available() -> list[str]:
    """Names that `train.sinks` takes here."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def load_sink(name: str) -> Any:
    """What makes the sink of a name. Raises SinkError where there is none, or a package that it needs is missing."""
    found = next((point.value for point in entry_points(group=GROUP) if point.name == name), BUILT_IN.get(name))
    if found is None:
        raise SinkError(
            f"`train.sinks` names {name!r}, which nothing here provides: there are {', '.join(available())}. A package adds one "
            f"by an entry point of the group `{GROUP}`."
        )
    module, _, attribute = found.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SinkError(f"`train.sinks`: {name} is at {found}, which cannot be imported: {error}.") from None
    if missing := [package for package in getattr(make, "requires", ()) if not is_installed(package)]:
        raise SinkError(
            f"`train.sinks`: {name} needs the package {missing[0]}, which is not installed here: `pip install {missing[0]}` (on "
            "every node), or leave it out."
        )
    return make


def plain_name(name: str) -> str:
    """A name of a number as every service takes it: letters, digits, `_ . - /`; R@1 as R_at_1."""
    return NOT_PLAIN.sub("_", name.replace("@", "_at_"))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def run_of(config: Config, run: RunDir, start: int) -> SinkRun:
    """What sinks are told of a run, whose id is made at its first start and kept in its directory."""
    if not run.exists(ID):
        run.write_text(ID, uuid.uuid4().hex[:16])
    told = {**to_dict(config), "config_hash": config_hash(config)}
    return SinkRun(run.read_text(ID).strip(), folder_name(run.path), run.path, run.root if run.local else None, start, told)


class SinkThread:
    """One sink, fed from a thread of its own."""

    def __init__(self, name: str, about: SinkRun) -> None:
        self.name, self.about = name, about
        self.failure = ""  # why it gets nothing more
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"sink-{name}")
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        if not self.failure:
            self._queue.put((step, values))

    def close(self) -> None:
        """Let it send what waits, for a while."""
        self._queue.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self.failure = self.failure or f"it has not sent everything {PATIENCE_S:g} s after the end of training"

    def _run(self) -> None:
        try:
            sink: Sink = load_sink(self.name)(self.about)
            while (item := self._queue.get()) is not None:
                sink.log(*item)
            sink.close()
        except BaseException as error:  # a service's own code may raise anything, SystemExit among it
            said = str(error).strip() or type(error).__name__
            self.failure = f"{type(error).__name__}: {said.splitlines()[0][:300]}"


class Sinks:
    """The sinks of a run, on rank 0."""

    def __init__(self, names: Sequence[str], about: SinkRun) -> None:
        self._threads = [SinkThread(name, about) for name in names]
        self._told: set[str] = set()

    def put(self, step: int, values: dict[str, float]) -> None:
        """Numbers at a step, for every sink that still works."""
        for thread in self._threads:
            thread.put(step, {plain_name(name): value for name, value in values.items()})

    def failures(self, step: int) -> list[dict[str, Any]]:
        """A record of metrics.jsonl for each sink that has failed since the last call."""
        failed = [t for t in self._threads if t.failure and t.name not in self._told]
        self._told |= {thread.name for thread in failed}
        return [{"step": step, "sink": thread.name, "sink_failure": thread.failure} for thread in failed]

    def close(self) -> None:
        for thread in self._threads:
            thread.close()


def check_sinks(config: Config) -> None:
    """Raise SinkError for a sink that is not there, before anything is started."""
    for name in config.train.sinks:
        load_sink(name)


def project(variable: str) -> str:
    """The project that a service is to show the run under: its own variable, as `WANDB_PROJECT`, else `mmref`."""
    return os.environ.get(variable) or PROJECT

"""What the service costs, and what it stands. Two parts, each against `mmref serve` started as a process of its own:

load   p50 and p95 of a search and searches a second at 1, 8 and 32 clients that ask again as soon as they are answered,
       with sentences never asked before and with repeated ones; and what each stage of one search takes. The index is
       that of real images, repeated to --items with noise.
soak   valid and hostile requests side by side for --minutes, and attacks (attacks.py: heavy images, bodies of keys, floods
       of judgements, begun uploads, half-sent requests, answers not taken, a slow host, guessed tokens): every valid request is
       answered, no client gets a 5xx, memory and descriptors do not grow. With --kill a replica of each index is killed in
       turn, one a minute, and two of each are kept: what is killed is then one of two, as where a service must not stand still.

python benchmarks/serve.py load --index INDEX --items 10000 --out load.json
python benchmarks/serve.py soak --index INDEX --minutes 10 --kill --out soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psutil
import pyarrow as pa
from attacks import TRAP, Target, attack, each_attack, head, make_trap, server_errors, slow_host
from output import write_figures
from PIL import Image

from mmref.retrieval.exact import widened
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.segment import Segment, read_items, write_items
from mmref.retrieval.service.limits import raise_file_limit
from mmref.storage.array_file import ArrayFile

START_S = 300
WARM_UP_S = 2.0
NOISE = 0.3  # length of what is added to a repeated image's unit vector
SAMPLE_S = 5.0  # between looks at memory
SETTLED = 0.25  # of a soak, after which memory should not grow
KILL_S, BACK_S = 60.0, 45.0  # between kills of replicas; until another has taken its place


@contextlib.contextmanager
def serving(indexes: list[Path], replicas: int, *options: str) -> Iterator[tuple[psutil.Process, int]]:
    """The process of `mmref serve` and its port."""
    command = [
        sys.executable,
        "jobs/serve.py",
        *map(str, indexes),
        "--port",
        "0",
        "--replicas",
        str(replicas),
        *options,
    ]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            until = time.monotonic() + START_S
            while not (found := re.search(r"at http://[\d.]+:(\d+)/", _read(output))):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the service did not start: {_read(output)}")
                time.sleep(0.2)
            yield psutil.Process(process.pid), int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)
            if process.returncode:
                print(_read(output), file=sys.stderr)


def _read(file: Any) -> str:
    file.seek(0)
    return str(file.read())


class Client:
    """A connection that is kept; opened again when the service has closed it."""

    def __init__(self, port: int, headers: str = "Host: 127.0.0.1\r\n") -> None:
        self.port, self.headers = port, headers
        self.reader: asyncio.StreamReader | None = None

    async def ask(self, target: str, body: bytes = b"", kind: str = "image/png") -> tuple[int, bytes]:
        """Status and body of an answer."""
        kept = self.reader is not None
        try:
            return await self._ask(target, body, kind)
        except (OSError, asyncio.IncompleteReadError) as error:
            # a kept connection may be closed in the moment it is used: any client asks again
            if not kept or getattr(error, "partial", b""):
                raise
        return await self._ask(target, body, kind)

    async def _ask(self, target: str, body: bytes, kind: str) -> tuple[int, bytes]:
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        method = "POST" if body else "GET"
        sent = f"{method} {target} HTTP/1.1\r\n{self.headers}Content-Length: {len(body)}\r\nContent-Type: {kind}\r\n\r\n"
        self.writer.write(sent.encode() + body)
        try:
            answer = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = int(re.search(r"content-length: (\d+)", answer, re.I)[1])  # type: ignore[index]
            found = await self.reader.readexactly(length)
            if "connection: close" in answer.lower():
                self.close()
        except BaseException:
            self.close()
            raise
        return int(answer.split()[1]), found

    def close(self) -> None:
        if self.reader is not None:
            self.writer.close()
            self.reader = None


# -- load ------------------------------------------------------------------------------------------------------------


def enlarge(source: Path, target: Path, items: int) -> None:
    """Write an index of `items` rows: those of another, repeated with noise; thumbnails are shared, codes repeated."""
    manifest = Manifest.read(source)
    shutil.copytree(source / "model", target / "model")
    folder = target / "segments" / manifest.segments[0]
    folder.mkdir(parents=True)
    first = source / "segments" / manifest.segments[0]
    features = Segment(first).features
    n, dim = features.shape
    rng, at = np.random.default_rng(0), np.arange(items) % n
    with ArrayFile(folder / "features.npy", (items, dim), np.float16) as out:
        for start in range(0, items, 50_000):
            some = widened(features[at[start : start + 50_000]])
            some = some + (NOISE / np.sqrt(dim) * rng.standard_normal(some.shape)).astype(np.float32)
            out.write(some / np.linalg.norm(some, axis=1, keepdims=True))
    for name in ("near", "weights", "thumbnails"):
        if (first / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", np.load(first / f"{name}.npy")[at])
    np.save(folder / "uids.npy", np.arange(items))
    os.link(first / "thumbnails.bin", folder / "thumbnails.bin")
    table = read_items(first).take(pa.array(at))
    ids = pa.array([f"{name}-{i}" for i, name in enumerate(table["id"].to_pylist())])
    write_items(folder, table.set_column(0, "id", ids))
    replace(manifest, items=items, next_uid=items, segments=[folder.name], kind="flat", vectors={}).write(target)


async def clients_at(port: int, count: int, seconds: float, sentence: Callable[[], str]) -> dict[str, float]:
    """Milliseconds of searches and searches a second with so many clients."""
    took: list[float] = []
    statuses: Counter[int] = Counter()
    began = time.perf_counter() + WARM_UP_S
    end = began + seconds

    async def one() -> None:
        client = Client(port)
        while (start := time.perf_counter()) < end:
            status, _ = await client.ask(f"/search?top=10&text={quote(sentence())}")
            if time.perf_counter() >= began:  # every client has one, however slow
                took.append(time.perf_counter() - start)
                statuses[status] += 1
        client.close()

    await asyncio.gather(*(one() for _ in range(count)))
    p50, p95 = np.percentile(took, [50, 95]) * 1000
    errors = sum(n for status, n in statuses.items() if status != 200)
    return {"p50_ms": float(p50), "p95_ms": float(p95), "per_s": len(took) / seconds, "errors": errors}


def stages(index: Path, sentences: list[str]) -> dict[str, float]:
    """Milliseconds of each stage of a search for one sentence, alone in a process: medians."""
    searcher = Searcher(str(index))
    model, ranker = searcher.model, searcher.ranker
    rows: list[dict[str, float]] = []
    for text in sentences:
        marks: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any], marks: dict[str, float] = marks) -> Any:
            began = time.perf_counter()
            result = work()
            marks[name] = (time.perf_counter() - began) * 1000
            return result

        timed("tokenise", lambda text=text: model._encoder.tokens([text]))
        features = timed("encode", lambda text=text: model.encode_text([text]))
        marks["encode"] -= marks["tokenise"]
        encoded = timed("codes", lambda f=features: ranker.encode(f, 0.0))
        timed("search", lambda e=encoded: ranker.rank(e, 10, refine=False))
        ranked = timed("refine", lambda e=encoded: ranker.rank(e, 10))
        marks["refine"] -= marks["search"]
        results = timed("describe", lambda e=encoded, r=ranked: searcher.results(e, *r))[0]
        timed("thumbnails", lambda r=results: [searcher.thumbnail(one.id) for one in r])
        rows.append(marks)
    return {name: float(np.median([row[name] for row in rows[2:]])) for name in rows[0]}


def load(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        index = Path(args.index).absolute()
        if args.items:
            index = Path(folder) / "index"
            enlarge(Path(args.index).absolute(), index, args.items)
        searcher = Searcher(str(index))
        captions = sorted({c for c in searcher.items["caption"].to_pylist() if c})
        result: dict[str, Any] = {"items": len(searcher), "dim": searcher.manifest.dim, "replicas": args.replicas}
        del searcher
        result["stages_ms"] = stages(index, captions[:100])
        print(json.dumps(result), flush=True)
        numbers = iter(range(10**9))
        kinds = {
            "new": lambda: f"{captions[random.randrange(len(captions))]} {next(numbers)}",
            "repeated": lambda: captions[random.randrange(min(500, len(captions)))],
        }
        with serving([index], args.replicas, "--max-rate", "0") as (process, port):
            for kind, sentence in kinds.items():
                for count in args.clients:
                    found = asyncio.run(clients_at(port, count, args.seconds, sentence))
                    result[f"{kind}, {count} clients"] = found
                    print(f"{kind} sentences, {count} clients: {json.dumps(found)}", flush=True)
            result["memory_mb"] = memory(process)
    return result


# -- soak ------------------------------------------------------------------------------------------------------------


def memory(process: psutil.Process) -> float:
    """MB that a process and what it started hold for themselves: pages of mapped files, of the index say, do not count."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            used = one.memory_info()
            total += used.rss - used.shared
    return total / 1e6


def picture(rng: random.Random, side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3))).save(file, "PNG")
    return file.getvalue()


@functools.cache
def large() -> bytes:
    """A small file of more pixels than are allowed."""
    return picture(random.Random(0), 8000)


async def valid(client: Client, rng: random.Random, words: list[str], ids: list[str]) -> tuple[int, bytes]:
    """A request that must be answered."""
    text, item = quote(f"{rng.choice(words)} {rng.randrange(10_000)}"), quote(rng.choice(ids), safe="")
    kind = rng.randrange(8)
    if kind < 4:
        return await client.ask(f"/search?text={text}&top={rng.randrange(1, 50)}&refine={rng.choice(['true', 'false'])}")
    if kind == 4:
        return await client.ask(f"/search?text={text}&image_weight=0.5", picture(rng))
    if kind == 5:
        return await client.ask(f"/thumbnail/{item}")
    if kind == 6:
        return await client.ask(f"/image/{item}")
    return await client.ask(f"/items/{item}")


async def refused(client: Client, rng: random.Random) -> tuple[int, bytes]:
    """A request that must be refused."""
    targets = (
        "/search", "/search?text=" + "x" * 2000, "/search?text=x&top=-1", "/search?text=x&top=1e9", "/search?text=x&where=a",
        "/search?text=x&where=path%3D/etc/passwd", "/search?text=x&index=../..", "/items/../../etc/passwd", "/nowhere",
        "/image/..%2F..%2Fetc%2Fpasswd", "/thumbnail/%00", "/items/" + "x" * 5000, "/explain?id=x&text=y", "/search?text=x&q=1",
    )  # fmt: skip
    bodies = (
        (b"no image", "image/png"), (b"{", "application/json"), (b'{"text": []}', "application/json"), (b"a=b", "text/plain"),
        (b"\x89PNG\r\n\x1a\n" + rng.randbytes(2000), "image/png"), (rng.randbytes(200_000), "image/jpeg"),
        (b'{"image": "' + b"A" * 100_000 + b'"}', "application/json"), (large(), "image/png"),
    )  # fmt: skip
    if rng.random() < 0.6:
        return await client.ask(rng.choice(targets))
    return await client.ask("/search", *rng.choice(bodies))


async def raw(port: int, rng: random.Random) -> None:
    """A connection that keeps to no rule; whatever comes back is read and dropped."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    kind = rng.randrange(6)
    with contextlib.suppress(OSError, TimeoutError):
        if kind == 0:  # no HTTP
            writer.write(rng.randbytes(1000) + b"\r\n\r\n")
        elif kind == 1:  # headers without end
            writer.write(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000)
        elif kind == 2:  # leaves in the middle of a body
            writer.write(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\nabc")
        elif kind == 3:  # says it sends more than is allowed
            writer.write(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n")
        elif kind == 4:  # leaves before the answer
            writer.write(b"GET /search?text=gone HTTP/1.1\r\nHost: localhost\r\n\r\n")
        else:  # a letter at a time
            for letter in b"GET /search?text=slow HTTP/1.1\r\n":
                writer.write(bytes([letter]))
                await writer.drain()
                await asyncio.sleep(0.1)
        await writer.drain()
        if kind in (0, 1, 3):
            await asyncio.wait_for(reader.read(4000), 20)
    writer.transport.abort()


def descriptors(process: psutil.Process) -> int:
    """Files and connections that the HTTP side has open."""
    with contextlib.suppress(psutil.Error):
        return int(process.num_fds())
    return 0


async def soak_for(args: argparse.Namespace, process: psutil.Process, target: Target) -> dict[str, Any]:
    searcher = Searcher(args.index)
    ids = searcher.items["id"].to_pylist()[:2000]
    words = [c for c in searcher.items["caption"].to_pylist()[:2000] if c] or ids
    del searcher
    answers: Counter[str] = Counter()
    wrong: list[str] = []
    took: list[float] = []

    def note(name: str, status: int, said: object) -> None:
        answers[f"{name} {status}"] += 1
        # an attack may hit upon something that is right to answer
        if status >= 500 or (name in ("valid", "hostile") and (status == 200) != (name == "valid")):
            wrong.append(f"{name} {status}: {said!r}")

    # The first time of an attack takes memory that is kept, and is not to look like growth wherever it comes by chance.
    for name, statuses in await each_attack(target, random.Random(0)):
        for status in statuses:
            note(name, status, "")
    end = time.monotonic() + 60 * args.minutes

    async def keep(seed: int, ask: Callable[[Client, random.Random], Coroutine[Any, Any, Any]], name: str) -> None:
        client, rng = Client(target.port, head(target)), random.Random(seed)
        while (began := time.monotonic()) < end:
            try:
                found = await ask(client, rng)
            except (OSError, asyncio.IncompleteReadError, TypeError) as error:
                client.close()
                if name == "valid":
                    wrong.append(f"{name}: {type(error).__name__} {error}")
                answers[f"{name} closed"] += 1
                continue
            if found is None:
                answers[name] += 1
                continue
            if name == "valid":
                took.append(time.monotonic() - began)
            note(name, found[0], found[1][:200])
        client.close()

    async def besiege(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            name, statuses = await attack(target, rng)
            for status in statuses:
                note(name, status, "")

    tasks = [keep(n, lambda c, r: valid(c, r, words, ids), "valid") for n in range(args.clients)]
    tasks += [keep(100 + n, refused, "hostile") for n in range(2)]
    tasks += [keep(200 + n, lambda c, r: raw(target.port, r), "raw") for n in range(2)]
    tasks += [besiege(300 + n) for n in range(args.attackers)]
    samples: list[tuple[float, int]] = []
    kills: list[dict[str, Any]] = []
    began = time.monotonic()

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(SAMPLE_S)
            samples.append((memory(process), descriptors(process)))
            said = f"{samples[-1][0]:.0f} MB, {samples[-1][1]} descriptors"
            print(f"{time.monotonic() - began:.0f} s: {said}, {dict(answers)}", flush=True)

    async def kill() -> None:
        """A replica of each index in turn, and how long until its index answers."""
        for number in itertools.count() if args.kill else ():
            if end - time.monotonic() < KILL_S + BACK_S:
                return
            await asyncio.sleep(KILL_S)
            index = number % 2
            if not _kill_replica(process, index):
                continue
            killed, client = time.monotonic(), Client(target.port, head(target))
            item = quote(target.remote[0] if index else ids[0], safe="")
            try:
                status, said = await client.ask(f"/items/{item}" + f"?index={TRAP}" * index)
                note("killed", status, said[:200])
            except (OSError, asyncio.IncompleteReadError) as error:
                wrong.append(f"killed: {type(error).__name__} {error}")
            client.close()
            kills.append({"index": index, "at_s": killed - began, "answers_after_s": time.monotonic() - killed})

    await asyncio.gather(*tasks, watch(), kill())
    counters = (await Client(target.port, head(target)).ask("/metrics"))[1].decode()
    settled = samples[int(SETTLED * len(samples)) :]
    half = len(settled) // 2
    first, last = (float(np.median([m for m, _ in part])) for part in (settled[: max(1, half)], settled[half:]))
    p50, p95 = np.percentile(took, [50, 95]) * 1000
    return {
        "minutes": args.minutes, "answers": dict(answers), "wrong": wrong[:20], "n_wrong": len(wrong), "kills": kills,
        "valid_unanswered": answers["valid closed"], "valid_p50_ms": float(p50), "valid_p95_ms": float(p95),
        "counted_5xx": server_errors(counters), "memory_mb": [round(m) for m, _ in samples], "growth": last / first - 1,
        "descriptors": [d for _, d in samples],
        "at_quarter": settled[0], "at_end": samples[-1],
    }  # fmt: skip


def _kill_replica(process: psutil.Process, index: int) -> bool:
    """Kill a replica of an index, by its place among those served; whether there was one. Ray Serve calls the process by the
    application, and `deploy` the application by that place."""
    for one in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if re.search(rf"ServeReplica:mmref-[0-9a-f]+-{index}:", " ".join(one.cmdline())):
                one.kill()
                return True
    return False


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # of another file system
        os.symlink(source, target)


def soak(args: argparse.Namespace) -> dict[str, Any]:
    raise_file_limit()
    token = os.urandom(16).hex()

    async def run(folder: Path) -> dict[str, Any]:
        async with slow_host() as port:
            index = Path(args.index).absolute()
            large, remote = make_trap(index, folder / TRAP, port)
            judged = folder / index.name  # an index of the same files: what attackers judge is not written into the user's
            shutil.copytree(index, judged, copy_function=_linked)
            indexes = [judged, folder / TRAP]
            (folder / "token").write_text(token)
            # a rate that valid clients do not reach, or guessed tokens would cost nothing
            options = ("--max-rate", "5000", "--token-file", str(folder / "token"), "--judge")
            options += ("--min-replicas", str(args.replicas)) if args.kill else ()
            with serving(indexes, args.replicas, *options) as (process, served):
                return await soak_for(args, process, Target(served, token, large, remote))

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("load")
    first.add_argument("--items", type=int, help="repeat the index to so many items (default: as it is)")
    first.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    first.add_argument("--seconds", type=float, default=20, help="of each measurement")
    first.add_argument("--scratch", help="where the repeated index is written (default: the system's)")
    second = parts.add_parser("soak")
    second.add_argument("--minutes", type=float, default=10)
    second.add_argument("--clients", type=int, default=4, help="that ask valid requests")
    second.add_argument("--attackers", type=int, default=2, help="attacks at a time")
    second.add_argument("--kill", action="store_true", help="kill a replica every minute, of each index in turn")
    for part, function in ((first, load), (second, soak)):
        part.add_argument("--index", required=True, help="directory of `mmref index`, of a set with captions")
        part.add_argument(
            "--replicas", type=int, help="0: in one process without Ray (default: 1, and 2 that are kept with --kill)"
        )
        part.add_argument("--out", help="also write the figures to this file")
        part.set_defaults(run=function)
    args = parser.parse_args()
    if args.replicas is None:
        args.replicas = 2 if getattr(args, "kill", False) else 1
    began = time.perf_counter()
    result = args.run(args)
    result |= {"cores": os.cpu_count(), "wall_s": time.perf_counter() - began}
    write_figures(result, args.out)
    if result.get("n_wrong") or result.get("counted_5xx") or result.get("growth", 0) > 0.1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

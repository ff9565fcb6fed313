"""What hostile clients do to the service in `benchmarks/serve.py soak`. Each attack is bounded in number and time, and ends
by itself; it returns the statuses it was answered with."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from PIL import Image

from mmref.retrieval.segment import ITEMS, read_items, write_items

HELD_S = 4.0  # how long connections are kept that are not used
ANSWER_S = 90.0
TRAP = "trap"  # name of the index whose images are large, or lie on a host that does not answer


@dataclass(frozen=True)
class Target:
    """The service, and what is known of it."""

    port: int
    token: str
    large: list[str]  # ids of images of 10 MB in the trap
    remote: list[str]  # ids of images of a slow host in the trap


async def attack(target: Target, rng: random.Random) -> tuple[str, list[int]]:
    """One attack, from another address than the valid clients' wherever clients share what an address may hold: its name,
    and what it was answered."""
    one: Callable[[Target, random.Random], Coroutine[Any, Any, list[int]]] = rng.choice(ATTACKS)
    return one.__name__, await one(target, rng)


async def each_attack(target: Target, rng: random.Random) -> list[tuple[str, list[int]]]:
    """All of them once, as `attack` tells of one."""
    return [(one.__name__, await one(target, rng)) for one in ATTACKS]


# -- requests ----------------------------------------------------------------------------------------------------------


async def heavy_images(target: Target, rng: random.Random) -> list[int]:
    """Images that weigh more than they look, all at once."""
    return list(await asyncio.gather(*(ask(target, rng, "/search", image, "image/webp") for image in HEAVY * 4)))


async def bodies_of_keys(target: Target, rng: random.Random) -> list[int]:
    """JSON of unknown keys and of filters, nested, repeated, and numbers of many digits."""
    return [await ask(target, rng, "/search", body, "application/json") for body in rng.sample(bodies(), 2)]


async def parameters(target: Target, rng: random.Random) -> list[int]:
    """A URL of thousands of parameters."""
    name = rng.choice(("where=c{}=1", "a{}=1", "text={}", "top={}"))
    return [await ask(target, rng, "/search?" + "&".join(name.format(n) for n in range(2000)))]


async def all_candidates(target: Target, rng: random.Random) -> list[int]:
    """As much work as a search can ask for; half of those who ask leave at once."""
    texts = [quote(f"all {rng.randrange(10**6)}") for _ in range(10)]
    for text in texts[:5]:
        await leave(target, rng, f"GET /search?candidates=0&top=100&text={text} HTTP/1.1\r\n{head(target)}\r\n")
    rest = [ask(target, rng, f"/search?candidates={rng.choice((0, 10**9))}&text={text}") for text in texts[5:]]
    return list(await asyncio.gather(*rest))


async def remote_images(target: Target, rng: random.Random) -> list[int]:
    """Images and explanations that wait for a host which does not answer."""
    paths = [f"/image/{quote(rng.choice(target.remote), safe='')}?index={TRAP}" for _ in range(12)]
    item = quote(rng.choice(target.remote))
    paths += [f"/explain?text=x&id={item}&index={TRAP}"] * 2
    return list(await asyncio.gather(*(ask(target, rng, path) for path in paths)))


async def judgements(target: Target, rng: random.Random) -> list[int]:
    """Sentences judged by the hundred, and bodies that are no judgement."""
    item = rng.choice(target.large + target.remote)
    right = {"id": item, "index": TRAP, "relevant": True}
    bodies: list[dict[str, Any]] = [right | {"text": f"{rng.randrange(10**9)} " + "x" * 200} for _ in range(100)]
    bodies += [bodies[0] | odd for odd in ODD_JUDGEMENTS]
    sent = [json.dumps(body).encode() for body in bodies]
    return list(await asyncio.gather(*(ask(target, rng, "/judgements", body, "application/json") for body in sent)))


async def guessed_tokens(target: Target, rng: random.Random) -> list[int]:
    """Wrong tokens, from the address of valid users."""
    wrong = Target(target.port, "wrong", [], [])
    return [await ask(wrong, rng, "/search?text=x", source="127.0.0.1") for _ in range(50)]


# -- connections -------------------------------------------------------------------------------------------------------


async def begun_uploads(target: Target, rng: random.Random) -> list[int]:
    """Bodies that begin and stall."""
    start = f"POST /search HTTP/1.1\r\n{head(target)}Content-Type: image/png\r\nContent-Length: 9000000\r\n\r\n"
    return await hold(target, rng, 270, start.encode() + rng.randbytes(rng.choice((3, 100_000))))


async def half_sent(target: Target, rng: random.Random) -> list[int]:
    """Headers that do not end, from the address of valid users too."""
    return await hold(target, rng, 500, b"GET /search?text=x HTTP/1.1\r\nHost: loc", rng.choice(("127.0.0.1", None)))


async def slow_readers(target: Target, rng: random.Random) -> list[int]:
    """Large images that are asked for and not taken."""
    path = f"/image/{quote(rng.choice(target.large), safe='')}?index={TRAP}"
    return await hold(target, rng, 60, f"GET {path} HTTP/1.1\r\n{head(target)}\r\n".encode())


async def tiny_chunks(target: Target, rng: random.Random) -> list[int]:
    """A body in chunks of a byte."""
    start = f"POST /search HTTP/1.1\r\n{head(target)}Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    with contextlib.suppress(OSError):
        async with connected(target, elsewhere(rng)) as (_, writer), asyncio.timeout(ANSWER_S):
            writer.write(start.encode())
            for _ in range(100):
                writer.write(b"1\r\na\r\n" * 10_000)
                await writer.drain()
    return []


async def leaving(target: Target, rng: random.Random) -> list[int]:
    """Clients that leave in the middle of a body."""
    for _ in range(20):
        await leave(target, rng, f"POST /search HTTP/1.1\r\n{head(target)}Content-Length: 9000\r\n\r\nabc")
    return []


ATTACKS = (
    heavy_images, bodies_of_keys, parameters, all_candidates, remote_images, judgements, guessed_tokens, begun_uploads,
    half_sent, slow_readers, tiny_chunks, leaving,
)  # fmt: skip


# -- how -----------------------------------------------------------------------------------------------------------------


def head(target: Target) -> str:
    return f"Host: 127.0.0.1\r\nAuthorization: Bearer {target.token}\r\n"


def elsewhere(rng: random.Random) -> str:
    """An address of this machine that no valid client has."""
    return f"127.0.0.{rng.randrange(2, 6)}"


@contextlib.asynccontextmanager
async def connected(
    target: Target, source: str, limit: int = 65_536
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, local_addr=(source, 0), limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(target: Target, rng: random.Random, path: str, body: bytes = b"", kind: str = "", source: str | None = None) -> int:
    """Status of an answer; 0: the service ended the connection without one."""
    request = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\n{head(target)}Connection: close\r\n"
    request += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with connected(target, source or elsewhere(rng)) as (reader, writer), asyncio.timeout(ANSWER_S):
            writer.write(request.encode() + body)
            with contextlib.suppress(ConnectionError):  # refused before it was sent: the answer is there all the same
                await writer.drain()
            return int((await reader.readuntil(b"\r\n")).split()[1])
    return 0


async def leave(target: Target, rng: random.Random, sent: str) -> None:
    with contextlib.suppress(OSError):
        async with connected(target, elsewhere(rng)) as (_, writer):
            writer.write(sent.encode())
            await writer.drain()
            await asyncio.sleep(0.05 * rng.random())


async def hold(target: Target, rng: random.Random, count: int, sent: bytes, source: str | None = None) -> list[int]:
    """Keep connections on which something has been sent; statuses of those that were answered meanwhile."""
    source = source or elsewhere(rng)

    async def one() -> int:
        with contextlib.suppress(OSError):
            async with connected(target, source, limit=1024) as (reader, writer):  # takes no more than that
                writer.write(sent)
                await asyncio.sleep(HELD_S)
                with contextlib.suppress(TimeoutError, ValueError, IndexError, asyncio.IncompleteReadError):
                    line = await asyncio.wait_for(reader.readuntil(b"\r\n"), 0.01)
                    return int(line.split()[1])
        return 0

    return [status for status in await asyncio.gather(*(one() for _ in range(count))) if status]


# -- what is sent --------------------------------------------------------------------------------------------------------


def plain_webp(width: int, height: int) -> bytes:
    """A lossless WebP of one colour, transparency declared: 34 bytes, whatever its size."""
    bits: list[tuple[int, int]] = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (1, 1), (0, 3)]
    bits += [(0, 1)] * 3  # no transform, no cache of colours, one group of codes
    bits += [(0b0001, 4)] * 5  # each code a simple one, of the symbol 0 alone: a pixel takes no bit
    value = at = 0
    for number, width_of in bits:
        value |= number << at
        at += width_of
    data = value.to_bytes(14, "little")  # six more than it takes: OpenCV looks at no smaller file
    chunk = b"VP8L" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


ODD_JUDGEMENTS: tuple[dict[str, Any], ...] = (
    {"text": "x" * 200_000}, {"text": ["x"]}, {"text": "\ud800"}, {"text": "line\nbreak\0"}, {"id": "../../etc/passwd"},
    {"id": {}}, {"relevant": "yes"}, {"relevant": None}, {"relevant": 1e300}, {"index": "../.."}, {"path": "/etc/passwd"},
)  # fmt: skip

# images that cost the service more than they cost to send; those that end a replica belong here too
HEAVY = (plain_webp(4096, 3072), plain_webp(6324, 6324), plain_webp(16_383, 16_383))


@functools.cache
def bodies() -> list[bytes]:
    keys = {f"k{n}": n for n in range(600_000)}
    return [
        json.dumps(keys).encode(), json.dumps({"text": "x", "where": dict.fromkeys(list(keys)[:400_000], 1)}).encode(),
        json.dumps({"text": "x", "where": [1] * 2_000_000}).encode(), b'{"text": "x", "where": ' + b"[" * 60_000,
        b'{"text": "x", "top": 1' + b"0" * 60_000 + b"}", b'"image":"' * 900_000,
        json.dumps({f"k{n}": n for n in range(4000)}).encode(),
    ]  # fmt: skip


def make_trap(index: Path, target: Path, port: int) -> tuple[list[str], list[str]]:
    """Copy an index so that one image in it has 10 MB, and the rest lie on a host of this machine; ids of both."""
    shutil.copytree(index, target)
    pixels = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(target / "large.png", compress_level=0)
    large: list[str] = []
    remote: list[str] = []
    for number, file in enumerate(sorted((target / "segments").glob("*"))):
        table = read_items(file)
        ids = table["id"].to_pylist()
        paths = [f"http://127.0.0.1:{port}/{n}.png" for n in range(len(ids))]
        if number == 0:
            paths[0] = str(target / "large.png")
        large, remote = large + ids[: number == 0], remote + ids[number == 0 :]
        for name, values in (("path", pa.array(paths)), ("offset", None), ("length", None)):
            at = table.schema.get_field_index(name)
            values = pa.array([0] * len(ids), pa.int64()) if values is None else values
            table = table.set_column(at, name, values)
        (file / ITEMS).unlink()  # linked to by nobody, but mapped
        write_items(file, table)
    return large, remote


@contextlib.asynccontextmanager
async def slow_host() -> AsyncIterator[int]:
    """Port of a host that sends a byte a second and does not end."""

    over = asyncio.Event()
    dripping: set[asyncio.Task[None] | None] = set()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dripping.add(asyncio.current_task())
        until = time.monotonic() + ANSWER_S
        with contextlib.suppress(OSError):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n")
            while time.monotonic() < until and not over.is_set():
                writer.write(b"x")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), 1)
        writer.transport.abort()
        dripping.discard(asyncio.current_task())

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        over.set()  # they end by themselves: asyncio reports a stream's task that is canceled as an error
        await asyncio.gather(*filter(None, dripping))


def server_errors(counters: str) -> int:
    """5xx answers that the service itself has counted, of clients that left among them."""
    # a route may hold braces: /image/{item_id:path}
    found = re.findall(r'^mmref_requests_total\{.*status="5\d\d"\} (\S+)', counters, re.M)
    return sum(int(float(n)) for n in found)

"""Evaluation of a split behind a URL whose every answer takes a while: features of all images and captions, encoded.

    python benchmarks/remote_evaluation.py --out remote.json

A server in a process of its own speaks as much of the S3 protocol as reading takes, and answers each request after
`--delay-ms`. The images are tiny, and so is the model, so that it is mostly waiting that is measured. "one by one" reads what
versions until 0.2 read for an image, in their order: its json, the image, its json again, of `--sample` images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import cv2
import numpy as np
import torch

from mmref.config import Config, load_config
from mmref.config.inputs import settled
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import load_tokens
from mmref.evaluate.features import Encoder
from mmref.export.interpolate import encode_split
from mmref.model.mmref import build_model
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.samples import SourceImage, SourceObject
from mmref.storage.locations import read_bytes


class TinyImages:
    """Objects of four images of 24 x 24 pixels, most of them in the split test."""

    name, licence, origin, min_images = "tiny", "CC0-1.0", "random numbers", 1

    def __init__(self, images: int) -> None:
        self.count = images // 4
        self.skipped: list[str] = []

    def objects(self) -> Iterable[SourceObject]:
        for number in range(self.count + 8):
            split = "test" if number < self.count else "train"
            caption = f"a texture of colour {number % 17}, grain {number % 5} and number {number}"
            images = [SourceImage(f"{number}-{i}", 4 * number + i, [caption], []) for i in range(4)]
            yield SourceObject(split, f"texture-{number}", images)

    def load(self, ref: int) -> bytes:
        pixels = np.random.default_rng(ref).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        done, data = cv2.imencode(".jpg", pixels)
        assert done
        return data.tobytes()

    def write_extras(self, root: str) -> None:
        """Nothing."""


def serve(folder: str, delay_s: float, port: Any, asked: Any) -> None:
    """Files of a folder as objects of a bucket, after a delay. `port` is told, and requests are counted in `asked`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            time.sleep(delay_s)
            with asked.get_lock():
                asked.value += 1
            key, _, query = self.path.partition("?")
            path = Path(folder) / key.lstrip("/").partition("/")[2]
            if "list-type=2" in query:
                self._list(parse_qs(query).get("prefix", [""])[0])
                return
            if not path.is_file():
                self._head(404, 0)
                return
            whole = path.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, end = (int(wanted[1]), min(int(wanted[2] or whole) + 1, whole)) if wanted else (0, whole)
            self._head(206 if wanted else 200, end - first, f"bytes {first}-{end - 1}/{whole}" if wanted else "")
            if body:
                with open(path, "rb") as file:
                    file.seek(first)
                    self.wfile.write(file.read(end - first))

        def _list(self, prefix: str) -> None:
            names = [(str(p.relative_to(folder)), p.stat().st_size) for p in sorted(Path(folder).rglob("*")) if p.is_file()]
            listed = "".join(
                f"<Contents><Key>{name}</Key><Size>{size}</Size><LastModified>2026-11-01T00:00:00Z</LastModified>"
                '<ETag>"0"</ETag></Contents>'
                for name, size in names
                if name.startswith(prefix)
            )
            answer = f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>".encode()
            self._head(200, len(answer))
            self.wfile.write(answer)

        def _head(self, status: int, size: int, part: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
            self.send_header("ETag", '"0"')
            if part:
                self.send_header("Content-Range", part)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


def one_by_one(shards: ShardSet, images: int) -> None:
    """What each of some images of the split test took."""
    index = shards.index("test")
    for i in range(images):
        path = index.shard_paths[int(index.shard[i])]
        for what in ("json", "image", "json"):
            offset, size = getattr(index, f"{what}_offset")[i], getattr(index, f"{what}_size")[i]
            assert len(read_bytes(path, int(offset), int(size))) == size


def measured(args: argparse.Namespace, config: Config, asked: Any) -> list[dict[str, Any]]:
    """A row for each way to read."""
    shards, rows = ShardSet.open(config.data.root), []
    tokens = load_tokens(config)
    model = build_model(config, tokens.vocab_size)
    encoder = Encoder(model, model, config.data, tokens, torch.device("cpu"))
    shards.index("test")  # connected, and known on this node
    for how in ("one by one", "byte ranges", "cache"):
        count = args.sample if how == "one by one" else args.images
        config.data.cache_gb = 1.0 if how == "cache" else 0.0
        before, began = asked.value, time.perf_counter()
        if how == "one by one":
            one_by_one(shards, count)
        else:
            found = encode_split(encoder, config, shards, "test")
            assert len(found.image) == count and not found.skipped
        seconds, requests = time.perf_counter() - began, asked.value - before
        rows.append({
            "how": how, "images": count, "seconds": seconds, "requests": requests,
            "seconds_for_all": seconds * args.images / count,
        })  # fmt: skip
        print(f"{how:<12}{count:>8} images {seconds:>8.1f} s {requests:>8} requests", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--delay-ms", type=float, default=30)
    parser.add_argument("--sample", type=int, default=200, help="images that are read one by one")
    parser.add_argument("--out", help="JSON file")
    args, passed = parser.parse_known_args()
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    port, asked = spawn.Value("i", 0), spawn.Value("i", 0)
    with tempfile.TemporaryDirectory(prefix="mmref-benchmark-") as folder:
        source = TinyImages(args.images)
        build_shards(source, f"{folder}/set", BuildOptions(tokenizer_vocab=200, target_mb=8, overwrite=True, progress=False))
        server = spawn.Process(target=serve, args=(folder, args.delay_ms / 1e3, port, asked), daemon=True)
        server.start()
        while not port.value:
            time.sleep(0.05)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.value}", "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
            "MMREF_CACHE": f"{folder}/cache",
        }  # fmt: skip
        try:
            config = settled(load_config(["--config", "configs/smoke.yaml", "--data.root", f"{folder}/set", *passed]))
            config.data.root, config.data.tokenizer = "s3://bucket/set", f"{folder}/set/tokenizer"
            rows = measured(args, config, asked)
        finally:
            server.terminate()
    print(f"all images: {rows[0]['seconds_for_all']:.0f} s one by one, {rows[1]['seconds']:.0f} s by byte ranges")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"rows": rows, "delay_ms": args.delay_ms}, file, indent=1)


if __name__ == "__main__":
    main()

"""`mmref shards build table` at size: rows a second and peak memory, and downloads against img2dataset.

    python benchmarks/tables.py build --rows 10000 100000 1000000 --before OTHER_CHECKOUT --out tables.json
    python benchmarks/tables.py fetch --images 5000 --img2dataset VENV/bin/img2dataset --out fetch.json

`build` makes a table of tiny images (hard links of a few files), and builds the set in a process of its own, with all its work
in that process. It tells two things apart: reading, checking and ordering the rows (`rows`), and the whole build (`set`), which
also decodes each image and writes the tars; `--only rows` leaves out the second. With `--before` another checkout of mmref does
the same in turns. Time is processor time, user and system: other work on the machine changes it little. Memory is the
process's greatest resident size less what it had after its imports.

`fetch` serves JPEGs by a local web server with a process of its own. mmref and img2dataset fetch the same URLs in turns, in one
process with the same number of threads, and write WebDataset tars with the images as they came.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from output import write_figures
from PIL import Image

ROOT = Path(__file__).parents[1]
FILES, PER_FOLDER = 32, 1000  # different files behind the hard links; links in a folder
IN_PROCESS = """
import json, resource, sys, tempfile, time
from pathlib import Path
from mmref.shards import build
from mmref.shards.sources.table import TableSource
table, out, only_rows = sys.argv[1], sys.argv[2], sys.argv[3] == "rows"
class Rows(Exception): pass
def stop(*_): raise Rows
if only_rows: build._check_usable = stop
usage = lambda: resource.getrusage(resource.RUSAGE_SELF)
before, began = usage(), time.perf_counter()
try:
    build.build_shards(TableSource(table), out, build.BuildOptions(progress=False))
except Rows: pass
after = usage()
seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
wall = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "wall": wall, "peak_mb": (after.ru_maxrss - before.ru_maxrss) / 1e3}))
"""
SERVER = """
import sys
from aiohttp import web
app = web.Application()
app.router.add_static("/", sys.argv[1])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None, access_log=None)
"""


def picture(seed: int, side: int, form: str) -> bytes:
    """A random image, soft enough to be a JPEG of a usual size."""
    small = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(out, form)
    return out.getvalue()


def make_table(folder: Path, rows: int, urls: bool) -> Path:
    """A CSV of images in folders beside it, or of URLs; four of an object, with a caption in quotation marks."""
    originals = [folder / f"original-{i}.png" for i in range(FILES)]
    for seed, path in enumerate(originals):
        path.write_bytes(picture(seed, 8, "PNG"))
    table = folder / f"{rows}.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "object_id", "caption"])
        for number in range(rows):
            name = f"images/{number // PER_FOLDER:05d}/{number:08d}.png"
            path = folder / name
            if urls:
                name = f"https://pictures.example/{name}"
            elif number % PER_FOLDER == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            if not urls and not path.exists():
                os.link(originals[number % FILES], path)
            writer.writerow([name, f"object {number // 4}", f"a photograph of thing {number}, on a table"])
    return table


def measure(checkout: Path, table: Path, what: str, work: Path) -> dict[str, float]:
    """Processor seconds, seconds and MB of a build, or of its rows alone."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "MMREF_CACHE": str(work / "cache")}
    command = [sys.executable, "-c", IN_PROCESS, str(table), str(work / "set"), what]
    # Python looks for modules in the working directory first.
    done = subprocess.run(command, env=environment, cwd=work, check=True, capture_output=True, text=True)
    shutil.rmtree(work / "set", ignore_errors=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bench_build(args: argparse.Namespace) -> dict[str, Any]:
    """Rows a second of processor time, and MB, by number of rows and checkout."""
    checkouts = {"now": ROOT, **({"before": Path(args.before).resolve()} if args.before else {})}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for rows in sorted(args.rows):
            table = make_table(Path(work), rows, args.urls)
            for what in ("rows",) if args.urls else args.only:
                for name, checkout in checkouts.items():
                    times = measure(checkout, table, what, Path(work))
                    per_second = round(rows / times["seconds"])
                    found[f"{what}, {rows}, {name}"] = {"rows_per_second": per_second, **times}
                    print(f"{what}, {rows:,} rows, {name}: {per_second:,} rows/s, {times}", file=sys.stderr, flush=True)
    return found


def bench_fetch(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of mmref and img2dataset in turns, and their ratio."""
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = Path(work) / "web"
        folder.mkdir()
        for number in range(args.images):
            (folder / f"{number}.jpg").write_bytes(picture(number, args.side, "JPEG"))
        table = Path(work) / "t.csv"
        root = f"http://127.0.0.1:{args.port}"
        lines = [f"{root}/{n}.jpg,{n},a photograph of thing {n},train" for n in range(args.images)]
        table.write_text("\n".join(["image,object_id,caption,split", *lines, ""]))
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(folder), str(args.port)])
        try:
            time.sleep(3)
            rounds = [fetch_round(args, table, Path(work)) for _ in range(args.rounds)]
        finally:
            server.terminate()
            server.wait()
    found: dict[str, Any] = {name: median(each[name] for each in rounds) for name in rounds[0]}
    return {**found, "rounds": rounds}


def fetch_round(args: argparse.Namespace, table: Path, work: Path) -> dict[str, float]:
    """Both commands once: images a second, and processor seconds with all they start."""
    threads = str(args.threads)
    commands = {
        "mmref": [
            sys.executable, "-m", "mmref.cli", "shards", "build", "table", str(table), "--out", str(work / "set"),
            "--workers", "0", "--downloads", threads, "--per-host", threads, "--min-shards", "1",
        ],
        "img2dataset": [
            args.img2dataset, "--url_list", str(table), "--input_format", "csv", "--url_col", "image",
            "--caption_col", "caption", "--output_format", "webdataset", "--output_folder", str(work / "other"),
            "--processes_count", "1", "--thread_count", threads, "--disable_all_reencoding", "True", "--enable_wandb", "False",
        ],
    }  # fmt: skip
    found: dict[str, float] = {}
    for name, command in commands.items():
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "no_proxy": "127.0.0.1"}
        if name == "mmref":
            environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=work)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        found[f"{name} images/s"] = args.images / seconds
        found[f"{name} processor s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    written = json.loads((work / "set" / "manifest.json").read_text())["splits"]["train"]["images"]
    other = sum(json.loads(path.read_text())["successes"] for path in (work / "other").glob("*_stats.json"))
    if (written, other) != (args.images, args.images):
        raise SystemExit(f"of {args.images} images mmref has {written}, img2dataset {other}")
    for folder in ("set", "other"):
        shutil.rmtree(work / folder)
    print(found, file=sys.stderr, flush=True)
    return {**found, "ratio": found["mmref images/s"] / found["img2dataset images/s"]}


def main() -> None:
    """Parses options and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file of the figures")
    parser.add_argument("--work", help="folder for tables and sets (default: that of temporary files)")
    kinds = parser.add_subparsers(dest="kind", required=True)
    build = kinds.add_parser("build")
    build.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    build.add_argument("--before", help="another checkout of mmref")
    build.add_argument("--only", nargs="+", choices=("rows", "set"), default=("rows", "set"))
    build.add_argument("--urls", action="store_true", help="a table of URLs, which are not fetched: rows alone")
    build.set_defaults(run=bench_build)
    fetch = kinds.add_parser("fetch")
    fetch.add_argument("--images", type=int, default=5000)
    fetch.add_argument("--side", type=int, default=128, help="pixels")
    fetch.add_argument("--threads", type=int, default=64)
    fetch.add_argument("--rounds", type=int, default=3)
    fetch.add_argument("--port", type=int, default=18765)
    fetch.add_argument("--img2dataset", required=True, help="its command")
    fetch.set_defaults(run=bench_fetch)
    args = parser.parse_args()
    write_figures(args.run(args), args.out)


if __name__ == "__main__":
    main()

"""Fetches pinned npm packages with the ordinary `npm` client, and reads JSON files out of unpacked ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from typing import Any

from mmref.errors import SourceError
from mmref.storage.locations import cache_folder, sha256_of

TIMEOUT_S = 600


def folder_name(package: str, version: str) -> str:
    """`@scope/name`, `1.2.3` -> `scope-name-1.2.3`: the name `npm pack` gives, without `.tgz`."""
    return f"{package.lstrip('@').replace('/', '-')}-{version}"


def default_cache() -> str:
    return cache_folder("npm")


def fetch(package: str, version: str, cache: str, sha256: str = "") -> str:
    """Folder `<cache>/<name>-<version>/package`, fetched by `npm pack` unless it is there. Raises SourceError, also where the
    archive that comes has another sha256 than the one given."""
    target = os.path.join(cache, folder_name(package, version))
    if os.path.isdir(os.path.join(target, "package")):
        return os.path.join(target, "package")
    if shutil.which("npm") is None:
        raise SourceError(
            f"{package}@{version} is needed and `npm` is not installed. Install Node.js, or unpack the package under "
            f"{target}/package and pass its parent with --packages. (The bundled shard set needs none of this.)"
        )
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        command = ["npm", "pack", "--silent", "--pack-destination", work, f"{package}@{version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"`{' '.join(command)}` did not finish in {TIMEOUT_S} s. Check the network.") from error
        archives = [name for name in os.listdir(work) if name.endswith(".tgz")]
        if done.returncode or not archives:
            raise SourceError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        archive = os.path.join(work, archives[0])
        if sha256 and (found := sha256_of(archive)) != sha256:
            raise SourceError(
                f"{package}@{version} has come with the sha256 {found}, expected {sha256}: it is not the same data."
            )
        unpacked = os.path.join(work, "unpacked")
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        try:
            os.replace(unpacked, target)
        except OSError:
            if not os.path.isdir(os.path.join(target, "package")):  # else another process was faster: same content
                raise
    return os.path.join(target, "package")


def read_json(folder: str, *parts: str) -> Any:
    """Parsed JSON file of a package. Raises SourceError when it is missing or broken."""
    path = os.path.join(folder, *parts)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}. Delete the package folder to fetch it again.") from error

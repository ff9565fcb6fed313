"""Tokens of frozen towers, kept on disk: each image and each caption passes through its tower once.

An entry is found by the SHA-256 of its input, so whatever changes an input (a flip, another size) has an entry of its own; the
file's name is the fingerprint of the tower, so that other weights never find these entries. Tokens are kept in half precision,
and a tower's own answer is rounded alike: a first epoch and a later one see the same numbers. A file grows to its limit, or to
the disk's; what has no place in it is encoded every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmref.errors import StorageError
from mmref.storage.locks import one_at_a_time

log = logging.getLogger("mmref")
OF_NO_EFFECT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}  # in a tower's config

Run = Callable[[Tensor], Tensor]  # rows of the batch to compute (m,) -> their tokens (m, N, w)


class FrozenTokens:
    """Tokens of one tower. Several processes of a node share the files; on a network file system they cannot."""

    def __init__(self, folder: str, tower: nn.Module, limit_gb: float) -> None:
        self.folder, self.tower, self.limit_gb = os.path.expanduser(folder), tower, limit_gb
        self._stores: dict[str, TokenFile] = {}
        self._seen: tuple[int, str] = (-1, "")

    def __call__(self, inputs: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        """Tokens (B, N, w), zero where the mask is.

        Args:
            inputs: (B, ...) what the tower is given, pixels or token ids.
            mask: (B, N) 1 on tokens of a caption; None for images, all of whose tokens are kept.
            run: the tower on some rows of the inputs.
        """
        words = None if mask is None else [row.nonzero()[0] for row in mask.cpu().numpy()]  # the places of each caption's tokens
        rows = inputs.detach().cpu().numpy()
        # What lies behind a caption is no part of it; padding before it may have moved its tokens to other positions.
        keys = [key_of(row if words is None else row[: words[i].max(initial=-1) + 1]) for i, row in enumerate(rows)]
        store = self._store(torch.is_autocast_enabled(inputs.device.type))
        found = store.read(keys)
        missing = {key: i for i, key in enumerate(keys) if key not in found}  # equal inputs once
        if missing:
            with torch.no_grad():
                new = run(torch.tensor(list(missing.values()), device=inputs.device))
            half = new.to("cpu", torch.float16).numpy()
            made = {k: t if words is None else t[words[i]] for (k, i), t in zip(missing.items(), half)}
            store.write(made)
            found |= made
        if words is None:
            return torch.from_numpy(np.stack([found[key] for key in keys])).to(inputs.device, torch.float32)
        tokens = np.zeros((len(keys), inputs.shape[1], found[keys[0]].shape[-1]), np.float16)
        for i, key in enumerate(keys):
            tokens[i, words[i]] = found[key]
        return torch.from_numpy(tokens).to(inputs.device, torch.float32)

    def _store(self, bf16: bool) -> TokenFile:
        """The file of the tower as it is now: weights may have been loaded since the last call."""
        tensors = self.tower.state_dict()
        version = sum(t._version for t in tensors.values())
        if version != self._seen[0]:
            self._seen = version, fingerprint(tensors, described(self.tower))
        name = f"{self._seen[1]}-{'bf16' if bf16 else 'fp32'}.sqlite"
        if name not in self._stores:
            self._stores[name] = TokenFile(os.path.join(self.folder, name), self.limit_gb)
        return self._stores[name]


def key_of(row: np.ndarray) -> bytes:
    """SHA-256 of one input's shape and content."""
    return hashlib.sha256(f"{row.shape} {row.dtype} ".encode() + row.tobytes()).digest()


def described(tower: nn.Module) -> str:
    """What a tower computes with its weights, as far as its modules and their configs say it."""
    configs: list[Any] = [getattr(module, "config", None) for module in tower.modules()]
    found: dict[str, Any] = next((config.to_dict() for config in configs if hasattr(config, "to_dict")), {})
    kept = {key: value for key, value in found.items() if key not in OF_NO_EFFECT}
    return f"{tower!r} {json.dumps(kept, sort_keys=True, default=str)}"


def fingerprint(tensors: dict[str, Tensor], computes: str) -> str:
    """16 hex digits over the names and values of a tower's weights, and over what it `computes` with them."""
    digest = hashlib.sha256(computes.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class TokenFile:
    """Half precision tokens (n, w) by key in one SQLite file of at most `limit_gb`. Raises StorageError."""

    def __init__(self, path: str, limit_gb: float) -> None:
        self.path, self.limit_gb, self.full = path, limit_gb, False
        with self._named_errors():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            # SQLite does not wait for a process that is making the same file: it fails with "database is locked".
            with one_at_a_time(f"{path}.lock"):
                self.connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
                self.connection.execute("CREATE TABLE IF NOT EXISTS tokens (key BLOB PRIMARY KEY, width INT, value BLOB)")
            self.connection.execute("PRAGMA synchronous=OFF")  # a lost entry is computed again
            (page,) = self.connection.execute("PRAGMA page_size").fetchone()
            self.connection.execute(f"PRAGMA max_page_count={max(1, int(limit_gb * 1e9 / page))}")

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the cache of frozen features {self.path} fails: {error}. Remove the file (it is made again), free space, or "
                "set `model.feature_cache` to another folder of this node's own disk."
            ) from error

    def read(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The tokens that are there."""
        wanted = list(set(keys))
        marks = ",".join("?" * len(wanted))
        with self._named_errors():
            rows = self.connection.execute(f"SELECT key, width, value FROM tokens WHERE key IN ({marks})", wanted)
            return {key: np.frombuffer(value, np.float16).reshape(-1, width) for key, width, value in rows}

    def write(self, tokens: dict[bytes, np.ndarray]) -> None:
        """Add tokens, all or none; another process may have been faster. Once they do not fit, none are added any more."""
        if self.full:
            return
        rows = [(key, t.shape[-1], t.tobytes()) for key, t in tokens.items()]
        with self._named_errors():
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                self.connection.executemany("INSERT OR IGNORE INTO tokens VALUES (?, ?, ?)", rows)
                self.connection.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                    raise
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                self.full = True
                log.warning(
                    "%s is full (`model.feature_cache_gb` is %s, or its disk has no space): what is not in it is encoded "
                    "every time.", self.path, self.limit_gb,
                )  # fmt: skip

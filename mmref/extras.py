"""Parts of mmref that are installed apart, by the extra that brings them, and the error where one is not here.

This module imports none of their packages: `--help` of every command, search, evaluation and indexing do without.
"""

from __future__ import annotations

import importlib.util

from mmref.errors import ExtraMissingError

# Packages by which an extra of pyproject.toml is known, as they are imported.
EXTRAS = {
    "train": ("ray", "deepspeed", "tensorboard"),
    "tune": ("ray", "deepspeed", "optuna", "rich"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "replicas": ("ray", "grpc_reflection"),
    "lora": ("peft",),
    "hub": ("huggingface_hub",),
    "emoji": ("resvg_py",),
    "lancedb": ("lancedb",),
    "qdrant": ("qdrant_client",),
    "pgvector": ("psycopg", "pgvector"),
}


def missing(extra: str, *packages: str) -> list[str]:
    """Packages of an extra that are not installed here, of those named, or of all by which it is known."""
    return [package for package in packages or EXTRAS[extra] if not is_installed(package)]


def is_installed(package: str) -> bool:
    """Whether a package can be imported: a folder of its name where a command is started, as `wandb/`, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def need(extra: str, what: str, *packages: str, otherwise: str = "") -> None:
    """Raise ExtraMissingError where an extra is not installed.

    Args:
        what: needs it, as the message begins: "mmref train".
        packages: those that are needed, by default all by which the extra is known.
        otherwise: what can be done without it, a sentence.
    """
    if absent := missing(extra, *packages):
        raise ExtraMissingError(
            f"{what} needs the extra `{extra}`, and {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not "
            f"installed here: pip install 'mmref[{extra}]'.{' ' if otherwise else ''}{otherwise}"
        )

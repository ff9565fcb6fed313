"""`mmref push`: a run's best model, or an export, as a repository on a hub of models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mmref.errors import ExportError
from mmref.export.card import on_hub
from mmref.export.write import export_run
from mmref.storage.hub import SCHEME, check_may_push, parse_hub, push_folder
from mmref.storage.locations import is_url

CARD, WEIGHTS = "README.md", "model.safetensors"


def push(model: str, place: str, data: str | None = None, private: bool = False, message: str | None = None) -> str:
    """Send a model to a repository, which is made where there is none.

    Args:
        model: run directory of `mmref train`, which is exported first, or a folder of `mmref export`.
        place: `user/repo`, or `user/repo@branch` for a branch that is there.
        data: the run's shard set, by default where its config says.
        private: whether a new repository is.
        message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        HubError: a wrong name, or the hub fails. HubTokenError, HubUnreachableError. ExportError: the run is not evaluated, or
            `model` is neither a run nor an export.
    """
    check_may_push(place)  # before minutes are spent on an export
    repo, _ = parse_hub(place)
    with tempfile.TemporaryDirectory(prefix="mmref-push-") as folder:
        exported = Path(model)
        if is_url(model) or not (exported / WEIGHTS).exists():
            if not is_url(model) and not (exported / "config.yaml").exists():
                raise ExportError(f"{model} is neither a run directory of `mmref train` nor a folder of `mmref export`.")
            exported = export_run(model, f"{folder}/{repo.rpartition('/')[2]}", data)
        if not (exported / CARD).exists():
            raise ExportError(f"{exported} has no {CARD}: export the run again.")
        sent = Path(folder) / "sent"
        _mirror(exported, sent)
        (sent / CARD).unlink()
        (sent / CARD).write_text(on_hub((exported / CARD).read_text("utf-8"), repo), "utf-8")
        return push_folder(str(sent), f"{SCHEME}{place.removeprefix(SCHEME)}", message or "Model of mmref", private)


def _mirror(folder: Path, target: Path) -> None:
    """A folder of links to the files of another: the card differs on the hub, and weights need no second copy."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            link = target / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), link)

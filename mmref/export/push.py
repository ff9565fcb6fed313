"""`mmref push`: a run's best model, or an export, as a repository on a hub of models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mmref.errors import ExportError
from mmref.export.card import on_hub
from mmref.export.write import export_run
from mmref.run.models import find_model
from mmref.storage.hub import SCHEME, check_may_push, parse_hub, push_folder
from mmref.storage.locations import is_url

CARD = "README.md"


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
            `model` is neither a run nor an export. ModelError: nothing can be told of its folder.
    """
    check_may_push(place)  # before minutes are spent on an export
    repo, branch = parse_hub(place)
    found = find_model(model) if is_url(model) or os.path.isdir(model) else None
    if found is None or found.kind == "pretrained":
        raise ExportError(f"{model} is neither a run directory of `mmref train` nor a folder of `mmref export`.")
    with tempfile.TemporaryDirectory(prefix="mmref-push-") as folder:
        name = f"{folder}/{repo.rpartition('/')[2]}"
        exported = Path(found.place) if found.kind == "export" else export_run(found.place, name, data)
        if not (exported / CARD).exists():
            raise ExportError(f"{exported} has no {CARD}: export the run again.")
        sent = Path(folder) / "sent"
        _mirror(exported, sent)
        (sent / CARD).unlink()
        (sent / CARD).write_text(on_hub((exported / CARD).read_text("utf-8"), repo, branch), "utf-8")
        return push_folder(str(sent), f"{SCHEME}{place.removeprefix(SCHEME)}", message or "Model of mmref", private)


def _mirror(folder: Path, target: Path) -> None:
    """A folder of links to the files of another: the card differs on the hub, and weights need no second copy."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            link = target / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), link)

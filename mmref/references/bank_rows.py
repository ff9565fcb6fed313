"""Objects added to, and removed from, the references of a trained run; what `mmref references` does.

Checkpoints stay complete throughout: new files are written beside the old ones, one replacement of meta.json makes them
count, and then the old ones go. A command that was interrupted is repeated.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from markupsafe import escape
from torch import Tensor

from mmref.cluster.resources import workers_that_fit
from mmref.config import Config, dump_yaml
from mmref.data.shard_set import ShardSet
from mmref.errors import ReferencesError, ShardSetError
from mmref.evaluate.evaluation import open_run
from mmref.evaluate.report import EXPLANATIONS
from mmref.evaluate.split_features import SplitFeatures, embed_splits
from mmref.model.reference_rows import warm_rows
from mmref.run.checkpoints import FOLDER, CheckpointInfo, best_checkpoint, checkpoint_folders, fetched, list_checkpoints
from mmref.run.directory import RunDir
from mmref.run.models import START
from mmref.run.row_file import RowFile, StoredReferences, are_set, pack_ids, row_files
from mmref.run.tensor_files import write_file

REPORTS = (".json", ".html")


def describe(run_dir: str, object_ids: Iterable[str] = ()) -> list[str]:
    """Lines on the references of a run's checkpoints, and on single objects."""
    run, _, best = open_run(run_dir)
    lines = []
    for info in list_checkpoints(run):
        with fetched(run, info, "references") as folder, row_files(folder, info.meta) as files:
            seen = are_set(StoredReferences(folder, info.meta))
            row_of = {name: row for row, name in enumerate(n for file in files for n in file.object_ids.to_pylist())}
        bank, size = info.meta["bank"], sum(file["bytes"] for file in info.files(("references",)).values())
        gone = f"; {info.meta['removed']} objects removed" if info.meta.get("removed") else ""
        lines.append(
            f"{info.folder}{' (best)' if info.folder == best.folder else ''}: {len(seen)} objects x {bank['per_object']} "
            f"references of width {bank['dim']}, {seen.sum()} of them set, {size / 1e6:.1f} MB{gone}"
        )
        for name in object_ids:
            state = "not there" if name not in row_of else "set" if seen[row_of[name]] else "there, not set yet"
            lines.append(f"  {name}: {state}")
    return lines


# -- adding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Added:
    """What `add_objects` did."""

    folder: str  # the checkpoint, inside the run
    objects: int
    known: int  # had references already, and keep them
    empty: int  # without a usable image or caption


def add_objects(
    run_dir: str, data: str, split: str = "train", workers: int | None = None, per_object: int | None = None
) -> Added:
    """Give the objects of a shard set references in a run's best checkpoint: means of their features by its encoders, with
    several references of an object those of groups of them.

    Args:
        run_dir: run directory of `mmref train`, not training meanwhile.
        data: shard set that holds the new objects; those that the run knows already keep their references.
        split: the split taken.
        workers: Ray actors that compute features, 0 for this process; by default as in `evaluate_run`.
        per_object: references of each object, for a run without any so far; by default `reference.per_object` of its config.

    Raises:
        ReferencesError: no object is new, the run trains no references, or its objects cannot have `per_object` of them.
        RunDirectoryError: the run is being trained, or another command changes its references.
    """
    run, config, _ = open_run(run_dir, data)
    shards = ShardSet.open(data)
    if split not in shards.splits:
        raise ShardSetError(f"{data} has no split `{split}`, only {shards.splits}.")
    if workers is not None:
        config.eval.workers = workers_that_fit(workers)
    with run.held():
        return _add(run, config, shards, split, per_object)


def _add(run: RunDir, config: Config, shards: ShardSet, split: str, per_object: int | None) -> Added:
    info = best_checkpoint(run)
    if per_object is not None:
        _check_per_object(run, config, info, per_object)
        config.reference.per_object = per_object
    object_ids = list(shards.index(split).object_ids)
    with fetched(run, info, "references") as folder, row_files(folder, info.meta) as files:
        known = {name for file in files for name in file.object_ids.to_pylist()}
    new = [row for row, name in enumerate(object_ids) if name not in known]
    if not new or not config.loss.uses_references:
        found = "all have references" if not new else "this run trains none (its `loss` has no weight on them)"
        raise ReferencesError(
            f"{len(object_ids)} objects in {split} of {shards.root}, and {found}: nothing to add to {run.path}."
        )
    features = embed_splits(config, run, info, shards.root, [split])[split]
    rows = rows_of(features, new, config)
    usable = (rows.abs().amax((1, 2)) > 0).nonzero()[:, 0].tolist()
    if not usable:
        raise ReferencesError(f"none of the {len(new)} new objects in {shards.root} has a usable image or caption.")
    if per_object is not None:
        _check_all_used(rows, config)
        _keep_per_object(run, per_object)
    append_rows(run, info, [object_ids[new[i]] for i in usable], rows[usable])
    return Added(info.folder, len(usable), len(object_ids) - len(new), len(new) - len(usable))


def _check_per_object(run: RunDir, config: Config, info: CheckpointInfo, per_object: int) -> None:
    """Raise ReferencesError where the objects of a run cannot have so many references each."""
    bank = info.meta["bank"]
    if per_object < 1:
        raise ReferencesError(f"{per_object} references for each object: give at least 1.")
    if bank["objects"] and bank["per_object"] != per_object:
        raise ReferencesError(
            f"{per_object} references for each object: the {bank['objects']} objects of {run.path} have {bank['per_object']}, "
            "and all must have as many. Leave the number out; for another one begin a run of the model in a new `--run_dir`, or "
            "train with `reference.per_object`."
        )
    if config.reference.assign == "modality" and per_object % 2:
        raise ReferencesError(
            f"{per_object} references for each object: {run.path} has `reference.assign: modality`, one half of them of images "
            "and one half of captions. Give an even number."
        )


def _check_all_used(rows: Tensor, config: Config) -> None:
    """Raise ReferencesError where no object has as many different features as references (n, K, d) were asked for."""
    used = rows.abs().amax(2) > 0  # (n, K)
    parts = [used[:, 0::2], used[:, 1::2]] if config.reference.assign == "modality" and used.shape[1] > 1 else [used]
    most = len(parts) * max(int(part.sum(1).max()) for part in parts)
    if most < used.shape[1]:
        raise ReferencesError(
            f"{used.shape[1]} references for each object: the images and captions of no object make more than {most}. Give at "
            "most that."
        )


def _keep_per_object(run: RunDir, per_object: int) -> None:
    """Let the run's config say how many references an object has. It is written before the checkpoint: where the command is
    interrupted in between, the checkpoint has no object yet, and the next one adds as many."""
    config = run.read_config()
    if config.reference.per_object != per_object:
        config.reference.per_object = per_object
        run.write_text("config.yaml", dump_yaml(config))


def rows_of(features: SplitFeatures, objects: list[int], config: Config) -> Tensor:
    """References (n, K, d) of some objects of an embedded split."""
    image, texts = torch.from_numpy(features.image), torch.from_numpy(features.text)
    of_image, of_text = (_members(x, len(features.index.object_ids)) for x in (features.image_objects, features.queries.objects))
    r = config.reference
    made = [
        warm_rows(image[of_image[row]], texts[features.queries.text[of_text[row]]], r.per_object, r.assign) for row in objects
    ]
    rows = torch.stack(made)
    # Rows learned by gradient are unit vectors.
    return torch.nn.functional.normalize(rows, dim=-1) if r.update == "gradient" else rows


def _members(objects: Any, count: int) -> list[Any]:
    """For each object row the positions at which it stands."""
    order = torch.from_numpy(objects).argsort(stable=True)
    return list(order.split(torch.from_numpy(objects).bincount(minlength=count).tolist()))


def append_rows(run: RunDir, info: CheckpointInfo, object_ids: list[str], rows: Tensor) -> None:
    """Add references (n, K, d) to a checkpoint as a file of their own, with fresh optimizer state where there is any.

    In a checkpoint without objects they take the place of its empty files, which may be of another K.
    """
    with fetched(run, info, "references") as folder, row_files(folder, info.meta) as files:
        last = files[-1]
        like = {name: last.read(name, 0, 0) for name in last.names}
        first = last.first + len(last)
        empty = {file.name for file in files if not len(file)}
    tensors = {name: torch.zeros(len(rows), *t.shape[1:], dtype=t.dtype) for name, t in like.items()}
    tensors["rows"] = rows.to(like["rows"].dtype).contiguous()
    ids = pack_ids(pa.array(object_ids, pa.large_string()))
    name = _new_name()
    kept = {known: file for known, file in info.meta["files"].items() if known not in empty}
    listed = {**kept, name: write_file(run, f"{info.folder}/{name}", tensors | ids, first)}
    info.meta["bank"]["per_object"] = rows.shape[1]
    _replace_meta(run, info, listed, len(object_ids))
    _clear(run, info, listed)


# -- removing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removed:
    """What `remove_objects` did."""

    objects: int
    checkpoints: int  # complete ones that held any of them
    unfinished: int  # folders of interrupted checkpoints, deleted
    reports: list[str]  # files of the run that named one of them: reports deleted, entries of lists dropped


def remove_objects(run_dir: str, object_ids: Iterable[str]) -> Removed:
    """Remove references and optimizer state of objects from every checkpoint of a run, and their ids from its files.

    The run must not be training meanwhile. Only the number of removed objects is kept.

    Raises:
        ReferencesError: some object is in no checkpoint (the others are removed), or no reference would be left.
        CheckpointError: a checkpoint is damaged; remove its folder and repeat.
        RunDirectoryError: the run is being trained, or another command changes its references.
    """
    run = RunDir(run_dir)
    run.read_config()
    with run.held():
        return _remove_everywhere(run, set(object_ids))


def _remove_everywhere(run: RunDir, wanted: set[str]) -> Removed:
    complete = list_checkpoints(run)
    for info in complete:  # all before the first is changed
        _check_some_left(run, info, wanted)
    unfinished = set(checkpoint_folders(run)) - {i.folder.rsplit("/", 1)[-1] for i in complete}
    for name in unfinished:
        run.remove(f"{FOLDER}/{name}")
    run.remove(START)  # an interrupted training makes it anew
    found = [_remove(run, info, wanted) for info in complete]
    reports = [name for name in run.list("") if name.endswith(REPORTS) and _strike(run, name, wanted)]
    known = set().union(*found)
    for name in run.list(""):
        if name.split("-")[0] == EXPLANATIONS:  # pictures, in which no name can be looked for
            run.remove(name)
            reports.append(f"{name}/")
    if missing := wanted - known:
        raise ReferencesError(
            f"{len(missing)} of {len(wanted)} objects have no references in any of the {len(complete)} checkpoints of "
            f"{run.path}, e.g. {min(missing)!r}; {len(known)} were removed. `mmref references info --object ID` looks for one."
        )
    return Removed(len(known), sum(map(bool, found)), len(unfinished), reports)


def _remove(run: RunDir, info: CheckpointInfo, wanted: set[str]) -> set[str]:
    """Remove objects from one checkpoint; which of them it held."""
    unwanted = pa.array(sorted(wanted), pa.large_string())
    listed, found = dict(info.meta["files"]), set()
    with fetched(run, info, "references") as folder, row_files(folder, info.meta) as files:
        masks = [pc.is_in(file.object_ids, value_set=unwanted) for file in files]
        gone = sum(pc.sum(mask).as_py() or 0 for mask in masks)
        for file, mask in zip(files, masks):
            if not pc.any(mask).as_py():
                continue
            found |= set(file.object_ids.filter(mask).to_pylist())
            name, tensors = _new_name(), _kept(file, pc.invert(mask))
            listed[name] = write_file(run, f"{info.folder}/{name}", tensors, file.first)
            del listed[file.name]
    if found:
        _replace_meta(run, info, listed, -gone)
    _clear(run, info, listed)
    return found


def _check_some_left(run: RunDir, info: CheckpointInfo, wanted: set[str]) -> None:
    unwanted = pa.array(sorted(wanted), pa.large_string())
    with fetched(run, info, "references") as folder, row_files(folder, info.meta) as files:
        if all(pc.all(pc.is_in(file.object_ids, value_set=unwanted)).as_py() for file in files):
            raise ReferencesError(f"no reference would be left in {run.join(info.folder)}: delete the run instead.")


def _clear(run: RunDir, info: CheckpointInfo, listed: Iterable[str]) -> None:
    """Delete files that count no longer, also those of an interrupted change; a rank's own list of files serves nothing once
    meta.json is there."""
    for name in set(run.list(info.folder)) - set(listed) - {"meta.json"}:
        run.remove(f"{info.folder}/{name}")


def _kept(file: RowFile, keep: pa.BooleanArray) -> dict[str, Tensor]:
    at = torch.from_numpy(keep.to_numpy(zero_copy_only=False)).nonzero()[:, 0]
    ids = pa.concat_arrays([file.object_ids.filter(keep)])
    return {name: file.read(name)[at].contiguous() for name in file.names} | pack_ids(ids)


def _strike(run: RunDir, name: str, wanted: set[str]) -> bool:
    """Whether a report or list of the run named one of the objects. A page is deleted, entries of lists are dropped."""
    text = run.read_text(name)
    if name.endswith(".html"):
        # A report marks what it shows of an object with its id. Older ones showed the id: in a <div>, or in a sentence.
        marks = ['data-object="{}"'] if "data-object=" in text else ["<div>{}</div>", "object {}; first"]
        shown = any(mark.format(escape(i)) in text for i in wanted for mark in marks)
        if shown:
            run.remove(name)
        return shown
    # Image ids hold the object's in many ways (a/thing.7.png, thing.7_0), so that only letters and digits go on with an id:
    # rather an entry of another object than one that tells of a removed object.
    named = re.compile(r"(?<![^\W_])(" + "|".join(re.escape(i) for i in sorted(wanted)) + r")(?![^\W_])")
    before = run.read_json(name)
    after = _without(before, named)
    if after != before:
        run.write_text(name, json.dumps(after, indent=1))
    return bool(after != before)


def _without(value: Any, named: re.Pattern[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, named) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, named) for item in value if not (isinstance(item, str) and named.search(item))]
    return value


def _new_name() -> str:
    return f"references-{uuid.uuid4().hex[:8]}.safetensors"


def _replace_meta(run: RunDir, info: CheckpointInfo, files: dict[str, Any], more: int) -> None:
    """Let a checkpoint consist of other files, by one replacement of meta.json; `more` objects than before."""
    bank = {**info.meta["bank"], "objects": info.meta["bank"]["objects"] + more}
    meta = {**info.meta, "files": files, "bank": bank, "removed": info.meta.get("removed", 0) + max(-more, 0)}
    run.write_text(f"{info.folder}/meta.json", json.dumps(meta, indent=1))

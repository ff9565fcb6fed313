"""Explanations as pictures, explain/<name>.png, and as a section of the run's report, kept as explain/<checkpoint>.html; of
another shard set or split than the run's own in explain-<view>/ and report-<view>.html."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from mmref.evaluate.report import explanations_folder, report_path, section_path, with_section
from mmref.explain.explained_run import Explanation
from mmref.explain.figure import draw, written
from mmref.explain.fonts import fonts_for
from mmref.run.directory import RunDir
from mmref.terminal.progress import say

OWN = re.compile(r"\d+-(query|object)-[\w-]+\.png|step-[\w-]+\.html")  # names of pictures and sections
CAPTIONS = 6  # of an object, shown beside the words of its reference


def write(run: RunDir, checkpoint: str, explanations: Sequence[Explanation], view: str = "") -> list[str]:
    """Write pictures and section into the run directory, in place of earlier ones, and into its report. The files written; others
    in that folder stay.

    view: what is explained, as of `evaluation.view_of`.
    """
    folder, report = explanations_folder(view), report_path(view)
    pictures = [draw(e) for e in explanations]
    _, missing = fonts_for("".join(map(written, explanations)))
    if missing:
        fix = "install one that has them, such as Noto Sans CJK. The text beside the pictures has them all"
        say(f"no font here has {len(missing)} letters of the pictures ({missing[:10]}), which show boxes in their place: {fix}.")
    names = [f"{folder}/{i}-{e.kind}-{slug(e.title)}.png" for i, e in enumerate(explanations, 1)]
    for name, picture in zip(names, pictures):
        run.write_bytes(name, picture)
    section = render(explanations, pictures)
    run.write_text(section_path(checkpoint, view), section)
    for name in {f"{folder}/{n}" for n in run.list(folder) if OWN.fullmatch(n)} - {
        *names,
        section_path(checkpoint, view),
    }:
        run.remove(name)  # when the new ones are there
    if run.exists(report):
        run.write_text(report, with_section(run.read_text(report), section))
        names.append(report)
    return [run.join(name) for name in names]


def slug(title: str) -> str:
    """A title as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")[:40].rstrip("-") or "untitled"


def render(explanations: Sequence[Explanation], pictures: Sequence[bytes]) -> str:
    """The section as HTML that loads nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = [(e, distinct(e.captions), base64.b64encode(p).decode("ascii")) for e, p in zip(explanations, pictures)]
    return environment.get_template("section.html.j2").render(shown=shown)


def distinct(captions: Sequence[str]) -> list[str]:
    """The first different captions, evenly taken from all."""
    found = list(dict.fromkeys(captions))
    step = max(1, len(found) // CAPTIONS)
    return found[::step][:CAPTIONS]

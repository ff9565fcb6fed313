"""The report of a run: one self-contained HTML file, and the same table as plain text for the terminal.

`metrics` is what `metrics.json` holds (docs/run-directory.md), with optional parts that appear when they are there:
"image_to_text" and each kind in "by_caption_kind" are blocks like the top level ("initial", "refined", "ci95");
"image_to_image" and "captions_as_one" of `protocols.Protocol.scores`; "ci95_initial" beside "ci95"; "refinement_gain" from
`bootstrap.paired_difference`; "skipped", a list of messages; "best_on_test" from `evaluation.best_on_test`; "start" from
`evaluation.start_metrics`; "class_protocol", {"initial": {name: percent}, "refined": ...}; "ambiguity" of
`ambiguity.ambiguity`; "by_object", {"initial": {"R@1": percent, ...}, "refined": ...}; "refinement"["tried"], the table of
`refinement.choose_refinement`.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from mmref.evaluate.few_objects import few_objects
from mmref.evaluate.metrics import FURTHER_METRICS, MAIN_METRICS
from mmref.evaluate.plotting import FAINT, axes_of, legend, own_style, to_svg
from mmref.losses.objective import LOSSES, TOTAL

_VAL_STYLES = (("#010000", "o", "-"), ("#020000", "s", "--"), ("#030000", "^", "-."), ("#040000", "D", ":"))
_SMOOTH_ABOVE = 60  # log lines from which a curve is drawn as a rolling mean
_TRIED_SHOWN = 12
EXPLANATIONS = "explain"  # folder of a run; explain-<view> of another set or split
EXPLAINED, JUDGED = "explanations", "judgements"  # sections that a report gets after it was written, by the comments around them


def metrics_path(view: str = "") -> str:
    """Where a run keeps the metrics of an evaluation, by `evaluation.view_of`."""
    return f"metrics-{view}.json" if view else "metrics.json"


def report_path(view: str = "") -> str:
    """Where a run keeps the report of an evaluation, by `evaluation.view_of`."""
    return f"report-{view}.html" if view else "report.html"


def explanations_folder(view: str = "") -> str:
    """Where a run keeps what `mmref explain` wrote, by `evaluation.view_of`."""
    return f"{EXPLANATIONS}-{view}" if view else EXPLANATIONS


def section_path(checkpoint: str, view: str = "") -> str:
    """Where in that folder the section on a checkpoint (its folder) lies."""
    return f"{explanations_folder(view)}/{checkpoint.rsplit('/', 1)[-1]}.html"


def with_section(report: str, section: str, kind: str = EXPLAINED) -> str:
    """A report with a section, EXPLAINED or JUDGED, in place of an earlier one."""
    opening, closing = f"<!-- {kind} -->", f"<!-- end of {kind} -->"
    start, end = report.find(opening), report.find(closing)
    if start < 0 or end < 0:  # written by an older version
        return report
    return report[: start + len(opening)] + "\n" + section + report[end:]


def rendered(template: str, **values: Any) -> str:
    """A part of a page by its template."""
    return _environment().get_template(template).render(**values)


@own_style()
def render_report(
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    opening: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    title: str,
    config: Mapping[str, Any],
) -> str:
    """The report as HTML that loads nothing from anywhere.

    Args:
        metrics: as described at the top of this file.
        history: lines of metrics.jsonl, training lines {"step", "loss", ...} and val lines
            {"step", "val_R@1", ...} mixed.
        opening: {"moves": as of `examples.count_moves`, "examples": those at the top of the page}.
        examples: further ones, [{"query", "kind", "object_id", "label", "rank_before", "rank_after", "before": [result, ...],
            "after": [result, ...]}]: what its object is called, and ranks of the first right result, 0 where there is none. A
            result is {"image": bytes, "ext", "object_id", "label", "image_id", "score", "hit"}, best first.
        title: headline of the page.
        config: the resolved config; values that JSON does not know are shown as text.
    """
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            metrics=metrics,
            names=MAIN_METRICS,
            further_names=FURTHER_METRICS,
            directions=_directions(metrics),
            further_rows=_further_rows(metrics),
            start_rows=_start_rows(metrics),
            kinds=metrics.get("by_caption_kind") or {},
            refinement=_describe_refinement(metrics),
            other_refinements=_other_refinements(metrics),
            excluded=excluded(metrics),
            ambiguous=ambiguous(metrics),
            few=few_objects(metrics.get("n_references", 0)),
            tried=_best_tried(metrics.get("refinement") or {}),
            loss_figure=_loss_figure(history),
            val_figure=_val_figure(history),
            opening=[_example(example, metrics["n_gallery"]) for example in opening["examples"]],
            moves=_moves_in_words(opening["moves"], len(opening["examples"])),
            examples=[_example(example, metrics["n_gallery"]) for example in examples],
            strip_width=_longest(examples),
            row_width=_longest(opening["examples"]),
            skipped=metrics.get("skipped") or [],
            training_speed=_training_speed(history),
            config=yaml.safe_dump(json.loads(json.dumps(dict(config), default=str)), sort_keys=False, allow_unicode=True),
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "count": _count, "signed": _signed, "interval": _interval}
    environment.globals["relation"] = _relation
    return environment


class Metrics(dict[str, Any]):
    """Metrics as of metrics.json, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        """Both directions before and after refinement, with 95 % intervals; text is escaped."""
        return (
            _environment()
            .get_template("metrics.html.j2")
            .render(
                metrics=self,
                names=MAIN_METRICS,
                directions=_directions(self),
                refinement=_describe_refinement(self),
                excluded=excluded(self),
            )
        )


def format_table(metrics: Mapping[str, Any]) -> str:
    """The metrics as aligned plain text, without a trailing newline."""
    kinds = metrics.get("by_caption_kind") or {}
    lines: list[tuple[str, Mapping[str, Any] | None]] = [("", None)]
    for place, (label, block) in enumerate(_directions(metrics)):
        lines.append((label, None))
        if not place:
            lines += [(f"  {name}", scores) for name, scores, _ in _start_rows(metrics)]
        lines += [("  initial", block["initial"]), ("  refined", block["refined"])]
        if block["ci95"]:
            lines.append(("    95 % interval", {k: _interval(v, "-") for k, v in block["ci95"].items()}))
    if kinds:
        lines.append(("refined, by caption kind", None))
        lines += [(f"  {kind} ({_count(block['n_queries'])})", block["refined"]) for kind, block in kinds.items()]
    cells = [(label, _text_cells(values)) for label, values in lines]
    cells[0] = ("", list(MAIN_METRICS))
    table = _aligned(cells)
    if further := _further_rows(metrics):
        table += _aligned(
            [("", list(FURTHER_METRICS)), *((label, _text_cells(row, FURTHER_METRICS)) for label, row, _ in further)]
        )
    for state, values in (metrics.get("by_object") or {}).items():
        table.append(f"by object, {state}: " + ", ".join(f"{name} {_number(value)}" for name, value in values.items()))
    table.append(
        f"{metrics['split']}: {_count(metrics['n_queries'])} queries, {_count(metrics['n_gallery'])} gallery images, "
        f"{_count(metrics['n_objects'])} objects; percent{excluded(metrics)}"
    )
    if said := ambiguous(metrics):
        table.append(said)
    table.append("refinement: " + _describe_refinement(metrics))
    table += [f"refinement, {label}: {how}" for label, how in _other_refinements(metrics)]
    if few := few_objects(metrics.get("n_references", 0)):
        table.append(f"note: {few}")
    if best := metrics.get("best_on_test"):
        chosen = ", ".join(f"{name} {_number(best[name])}" for name in ("R@1", "mAP"))
        table.append(f"best on test, chosen on test as some papers do (step {_count(best['step'])}, before refinement): {chosen}")
    for state, values in (metrics.get("class_protocol") or {}).items():
        table.append(f"by class, {state}: " + ", ".join(f"{name} {_number(value)}" for name, value in values.items()))
    if skipped := metrics.get("skipped"):
        table.append(f"skipped samples: {_count(len(skipped))}")
    return "\n".join(table)


def _aligned(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lines of a table: labels to the left, cells to the right. A label without cells makes no column wider."""
    first = max(len(label) for label, cells in rows if cells)
    width = 2 + max(len(cell) for _, cells in rows for cell in cells)
    return [(f"{label:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip() for label, cells in rows]


def _text_cells(values: Mapping[str, Any] | None, names: Sequence[str] = MAIN_METRICS) -> list[str]:
    if values is None:
        return []
    return [v if isinstance(v := values.get(name), str) else _number(v) for name in names]


def _directions(metrics: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(direction, its block) with every optional part present, None where there is nothing."""
    optional = ("ci95", "ci95_initial", "refinement_gain")
    blocks = {"text to image": metrics, "image to text": metrics.get("image_to_text")}
    blocks |= dict(_protocols(metrics))
    return [
        (label, {"initial": block["initial"], "refined": block["refined"]} | {key: block.get(key) for key in optional})
        for label, block in blocks.items()
        if block
    ]


def _protocols(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(label, block) of the other kinds of queries that were asked."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    if block := metrics.get("image_to_image"):
        camera = f", without images by the same {block['same_camera']}" if block["same_camera"] else ""
        alone = f", {_count(block['n_excluded'])} of them without a hit to find" if block["n_excluded"] else ""
        found.append((f"image to image{camera} ({_count(block['n_queries'])} queries{alone})", block))
    if block := metrics.get("captions_as_one"):
        counts = (
            f"{_count(block['n_queries'])} queries of {_number(block['n_captions'] / block['n_queries'])} captions on average"
        )
        found.append((f"text to image, the captions of each {block['of']} as one query ({counts})", block))
    return found


def _further_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float], Mapping[str, Any]]]:
    """(direction and state, scores, intervals) of FURTHER_METRICS; [] for metrics of a version that did not have them."""
    found = []
    for label, block in _directions(metrics):
        for state, intervals in (("initial", "ci95_initial"), ("refined", "ci95")):
            if FURTHER_METRICS[0] in block[state]:
                found.append((f"{label.split(' (')[0]}, {state}", block[state], block[intervals] or {}))
    return found


def _other_refinements(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, its refinement in words) of the other kinds of queries."""
    has_val = (metrics.get("refinement") or {}).get("chosen_on") == "val"  # on which that of the captions was chosen
    return [
        (label.split(" (")[0], _describe_refinement({**metrics, "refinement": block["refinement"]}, has_val))
        for label, block in _protocols(metrics)
    ]


def _start_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float], Mapping[str, Any]]]:
    """(name, scores, intervals) of what training started from: one row, and one of its refinement where it has any."""
    start = metrics.get("start")
    if not start:
        return []
    rows = [("before training", start["initial"], start["ci95_initial"])]
    if start["refined"] != start["initial"]:
        rows.append(("before training, refined", start["refined"], start["ci95"]))
    return rows


def _number(value: float | None, digits: int = 1) -> str:
    """Fixed digits; a dash for what is missing or not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _signed(value: float, digits: int = 1) -> str:
    """With its sign, a true minus, and no sign at all on what rounds to zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return "±" + text
    return ("+" if value > 0 else "−") + text


def _interval(bounds: Sequence[float] | None, dash: str = "–") -> str:
    return "" if not bounds else f"{_number(bounds[0])}{dash}{_number(bounds[1])}"


def _relation(initial: Mapping[str, float], refined: Mapping[str, float], name: str) -> str:
    """Signed change of a metric, empty where either value is missing."""
    before, after = initial.get(name), refined.get(name)
    return "" if before is None or after is None else _signed(after - before)


def excluded(metrics: Mapping[str, Any]) -> str:
    """Words on the queries that count in no mean, "" where there are none."""
    count = metrics.get("n_excluded")
    return f"; {_count(count)} of the queries have no image in the gallery and count in no mean" if count else ""


def ambiguous(metrics: Mapping[str, Any]) -> str:
    """Words on the captions that several objects share, "" for metrics of a version that did not count them."""
    found = metrics.get("ambiguity")
    if not found:
        return ""
    ceiling, guessing = _number(found["ceiling"]), _number(found["guessing"])
    return (
        f"ceiling of R@1: {ceiling}, as {_count(found['n_same'])} captions are those of several objects word for word; "
        f"{_count(found['n_fitting'])} fit several by their words, and guessing among these gives {guessing}"
    )


def _describe_refinement(metrics: Mapping[str, Any], has_val: bool = False) -> str:
    """The settings in words. has_val: there was a val split, so that settings not chosen had nothing there to be chosen by."""
    refinement, images = metrics.get("refinement") or {}, metrics["n_gallery"]
    if not refinement:
        return "none"
    on = refinement.get("chosen_on")
    chosen_on = f"; chosen on {on}" if on else ""
    if on and on == metrics["split"]:
        chosen_on += ", the split reported: optimistic"
    if not refinement.get("weight"):
        if on == "":
            lacking = "no such query on val has anything to find" if has_val else "there is no val split to choose it on"
            return f"none: {lacking}"
        # The other kinds of queries do not keep what was tried: without references it was nothing.
        tried = [] if metrics.get("n_references") == 0 else refinement.get("tried", [{"weight": 1}])
        if on == "val" and not any(row["weight"] for row in tried):
            return "none: there was no setting to try"
        return f"declined: no setting beat the initial ranking{chosen_on}"
    if refinement.get("kind", "sparse") == "dense":
        code = "dense similarities to all references, centred per modality"
    else:
        code = f"softmax over the {refinement['top_r']} nearest references, temperature {refinement['tau']:g}"
        if refinement.get("kind") == "expansion":
            code = f"queries expanded by a {code}"
    top_p = refinement.get("top_p") or images
    scope = f"the first {_count(top_p)} candidates" if top_p < images else "all candidates"
    return f"{code}; weight {refinement['weight']:g} on {scope}{chosen_on}"


def _best_tried(refinement: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The best settings tried, and the initial ranking wherever it came."""
    ordered = sorted(refinement.get("tried") or [], key=lambda row: -row["objective"])
    return [row for place, row in enumerate(ordered) if place < _TRIED_SHOWN or not row["weight"]]


def _longest(examples: Sequence[Mapping[str, Any]]) -> int:
    """Results of the longest row."""
    return max((len(example[side]) for example in examples for side in ("before", "after")), default=1)


def _example(example: Mapping[str, Any], images: int) -> dict[str, Any]:
    """An example with its images inlined and each result's movement between the two rankings of `images` images."""
    rank_before = {result["image_id"]: rank for rank, result in enumerate(example["before"], 1)}
    stays = {result["image_id"] for result in example["after"]}
    before = [_result(result, "" if result["image_id"] in stays else "leaves") for result in example["before"]]
    after = [_result(r, _movement(rank_before.get(r["image_id"]), rank)) for rank, r in enumerate(example["after"], 1)]
    return {
        **{key: example[key] for key in ("query", "kind", "object_id", "label")},
        "strips": [("Initial", before), ("Refined", after)],
        "move": _move_in_words(example["rank_before"], example["rank_after"], images),
    }


def _result(result: Mapping[str, Any], moved: str) -> dict[str, Any]:
    subtype = {"jpg": "jpeg", "svg": "svg+xml"}.get(result["ext"].lower(), result["ext"].lower())
    data = base64.b64encode(result["image"]).decode("ascii")
    shown = {key: result[key] for key in ("object_id", "label", "image_id", "score", "hit")}
    return shown | {"source": f"data:image/{subtype};base64,{data}", "moved": moved}


def _movement(before: int | None, after: int) -> str:
    if before is None:
        return "new"
    return "" if before == after else f"{'↑' if after < before else '↓'}{abs(before - after)}"


def _move_in_words(before: int, after: int, images: int) -> str:
    """What refinement did to the first right result, by its ranks among `images`; both are 0 where the gallery has none."""
    if not before:
        return "no right image in the gallery"
    if before == after:
        return f"first right image: rank {_count(before)} of {_count(images)}, before and after"
    verdict = "better" if after < before else "worse"
    return f"first right image: rank {_count(before)} → {_count(after)} of {_count(images)}, {verdict}"


def _moves_in_words(moves: Mapping[str, int], shown: int) -> str:
    """What refinement did to the first right results of all queries, as of `examples.count_moves`, and how the `shown` ones were
    chosen among them."""
    up, down, same = (_count(moves[name]) for name in ("up", "down", "same"))
    if moves["up"] or moves["down"]:
        said = f"Refinement moved the first right image up for {up} captions, down for {down}, and not at all for {same}."
    else:
        said = f"Refinement moved the first right image of none of the {same} captions."
    drawn = "Of each kind one is shown," if all(moves.values()) and shown == len(moves) else "Those shown are"
    return f"{said} {drawn} drawn at random with a fixed seed, if possible with a right image in a row."


def _training_speed(history: Sequence[Mapping[str, Any]]) -> str:
    """Medians over the log lines in a sentence, "" without any."""
    keys = ("images_per_second", "tflops_per_worker", "mfu")
    images, tera, mfu = (float(np.median(values)) if len(values := _series(history, key)[1]) else None for key in keys)
    if images is None:
        return ""
    said = f"Training took in {_count(images)} images/s"
    if tera is not None:
        said += f", {tera:.3g} TFLOP/s a worker"
    if mfu is not None:
        said += f", which is {100 * mfu:.1f} % of what the GPU can do (MFU)"
    return f"{said} (medians of the log lines)."


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have a finite value under `key`."""
    points = [(line["step"], line[key]) for line in history if line.get(key) is not None and math.isfinite(line[key])]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, fewer at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(0, middle - window // 2), np.minimum(len(values), middle + window // 2 + 1)
    return (total[high] - total[low]) / (high - low)


def _loss_figure(history: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Total loss and its parts over steps, or None without training lines."""
    curves = {key: _series(history, key) for key in LOSSES}
    # A part that was switched off is logged as 0 throughout: a flat line at the bottom says nothing.
    curves = {key: xy for key, xy in curves.items() if len(xy[0]) and (key == TOTAL or np.any(xy[1]))}
    if not curves:
        return None
    figure, axes = axes_of("step", "loss")
    for key, (steps, values) in curves.items():
        label, colour, style = LOSSES[key]
        window = len(values) // 20 if len(values) > _SMOOTH_ABOVE else 1
        if window > 1 and key == TOTAL:
            axes.plot(steps, values, color=FAINT, linewidth=0.8)
        width = 2.2 if key == TOTAL else 1.6
        axes.plot(steps, _rolling_mean(values, window), color=colour, linestyle=style, linewidth=width, label=label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    legend(axes)
    return to_svg(figure, "loss")


def _val_figure(history: Sequence[Mapping[str, Any]]) -> Markup | None:
    """R@1 and mAP on val over steps, or None without val lines."""
    keys = dict.fromkeys(key for line in history for key in line if key.startswith("val_"))
    curves = {key[4:]: _series(history, key) for key in keys if key.endswith(("R@1", "mAP"))}
    curves = {label: xy for label, xy in curves.items() if len(xy[0])}
    if not curves:
        return None
    figure, axes = axes_of("step", "percent, val")
    ends = []
    for (label, (steps, values)), (colour, marker, style) in zip(curves.items(), _VAL_STYLES, strict=False):
        line = {"color": colour, "marker": marker, "linestyle": style, "markersize": 4.5, "linewidth": 1.8}
        axes.plot(steps, values, label=label.replace("_", " "), **line)
        ends.append((values[-1], steps[-1], colour))
    axes.set_ylim(bottom=0)
    # The last values, written at the curves' ends; where two would overlap, the upper one moves up.
    gap, lowest = 0.055 * axes.get_ylim()[1], -math.inf
    for value, step, colour in sorted(ends):
        lowest = max(value, lowest + gap)
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.1f}", (step, lowest), color=colour, **place)
    legend(axes)
    return to_svg(figure, "val")

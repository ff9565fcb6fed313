"""The report: what it shows, what it escapes, and that it loads nothing from anywhere."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mmref.evaluate import report
from mmref.evaluate.few_objects import ENOUGH
from mmref.evaluate.metrics import FURTHER_METRICS, MAIN_METRICS, METRIC_NAMES
from mmref.evaluate.plotting import CSS_COLOURS
from mmref.evaluate.report import format_table, render_report

IMAGE = b"\x89PNG pretend"


def block(start, gain=2.0):
    initial = {name: start + 5.0 * i for i, name in enumerate(METRIC_NAMES)}
    return {"initial": initial, "refined": {name: value + gain for name, value in initial.items()}}


def some_metrics(**changes):
    metrics = {
        "split": "test",
        "n_queries": 6156,
        "n_gallery": 3074,
        "n_objects": 642,
        **block(40.0),
        "ci95": {name: [41.5, 43.25] for name in METRIC_NAMES},
        "refinement": {"kind": "sparse", "weight": 0.2, "top_r": 32, "tau": 0.05, "top_p": None, "chosen_on": "val"},
        "image_to_text": block(30.0),
        "by_caption_kind": {"keywords": {"n_queries": 1234, **block(20.0, gain=-1.0)}},
        "skipped": ["shard 3: <broken> image"],
        "wall_seconds": 731.2,
        "images_per_second": 212.4,
        "config_hash": "9f3c2ab1",
    }
    return metrics | changes


def result(image_id, hit=False, score=0.5, ext="png"):
    named = {"object_id": f"o-{image_id}", "label": f"a {image_id}", "image_id": image_id}
    return {"image": IMAGE, "ext": ext, **named, "score": score, "hit": hit}


def example(before, after, query="a <b>red</b> bird", ranks=(3, 1)):
    named = {"query": query, "kind": "name", "object_id": "o-1", "label": "red bird"}
    return {**named, "rank_before": ranks[0], "rank_after": ranks[1], "before": before, "after": after}


def opening(*examples, **moves):
    return {"moves": {"up": 0, "down": 0, "same": 0} | moves, "examples": list(examples)}


HISTORY = [
    {"step": 0, "loss": 6.0, "loss_align": 4.0, "loss_fuse": 0.0, "loss_rec": 2.0, "images_per_second": 200.0},
    {"step": 10, "loss": 5.0, "loss_align": 3.5, "loss_fuse": 0.0, "loss_rec": 1.5, "images_per_second": 200.0},
    {"step": 10, "val_R@1": 12.5, "val_mAP": 10.0, "val_R@5": 99.0},
    {"step": 20, "loss": float("nan"), "loss_align": 3.0, "loss_fuse": 0.0, "loss_rec": 1.0},
    {"step": 20, "val_R@1": 22.5, "val_mAP": 17.5},
]


def render(**changes):
    arguments = {"metrics": some_metrics(), "history": HISTORY, "title": "A run", "config": {"seed": 1}}
    return render_report(**arguments | {"opening": opening(), "examples": []} | changes)


class Elements(HTMLParser):
    """Every start tag with its attributes, the visible text, and tags left open or closed out of order."""

    VOID = frozenset({"meta", "img", "br", "use", "path"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.wrong = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_is_well_formed_and_loads_nothing():
    shown = [example([result("a", True)], [result("b")])]
    html = render(opening=opening(*shown), examples=shown)
    page = Elements(html)
    assert page.open == [] and page.wrong == []
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base")]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert {"charset": "utf-8"} in page.all("meta")


def test_whatever_the_user_wrote_is_escaped():
    evil = "<script>alert('x')</script>"
    bad = result("a") | {"object_id": evil, "label": evil, "image_id": f'"{evil}', "ext": f'png"{evil}'}
    shown = example([bad], [bad], query=evil) | {"kind": evil, "object_id": evil, "label": evil}
    metrics = some_metrics(skipped=[evil], split=evil, by_caption_kind={evil: {"n_queries": 1, **block(1.0)}})
    html = render(
        title=evil,
        metrics=metrics,
        config={"name": evil},
        opening=opening(shown),
        examples=[shown],
        history=[{"step": 1, f"val_{evil}mAP": 3.0}],
    )
    page = Elements(html)
    assert "<script" not in html
    assert not page.all("script") and page.wrong == []
    assert all(set(image) == {"src", "alt"} for image in page.all("img"))
    assert "".join(page.text).count(evil) >= 14


def test_images_are_inlined_with_their_type():
    strip = [result("a", ext="jpg"), result("b", ext="webp"), result("c", ext="PNG")]
    sources = [image["src"] for image in Elements(render(examples=[example(strip, [])])).all("img")]
    assert [source.split(";")[0] for source in sources] == ["data:image/jpeg", "data:image/webp", "data:image/png"]
    assert all(base64.b64decode(source.split(",")[1]) == IMAGE for source in sources)


def test_right_results_are_marked_and_movement_is_shown():
    before = [result("a"), result("b"), result("c", hit=True), result("d")]
    after = [result("c", hit=True), result("b"), result("e", hit=True), result("a")]
    page = Elements(render(examples=[example(before, after)]))
    marked = ["hit" in figure["class"].split() for figure in page.all("figure") if "class" in figure]
    assert marked == [False, False, True, False, True, False, True, False]
    assert [image["alt"].endswith(", right") for image in page.all("img")] == marked
    shown = report._example(example(before, after), 3074)
    moved = {label: [r["moved"] for r in results] for label, results in shown["strips"]}
    assert moved == {"Initial": ["", "", "", "leaves"], "Refined": ["↑2", "", "new", "↓3"]}
    assert shown["move"] == "first right image: rank 3 → 1 of 3,074, better"


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ((1432, 57), "first right image: rank 1,432 → 57 of 3,074, better"),
        ((1, 12), "first right image: rank 1 → 12 of 3,074, worse"),
        ((35, 35), "first right image: rank 35 of 3,074, before and after"),
        ((0, 0), "no right image in the gallery"),
    ],
)
def test_the_rank_of_the_first_right_image_is_said_wherever_it_is(ranks, said):
    shown = example([result("a")] * 10, [result("a")] * 10, ranks=ranks)
    html = render(opening=opening(shown), examples=[shown])
    assert html.count(said) == 2 and "beyond" not in html


def test_the_first_screen_shows_queries_before_any_table():
    shown = [example([result(f"b{i}")], [result(f"a{i}", hit=True)], query=f"query {i}") for i in range(3)]
    html = render(opening=opening(*shown, up=1234, down=56, same=7), examples=[example([result("x")], [], query="later")])
    places = [
        html.index(part) for part in ("<h1>", "Measured on test", "query 0", "query 1", "query 2", "R@1, refined", "<table>")
    ]
    assert places == sorted(places) and html.index("later") > html.index("<table>")
    text = " ".join(" ".join(Elements(html).text).split())
    assert "up for 1,234 captions, down for 56, and not at all for 7. Of each kind one is shown, drawn at random" in text
    assert "More examples" in text
    still = render(opening=opening(shown[0], same=3210))
    assert "Refinement moved the first right image of none of the 3,210 captions. Those shown are drawn at random" in still


def test_a_tile_is_labelled_with_what_it_shows_and_its_title_has_the_ids():
    long = "a drawing of an officer of the police, with words that no tile has room for"
    tile = result("1f46e-1f3fc-200d-2642-fe0f@twemoji") | {"object_id": "1f46e", "label": long}
    html = render(opening=opening(example([tile], [])), examples=[example([tile], [])])
    assert html.count(f"<div>{long}</div>") == 2 and "text-overflow: ellipsis" in html
    page = Elements(html)
    assert "1f46e" not in "".join(page.text)
    figures = [f for f in page.all("figure") if f.get("data-object") == "1f46e"]
    assert [f["title"] for f in figures] == [f"{long} (image 1f46e-1f3fc-200d-2642-fe0f@twemoji of 1f46e)"] * 2
    assert [image["alt"] for image in page.all("img")] == [long] * 2


def test_table_shows_both_directions_kinds_and_intervals():
    text = " ".join(" ".join(Elements(render()).text).split())
    for expected in (
        "6,156 captions search 3,074 images of 642 objects",
        "initial 40.0 (+2.0)",
        "41.5–43.2",
        "Image to text initial 30.0 35.0",
        "refined 32.0 37.0",
        "keywords 1,234 19.0 −1.0",
        "weight 0.2 on all candidates; chosen on val",
        "Skipped samples: 1",
        "9f3c2ab1",
    ):
        assert expected in text


def test_optional_parts_may_be_missing():
    needed = ("split", "n_queries", "n_gallery", "n_objects", "initial", "refined")
    metrics = {key: value for key, value in some_metrics().items() if key in needed}
    page = Elements(render(metrics=metrics, history=[]))
    text = "".join(page.text)
    assert page.wrong == [] and page.open == []
    assert "Image to text" not in text and "By kind" not in text and "Training" not in text
    assert "No sample was skipped" in text
    assert "image to text" not in format_table(metrics)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "none"),
        ({"weight": 0.0, "top_r": 8, "tau": 0.1, "chosen_on": "val"}, "declined.*chosen on val"),
        ({"weight": 0.0, "chosen_on": "val", "tried": [{"weight": 0}, {"weight": 1.0}]}, "declined.*chosen on val"),
        ({"weight": 0.0, "chosen_on": "val", "tried": []}, "none: there was no setting to try"),
        ({"weight": 0.0, "chosen_on": "", "tried": []}, "none: there is no val split"),
        ({"weight": 0.2, "top_r": 32, "tau": 0.05, "chosen_on": "val"}, "32 nearest.*0.05.*0.2 on all.*on val"),
        ({"kind": "dense", "weight": 1.0, "top_p": 1000}, "dense.*weight 1 on the first 1,000 candidates$"),
        ({"kind": "dense", "weight": 1.0, "top_p": 3074}, "weight 1 on all candidates$"),
    ],
)
def test_refinement_in_words(settings, expected):
    assert re.search(expected, report._describe_refinement({"refinement": settings, "n_gallery": 3074, "split": "test"}))


def test_settings_tried_end_with_the_initial_ranking_wherever_it_came():
    tried = [
        {"kind": "sparse", "weight": w, "top_r": 8, "tau": 0.1, "top_p": None, "objective": w, **block(1.0)["initial"]}
        for w in np.arange(30) / 10
    ]
    shown = report._best_tried({"tried": tried})
    assert [row["weight"] for row in shown[:2]] == [2.9, 2.8]
    assert len(shown) == report._TRIED_SHOWN + 1 and shown[-1]["weight"] == 0
    assert "initial ranking" in render(metrics=some_metrics(refinement={"weight": 2.9, "top_r": 8, "tau": 0.1, "tried": tried}))


def test_figures_draw_the_parts_that_exist():
    page = Elements(render())
    labels = {text.strip() for text in page.text}
    assert {"total", "alignment", "reconstruction", "R@1", "mAP", "step"} <= labels
    assert "fusion" not in labels  # logged as 0 throughout
    assert "guidance" not in labels  # not logged
    assert {"22.5", "17.5"} <= labels  # the last values, at the ends of their curves
    assert len(page.all("svg")) == 2


def test_figures_take_the_colours_of_the_page():
    html = render()
    assert not [colour for colour in CSS_COLOURS if colour in html]
    assert "var(--series-1)" in html and "var(--ink)" in html
    html = render(history=[{"step": i, **dict.fromkeys(report.LOSSES, 1.0 + i)} for i in (1, 2)])
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= set(re.findall(r"(--[\w-]+):", html)), "a colour is not defined"


def test_rolling_mean_is_centred_and_shrinks_at_the_ends():
    values = np.array([1.0, 2.0, 6.0, 3.0])
    np.testing.assert_allclose(report._rolling_mean(values, 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(report._rolling_mean(values, 1), values)


def test_config_may_hold_anything_printable():
    assert "path: runs/a" in render(config={"data": {"path": Path("runs/a")}})


def test_what_was_chosen_on_the_split_reported_is_said_to_be_optimistic():
    for split, said in (("val", True), ("test", False)):
        metrics = some_metrics(split=split, n_excluded=3)
        assert ("chosen on val, the split reported: optimistic" in render(metrics=metrics)) == said
        assert ("optimistic" in format_table(metrics)) == said
        assert "3 of the queries have no image in the gallery" in format_table(metrics)
        assert "3 of the queries have no image in the gallery" in render(metrics=metrics)
    named = some_metrics(refinement={"weight": 0.0, "chosen_on": "val of ICFG-PEDES", "tried": []})
    assert "Declined: no setting beat the initial ranking; chosen on val of ICFG-PEDES." in render(metrics=named)


def test_terminal_table_is_aligned():
    lines = format_table(some_metrics()).splitlines()
    assert lines[0].split() == list(MAIN_METRICS)
    further = next(i for i, line in enumerate(lines) if line.split() == list(FURTHER_METRICS))
    assert [line.split("  ")[0] for line in lines[further + 1 : further + 5]] == [
        f"{direction}, {state}" for direction in ("text to image", "image to text") for state in ("initial", "refined")
    ]
    assert lines[further + 2].split()[-2:] == ["67.0", "72.0"]
    ends = [match.end() for match in re.finditer(r"\S+", lines[0])]
    rows = [line for line in lines[:further] if line.startswith("  ")][1:]
    assert [row.strip().split("  ")[0] for row in rows] == [
        "initial", "refined", "95 % interval", "initial", "refined", "keywords (1,234)",
    ]  # fmt: skip
    for row in rows:
        assert [match.end() for match in re.finditer(r"[\d.-]+(?=\s|$)", row)][-5:] == ends
    assert rows[1].split() == ["refined", "42.0", "47.0", "52.0", "57.0", "62.0"]
    assert "41.5-43.2" in rows[2]
    assert lines[-1] == "skipped samples: 1"


@pytest.mark.parametrize(("value", "expected"), [(0.04, "±0.0"), (-0.04, "±0.0"), (1.25, "+1.2"), (-3.0, "−3.0")])
def test_signed(value, expected):
    assert report._signed(value) == expected


def test_the_best_on_test_is_labelled_as_such():
    best = {"step": 1500, **block(60.0)["initial"], "chosen_on": "test"}
    metrics = some_metrics(best_on_test=best)
    assert "best on test, chosen on test as some papers do (step 1,500, before refinement): R@1 60.0, mAP 75.0" in format_table(
        metrics
    )
    assert "chosen on test" in render(metrics=metrics) and "chosen on test" not in render()


def test_what_training_started_from_stands_beside_it():
    start = {"model": "some/clip", **block(20.0)}
    start["ci95_initial"] = start["ci95"] = {name: [19.0, 21.0] for name in METRIC_NAMES}
    metrics = some_metrics(start=start)
    rows = [line.split("  ")[1] for line in format_table(metrics).splitlines() if line.startswith("  ")][1:5]
    assert rows == ["before training", "before training, refined", "initial", "refined"]
    page = render(metrics=metrics)
    assert "some/clip" in page and "<td>before training, refined</td>" in page and "before training" not in render()
    start["refined"] = start["initial"]  # no references
    assert "before training, refined" not in render(metrics=metrics) + format_table(metrics)


def test_the_class_protocol_is_shown_where_it_was_asked_for():
    by_class = {"initial": {"AP@50": 41.26, "image top-1": 55.0}, "refined": {"AP@50": 43.0, "image top-1": 56.0}}
    metrics = some_metrics(class_protocol=by_class)
    assert "by class, initial: AP@50 41.3, image top-1 55.0" in format_table(metrics)
    assert "AP@50 43.0" in render(metrics=metrics) and "By class" not in render()


def test_the_ranks_of_objects_are_shown():
    by_object = {"initial": {"R@1": 41.26, "R@5": 55.0, "R@10": 60.0}, "refined": {"R@1": 43.0, "R@5": 56.0, "R@10": 61.0}}
    metrics = some_metrics(by_object=by_object)
    assert "by object, initial: R@1 41.3, R@5 55.0, R@10 60.0" in format_table(metrics)
    assert "R@5 56.0" in render(metrics=metrics) and "By object" not in render()


def test_what_ambiguous_captions_leave_is_said_where_it_was_counted():
    metrics = some_metrics(ambiguity={"n_same": 18, "ceiling": 99.91, "n_fitting": 2158, "guessing": 87.72})
    said = "eiling of R@1: 99.9, as 18 captions are those of several objects word for word; 2,158 fit several"
    assert f"c{said}" in format_table(metrics) and f"<p>C{said}" in render(metrics=metrics)
    assert said not in render() + format_table(some_metrics())


def test_few_objects_are_said_where_there_are_references():
    said = "41 objects are few for references"
    assert said in format_table(some_metrics(n_references=41)) and said in render(metrics=some_metrics(n_references=41))
    for enough in (0, ENOUGH):
        assert "few for references" not in format_table(some_metrics(n_references=enough)) + render()


def test_an_expansion_is_called_one():
    settings = {"kind": "expansion", "weight": 0.2, "top_r": 8, "tau": 0.1, "top_p": None, "chosen_on": "val"}
    text = format_table(some_metrics(refinement=settings))
    assert "queries expanded by a softmax over the 8 nearest references, temperature 0.1; weight 0.2 on all" in text


def test_other_kinds_of_queries_have_rows_and_refinements_of_their_own():
    about = {"n_queries": 1203, "n_excluded": 12, "refinement": {"weight": 0.0, "chosen_on": "val", "tried": []}}
    images = {**about, "same_camera": "cam", **block(12.0)}
    together = {**about, "of": "object", "n_captions": 3609, **block(24.0), "refinement": some_metrics()["refinement"]}
    metrics = some_metrics(image_to_image=images, captions_as_one=together)
    text, page = format_table(metrics), render(metrics=metrics)
    label = "without images by the same cam (1,203 queries, 12 of them without a hit to find)"
    assert f"image to image, {label}" in text and f"Image to image, {label}" in page
    for shown in (text, page):
        assert "the captions of each object as one query (1,203 queries of 3.0 captions on average)" in shown
    assert "refinement, image to image, without images by the same cam: none: there was no setting to try" in text
    assert "the captions of each object as one query: softmax over the 32 nearest" in page
    images["refinement"]["chosen_on"] = ""
    assert "same cam: none: no such query on val has anything to find" in format_table(metrics)
    metrics["refinement"] = {**metrics["refinement"], "chosen_on": "", "weight": 0.0}
    assert "same cam: none: there is no val split to choose it on" in format_table(metrics)
    widths = {len(line) for line in text.splitlines() if line.startswith("  initial")}
    assert widths == {len(text.splitlines()[0])}, "long labels make no column wider"


def test_a_notebook_shows_metrics_as_a_table():
    metrics = report.Metrics(some_metrics(data="<b>set", ci95_initial={name: [39.0, 41.25] for name in METRIC_NAMES}))
    page = metrics._repr_html_()
    rows = [re.sub(r"\s*<[^>]+>\s*", "|", row).strip("|") for row in re.findall(r"<tr>.*?</tr>|<tr .*?</tr>", page, re.DOTALL)]
    cells = [[cell for cell in row.split("|") if cell] for row in rows]
    assert cells[0] == list(MAIN_METRICS)
    assert cells[1:6] == [
        ["text to image"],
        ["initial", *(f"{40 + 5 * i}.0" for i in range(5))],
        ["95 % interval", *["39.0–41.2"] * 5],
        ["refined", *(f"{42 + 5 * i}.0" for i in range(5))],
        ["95 % interval", *["41.5–43.2"] * 5],
    ]
    assert [row[0] for row in cells[6:]] == ["image to text", "initial", "refined"], "it has no intervals"
    assert "&lt;b&gt;set, test: 6,156 queries" in page and "weight 0.2 on all candidates; chosen on val" in page
    assert metrics == dict(metrics) and metrics["refined"]["R@1"] == 42.0


def test_the_speed_of_training_is_told_with_what_the_gpu_made_of_it():
    line = {"step": 10, "loss": 1.0, "images_per_second": 1000.0, "tflops_per_worker": 396.04, "mfu": 0.4002}
    assert "Training took in 1,000 images/s, 396 TFLOP/s a worker, which is 40.0 % of what the GPU can do" in render(
        history=[line]
    )
    unknown = render(history=[{**line, "mfu": None}])
    assert "396 TFLOP/s a worker (medians" in unknown and "MFU" not in unknown
    old = render()
    assert "Training took in 200 images/s (medians" in old, "lines of an older version"
    assert "Training took" not in render(history=[])

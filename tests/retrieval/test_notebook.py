"""What a notebook shows of a search: pictures in the page, scores, metadata, and nothing that runs."""

from __future__ import annotations

import base64
import copy
import html
import json
import pickle
import re
from html.parser import HTMLParser

import pytest

from mmref import Searcher
from mmref.retrieval.notebook import MOST_SHOWN, Results
from mmref.retrieval.searcher import Result

HOSTILE = "<script>alert('1')</script>\x1b[31m"


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def result(rank: int, **values: object) -> Result:
    of = {"id": f"{rank}.jpg", "score": 0.5, "initial": 0.5, "rank_before": rank, "object_id": None, "path": "p"}
    return Result(rank, width=1, height=1, **of | values)  # type: ignore[arg-type]


def test_a_search_is_shown_with_the_thumbnails_of_the_index(split_index):
    searcher = Searcher(split_index)
    results = searcher.search("red circle", top=4)
    page = Tags(results._repr_html_())
    pictures = [about["src"] for tag, about in page.found if tag == "img"]
    prefix = "data:image/webp;base64,"
    assert all(source and source.startswith(prefix) for source in pictures)
    assert [base64.b64decode((s or "").removeprefix(prefix)) for s in pictures] == [searcher.thumbnail(r.id) for r in results]
    for found in results:
        assert found.id in page.text and f"{found.score:.3f}" in page.text and found.metadata["caption"] in page.text
    assert {about.get("src", "data:")[:5] for _, about in page.found} == {"data:"}, "nothing is fetched"
    assert "no result" in searcher.search("x", where={"object_id": "nobody"})._repr_html_()


def test_what_an_item_says_is_text():
    page = Results([result(1, id=HOSTILE, object_id="<b>", metadata={"<i>": HOSTILE, "n": 3})], lambda item: b"")._repr_html_()
    tags = Tags(page)
    assert {tag for tag, _ in tags.found} == {"div", "img", "b", "span"} and sum(tag == "b" for tag, _ in tags.found) == 1
    assert "\x1b" not in page and html.escape("<b>") in page and "n: 3" in tags.text


def test_refinement_is_told_where_it_changed_a_score():
    page = Results([result(1, score=0.75, initial=0.5, rank_before=7), result(2)], lambda item: b"")._repr_html_()
    assert [" ".join(found.split()) for found in re.findall(r"\(before[^)]*\)", page)] == ["(before refinement 7, 0.500)"]


def test_only_the_first_are_shown_and_read():
    read: list[str] = []
    page = Results([result(i) for i in range(1, MOST_SHOWN + 4)], lambda item: bytes(read.append(item) or 0))._repr_html_()
    assert len(read) == MOST_SHOWN and "and 3 more" in page


def test_results_are_a_list_and_leave_the_process_as_one(split_index):
    results = Searcher(split_index).search("red circle", top=3)
    assert isinstance(results, list) and results == list(results) and results[0].rank == 1
    for moved in (pickle.loads(pickle.dumps(results)), copy.deepcopy(results)):
        assert type(moved) is list and moved == results
    assert json.loads(json.dumps([r.to_dict() for r in results]))[2]["rank"] == 3
    with pytest.raises(IndexError):
        results[3]

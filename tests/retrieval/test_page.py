"""The page in a real browser: typing, refinement, a result opened, an image dropped, errors, keys, a phone, a token."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from PIL import Image
from support.browser import Page, browser, find_chromium

from mmref.retrieval import index
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service.access import Access
from mmref.retrieval.service.answering import Engine
from mmref.retrieval.service.app import build_app
from mmref.retrieval.service.backend import Local
from mmref.retrieval.service.limits import Limits

pytest.importorskip("websockets", reason="speaks to the browser")
pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: install one, or set $CHROMIUM")

TOKEN = "0123456789abcdef"
LIMITS = Limits(rate=0, image_bytes=20_000)
RESULTS = "document.querySelectorAll('#results button').length"
IDS = "[...document.querySelectorAll('#results button')].map(b => b.dataset.id)"
QUIET = "document.querySelector('#results').getAttribute('aria-busy') === 'false'"


class Server:
    """The service on a port of this machine; `asked` holds the targets of its searches."""

    def __init__(self, index: Path, access: Access | None = None) -> None:
        self.asked: list[str] = []
        self.engine = Engine(str(index), LIMITS, watch=False)
        app = build_app({index.name: Local(self.engine)}, access, LIMITS)

        async def noted(scope, receive, send):
            if scope["type"] == "http" and scope["path"] == "/search":
                self.asked.append(scope["query_string"].decode())
            await app(scope, receive, send)

        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(noted, log_level="warning", lifespan="off", ws="none"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser(find_chromium() or "") as page:
        yield page


@pytest.fixture(scope="module")
def server(split_index: Path) -> Iterator[Server]:
    with Server(split_index) as server:
        yield server


@pytest.fixture
def page(tab: Page, server: Server) -> Page:
    """A tab that has just opened the page."""
    tab.screen(1100, 800)
    tab.requested.clear()
    tab.errors.clear()
    tab.open(server.url)
    tab.wait("document.querySelector('#status').textContent.includes('12 images')")
    server.asked.clear()
    return tab


def search(page: Page, text: str) -> None:
    page.run("document.querySelector('#text').focus()")
    page.type(text)
    page.wait(f"{RESULTS} > 0 && {QUIET} && document.title.startsWith({text!r})")


def test_results_fill_when_typing_stops(page, server):
    search(page, "red circle")
    expected = Searcher(str(server.engine._searcher.index)).search("red circle", top=12)
    assert page.run(IDS) == [r.id for r in expected]
    assert "12 of 12 images" in page.text("#status")
    assert len(server.asked) < len("red circle"), "not one search for each letter"
    page.wait("[...document.images].filter(i => i.offsetParent).every(i => i.complete && i.naturalWidth > 0)")
    assert all(url.startswith((server.url, "blob:")) for url in page.requested), "no other host"
    assert page.errors == []


def test_an_old_answer_never_replaces_a_newer_one(page, server):
    page.run(
        "window.real = window.fetch; window.fetch = async (path, options) => {"
        "  const answer = await real(path, {...options, signal: undefined});"
        "  if (`${path}`.includes('text=red')) await new Promise(done => setTimeout(done, 600));"
        "  return answer; }"
    )
    page.run("document.querySelector('#text').value = 'red'; document.querySelector('#search').requestSubmit()")
    page.run("document.querySelector('#text').value = 'blue star'; document.querySelector('#search').requestSubmit()")
    page.wait(f"{RESULTS} === 12 && {QUIET}")
    page.run("new Promise(done => setTimeout(done, 900))")
    expected = Searcher(str(server.engine._searcher.index)).search("blue star", top=12)
    assert page.run(IDS) == [r.id for r in expected]


def test_refinement_shows_what_moved_and_by_how_much(page, server):
    searcher = Searcher(str(server.engine._searcher.index))

    def moved(sentence: str) -> dict[str, int]:
        return {r.id: r.rank_before - r.rank for r in searcher.search(sentence, top=12)}

    sentences = [caption for caption in searcher.items["caption"].to_pylist() if caption]
    sentence = next(s for s in sentences if any(moved(s).values()))  # or there is nothing to see
    search(page, sentence)
    moves = moved(sentence)
    shown = (
        "Object.fromEntries([...document.querySelectorAll('#results button')]"
        ".map(b => [b.dataset.id, b.querySelector('.moved')?.innerText ?? '']))"
    )
    expected = {i: f"{'▲' if by > 0 else '▼'}{abs(by)}" if by else "" for i, by in moves.items()}
    assert page.run(shown) == expected
    assert f"refinement moved {sum(map(bool, moves.values()))}" in page.text("#status")
    page.click("#refine")
    page.wait("document.querySelector('#status').textContent.includes('not refined')")
    assert page.run(IDS) == [r.id for r in searcher.search(sentence, top=12, refine=False)]
    assert not any(page.run(shown).values())


def test_a_result_opens_with_its_map_references_and_reasons(page, server):
    search(page, "red circle 0")
    page.click("#results button")
    page.wait("document.querySelectorAll('#why li').length > 4")
    why = page.text("#why")
    result = Searcher(str(server.engine._searcher.index)).search("red circle 0", top=12)[0]
    assert f"Rank 1: likeness {result.initial:.3f} + {result.score - result.initial:.3f} from references" in why
    assert "References that raise it" in why and result.references[0].caption in why and "References nearest to both" in why
    drawn = (
        "(() => { const c = document.querySelector('#detail canvas');"
        "return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size; })()"
    )
    assert page.run(drawn) > 8, "an overlay of many shades"
    page.click("#overlay")
    assert page.run("document.querySelector('#detail canvas').hidden")
    page.press("Escape")
    page.wait("!document.querySelector('#detail').open")
    assert page.errors == []


def test_objects_with_their_images(page, server):
    searcher = Searcher(str(server.engine._searcher.index))
    search(page, "red circle")
    page.click("#object")
    objects = searcher.search_objects("red circle", images=4)
    page.wait(f"{RESULTS} === {len(objects)} && {QUIET}")
    assert page.run(IDS) == [o.images[0].id for o in objects]
    assert f"{len(objects)} of {len(searcher.objects)} objects" in page.text("#status")
    small = page.run("[...document.querySelectorAll('#results button')].map(b => b.querySelectorAll('.others img').length)")
    assert small == [len(o.images) - 1 for o in objects]
    at = next(place for place, o in enumerate(objects) if len(o.images) > 1)
    page.run(f"document.querySelectorAll('#results button')[{at}].click()")
    page.wait("document.querySelectorAll('#why dd').length > 0")
    first, second = objects[at].images[:2]
    assert page.run("document.querySelectorAll('#images button').length") == len(objects[at].images)
    assert f"Rank {at + 1}" in page.text("#why") and first.id in page.text("#why dl")
    page.click("#images button:nth-child(2)")
    page.wait(f"document.querySelector('#why dl')?.innerText.includes({second.id!r})")
    assert "Image 2 of this object" in page.text("#why")
    assert page.run("[...document.querySelectorAll('#images button')].map(b => b.ariaPressed)")[:2] == ["false", "true"]
    page.press("ArrowLeft" if at else "ArrowRight")
    page.wait(f"document.querySelector('#why').innerText.includes('Rank {at or 2}:')")
    page.press("Escape")
    page.click("#object")
    page.wait(f"{RESULTS} === 12 && {QUIET}")
    assert page.errors == []


def test_without_objects_there_is_no_switch(tab, folder, run, tmp_path):
    index.create(str(folder), str(run), str(tmp_path / "own"), workers=0)
    with Server(tmp_path / "own") as server:
        tab.open(server.url)
        tab.wait("document.querySelector('#status').textContent.includes('images')")
        assert tab.run("document.querySelector('#grouped').hidden")


def test_keys(page):
    search(page, "blue star")
    page.press("ArrowDown")
    assert page.run(f"document.activeElement.dataset.id === ({IDS})[0]")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run(f"document.activeElement.dataset.id === ({IDS})[2]")
    page.press("Enter")
    page.wait("document.querySelector('#detail').open && document.querySelector('#why').innerText.includes('Rank 3')")
    page.press("ArrowRight")
    page.wait("document.querySelector('#why').innerText.includes('Rank 4')")
    page.press("Escape")
    page.wait("!document.querySelector('#detail').open")
    page.wait(f"document.activeElement.dataset.id === ({IDS})[3]")  # back where one was
    page.type("r")
    page.wait("document.querySelector('#status').textContent.includes('not refined')")
    page.type("/")
    assert page.run("document.activeElement.id === 'text' && document.querySelector('#text').value === 'blue star'")


def test_an_image_is_dropped_and_taken_away(page, server, tmp_path):
    searcher = Searcher(str(server.engine._searcher.index))
    item = searcher.items["id"][4].as_py()
    (tmp_path / "query.png").write_bytes(searcher.image_bytes(item))
    page.drop(tmp_path / "query.png")
    page.wait(f"{RESULTS} === 12 && {QUIET}")
    expected = searcher.search(image=searcher.image_bytes(item), top=12)
    assert page.run(IDS) == [r.id for r in expected] and expected[0].id == item
    assert page.run("document.querySelector('#weight').hidden && !document.querySelector('#picture').hidden")
    page.click("#results button")
    page.wait("document.querySelectorAll('#why li').length > 4")
    page.press("Escape")
    page.click("#picture button")
    page.wait(f"{RESULTS} === 0 && document.querySelector('#picture').hidden")


def test_errors_are_shown_as_errors(page, tmp_path, server, monkeypatch):
    search(page, "red")
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.drop(tmp_path / "broken.png")
    page.wait("!document.querySelector('#error').hidden")
    assert "The image cannot be read." in page.text("#error") and "Send a whole JPEG" in page.text("#error")
    assert page.run(RESULTS) == 0
    Image.effect_noise((200, 200), 90).save(tmp_path / "large.png")
    page.drop(tmp_path / "large.png")
    page.wait("document.querySelector('#error').innerText.includes('20,000')")
    page.click("#text")
    page.type(" star")
    page.wait(f"{RESULTS} > 0 && document.querySelector('#error').hidden")
    page.run("window.fetch = () => Promise.reject(new TypeError('no network'))")
    page.type(" 7")
    page.wait("document.querySelector('#error').innerText.includes('The service does not answer.')")


def test_filters_narrow_the_results(tab, tiny_set, run, tmp_path):
    index.create(str(tiny_set), str(run), str(tmp_path / "all"), workers=0)
    with Server(tmp_path / "all") as server:
        tab.open(server.url)
        tab.wait("document.querySelector('#filters select[name=split]')")
        search(tab, "green circle")
        tab.run(
            "(() => { const s = document.querySelector('#filters select[name=split]'); s.value = 'val';"
            "s.dispatchEvent(new Event('change')); })()"
        )
        expected = [r.id for r in server.engine._searcher.search("green circle", top=12, where={"split": "val"})]
        tab.wait(f"JSON.stringify(({IDS}).slice(0, 12)) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")
        assert "where=split%3Dval" in server.asked[-1]


def test_a_phone_and_the_dark(page):
    page.screen(375, 700, dark=True, phone=True)
    search(page, "grey square")
    assert page.run("document.documentElement.scrollWidth <= 375"), "nothing lies outside the screen"
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    page.run("document.querySelector('#results button').click()")
    page.wait("document.querySelectorAll('#why li').length > 4")
    box = page.run("(() => { const b = document.querySelector('#detail').getBoundingClientRect(); return [b.x, b.width]; })()")
    assert box[0] >= 0 and box[0] + box[1] <= 375
    page.screen(1100, 800)
    assert page.run("getComputedStyle(document.body).backgroundColor") != dark


def test_a_token_is_asked_for_once(tab, split_index):
    with Server(split_index, Access(TOKEN)) as server:
        tab.open(server.url)
        tab.wait("document.querySelector('#login').open")
        tab.run("document.querySelector('#login input').focus()")
        tab.type("wrong")
        tab.press("Enter")
        tab.wait("!document.querySelector('#wrong').hidden")
        tab.run("document.querySelector('#login input').value = ''")
        tab.type(TOKEN)
        tab.press("Enter")
        tab.wait("!document.querySelector('#login').open && document.querySelector('#status').textContent.includes('12')")
        search(tab, "red circle")
        tab.wait("[...document.images].filter(i => i.offsetParent).every(i => i.complete && i.naturalWidth > 0)")
        assert TOKEN not in tab.run("location.href + document.cookie")
    with Server(split_index, Access(TOKEN)) as server:
        tab.open(f"{server.url}#{TOKEN}")
        tab.wait("document.querySelector('#status').textContent.includes('12 images')")
        assert tab.run("location.hash") == ""

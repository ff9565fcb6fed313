"""The page in a real browser: typing, refinement, a result opened, an image dropped, errors, keys, a phone, a token."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import pytest
import uvicorn
from PIL import Image
from support.browser import Page, browser, find_chromium
from support.images import write_images

from mmref.export.model import Model
from mmref.retrieval import index
from mmref.retrieval.feedback import FILE, Judgements
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
EXPLAINED = "document.querySelector('#detail').open && document.querySelector('#references').ariaBusy === 'false'"
OLD = "parseFloat(getComputedStyle(document.querySelector('#results')).opacity) < 0.6"
QUIET = "document.querySelector('#results').getAttribute('aria-busy') === 'false'"


class Server:
    """The service on a port of this machine; `asked` holds the targets of its searches."""

    def __init__(self, *indexes: Path, access: Access | None = None, judge: bool = False, limits: Limits = LIMITS) -> None:
        self.asked: list[str] = []
        engines = {index.name: Engine(str(index), limits, watch=False) for index in indexes}
        self.engine = engines[indexes[0].name]
        self.judgements = Judgements(indexes[0] / FILE)
        backends = {name: Local(engine) for name, engine in engines.items()}
        app = build_app(backends, access, limits, {indexes[0].name: self.judgements} if judge else {})

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
    tab.leave()
    tab.open(server.url)
    tab.wait("document.querySelector('#status').textContent.includes('12 images')")
    server.asked.clear()
    return tab


def search(page: Page, text: str) -> None:
    page.run("document.querySelector('#text').select()")
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


def test_bars_compare_results_and_what_is_far_is_said(page, server, monkeypatch):
    search(page, "red circle")
    shares = [r.score for r in Searcher(str(server.engine._searcher.index)).search("red circle", top=12)]
    shares = [max(0.0, score / shares[0]) for score in shares]
    wide = "[...document.querySelectorAll('#results .share span')].map(e => e.offsetWidth / e.parentElement.offsetWidth)"
    shown = page.run(wide)
    assert shown == pytest.approx(shares, abs=0.01)
    assert page.run("document.querySelector('#far').hidden"), "nobody has said what is close for this model"
    assert page.run("getComputedStyle(document.querySelector('#results')).opacity") == "1", "what has come is not dimmed"
    monkeypatch.setattr(Model, "close_cosine", 2.0)
    page.type(" nonsense")
    page.wait("!document.querySelector('#far').hidden")
    assert "No close match" in page.text("#far") and page.run(RESULTS) == 12
    monkeypatch.setattr(Model, "close_cosine", -2.0)
    page.type(" more")
    page.wait("document.querySelector('#far').hidden")


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


def test_a_result_opens_with_its_facts_first_and_each_reference_once(page, server):
    search(page, "red circle 0")
    page.click("#results button")
    page.wait(EXPLAINED)
    result = Searcher(str(server.engine._searcher.index)).search("red circle 0", top=12)[0]
    why = page.text("#why")
    places = [why.index(heading) for heading in ("About the image", "Why it is here", "References it shares with the query")]
    assert places == sorted(places) and result.id in page.text("#facts")
    assert f"Rank 1: likeness {result.initial:.3f} + {result.score - result.initial:.3f} from references" in why
    assert result.references[0].caption in why
    assert page.run("document.querySelectorAll('#references > ul > li').length") == 4
    assert not page.run("document.querySelector('#references details').open"), "the rest is folded"
    page.click("summary")
    told = page.run("[...document.querySelectorAll('#references li > span:first-of-type')].map(e => e.innerText)")
    assert len(told) == len(set(told)) > 4, "each reference once"
    page.click("#overlay")
    assert page.run("document.querySelector('#detail canvas').hidden")
    page.click("#overlay")
    page.press("Escape")
    page.wait("!document.querySelector('#detail').open")
    assert page.errors == []


ANSWER = (  # explanations come late, changed by `change`, as the page itself asks for them
    "window.real ||= window.fetch; window.fetch = async (path, options) => {{"
    "  const answer = await real(path, options);"
    "  if (!`${{path}}`.startsWith('explain')) return answer;"
    "  await new Promise(done => setTimeout(done, 500));"
    "  const found = await answer.json(); ({change})(found); return Response.json(found); }}"
)


@pytest.mark.parametrize("phone", [False, True])
def test_the_detail_view_does_not_jump_while_it_fills(page, phone):
    if phone:
        page.screen(375, 700, phone=True)
    page.run(ANSWER.format(change="found => {}"))
    search(page, "blue star")
    page.click("#results button")
    places = (
        "JSON.stringify(['#detail', '#detail figure', '#facts', '#references']"
        ".map(s => document.querySelector(s).getBoundingClientRect()).map(b => [b.x, b.y, b.width]))"
    )
    page.wait("document.querySelectorAll('#references .awaited').length > 0")
    before, height = page.run(places), page.run("document.querySelector('#detail').offsetHeight")
    page.wait(EXPLAINED)
    assert page.run(places) == before and page.run("document.querySelector('#detail').offsetHeight") == height


def test_a_result_opened_right_after_another_is_explained(page):
    """The browser tells of the closing a moment later."""
    search(page, "blue star")
    page.click("#results button")
    page.wait("document.querySelector('#detail').open")
    page.run("document.querySelector('#detail').close(); document.querySelectorAll('#results button')[1].click()")
    page.wait(EXPLAINED)
    assert "Rank 2" in page.text("#why") and page.run("document.querySelectorAll('#references li').length") > 0


def painted(page: Page, x: int, y: int) -> bool:
    """Whether the map covers a point of its 7 x 7 grid."""
    return page.run(
        "(() => { const c = document.querySelector('#detail canvas');"
        f"const at = [{x} / 7 * c.width - 1, {y} / 7 * c.height - 1];"
        "return c.getContext('2d').getImageData(...at, 2, 2).data.some(v => v > 0); })()"
    )


def test_the_strongest_cells_are_outlined_and_a_flat_map_is_told(page):
    page.run(ANSWER.format(change="found => { found.cosine = 0.5; found.heat = found.heat.map(r => r.map(() => 0.001));"
                                  "found.heat[2][3] = found.heat[2][4] = 0.2; found.heat[6][6] = 0.05; }"))  # fmt: skip
    search(page, "blue star")
    page.click("#results button")
    page.wait(EXPLAINED)
    assert all(painted(page, x, y) for x, y in ((3.5, 2), (4.5, 2), (3, 2.5), (5, 2.5), (3.5, 3), (4.5, 3)))
    assert not any(painted(page, x, y) for x, y in ((3.5, 2.5), (4, 2.5), (6.5, 6.5), (6, 6.5), (1, 1))), "no veil"
    assert "Outlined" in page.text("#legend") and not page.run("document.querySelector('#overlay').disabled")
    page.press("Escape")
    page.run(ANSWER.format(change="found => { found.cosine = 0.5; found.heat = found.heat.map(r => r.map(() => 0.02)); }"))
    page.click("#results button")
    page.wait(EXPLAINED)
    assert not painted(page, 3, 2.5)
    assert "No part stands out" in page.text("#legend") and page.run("document.querySelector('#overlay').disabled")


def test_references_without_a_picture_wait_in_the_fold(tab, tiny_set, run, tmp_path):
    index.create(str(tiny_set), str(run), str(tmp_path / "all"), workers=0)
    with Server(tmp_path / "all") as server:
        tab.open(server.url)
        tab.wait("document.querySelector('#filters select')")
        tab.run(ANSWER.format(change="found => { found.references[0].item_id = found.shared[0].item_id = null; }"))
        search(tab, "green circle")
        tab.click("#results button")
        tab.wait(EXPLAINED)
        assert tab.run("document.querySelectorAll('#references > ul > li').length") == 4
        assert tab.run("[...document.querySelectorAll('#references > ul > li')].every(li => li.querySelector('img'))")
        assert tab.run("document.querySelectorAll('#references details li:not(:has(img))').length") > 0


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
    page.wait(EXPLAINED)
    first, second = objects[at].images[:2]
    assert page.run("document.querySelectorAll('#images button').length") == len(objects[at].images)
    assert f"Rank {at + 1}" in page.text("#why") and first.id in page.text("#facts")
    page.click("#images button:nth-child(2)")
    page.wait(f"document.querySelector('#facts').innerText.includes({second.id!r})")
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
    page.wait(EXPLAINED)
    page.press("Escape")
    page.click("#picture button")
    page.wait(f"{RESULTS} === 0 && document.querySelector('#picture').hidden")


def test_errors_are_shown_as_errors(page, tmp_path, server, monkeypatch):
    search(page, "red")
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.drop(tmp_path / "broken.png")
    page.wait("!document.querySelector('#error').hidden")
    assert "The image cannot be read." in page.text("#error") and "Send a whole JPEG" in page.text("#error")
    assert page.run(RESULTS) == 12 and page.run(OLD), "what was found before stays, dimmed"
    assert page.run("document.querySelector('#retry').hidden"), "the same again would be the same"
    Image.effect_noise((200, 200), 90).save(tmp_path / "large.png")
    page.drop(tmp_path / "large.png")
    page.wait("document.querySelector('#error').innerText.includes('20,000')")
    page.click("#text")
    page.type(" star")
    page.wait(f"{RESULTS} > 0 && document.querySelector('#error').hidden")


def test_results_stay_while_the_service_is_away_and_come_back_with_it(page):
    search(page, "red")
    found = page.run(IDS)
    page.run("window.real = window.fetch; window.fetch = () => Promise.reject(new TypeError('no network'))")
    page.type(" star 7")
    page.wait("document.querySelector('#error').innerText.includes('The service does not answer.')")
    assert page.run(IDS) == found and page.run(OLD) and not page.run("document.querySelector('#retry').hidden")
    assert "earlier search" in page.text("#status")
    page.run("window.fetch = window.real")  # nobody clicks
    page.wait(f"document.querySelector('#error').hidden && {RESULTS} === 12 && !({OLD})")
    page.run("window.fetch = () => Promise.reject(new TypeError('no network'))")
    page.type(" 8")
    page.wait("!document.querySelector('#error').hidden")
    page.run("window.fetch = window.real; document.querySelector('#retry').click()")
    assert page.run("document.querySelector('#results').ariaBusy") == "true", "at once"
    page.wait("document.querySelector('#error').hidden")


def test_the_service_may_come_up_after_the_page(tab, server):
    away = "window.real = fetch; window.fetch = () => Promise.reject(new TypeError())"
    script = tab.send("Page.addScriptToEvaluateOnNewDocument", source=away)["identifier"]
    tab.open(server.url)
    tab.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    tab.wait("document.querySelector('#error').innerText.includes('The service does not answer.')")
    tab.run("window.fetch = window.real")
    tab.wait("document.querySelector('#error').hidden && document.querySelector('#status').textContent.includes('12 images')")


def test_a_first_visit_begins_with_sentences_and_images_of_the_index(page, server):
    captions = {c for c in server.engine._searcher.items["caption"].to_pylist() if c}
    offered = page.run("[...document.querySelectorAll('#sentences button')].map(b => b.innerText)")
    assert len(offered) == 4 and set(offered) <= captions
    assert page.run("document.querySelectorAll('#samples button').length") == 12
    page.wait("[...document.querySelectorAll('#samples img')].every(i => i.complete && i.naturalWidth > 0)")
    page.click("#sentences button")
    page.wait(f"{RESULTS} === 12 && {QUIET}")
    assert page.run("document.querySelector('#text').value") == offered[0] and page.run("document.querySelector('#empty').hidden")
    page.run("document.querySelector('#text').value = ''; document.querySelector('#search').requestSubmit()")
    page.wait("!document.querySelector('#empty').hidden")
    page.click("#samples button")
    page.wait(f"{RESULTS} === 12 && {QUIET} && !document.querySelector('#picture').hidden")


def test_equal_captions_are_told_apart_and_named_once(page, server):
    search(page, "red circle")
    cards = page.run(
        "[...document.querySelectorAll('#results button')].map(b => [b.dataset.id, b.querySelector('.caption').innerText,"
        "b.querySelector('.difference')?.innerText ?? '', b.ariaLabel, b.querySelector('img').alt])"
    )
    captions = [caption for _, caption, *_ in cards]
    assert any(captions.count(c) > 1 for c in captions)
    for item, caption, difference, name, alternative in cards:
        assert difference == (item.split("/")[-1] if captions.count(caption) > 1 else ""), item
        assert name.count(caption) == 1 and difference in name and alternative == ""
    assert page.run("document.querySelectorAll('h1').length") == 1
    page.click("#results button")
    page.wait("document.querySelector('#detail').open")
    named = "(s => document.getElementById(document.querySelector(s).getAttribute('aria-labelledby')).textContent)"
    assert page.run(f"{named}('#detail')") == captions[0] and "token" in page.run(f"{named}('#login')")


def test_what_was_removed_is_not_shown_from_memory(tab, own_index):
    with Server(own_index) as server:
        tab.screen(1100, 800)
        tab.open(server.url)
        tab.wait("document.querySelector('#status').textContent.includes('12 images')")
        search(tab, "red circle")
        first, *others = tab.run(IDS)
        tab.type(" 1")
        tab.wait(f"{RESULTS} === 12 && {QUIET} && document.title.startsWith('red circle 1')")
        index.remove(str(own_index), [first])
        server.engine.refresh()
        tab.run("document.querySelector('#text').value = 'red circle'; document.querySelector('#search').requestSubmit()")
        tab.wait(f"{RESULTS} === 11 && {QUIET}")
        assert sorted(tab.run(IDS)) == sorted(others)
        gone = others[0]
        index.remove(str(own_index), [gone])
        server.engine.refresh()
        tab.run(f"document.querySelector('#results button[data-id={json.dumps(gone)}]').click()")
        tab.wait("document.querySelector('#references').innerText.includes('has no item')")
        tab.wait(f"{RESULTS} === 10 && {QUIET}")
        assert gone not in tab.run(IDS)
        tab.press("Escape")


def test_nothing_of_an_index_is_shown_for_another_in_its_place(tab, own_index, tiny_set, run, tmp_path):
    """The generation of both is 1."""
    index.create(str(tiny_set), str(run), str(tmp_path / "all"), workers=0)
    with Server(own_index) as server:
        tab.open(server.url)
        tab.wait("document.querySelector('#status').textContent.includes('12 images')")
        search(tab, "red circle")
        pictures = "[...document.querySelectorAll('#results .card > img')].map(i => i.src)"
        before = tab.run(pictures)
        shutil.rmtree(own_index)
        (tmp_path / "all").rename(own_index)
        assert server.engine.refresh()
        tab.run("document.querySelector('#search').requestSubmit()")
        expected = server.engine._searcher.search("red circle", top=24)
        wait_for(tab, [r.id for r in expected])
        tab.wait("document.querySelector('#filters select[name=split]')")
        assert not set(before) & set(tab.run(pictures)), "the browser would show them from its memory"


@pytest.mark.parametrize(("most", "offered", "first"), [(30, ["12", "24"], "24"), (20, ["12"], "12"), (7, ["7"], "7")])
def test_no_more_results_are_offered_than_the_service_allows(tab, split_index, most, offered, first):
    with Server(split_index, limits=replace(LIMITS, top=most)) as server:
        tab.leave()
        tab.open(f"{server.url}?q=red+circle&top=48")
        found = server.engine._searcher.search("red circle", top=min(12, int(first)))
        wait_for(tab, [r.id for r in found])
        assert tab.run("[...document.querySelector('#top').options].map(o => o.value)") == offered
        assert f"top={first}&" in server.asked[-1] and tab.run("location.search") == "?q=red+circle" and tab.errors == []


def test_filters_narrow_the_results(tab, tiny_set, run, tmp_path):
    index.create(str(tiny_set), str(run), str(tmp_path / "all"), workers=0)
    with Server(tmp_path / "all") as server:
        tab.open(server.url)
        tab.wait("document.querySelector('#filters select[name=split]')")
        labels = tab.run("[...document.querySelectorAll('#filters label')].map(e => e.firstChild.textContent.trim())")
        assert "Split" in labels and not any("_" in label for label in labels)
        search(tab, "green circle")
        tab.run(
            "(() => { const s = document.querySelector('#filters select[name=split]'); s.value = 'val';"
            "s.dispatchEvent(new Event('change')); })()"
        )
        expected = [r.id for r in server.engine._searcher.search("green circle", top=12, where={"split": "val"})]
        tab.wait(f"JSON.stringify(({IDS}).slice(0, 12)) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")
        assert "where=split%3Dval" in server.asked[-1]


@pytest.fixture(scope="module")
def shop(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """130 products with a price, a day, a color, and titles that are all different."""
    folder = tmp_path_factory.mktemp("shop")
    write_images(folder, range(130))
    rows = ["image,object_id,unit_price,taken,color,title,stock>0"]
    for n in range(130):
        price = "" if n == 7 else f"{(7 * n) % 130 + 0.5}"
        name = f"{'deep/' if n % 2 else ''}{n:02d}.png"
        rows.append(
            f"{name},o{n // 2},{price},2024-{n % 12 + 1:02d}-15,{('red', 'blue', 'light blue')[n % 3]},Hat no. {n},{n % 2 > 0}"
        )
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    index.create(str(folder / "t.csv"), str(run), str(folder / "shop"), workers=0)
    with Server(folder / "shop") as server:
        yield server


def opened(tab: Page, server: Server) -> Searcher:
    tab.screen(1280, 900)
    tab.leave()
    tab.open(server.url)
    tab.wait("document.querySelector('#filters select')")
    return server.engine._searcher


def put(page: Page, name: str, op: str, value: str) -> None:
    """A value into a control, as typing or choosing does."""
    control = f"document.querySelector('#filters [name={json.dumps(name)}][data-op={json.dumps(op)}]')"
    page.run(
        f"(() => {{ const c = {control}; c.value = {json.dumps(value)};"
        "for (const kind of ['input', 'change']) c.dispatchEvent(new Event(kind)); })()"
    )


def wait_for(page: Page, expected: list[str]) -> None:
    page.wait(f"JSON.stringify({IDS}) === {json.dumps(json.dumps(expected, separators=(',', ':')))} && {QUIET}")


def test_columns_that_are_called_as_the_pages_own_facts_and_long_numbers_are_shown(tab, run, tmp_path):
    write_images(tmp_path, range(4))
    rows = [{"image": f"{n:02d}.png", "size": "XL", "object": "mug", "tweet": 1234567890123456790 + n} for n in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index.create(str(tmp_path / "t.jsonl"), str(run), str(tmp_path / "own"), workers=0)
    with Server(tmp_path / "own") as server:
        tab.screen(1280, 900)
        tab.leave()
        tab.open(server.url)
        search(tab, "red circle")
        first = int(tab.run(f"({IDS})[0]").split(".")[0])
        tab.run("document.querySelector('#results button').click()")
        tab.wait(EXPLAINED)
        facts = tab.run("[...document.querySelectorAll('#facts dt')].map(e => [e.innerText, e.nextSibling.innerText])")
    told = dict(facts)
    assert (told["Size"], told["Object"], told["Tweet"]) == ("XL", "mug", str(1234567890123456790 + first))
    assert "×" in told["Image size"] and len(told) == len(facts)


def test_each_column_has_the_control_of_its_type(tab, shop):
    searcher = opened(tab, shop)
    search(tab, "green circle")
    controls = tab.run(
        "Object.fromEntries([...document.querySelectorAll('#filters [data-op]')].map(c => [c.name + c.dataset.op, c.type]))"
    )
    assert controls == {
        "unit_price>=": "number", "unit_price<=": "number", "taken>=": "date", "taken<=": "date",
        "color=": "select-one", "title~": "search", "stock>0=": "select-one",
    }  # fmt: skip
    assert "Unit price" in tab.text("#filters") and "unit_price" not in tab.text("#filters")
    where: list[str] = []
    for (name, op, value), condition in (
        (("unit_price", ">=", "20"), "unit_price>=20"), (("taken", "<=", "2024-06-15"), "taken<=2024-06-15"),
        (("color", "=", "light blue"), "color=light blue"), (("stock>0", "=", "True"), '"stock>0"=True'),
        (("title", "~", "NO. 1"), "title~NO. 1"),
    ):  # fmt: skip
        put(tab, name, op, value)
        where.append(condition)
        expected = searcher.search("green circle", top=24, where=where)
        assert expected, where
        wait_for(tab, [r.id for r in expected])
        assert tab.text("#more") == "" or f"({len(where)})" in tab.run("document.querySelector('#more').textContent")
    assert tab.errors == []


def test_show_more_goes_on_where_it_is(tab, shop):
    searcher = opened(tab, shop)
    search(tab, "green circle")
    whole = [r.id for r in searcher.search("green circle", top=len(searcher))]
    for shown in (48, 72):
        tab.click("#further")
        wait_for(tab, whole[:shown])
    tab.run("document.querySelectorAll('#results button')[60].click()")
    tab.wait(EXPLAINED)
    assert "Rank 61:" in tab.text("#why")
    tab.press("Escape")
    for shown in (96, 120, 130):
        tab.click("#further")
        wait_for(tab, whole[:shown])
    assert tab.run("document.querySelector('#further').hidden") and tab.errors == []
    put(tab, "color", "=", "red")
    wait_for(tab, [r.id for r in searcher.search("green circle", top=24, where="color=red")])
    assert not tab.run("document.querySelector('#further').hidden")
    tab.click("#object")
    objects = [o.images[0].id for o in searcher.search_objects("green circle", top=48, images=4, where="color=red")]
    wait_for(tab, objects[:24])
    tab.click("#further")
    wait_for(tab, objects)
    tab.click("#object")


def test_results_are_put_in_the_order_of_a_column(tab, shop):
    searcher = opened(tab, shop)
    search(tab, "green circle")
    offered = tab.run("[...document.querySelectorAll('#order option')].map(o => o.textContent)")
    assert offered == [
        "best first", "Unit price, low to high", "Unit price, high to low", "Taken, oldest first", "Taken, newest first",
    ]  # fmt: skip
    choose = "(v => { const s = document.querySelector('#order select'); s.value = v; s.dispatchEvent(new Event('change')); })"
    tab.run(f"{choose}('-unit_price')")
    wait_for(tab, [r.id for r in searcher.search("green circle", top=24, sort="-unit_price")])
    tab.click("#further")
    in_order = searcher.search("green circle", top=48, sort="-unit_price")
    wait_for(tab, [r.id for r in in_order])
    tab.run("document.querySelectorAll('#results button')[2].click()")
    tab.wait(EXPLAINED)
    assert f"Rank {in_order[2].rank}:" in tab.text("#why")
    tab.press("Escape")
    tab.run(f"{choose}('+taken')")
    wait_for(tab, [r.id for r in searcher.search("green circle", top=48, sort="taken")])
    tab.run(f"{choose}('')")
    wait_for(tab, [r.id for r in searcher.search("green circle", top=48)])


def test_the_address_opens_the_same_search_again(tab, shop):
    opened(tab, shop)
    search(tab, "green circle")
    assert tab.run("location.search") == "?q=green+circle", "nothing of what is as it is at first"
    for name, op, value in (
        ("unit_price", ">=", "20"), ("taken", "<=", "2024-09-15"), ("stock>0", "=", "True"), ("title", "~", 'no. "1'),
    ):  # fmt: skip
        put(tab, name, op, value)
    tab.wait("new URLSearchParams(location.search).getAll('where').length === 4")
    put(tab, "title", "~", "no. ")
    put(tab, "color", "=", "light blue")
    change = "(v => {{ const s = document.querySelector('{}'); s.value = v; s.dispatchEvent(new Event('change')); }})"
    tab.run(f"{change.format('#top')}('12')")
    tab.run(f"{change.format('#order select')}('-unit_price')")
    for box in ("#refine", "#object"):
        tab.click(box)
    tab.wait(f"{RESULTS} > 0 && {QUIET} && location.search.includes('refine=false')")
    expected = ["by=object", "q=green+circle", "refine=false", "sort=-unit_price", "top=12", "where=%22stock%3E0%22%3DTrue"]
    expected += [
        "where=color%3Dlight+blue",
        "where=taken%3C%3D2024-09-15",
        "where=title%7E%22no.+%22",
        "where=unit_price%3E%3D20",
    ]
    told, ids = tab.run("location.search"), tab.run(IDS)
    assert sorted(told[1:].split("&")) == sorted(expected), told
    controls = (
        "[...document.querySelectorAll('#options input, #options select')].map(c => c.type === 'checkbox' ? c.checked : c.value)"
    )
    before = tab.run(controls)
    tab.open(f"{shop.url}?")
    tab.wait("document.querySelector('#filters select')")
    assert tab.run(controls) != before
    tab.open(shop.url + told)
    wait_for(tab, ids)
    assert tab.run(controls) == before and tab.run("location.search") == told
    assert "(5)" in tab.run("document.querySelector('#more').textContent") and tab.errors == []


@pytest.mark.parametrize("address", ["?where=&sort=-nothing&top=7&by=&index=other", "?where=+&top&refine=%FF"])
def test_an_address_that_says_what_is_not_there_is_passed_over(tab, shop, address):
    searcher = opened(tab, shop)
    tab.open(f"{shop.url}{address}&q=green+circle")
    wait_for(tab, [r.id for r in searcher.search("green circle", top=24)])
    assert tab.run("location.search") == "?q=green+circle" and tab.errors == []


def test_the_address_is_kept_by_browsers_that_do_not_count_its_parameters(tab, shop):
    opened(tab, shop)
    tab.run("delete URLSearchParams.prototype.size")
    search(tab, "green circle")
    assert tab.run("location.search") == "?q=green+circle"


def test_filters_without_a_control_stay_until_they_are_taken_away(tab, shop):
    """A link may be older than the values of a column, or written by hand."""
    searcher = opened(tab, shop)
    where = ["color=red", "color!=blue", "title=Hat no. 12", "unit_price>=5", "unit_price>=20", "taken!=2024-06-15"]
    tab.open(f"{shop.url}?{urlencode({'q': 'green circle', 'where': where}, doseq=True)}")
    chips = "[...document.querySelectorAll('#filters .chip span')].map(e => e.textContent)"
    wait_for(tab, [r.id for r in searcher.search("green circle", top=24, where=where)])
    assert tab.run(chips) == ["color!=blue", "title=Hat no. 12", "unit_price>=20", "taken!=2024-06-15"]
    assert tab.run("document.querySelector('#filters select[name=color]').value") == "red"
    assert "(6)" in tab.run("document.querySelector('#more').textContent")
    told = tab.run("new URLSearchParams(location.search).getAll('where')")
    assert sorted(told) == sorted(where)
    tab.click("#filters .chip:nth-last-child(3) button")
    tab.click("#filters .chip:last-child button")
    left = [one for one in where if one not in ("title=Hat no. 12", where[-1])]
    wait_for(tab, [r.id for r in searcher.search("green circle", top=24, where=left)])
    assert tab.run(chips) == ["color!=blue", "unit_price>=20"]
    assert sorted(tab.run("new URLSearchParams(location.search).getAll('where')")) == sorted(left) and tab.errors == []
    tab.open(f"{shop.url}?q=green+circle&where=none%3D1")
    tab.wait("!document.querySelector('#error').hidden")
    assert "no column 'none'" in tab.text("#error")
    tab.click("#filters .chip button")
    wait_for(tab, [r.id for r in searcher.search("green circle", top=24)])


def test_filters_stay_when_an_index_loses_their_controls(tab, tiny_set, run, tmp_path):
    """The last item with another value of a column goes: there is nothing to choose from any more."""
    index.create(str(tiny_set), str(run), str(tmp_path / "all"), workers=0)
    with Server(tmp_path / "all") as server:
        tab.open(f"{server.url}?q=red+circle&where=split%3Dval")
        searcher = server.engine._searcher
        wait_for(tab, [r.id for r in searcher.search("red circle", top=24, where="split=val")])
        assert tab.run("document.querySelector('#filters .chip') === null")
        others = [r.id for r in searcher.search("red", top=len(searcher), where="split!=val")]
        index.remove(str(tmp_path / "all"), others)
        assert server.engine.refresh()
        tab.run("document.querySelector('#search').requestSubmit()")
        tab.wait("document.querySelector('#filters .chip') !== null")
        assert tab.text("#filters .chip span") == "split=val" and tab.run("location.search").endswith("where=split%3Dval")
        left = server.engine._searcher
        wait_for(tab, [r.id for r in left.search("red circle", top=len(left))])


def test_the_address_names_the_index(tab, tiny_set, run, tmp_path):
    found = {}
    for name in ("val", "test"):
        index.create(str(tiny_set), str(run), str(tmp_path / name), split=name, workers=0)
        searcher = Searcher(str(tmp_path / name))
        found[name] = [r.id for r in searcher.search("red circle", top=len(searcher))]
    with Server(tmp_path / "val", tmp_path / "test") as server:
        tab.leave()
        tab.open(f"{server.url}?q=red+circle&index=test")
        wait_for(tab, found["test"])
        assert tab.run("location.search") == "?q=red+circle&index=test"
        tab.run(
            "(() => { const s = document.querySelector('#index select'); s.selectedIndex = 0;"
            "s.dispatchEvent(new Event('change')); })()"
        )
        wait_for(tab, found["val"])
        assert tab.run("location.search") == "?q=red+circle" and tab.errors == []


def test_a_search_within_what_is_shown(tab, shop, tmp_path):
    searcher = opened(tab, shop)
    search(tab, "green circle")
    within = tab.run(IDS)
    tab.click("#narrow")
    tab.wait("!document.querySelector('#within').hidden")
    assert "Only among 24 images of “green circle”" in tab.text("#within")
    tab.type("blue star")  # in place of the words, which are selected
    tab.wait(f"document.title.startsWith('blue star') && {QUIET}")
    wait_for(tab, [r.id for r in searcher.search("blue star", top=24, within=within)])
    assert "24 of 24 images" in tab.text("#status")
    assert tab.run("document.querySelector('#narrow').hidden && document.querySelector('#further').hidden")
    data = searcher.image_bytes(within[3])
    (tmp_path / "q.png").write_bytes(data if len(data) < 20_000 else searcher.thumbnail(within[3]))
    tab.drop(tmp_path / "q.png")
    tab.wait(f"!document.querySelector('#picture').hidden && {QUIET}")
    assert set(tab.run(IDS)) == set(within)
    tab.click("#picture button")
    tab.click("#within button")
    wait_for(tab, [r.id for r in searcher.search("blue star", top=24)])
    assert tab.run("document.querySelector('#within').hidden") and tab.errors == []


@pytest.mark.parametrize("limits", [{"within": 10}, {"within_bytes": 2 + 10 * len('"00.png",')}])
def test_a_search_within_more_than_is_allowed_is_of_the_first(tab, shop, tmp_path, limits):
    shutil.copytree(shop.engine._searcher.index, tmp_path / "shop")
    with Server(tmp_path / "shop", limits=replace(LIMITS, **limits)) as server:
        searcher = opened(tab, server)
        search(tab, "green circle")
        ids = tab.run(IDS)
        tab.click("#narrow")
        tab.wait(f"!document.querySelector('#within').hidden && {QUIET}")
        most = int(tab.text("#within").split("first ")[1].split()[0])
        assert f"Only among the first {most} of 24 images of “green circle”" in tab.text("#within") and 5 <= most <= 10
        if "within_bytes" in limits:
            told = [len(json.dumps(ids[:count], separators=(",", ":"))) for count in (most, most + 1)]
            assert told[0] <= limits["within_bytes"] < told[1]
        wait_for(tab, [r.id for r in searcher.search("green circle", top=24, within=ids[:most])])


def test_filters_on_a_phone(tab, shop):
    opened(tab, shop)
    tab.screen(375, 700, phone=True)
    search(tab, "green circle")
    tab.click("#more")
    assert tab.run("document.documentElement.scrollWidth <= 375")
    small = (
        "[...document.querySelectorAll('button, select, input:not([role=switch], #file, [type=range]), label')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 44).map(e => e.outerHTML)"
    )
    assert tab.run(small) == []
    put(tab, "unit_price", "<=", "9")
    tab.wait("document.querySelector('#more').textContent.includes('(1)')")
    tab.open(f"{shop.url}?q=green+circle&where=title%3D{'Hat' * 40}")
    tab.wait(f"document.querySelector('#filters .chip') && {QUIET}")
    tab.click("#more")
    assert tab.run(small) == [] and tab.run("document.documentElement.scrollWidth <= 375")


def test_a_phone_and_the_dark(page):
    page.screen(375, 700, dark=True, phone=True)
    assert page.run("!document.querySelector('#options').offsetParent"), "the options are behind one button"
    page.click("#more")
    assert page.run("document.querySelector('#more').ariaExpanded") == "true"
    assert page.run("!!document.querySelector('#refine').offsetParent")
    small = (
        "[...document.querySelectorAll('button, select, input:not([type=range], [role=switch], #file), label')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 44).map(e => e.outerHTML)"
    )
    assert page.run(small) == [], "each is as high as a finger"
    page.click("#more")
    assert page.run("!document.querySelector('#options').offsetParent")
    search(page, "grey square")
    assert page.run("document.documentElement.scrollWidth <= 375"), "nothing lies outside the screen"
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    tile = "getComputedStyle(document.querySelector('#results img'))"
    assert max(page.run(f"{tile}.backgroundColor.match(/\\d+/g).map(Number)")) < 80, "no white tile"
    assert "brightness" in page.run(f"{tile}.filter")
    page.run("document.querySelector('#results button').click()")
    page.wait(EXPLAINED)
    assert page.run(small) == []
    box = page.run("(() => { const b = document.querySelector('#detail').getBoundingClientRect(); return [b.x, b.width]; })()")
    assert box[0] >= 0 and box[0] + box[1] <= 375
    page.screen(1100, 800)
    assert page.run("getComputedStyle(document.body).backgroundColor") != dark


# -- judging ---------------------------------------------------------------------------------------------------------

CARDS = "[...document.querySelectorAll('#results .card')].map(b => b.dataset.id)"
SAID = (  # what the page shows of each result: true, false or null
    "Object.fromEntries([...document.querySelectorAll('#results .judge')].map(pair => ["
    "pair.dataset.judged, [...pair.children].map(b => b.ariaPressed).join() === 'true,false' ? true"
    " : [...pair.children].map(b => b.ariaPressed).join() === 'false,true' ? false : null]))"
)
FAILING = (  # what is judged does not arrive while `window.failing`
    "window.real ||= window.fetch; window.fetch = async (path, options) =>"
    "  window.failing && options?.method === 'POST' && `${path}` === 'judgements'"
    "    ? Response.json({error: 'NotWritten', message: 'the disk is full.', fix: 'Make room.'}, {status: 503})"
    "    : real(path, options)"
)


@pytest.fixture
def judging(tab: Page, own_index: Path) -> Iterator[Server]:
    """A service whose visitors may judge, and its page just opened."""
    with Server(own_index, judge=True) as server:
        tab.screen(1100, 800)
        tab.leave()
        tab.open(server.url)
        tab.wait("document.querySelector('#status').textContent.includes('12 images')")
        yield server


def button(at: int, relevant: bool) -> str:
    return f"#results li:nth-child({at}) [data-relevant={str(relevant).lower()}]"


def kept(server: Server) -> dict[tuple[str, str], bool]:
    """What is read for an export or a training."""
    return {(j.query, j.id): j.relevant for j in server.judgements.read()} if server.judgements.path.exists() else {}


def wait_until_kept(page: Page, server: Server, expected: dict[tuple[str, str], bool]) -> None:
    for _ in range(200):
        if kept(server) == expected:
            return
        page.run("new Promise(done => setTimeout(done, 50))")
    assert kept(server) == expected


def test_results_are_judged_and_what_was_said_is_seen_again(tab, judging):
    search(tab, "red circle")
    ids = tab.run(CARDS)
    assert tab.run(SAID) == dict.fromkeys(ids) and "Say which are right" in tab.text("#judged")
    tab.click(button(1, True))
    tab.click(button(2, False))
    wait_until_kept(tab, judging, {("red circle", ids[0]): True, ("red circle", ids[1]): False})
    said = dict.fromkeys(ids) | {ids[0]: True, ids[1]: False}
    assert tab.run(SAID) == said and "2 judged for this sentence" in tab.text("#judged")
    assert "mmref train --from-judgements INDEX" in tab.text("#judged")
    search(tab, "blue star")
    assert set(tab.run(SAID).values()) == {None} and "Say which are right" in tab.text("#judged")
    tab.wait("document.querySelector('#judged').innerText.includes('1 sentence in all')")
    tab.open("about:blank")
    tab.open(f"{judging.url}?q=red+circle")
    tab.wait(f"{RESULTS} > 0 && Object.values({SAID}).filter(said => said !== null).length === 2")
    assert tab.run(SAID) == said and "2 judged for this sentence" in tab.text("#judged")
    tab.click("#refine")
    tab.wait("document.querySelector('#status').textContent.includes('not refined')")
    assert tab.run(SAID) == said, "whatever their order"
    tab.click("#refine")
    tab.wait("!document.querySelector('#status').textContent.includes('not refined')")
    tab.click(button(1, True))  # again: taken back
    tab.click(button(2, True))  # another opinion
    wait_until_kept(tab, judging, {("red circle", ids[1]): True})
    assert tab.run(SAID) == dict.fromkeys(ids) | {ids[1]: True} and tab.errors == []


def test_what_the_terminal_judged_is_shown_too(tab, judging):
    item = judging.engine._searcher.items["id"][3].as_py()
    judging.judgements.save(judging.engine._searcher, "red circle", item, False)
    search(tab, "red circle")
    tab.wait(f"({SAID})[{json.dumps(item)}] === false")


def test_buttons_name_their_images_and_keys_judge(tab, judging):
    search(tab, "red circle")
    ids = tab.run(CARDS)
    for at, name in enumerate(
        tab.run("[...document.querySelectorAll('#results .card')].map(b => b.ariaLabel.split(', rank')[0])")
    ):
        labels = tab.run(f"[...document.querySelectorAll('#results li:nth-child({at + 1}) .judge button')].map(b => b.ariaLabel)")
        assert labels == [f"Right: {name}", f"Wrong: {name}"]
    tab.press("ArrowDown")
    tab.press("ArrowRight")
    stops = (
        "[...document.querySelectorAll('#results button')].filter(b => b.tabIndex === 0)"
        ".map(b => b.closest('li').firstChild.dataset.id)"
    )
    assert tab.run(stops) == [ids[1]] * 3, "one result is a stop, with its buttons"
    tab.type("y")
    wait_until_kept(tab, judging, {("red circle", ids[1]): True})
    tab.press("Tab")
    tab.press("Tab")
    assert tab.run("document.activeElement.ariaLabel.startsWith('Wrong: ')")
    tab.press("Enter")
    wait_until_kept(tab, judging, {("red circle", ids[1]): False})
    tab.press("ArrowRight")
    assert tab.run(f"document.activeElement.dataset.id === ({CARDS})[2]")
    tab.type("n")
    wait_until_kept(tab, judging, {("red circle", ids[1]): False, ("red circle", ids[2]): False})
    tab.type("n")
    wait_until_kept(tab, judging, {("red circle", ids[1]): False})
    search(tab, "tiny y n")
    assert kept(judging) == {("red circle", ids[1]): False}, "letters of a sentence judge nothing"


def test_what_is_not_kept_is_not_shown_as_kept(tab, judging):
    tab.run(FAILING)
    search(tab, "red circle")
    ids = tab.run(CARDS)
    tab.click(button(1, True))
    wait_until_kept(tab, judging, {("red circle", ids[0]): True})
    tab.run("window.failing = true")
    for at, relevant in ((1, False), (2, True), (1, True), (1, True)):
        tab.run(f"document.querySelector({button(at, relevant)!r}).click()")
    tab.wait("document.querySelector('#judged').innerText.includes('Not kept. The disk is full. Make room.')")
    tab.wait(f"JSON.stringify({SAID}) === {json.dumps(json.dumps(dict.fromkeys(ids) | {ids[0]: True}, separators=(',', ':')))}")
    assert tab.run(RESULTS) == 36 and not tab.run(OLD), "the results are as good as before"
    tab.run("scrollTo(0, 1e6)")
    place = "document.querySelector('#counted').getBoundingClientRect()"
    assert 0 <= tab.run(f"{place}.top") < tab.run(f"{place}.bottom") <= 800, "wherever one is on the page"
    tab.run("window.failing = false")
    tab.click(button(2, True))
    wait_until_kept(tab, judging, {("red circle", ids[0]): True, ("red circle", ids[1]): True})
    assert "2 judged for this sentence" in tab.text("#judged")


def test_the_last_of_quick_presses_counts(tab, judging):
    tab.run(  # answers to what is judged come ever faster
        "window.real ||= window.fetch; window.wait = 400; window.fetch = async (path, options) => {"
        "  if (options?.method === 'POST') await new Promise(done => setTimeout(done, window.wait -= 90));"
        "  return real(path, options); }"
    )
    search(tab, "red circle")
    ids = tab.run(CARDS)
    for relevant in (True, False, True, False):
        tab.run(f"document.querySelector({button(1, relevant)!r}).click()")
    assert tab.run(SAID)[ids[0]] is False, "shown at once"
    tab.run("new Promise(done => setTimeout(done, 1500))")
    assert kept(judging) == {("red circle", ids[0]): False} and tab.run(SAID)[ids[0]] is False
    assert len(judging.judgements.path.read_text().splitlines()) == 4


def test_what_is_opened_is_judged_and_images_of_an_object_each_for_itself(tab, judging):
    search(tab, "red circle")
    ids = tab.run(CARDS)
    tab.run("document.querySelector('#results .card').click()")
    tab.wait(EXPLAINED)
    assert tab.text("#asked") == "Is it right for “red circle”?"
    tab.click("#verdict [data-relevant=true]")
    tab.press("ArrowRight")
    tab.wait(f"document.querySelector('#verdict .judge').dataset.judged === {json.dumps(ids[1])}")
    tab.type("n")
    wait_until_kept(tab, judging, {("red circle", ids[0]): True, ("red circle", ids[1]): False})
    assert tab.run("[...document.querySelectorAll('#verdict button')].map(b => b.ariaPressed)") == ["false", "true"]
    tab.press("Escape")
    assert tab.run(SAID) == dict.fromkeys(ids) | {ids[0]: True, ids[1]: False}
    tab.click("#object")
    tab.wait("document.querySelector('#results .others') !== null")
    assert tab.run("document.querySelectorAll('#results .judge').length") == 0
    objects = judging.engine._searcher.search_objects("red circle", images=4)
    at, other = next((at, image.id) for at, o in enumerate(objects) for image in o.images[1:2] if image.id not in ids[:2])
    tab.run(f"document.querySelectorAll('#results .card')[{at}].click()")
    tab.wait("document.querySelector('#images button:nth-child(2)') !== null")
    tab.click("#images button:nth-child(2)")
    tab.wait(f"document.querySelector('#verdict .judge').dataset.judged === {json.dumps(other)}")
    tab.click("#verdict [data-relevant=false]")
    wait_until_kept(tab, judging, {("red circle", ids[0]): True, ("red circle", ids[1]): False, ("red circle", other): False})
    tab.press("Escape")
    tab.click("#object")
    tab.wait(f"document.querySelectorAll('#results .judge').length === 12 && {QUIET}")
    assert tab.run(SAID)[other] is False and tab.errors == []


def test_what_an_image_finds_is_not_judged(tab, judging, tmp_path):
    search(tab, "red circle")
    searcher = judging.engine._searcher
    (tmp_path / "query.png").write_bytes(searcher.image_bytes(searcher.items["id"][4].as_py()))
    tab.drop(tmp_path / "query.png")
    tab.wait(f"document.querySelectorAll('#results .judge').length === 0 && {RESULTS} === 12 && {QUIET}")
    assert tab.run("document.querySelector('#judged').hidden")
    tab.run("document.querySelector('#results .card').focus()")
    tab.type("y")
    tab.run("document.querySelector('#results .card').click()")
    tab.wait(EXPLAINED)
    assert tab.run("document.querySelector('#verdict').hidden")
    tab.type("y")
    tab.press("Escape")
    assert kept(judging) == {}


def test_without_the_flag_nothing_is_asked(page, server):
    search(page, "red circle")
    page.click("#results button")
    page.wait(EXPLAINED)
    assert page.run("document.querySelectorAll('#results .judge').length") == 0
    assert page.run("document.querySelector('#judged').hidden && document.querySelector('#verdict').hidden")
    page.press("Escape")
    page.press("ArrowDown")
    page.type("y")
    assert not any("judgements" in url for url in page.requested) and page.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_judging_on_a_phone(tab, judging, dark):
    tab.screen(375, 700, dark=dark, phone=True)
    search(tab, "red circle")
    sizes = (
        "[...document.querySelectorAll('.judge button')].filter(e => e.offsetParent).map(e => e.getBoundingClientRect())"
        ".filter(b => b.width < 44 || b.height < 44).length"
    )
    tab.click(button(1, True))
    tab.wait("document.querySelector('#judged').innerText.includes('1 judged')")
    assert tab.run(sizes) == 0 and tab.run("document.documentElement.scrollWidth <= 375")
    spills = "[...document.querySelectorAll('.judge button')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert tab.run(spills) == 0
    tab.run("document.querySelector('#results .card').click()")
    tab.wait(EXPLAINED)
    assert tab.run(sizes) == 0
    tab.press("Escape")


def test_a_token_is_asked_for_once(tab, split_index):
    with Server(split_index, access=Access(TOKEN)) as server:
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
    with Server(split_index, access=Access(TOKEN)) as server:
        tab.open(f"{server.url}#{TOKEN}")
        tab.wait("document.querySelector('#status').textContent.includes('12 images')")
        assert tab.run("location.hash") == ""
        assert tab.run("location.search") == ""
        tab.open("about:blank")
        tab.open(f"{server.url}?q=red+circle#{TOKEN}")
        tab.wait(f"{RESULTS} === 12 && {QUIET}")
        assert tab.run("document.querySelector('#text').value") == "red circle"
        assert tab.run("location.search + location.hash") == "?q=red+circle"


def test_what_stands_behind_the_hash_may_be_anything(tab, server):
    for address in ("#100%", "#caf\u00e9 \u2603", "?q=red+circle#100%"):
        tab.open("about:blank")
        tab.open(f"{server.url}{address}")
        tab.wait("document.querySelector('#status').textContent.includes('12')")
        assert tab.run("document.querySelector('#error').hidden") and tab.run("location.hash") == ""

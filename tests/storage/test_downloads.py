"""Many downloads at a time: hosts are not asked more than they may be, or for what they do not give, nor twice for anything."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from email.utils import formatdate
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from mmref.cli import main
from mmref.errors import SampleError
from mmref.storage import download as module
from mmref.storage.download import Terms, _retry_after, download
from mmref.storage.downloads import Downloads


class Host(http.server.BaseHTTPRequestHandler):
    """/tags/A|B answers with these X-Robots-Tags, /busy/S with 429 and a Retry-After of S once, /missing with 404, others with
    `body`, or their path."""

    asked: list[str] = []
    agents: set[str | None] = set()
    busy = most = 0
    down = False
    body = b""
    lock = threading.Lock()

    def do_GET(self) -> None:
        kind, _, rest = unquote(self.path).strip("/").partition("/")
        with Host.lock:
            Host.busy += 1
            Host.most = max(Host.most, Host.busy)
            self.asked.append(self.path)
            self.agents.add(self.headers["User-Agent"])
            again = self.asked.count(self.path) > 1
        if kind == "slow":
            time.sleep(0.05)
        status = 429 if kind == "busy" and not again else 404 if kind == "missing" else 503 if Host.down else 200
        self.send_response(status)
        for value in rest.split("|") if kind == "tags" else ():
            self.send_header("X-Robots-Tag", value)
        if status == 429:
            self.send_header("Retry-After", rest)
        data = self.body or self.path.encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with Host.lock:
            Host.busy -= 1
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    monkeypatch.setattr(module, "PAUSES", module._Pauses())
    for name, value in {"asked": [], "agents": set(), "busy": 0, "most": 0, "down": False, "body": b""}.items():
        monkeypatch.setattr(Host, name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("tags", "taken"),
    [
        ("all", True),
        ("nofollow, noarchive", True),
        ("noai", False),
        ("nofollow, NoImageAI", False),
        ("noindex", False),
        ("otherbot: noai", True),
        ("mmref: noimageindex, nofollow", False),
        ("otherbot: noai|noai", False),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", True),
    ],
)
def test_what_a_host_does_not_give_for_training(web: str, tags: str, taken: bool) -> None:
    url = f"{web}/tags/{tags.replace(' ', '%20')}"
    assert download(url), "not for training"
    if taken:
        assert download(url, Terms(for_training=True))
    else:
        with pytest.raises(SampleError, match="is not given for training \\(X-Robots-Tag: no"):
            download(url, Terms(for_training=True))


def test_who_asks_is_told(web: str) -> None:
    download(f"{web}/a")
    download(f"{web}/b", Terms("my-shop/1.0 (+https://shop.example/bots)"))
    assert Host.agents == {module.Terms.user_agent, "my-shop/1.0 (+https://shop.example/bots)"}
    assert module.Terms.user_agent.startswith("mmref/")


def test_a_host_that_asks_to_wait_is_left_alone(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    assert download(f"{web}/busy/7") == b"/busy/7"
    assert any(6 < seconds <= 7 for seconds in slept)
    slept.clear()
    assert download(f"{web}/other") == b"/other" and 6 < max(slept) <= 7, "for other images too"
    monkeypatch.setattr(module, "PAUSES", module._Pauses())
    with pytest.raises(OSError, match="has not come within"):
        download(f"{web}/busy/3600")


def test_pauses_are_numbers_or_dates() -> None:
    message = Message()
    assert _retry_after(message) == 0
    for value, seconds in ((" 12 ", 12.0), ("soon", 0.0), (formatdate(time.time() + 100, usegmt=True), 100.0), ("-3", 0.0)):
        message["Retry-After"] = value
        assert abs(_retry_after(message) - seconds) < 2
        del message["Retry-After"]


def test_a_size_that_is_too_large(web: str) -> None:
    assert download(f"{web}/abc", Terms(max_bytes=4)) == b"/abc"
    with pytest.raises(SampleError, match="larger than the 4 bytes"):
        download(f"{web}/abcd", Terms(max_bytes=4))


def test_so_many_of_each_host_at_a_time(web: str) -> None:
    downloads = Downloads(at_once=16, per_host=3)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(downloads.fetch, [f"{web}/slow/{i}" for i in range(24)]))
    assert found == [f"/slow/{i}".encode() for i in range(24)]
    assert 1 < Host.most <= 3
    assert downloads.share(4, "x") == Downloads(at_once=4, per_host=1, folder="x")


def build(web: str, tmp_path: Path, names: list[str], *options: str) -> int:
    rows = [{"image": f"{web}/{name}", "object_id": name, "caption": "x", "split": "train"} for name in names]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return main(
        ["shards", "build", "table", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "set"), "--workers", "0", *options]
    )


def test_a_build_goes_on_where_it_was_ended(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    monkeypatch.setattr(Host, "body", data.getvalue())
    names = [*(f"{i}.png" for i in range(40)), "missing/a.png", "tags/noai"]
    with monkeypatch.context() as ended:
        ended.setattr("mmref.shards.build._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(web, tmp_path, names)
    kept = [path for path in (tmp_path / "set.downloads").rglob("*") if path.is_file()]
    assert len(kept) == 40 and not (tmp_path / "set").exists()
    first = Counter(Host.asked)
    assert build(web, tmp_path, names) == 0
    again = Counter(Host.asked) - first
    assert set(again) == {"/missing/a.png", "/tags/noai"}, "what came is not asked for again"
    assert not (tmp_path / "set.downloads").exists(), "the set is complete"
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["images"] == 40
    assert manifest["skipped"]["kinds"] == {"HTTP 404": 1, "not for machine learning": 1}
    said = capsys.readouterr().out
    assert "2 left out (HTTP 404 1, not for machine learning 1)" in said
    (tmp_path / "set.downloads" / "ab").mkdir(parents=True)
    (tmp_path / "set.downloads" / "ab" / "mine.txt").write_text("a folder of that name that is the user's")
    assert build(web, tmp_path, names, "--overwrite", "--ignore-robots-tag", "--user-agent", "me/1") == 0
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["images"] == 41 and "me/1" in Host.agents
    left = [path.name for path in (tmp_path / "set.downloads").rglob("*")]
    assert left == ["ab", "mine.txt"]


@pytest.mark.parametrize(("option", "value"), [("--max-download-mb", "0"), ("--user-agent", "a\nb")])
def test_options_that_cannot_work(web: str, tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(web, tmp_path, ["a"], option, value) == 2
    assert option in capsys.readouterr().err

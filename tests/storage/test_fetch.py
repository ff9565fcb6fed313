"""Images by the names that tables give them: as they are written, as a browser would take them, or as a Mac keeps them."""

from __future__ import annotations

import http.server
import os
import re
import sys
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from mmref.errors import FileSystemMissingError, OutsideError, SampleError
from mmref.storage import download
from mmref.storage.download import quoted
from mmref.storage.fetch import id_of, locate, locate_inside, outside_most, read_location, unsigned

NFC, NFD = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))


class Web(http.server.BaseHTTPRequestHandler):
    """Answers with the path that was asked for, after the failures that the path names."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        before = self.asked.count(self.path)
        name = unquote(self.path.partition("?")[0]).strip("/")
        status = int(name.split("-")[1]) if name.startswith("always-") else 200
        if name.startswith("once-") and before == 1:
            status = int(name.split("-")[1])
        body = b" <!DOCTYPE HTML><html>Log in" if name == "login.jpg" else self.path.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (name == "cut.png" and before == 1)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setattr(Web, "asked", [])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("http://a.b/red mug.png", "http://a.b/red%20mug.png"),
        ("http://a.b/red%20mug.png", "http://a.b/red%20mug.png"),
        ("http://a.b/100% new.png", "http://a.b/100%%20new.png"),
        ("http://a.b/100%25%20new.png", "http://a.b/100%25%20new.png"),
        ("http://a.b/größe/猫.png", "http://a.b/gr%C3%B6%C3%9Fe/%E7%8C%AB.png"),
        ("http://a.b/a,b;c(1)+2~[x].png", "http://a.b/a,b;c(1)+2~[x].png"),
        ("https://a.b/x?q=rote Tasse&w=1%2F2&sig=a/b+c==", "https://a.b/x?q=rote%20Tasse&w=1%2F2&sig=a/b+c=="),
        ('http://a.b/a"<b>.png#part', "http://a.b/a%22%3Cb%3E.png"),
        ("http://a.b/c\\d.png", "http://a.b/c/d.png"),
        ("http://bob:größe %2F@münchen.de/a.png", "http://bob:gr%C3%B6%C3%9Fe%20%2F@xn--mnchen-3ya.de/a.png"),
        ("http://münchen.de:8080/a.png", "http://xn--mnchen-3ya.de:8080/a.png"),
    ],
)
def test_urls_are_quoted_as_a_browser_does(given: str, sent: str) -> None:
    assert quoted(given) == sent


def test_urls_are_fetched(web: str) -> None:
    for name in ("red mug.png", "größe é.png", "100%25%20new.png", "a?b=c d", "plain.png"):
        assert read_location(f"{web}/{name}").decode() == quoted(f"{web}/{name}").removeprefix(web)
    assert read_location(locate("rote Tasse.png", web)) == b"/rote%20Tasse.png"
    assert read_location(f"{web}/plain.png".replace("http", "HTTP")) == b"/plain.png"


@pytest.mark.parametrize(
    ("name", "times", "said"),
    [
        ("always-404", 1, "404"), ("always-410", 1, "410"), ("always-403", 1, "403"), ("always-503", 3, "503"),
        ("once-429", 2, ""), ("once-500", 2, ""), ("cut.png", 2, ""), ("login.jpg", 1, "is a web page, not an image"),
    ],
)  # fmt: skip
def test_what_may_pass_is_asked_again(web: str, name: str, times: int, said: str) -> None:
    if said:
        with pytest.raises((OSError, SampleError), match=said):
            read_location(f"{web}/{name}")
    else:
        assert read_location(f"{web}/{name}") == f"/{name}".encode()
    assert Web.asked == [f"/{name}"] * times


def test_what_is_no_url_costs_that_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    for place in ("http://[::1/a.png", "http://", "http://a.b:port/x"):
        with pytest.raises((OSError, SampleError)):
            read_location(place)
    with pytest.raises(SampleError, match=r"nothing opens URLs that begin with htp://"):
        read_location("htp://a.b/c.png")
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(FileSystemMissingError, match="adlfs"):
        read_location("abfs://a/b.png")


@pytest.mark.parametrize(("there", "named"), [(NFC, NFD), (NFD, NFC)])
def test_a_name_in_the_other_unicode_form(tmp_path: Path, there: str, named: str) -> None:
    folder = tmp_path / there.removesuffix(".png")  # the folder too
    folder.mkdir()
    (folder / there).write_bytes(b"image")
    place = f"{tmp_path}/{named.removesuffix('.png')}/{named}"
    assert read_location(place) == read_location(f"file://{place}") == b"image"
    (folder / named).write_bytes(b"other")
    assert read_location(f"{folder}/{named}") == b"other", "as it is written"
    mixed = unicodedata.normalize("NFC", "é") + unicodedata.normalize("NFD", "é")
    for form in ("NFC", "NFD"):
        (folder / unicodedata.normalize(form, mixed)).write_bytes(form.encode())
    with pytest.raises(FileNotFoundError, match=r"2 other forms of Unicode \(NFC, NFD\)"):
        read_location(f"{folder}/{mixed}")


def test_a_name_in_the_other_unicode_form_behind_a_url(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe(f"/forms/{NFD}", b"image")
    assert read_location(f"memory://forms/{NFC}") == b"image"
    with pytest.raises(FileNotFoundError):
        read_location("memory://forms/none.png")


def test_names_of_windows_and_other_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "A 1.png").write_bytes(b"image")
    (tmp_path / "b\\c.png").write_bytes(b"as it is")
    assert read_location(locate("pics\\A 1.png", str(tmp_path))) == b"image"
    assert read_location(locate("b\\c.png", str(tmp_path))) == b"as it is"
    assert read_location(f"file://{tmp_path}/pics/A%201.png") == read_location(f"file://{tmp_path}/pics/A 1.png") == b"image"
    with pytest.raises(FileNotFoundError, match=r"has 'A 1.png', with other capitals"):
        read_location(locate("pics/a 1.PNG", str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="a path of Windows"):
        read_location(locate("C:\\Users\\me\\a.png", str(tmp_path)))
    (tmp_path / "pics" / "new.png").write_bytes(b"later")
    assert read_location(locate("pics\\new.png", str(tmp_path))) == b"later", "names are looked up again"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_location(locate("~/pics/A 1.png", "/nowhere")) == b"image"
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "pics"):
        with pytest.raises(OSError, match="is no file"):
            read_location(str(tmp_path / name))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images beside which a secret lies, with links inside, out of it and to nothing."""
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "a b.png").write_bytes(b"image")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "x.png").write_bytes(b"secret")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "deep" / "a b.png")
    return root


def test_a_table_names_what_lies_below_its_root(root: Path) -> None:
    inside = ["deep/a b.png", "deep\\a b.png", "./deep/../deep/a b.png", "in.png", "up/root/in.png", f"{root}/in.png"]
    inside += [f"file://{root}/deep/a%20b.png", f"file://localhost{root}/in.png"]
    for ref in inside:
        assert locate_inside(ref, str(root)) == locate(ref, str(root))
        assert read_location(locate_inside(ref, str(root))) == b"image"
    for ref in ("missing.png", "https://a.b/../c.png", "HTTP://127.0.0.1/c.png"):
        assert locate_inside(ref, str(root)) == locate(ref, str(root))
    assert read_location(locate_inside("deep/a b.png", f"file://{root}")) == b"image"


@pytest.mark.parametrize(
    "ref",
    [
        "../secret.png", "deep/../../secret.png", "..\\secret.png", "deep\\..\\..\\secret.png", "{up}/secret.png", "out.png",
        "up/secret.png", "up\\secret.png", "file://{up}/secret.png", "FILE://{up}/secret.png", "file://{up}/root/%2e%2e/secret.png",
        "file://localhost{up}/secret.png", "file://{up}/root/..%2fsecret.png", "~/secret.png", "../root-2/x.png", "/etc/hostname",
        "../missing.png", "..\\missing.png", "memory://bucket/a.png", "local://{up}/secret.png", "/dev/zero",
    ],
)  # fmt: skip
def test_a_table_names_nothing_beside_its_root(root: Path, monkeypatch: pytest.MonkeyPatch, ref: str) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    with pytest.raises(OutsideError, match="--allow-outside allows it"):
        locate_inside(ref.replace("{up}", str(root.parent)), str(root))


@pytest.mark.parametrize(
    ("ref", "allowed"),
    [
        ("a.png", True), ("memory://bucket/x/deep/a.png", True), ("../y/a.png", False), ("memory://bucket/x/../y/a.png", False),
        ("memory://bucket/x/%2e%2e/y/a.png", False), ("memory://bucket/xy/a.png", False), ("memory://other/a.png", False),
        ("/etc/hostname", False), ("file:///etc/hostname", False), ("memory://bucket/x/a::file:///etc/hostname", False),
        ("https://a.b/c.png", True),
    ],
)  # fmt: skip
def test_a_table_of_a_storage_names_what_lies_below_its_prefix(ref: str, allowed: bool) -> None:
    if allowed:
        assert locate_inside(ref, "memory://bucket/x") == locate(ref, "memory://bucket/x")
    else:
        with pytest.raises(OutsideError, match="--allow-outside"):
            locate_inside(ref, "memory://bucket/x")


def test_a_storage_that_is_not_installed_is_told_before_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(FileSystemMissingError, match="adlfs"):
        locate_inside("abfs://a/b.png", str(tmp_path))
    for ref in ("htp://a.b/c.png", "simplecache::file:///etc/hostname", "file::file:///etc/hostname"):
        with pytest.raises(SampleError, match="nothing opens URLs"):
            locate_inside(ref, str(tmp_path))


def test_a_table_of_which_most_lies_outside() -> None:
    assert outside_most("t.csv", "/r", [], 0) == outside_most("t.csv", "/r", [("row 2", "why")], 2) == ""
    said = outside_most("t.csv", "/r", [("row 2", "why"), ("row 3", "why")], 3)
    assert "2 of 3 rows" in said and "row 2: why" in said and "--allow-outside" in said and "--image-root" in said


def test_ids_tell_neither_folders_nor_keys() -> None:
    for ref in ("a.png", "deep/../a b.png", "C:\\x\\a.png"):
        assert id_of(ref) == ref
    places = ["/home/me/a.png", "/home/you/a.png", "~/a.png", "https://a.b/me/a.png", "https://a.b/me/a.png?w=1", "s3://me/a.png",
              "http://a.b/me/a.png", "file:///home/me/a.png", "https://me:word@a.b/a.png#me"]  # fmt: skip
    ids = [id_of(place) for place in places]
    assert len(set(ids)) == len(places) and ids == [id_of(place) for place in places]
    assert all(re.fullmatch(r"a-[0-9a-f]{12}\.png", name) for name in ids), ids
    for place in ("https://me:word@a.b", "https://a.b/?me=1", "http://[::1/", "/"):
        assert re.fullmatch(r"image-[0-9a-f]{12}", id_of(place)), id_of(place)
    assert len(id_of(f"/{'x' * 500}.png")) < 120


def test_another_password_is_the_same_image() -> None:
    for user in ("bob:one@", "bob:tw@o@", "ann@", "@"):
        assert unsigned(f"HTTPS://{user}a.b/c@2x.png?w=1@") == "HTTPS://a.b/c@2x.png?w=1@"
        assert id_of(f"https://{user}a.b/c.png") == id_of("https://a.b/c.png") == "c-2c74880a8357.png"
    for ref in ("s3://b@c/d.png", "https://a.b/c:d@e.png", "https://a.b?c@d", "https://a.b#c@d", "x/http://a@b"):
        assert unsigned(ref) == ref


@pytest.mark.parametrize(
    ("signed", "plain"),
    [
        ("X-Amz-Algorithm=A&X-Amz-Date={}&X-Amz-Expires=60&X-Amz-Signature={}", ""),
        ("w=2&AWSAccessKeyId=A&Expires={}&Signature={}", "?w=2"), ("Policy={}&Signature={}&Key-Pair-Id=K", ""),
        ("X-Goog-Signature={}&X-Goog-Date={}", ""), ("sv=2024&se={}&sr=b&sp=r&sig={}", ""), ("w=2&expires={}", None),
        ("version={}&name=sig", None),
    ],
)  # fmt: skip
def test_another_signature_is_the_same_image(signed: str, plain: str | None) -> None:
    one, other = ("https://a.b/c.png?" + signed.format(*[key] * 2) for key in ("k1", "k2"))
    assert (id_of(one) == id_of(other)) is (plain is not None)
    assert unsigned(one) == (one if plain is None else "https://a.b/c.png" + plain)

"""What a table brings into an index: images that it may name, under ids that tell neither folders nor keys."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from mmref.errors import SearchIndexError, StorageError
from mmref.retrieval import images, index
from mmref.retrieval.images import TableColumns, list_images
from mmref.retrieval.manifest import Source
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.set_aside import read_skipped
from mmref.shards.build import BuildOptions, build_shards, make_source
from mmref.storage import download, image_places, retries


def ids(path: Path) -> list[str]:
    return Searcher(str(path)).items["id"].to_pylist()


def test_a_table_brings_images_from_outside_with_a_flag(folder, run, tmp_path):
    secret = tmp_path / "secret.png"
    shutil.copy(folder / "00.png", secret)
    (folder / "t.csv").write_text(f"image\n02.png\n../secret.png\n{folder}/04.png\n")
    index.create(str(folder / "t.csv"), str(run), str(tmp_path / "out"), workers=0)
    (short,) = set(ids(tmp_path / "out")) - {"02.png"}
    assert re.fullmatch(r"04-[0-9a-f]{12}\.png", short)
    (skipped,) = read_skipped(tmp_path / "out")
    assert skipped["id"] == "row 3" and "--allow-outside" in skipped["problem"]
    columns = TableColumns(allow_outside=True)
    index.add(str(tmp_path / "out"), str(folder / "t.csv"), columns=columns, workers=0)
    assert set(ids(tmp_path / "out")) == {"02.png", "../secret.png", short}
    (folder / "t.csv").write_text(f"image\n02.png\n../secret.png\nfile://{secret}\n{secret}\n")
    with pytest.raises(SearchIndexError, match=r"3 of 4 rows name images outside of .*--allow-outside"):
        index.create(str(folder / "t.csv"), str(run), str(tmp_path / "other"), workers=0)
    assert not (tmp_path / "other.partial").exists()


def test_an_index_of_before_keeps_its_ids(folder, run, tmp_path, monkeypatch):
    (folder / "t.csv").write_text(f"image,caption\n{folder}/00.png,one\nfile://{folder}/02.png,two\n04.png,three\n")
    monkeypatch.setattr(images, "id_of", lambda ref: ref)
    before = index.create(str(folder / "t.csv"), str(run), str(tmp_path / "out"), workers=0)
    monkeypatch.undo()
    after = index.add(str(tmp_path / "out"), str(folder / "t.csv"), workers=0)
    assert (after.generation, after.items) == (before.generation, 3)
    assert set(ids(tmp_path / "out")) == {f"{folder}/00.png", f"file://{folder}/02.png", "04.png"}


def test_ids_of_a_column(folder, run, tmp_path):
    rows = ["00.png,7,x", "00.png,7,y", "02.png,8,", "02.png,9,", "04.png,7,", "06.png,,", f"{folder}/08.png,a b,"]
    (folder / "t.csv").write_text("image,sku,caption\n" + "".join(f"{row}\n" for row in rows))
    columns = TableColumns(item_id="sku")
    index.create(str(folder / "t.csv"), str(run), str(tmp_path / "out"), columns=columns, workers=0)
    assert ids(tmp_path / "out") == ["7", "8", "a b"]
    assert Searcher(str(tmp_path / "out")).metadata_columns == ["caption"]
    said = {s["id"]: s["problem"] for s in read_skipped(tmp_path / "out")}
    assert list(said) == ["row 5", "row 6", "row 7"] and said["row 7"] == "no sku"
    assert "has the id '8' in an earlier row, here '9'" in said["row 5"] and "is that of the image '00.png'" in said["row 6"]
    with pytest.raises(SearchIndexError, match=r"no column 'nr'.*--id-column"):
        list_images(str(folder / "t.csv"), columns=TableColumns(item_id="nr"))


def test_the_same_urls_with_other_signatures(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        image_places, "read_location", lambda place: (folder / place.split("/")[-1].partition("?")[0]).read_bytes()
    )
    urls = [f"https://a.b/{name}.png?Expires=1&Signature=" for name in ("00", "02")]
    for signature in ("k1", "k2"):
        rows = "".join(f"{url}{signature}\n" for url in [*urls, urls[0] + "again"])
        (tmp_path / f"{signature}.csv").write_text(f"image\n{rows}")
    index.create(str(tmp_path / "k1.csv"), str(run), str(tmp_path / "out"), workers=0)
    first = ids(tmp_path / "out")
    assert len(first) == 2 and not any("https" in name or "k1" in name for name in first)
    index.add(str(tmp_path / "out"), str(tmp_path / "k2.csv"), workers=0)
    assert sorted(ids(tmp_path / "out")) == sorted(first)
    searcher = Searcher(str(tmp_path / "out"))
    assert {searcher.item(name)["path"] for name in first} == {f"{url}k2" for url in urls}, "the old ones have expired"


def test_what_is_wrong_with_a_url_tells_no_password(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    monkeypatch.setenv("no_proxy", "*")
    table, out = tmp_path / "t.csv", tmp_path / "out"

    def write(key: str) -> None:
        urls = [f"http://bob:{key}@127.0.0.1:1/{name}?w=1&Expires=1&Signature={key}" for name in ("a.jpg", "b.jpg")]
        rows = [f"{folder}/00.png,0", *(f"{url},{number}" for number, url in enumerate(urls, 1)), f"{urls[0]},9"]
        table.write_text("image,sku\n" + "".join(f"{row}\n" for row in rows))

    columns = TableColumns(item_id="sku", allow_outside=True)
    write("s3cr3t")
    index.create(str(table), str(run), str(out), columns=columns, workers=0)
    lines = read_skipped(out)
    assert {line["id"]: line["path"] for line in lines} == {
        "1": "http://127.0.0.1:1/a.jpg?w=1", "2": "http://127.0.0.1:1/b.jpg?w=1", "row 5": str(table),
    }  # fmt: skip
    assert "http://127.0.0.1:1/a.jpg cannot be fetched" in lines[0]["problem"] and "earlier row" in lines[2]["problem"]
    assert "s3cr3t" not in (out / "skipped.jsonl").read_text()
    write("another")
    told: list[str] = []
    index.sync(str(out), Source(str(table), columns=columns), workers=0, dry_run=told.append)
    assert [line[:4] for line in told] == ["? 1 ", "? 2 "], "which of them were tried before is known"
    index.add(str(out), str(table), columns=columns, workers=0)
    assert sorted(read_skipped(out), key=lambda line: line["id"]) == lines


def test_ids_of_a_shard_set_of_such_a_table(folder, tmp_path):
    (folder / "t.csv").write_text(f"image,object_id,caption\n{folder}/00.png,1,one\n02.png,2,two\n")
    options = BuildOptions(workers=0, min_shards=1, progress=False)
    build_shards(make_source("table", path=str(folder / "t.csv")), str(tmp_path / "set"), options)
    found = list_images(str(tmp_path / "set")).items["id"].to_pylist()
    assert "02.png" in found and any(re.fullmatch(r"00-[0-9a-f]{12}\.png", name) for name in found) and len(found) == 2


def test_a_host_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it "holds no image" would be wrong."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(retries, "PATIENCE_S", 0.01)
    with socket.socket() as sock:  # bound and not listening: nobody else can take the port
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(StorageError, match="Cannot connect to host"):
            list_images(f"http://127.0.0.1:{sock.getsockname()[1]}/images")

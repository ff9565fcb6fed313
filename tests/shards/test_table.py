"""The table source: CSV, TSV, JSONL and Parquet give the same objects; every mistake gets a message with its fix."""

from __future__ import annotations

import functools
import http.server
import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmref.errors import OutsideError, SourceError
from mmref.shards.build import BuildOptions, build_shards, make_source
from mmref.shards.sources.table import TableSource
from mmref.storage.downloads import Downloads

ROWS = [
    {"image": "a.png", "object_id": "007", "caption": "a red, small bird", "split": "train"},
    {"image": "a.png", "object_id": "007", "caption": "a bird", "split": "training"},
    {"image": "b.png", "object_id": "x.y/z", "caption": "ein Vögel", "split": "dev"},
]


def write(path, rows=ROWS):
    names = list(rows[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(names)] + [mark.join(f'"{row[n]}"' for n in names) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_formats_agree(tmp_path, ending):
    first, second = TableSource(write(tmp_path / f"t.{ending}")).objects()
    assert (first.object_id, first.split, second.object_id, second.split) == ("007", "train", "x.y/z", "val")
    (image,) = first.images
    assert (image.image_id, image.captions, image.caption_kinds) == ("a.png", ["a red, small bird", "a bird"], None)
    assert second.images[0].captions == ["ein Vögel"]


def test_list_column_and_several_columns(tmp_path):
    rows = [{"image": "a.png", "object_id": 1, "captions": ["one", " ", "two"], "title": "three"}]
    path = write(tmp_path / "t.parquet", rows)
    assert TableSource(path).objects()[0].images[0].captions == ["one", "two"]
    image = TableSource(path, captions=["title", "captions"]).objects()[0].images[0]
    assert (image.captions, image.caption_kinds) == (["three", "one", "two"], ["title", "captions", "captions"])


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("captions", ["['a red bird', \"it's small\"]", "['a bird'\n 'red']"])
def test_lists_that_were_written_as_texts(tmp_path, ending, captions):
    """pandas writes a column of lists into a CSV like this: their brackets would be trained on."""
    path = tmp_path / f"t.{ending}"
    rows = [{"image": f"{i}.png", "object_id": f"{i}", "caption": captions} for i in range(3)]
    text = [json.dumps(row) for row in rows]
    if ending == "csv":
        quoted = captions.replace('"', '""')
        text = ["image,object_id,caption", *(f'{row["image"]},{row["object_id"]},"{quoted}"' for row in rows)]
    path.write_text("\n".join(text))
    with pytest.raises(SourceError, match=r"'caption' are lists that were written as texts, the first .*red.* a row for each"):
        make_source("table", path=str(path)).objects()
    path.write_text("\n".join([*text, "3.png,3,[a] bird" if ending == "csv" else json.dumps({**rows[0], "caption": "x"}), ""]))
    assert len(make_source("table", path=str(path)).objects()) >= 3, "a caption may look like one"


def test_own_column_names(tmp_path):
    rows = [{"file": "a.png", "sku": "s", "text": "one", "part": "test", "shop": "north"}]
    source = TableSource(write(tmp_path / "t.csv", rows), "file", "sku", ["text"], "part", keep=["shop"])
    (item,) = source.objects()
    assert (item.split, item.object_id, item.images[0].extra) == ("test", "s", {"shop": "north"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "imag"}, ["no column 'imag'", "Did you mean 'image'", "object_id, caption, split", "--image"]),
        ({"object_id": "pid"}, ["no column 'pid'", "--object-id"]),
        ({"captions": ["caption", "captoin"]}, ["no column 'captoin'", "Did you mean 'caption'", "--captions"]),
        ({"split": "fold"}, ["no column 'fold'", "--split"]),
        ({"keep": ["shop"]}, ["no column 'shop'", "--keep"]),
    ],
)
def test_missing_column(tmp_path, options, words):
    with pytest.raises(SourceError) as error:
        TableSource(write(tmp_path / "t.csv"), **options).objects()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "val"}, ["row 3", "object '007' is in 'train' and in 'val'"]),
        ({"object_id": "8"}, ["row 3", "image 'a.png' belongs to the objects '007' and '8'"]),
    ],
)
def test_contradictions(tmp_path, change, words):
    rows = [ROWS[0], {**ROWS[1], **change}, ROWS[2]]
    with pytest.raises(SourceError) as error:
        TableSource(write(tmp_path / "t.csv", rows)).objects()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "spelled",
    [
        "./s/é a.png",
        "s/.//é a.png",
        "s//é a.png",
        "s/../s/é a.png",
        "s\\é a.png",
        "s/e\u0301 a.png",
        "{}/s/é a.png",
        "file://{}/s/é%20a.png",
    ],
)
def test_two_spellings_of_a_path_are_one_image(tmp_path, spelled):
    spelled = spelled.format(tmp_path)
    first, second = ({"image": image, "object_id": "1", "caption": image} for image in ("s/é a.png", spelled))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "é a.png").touch()
    (found,) = TableSource(write(tmp_path / "t.csv", [first, second])).objects()
    assert [(image.image_id, image.captions) for image in found.images] == [("s/é a.png", ["s/é a.png", spelled])]
    with pytest.raises(SourceError, match="belongs to the objects '1' and '2'"):
        TableSource(write(tmp_path / "t.csv", [first, {**second, "object_id": "2"}])).objects()


def test_a_field_of_the_set_is_not_kept(tmp_path):
    """It would be lost in silence."""
    path = write(tmp_path / "t.csv", [{"image": "a.png", "object_id": "1", "caption": "x", "image_id": "7"}])
    with pytest.raises(SourceError, match="--keep image_id: a sample has a field of that name already"):
        TableSource(path, keep=["image_id"]).objects()
    assert TableSource(path, keep=["object_id"]).objects(), "the same value"


def test_unreadable_tables(tmp_path):
    for name, text, words in [
        ("t.xlsx", "", "ending"),
        ("t.csv", "", "empty"),
        ("t.jsonl", '{"image": 1}\n{', "line 2 is not JSON"),
        ("t2.jsonl", "[1]", "line 1: expected an object"),
        ("t.parquet", "no", "not a Parquet file"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(SourceError, match=words):
            TableSource(str(tmp_path / name)).objects()
    with pytest.raises(SourceError, match="cannot be read"):
        TableSource(str(tmp_path / "nowhere.csv")).objects()
    # as spreadsheets of Western Europe save: the first such letter may come in any row
    for rows in (1, 5000):
        text = "image,object_id,caption\n" + "a.png,a,plain\n" * rows + "b.png,b,Käse\n"
        (tmp_path / "latin.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(SourceError, match="is not UTF-8"):
            list(TableSource(str(tmp_path / "latin.csv")).objects())


def test_load_paths_and_urls(tmp_path, encode):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode(0))
    table = write(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError):
        TableSource(table).load("a.png")
    for source, ref in [
        (TableSource(table), "images/a.png"),
        (TableSource(table, image_root=str(tmp_path / "images")), "a.png"),
        (TableSource(table, image_root=f"file://{tmp_path}/images"), "a.png"),
        (TableSource(table), str(tmp_path / "images" / "a.png")),
    ]:
        assert source.load(ref) == encode(0)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}/images"
        assert TableSource(table).load(f"{root}/a.png") == encode(0)
        assert TableSource(table, image_root=root).load("a.png") == encode(0)
        with pytest.raises(OSError, match="404"):
            TableSource(table).load(f"{root}/b.png")
    finally:
        server.shutdown()
        server.server_close()


def test_a_password_of_a_url_does_not_stand_in_the_set(tmp_path, encode, monkeypatch):
    fetched = []

    def fetch(downloads, url):
        fetched.append(url)
        if "b.png" in url:
            raise OSError("b cannot be fetched")
        return encode(0)

    monkeypatch.setattr(Downloads, "fetch", fetch)
    urls = [
        "http://bob:one@a.b/a.png",
        "http://bob:two@a.b/a.png",
        "http://bob:one@a.b/b.png?w=1&Signature=s",
        "http://a.b/c.png",
    ]
    rows = [{"image": url, "object_id": "1", "caption": f"image {i}", "split": "train"} for i, url in enumerate(urls)]
    options = BuildOptions(workers=0, min_shards=1, progress=False)
    build_shards(make_source("table", path=write(tmp_path / "t.csv", rows)), str(tmp_path / "set"), options)
    assert list(dict.fromkeys(fetched)) == [urls[0], urls[2], urls[3]], "a sample first, then all"
    (index,) = (tmp_path / "set" / "train").glob("*.index.parquet")
    assert pq.read_table(index)["image_id"].to_pylist() == ["http://a.b/a.png", "http://a.b/c.png"]
    (line,) = (tmp_path / "set" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["left_out"] == "http://a.b/b.png?w=1: b cannot be fetched"


def test_images_outside_of_the_root_need_a_flag(tmp_path, encode):
    root = tmp_path / "root"
    root.mkdir()
    for path in (root / "a.png", root / "b.png", tmp_path / "secret.png"):
        path.write_bytes(encode(0))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["a.png", "../secret.png", str(root / "b.png"), "c.png"]
    table = write(root / "t.csv", [{"image": n, "object_id": n, "caption": "x", "split": "train"} for n in names])
    source = TableSource(table)
    assert [o.object_id for o in source.objects()] == ["a.png", str(root / "b.png"), "c.png"]
    (refused,) = source.skipped
    assert refused.startswith("row 3: '../secret.png'") and "--allow-outside" in refused
    for ref in ("../secret.png", "link.png", f"file://{tmp_path}/secret.png"):
        with pytest.raises(OutsideError):
            source.load(ref)
        assert TableSource(table, allow_outside=True).load(ref) == encode(0)
    assert len(TableSource(table, allow_outside=True).objects()) == 4
    for more in ("link.png", f"file://{tmp_path}/secret.png", "/etc/hostname"):
        names.append(more)
    write(root / "t.csv", [{"image": n, "object_id": n, "caption": "x", "split": "train"} for n in names[1:]])
    with pytest.raises(SourceError, match=r"4 of 6 rows name images outside of .*row 2: .*--allow-outside"):
        TableSource(table).objects()


def test_a_link_in_a_late_row_is_found_when_its_image_is_read(tmp_path, encode, monkeypatch):
    monkeypatch.setattr("mmref.shards.sources.table.LOOKED_AT", 2)
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encode(0))
    for i in range(4):
        (root / f"{i}.png").write_bytes(encode(i))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["0.png", "1.png", "2.png", "link.png", "../secret.png", "3.png"]
    table = write(root / "t.csv", [{"image": n, "object_id": n, "caption": "x", "split": "train"} for n in names])
    manifest = build_shards(TableSource(table), str(tmp_path / "set"), BuildOptions(progress=False))
    assert manifest["splits"]["train"]["images"] == 4
    first, second = manifest["skipped"]["first"]
    assert first.startswith("row 6: '../secret.png'") and second.startswith("link.png: 'link.png' leads to ")
    assert manifest["skipped"]["kinds"] == {"outside of the root": 2}
    names = ["link.png", "../secret.png", *names]
    write(root / "t.csv", [{"image": n, "object_id": n, "caption": "x", "split": "train"} for n in names])
    with pytest.raises(SourceError, match="2 of 2 rows name images outside of"):
        TableSource(table).objects()


def test_the_flag_reaches_the_source(tmp_path, encode, capsys):
    from mmref.cli import main

    (tmp_path / "t").mkdir()
    (tmp_path / "a.png").write_bytes(encode(0))
    table = write(tmp_path / "t" / "t.csv", [{"image": str(tmp_path / "a.png"), "object_id": 1, "caption": "x"}])
    command = [
        "shards",
        "build",
        "table",
        table,
        "--out",
        str(tmp_path / "set"),
        "--workers",
        "0",
        "--fractions",
        "train=1",
    ]
    assert main(command) == 1 and "--allow-outside" in capsys.readouterr().err
    assert main([*command, "--allow-outside"]) == 0


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_row_whose_split_cannot_be_one_is_left_out(tmp_path, ending):
    rows = [ROWS[0], {**ROWS[1], "split": "../up"}, ROWS[2]]
    source = make_source("table", path=write(tmp_path / f"t.{ending}", rows))
    kept = [text for item in source.objects() for image in item.images for text in image.captions]
    assert kept == [ROWS[0]["caption"], ROWS[2]["caption"]]
    assert [line.split(": ", 1)[1] for line in source.skipped] == ["'../up' (column 'split') cannot name a split"]


@pytest.mark.parametrize("given", ["parts/*.parquet", "parts"])
def test_parquet_files_that_name_images_are_one_table(tmp_path, given):
    (tmp_path / "parts").mkdir()
    for number in range(3):
        rows = [
            {"image": f"{number}.png", "object_id": str(i), "caption": f"{number} {i}"} for i in range(2 if number < 2 else 1)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parts" / f"{number}.parquet")
        (tmp_path / "parts" / f"{number}.png").write_bytes(bytes([number]))
    with pytest.raises(SourceError, match=r"row 2: image '0.png' belongs to the objects '0' and '1'"):
        make_source("table", path=str(tmp_path / given)).objects()
    source = make_source("table", path=str(tmp_path / given), captions=["caption"], object_id="image")
    found = {image.image_id: (image.captions, source.load(image.ref)) for item in source.objects() for image in item.images}
    assert found == {"0.png": (["0 0", "0 1"], b"\0"), "1.png": (["1 0", "1 1"], b"\1"), "2.png": (["2 0"], b"\2")}
    pq.write_table(pa.table({"image": ["x.png"]}), tmp_path / "parts" / "x.parquet")
    with pytest.raises(SourceError, match=r"x\.parquet and .*0\.parquet do not both have the column 'caption'"):
        source.objects()


def test_names_in_files_of_several_folders_need_a_root(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"image": ["1.png"], "object_id": [part], "caption": [part]}), tmp_path / part / "t.parquet")
    with pytest.raises(SourceError, match=r"files of 2 folders .*--image-root"):
        make_source("table", path=str(tmp_path))


@pytest.mark.parametrize("given", ["t", "t/*/*/*.parquet"])
def test_columns_that_folders_are_named_after(tmp_path, given):
    """As Spark's `partitionBy`, Dask, pandas and pyarrow write them: without these columns, objects of train would be in test."""
    table = pa.table({
        "image": [f"{i}.png" for i in range(4)], "object_id": ["a", "b", "c", "d"], "caption": ["x"] * 4,
        "split": ["train", "train", "val", "test"], "kind of": ["in/side", "50%", None, "7"],
    })  # fmt: skip
    pq.write_to_dataset(table, tmp_path / "t", partition_cols=["split", "kind of"])
    source = make_source("table", path=str(tmp_path / given), image_root=str(tmp_path), keep=["kind of"])
    assert {(item.object_id, item.split, item.images[0].extra["kind of"]) for item in source.objects()} == {
        ("a", "train", "in/side"), ("b", "train", "50%"), ("c", "val", None), ("d", "test", "7"),
    }  # fmt: skip


def test_a_folder_with_an_equals_sign_is_a_column_where_all_have_it(tmp_path):
    for folder in ("lr=1", "other"):
        (tmp_path / "t" / folder).mkdir(parents=True)
        pq.write_table(
            pa.table({"image": ["1.png"], "object_id": [folder], "caption": ["x"]}), tmp_path / "t" / folder / "t.parquet"
        )
    source = make_source("table", path=str(tmp_path / "t"), object_id="image", image_root=str(tmp_path))
    assert [len(item.images) for item in source.objects()] == [1]

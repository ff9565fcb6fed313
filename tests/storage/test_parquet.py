"""The one reader of Parquet files, and that there is no other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmref.storage.parquet import open_parquet, parquet_batches, read_parquet

ROOT = Path(__file__).parents[2]
ONLY_HERE = ROOT / "mmref" / "storage" / "parquet.py"
# what reads with threads of a pool, unless it is told not to
THREADED = {"ParquetDataset", "ParquetFile", "read_pandas", "read_parquet", "read_table"}
STARTS = 3
READ_AND_END = """
import sys
from pathlib import Path
from mmref.retrieval.segment import Segment
print(Segment(Path(sys.argv[1])).items.num_rows)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"a": range(10), "b": [str(i) for i in range(10)]}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def uses(source: str) -> list[tuple[int, str]]:
    """Lines on which a module reads Parquet with pyarrow itself."""
    if "parquet" not in source:  # parsing takes a while
        return []
    tree, names, found = ast.parse(source), set[str](), list[tuple[int, str]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name for a in node.names if a.name in ("pyarrow.parquet", "pandas")}
        if isinstance(node, ast.ImportFrom) and node.module == "pyarrow.parquet":
            found += [(node.lineno, a.name) for a in node.names if a.name in THREADED]
        if isinstance(node, ast.ImportFrom) and node.module == "pyarrow":
            names |= {a.asname or a.name for a in node.names if a.name == "parquet"}
    for node in ast.walk(tree):  # as a type a name may stand
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) in names and called.attr in THREADED:
            found.append((node.lineno, called.attr))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pyarrow.parquet as pq\npq.read_table(1)",
        "import pyarrow.parquet\npyarrow.parquet.read_table(1)",
        "from pyarrow import parquet\nparquet.ParquetDataset(1)",
        "from pyarrow.parquet import read_table",
        "import pyarrow.parquet as pq\npq.ParquetFile(1).read()",
        "import pandas as pd\npd.read_parquet(1)",
    ],
)
def test_other_readers_are_found(source: str) -> None:
    assert uses(source)


def test_there_is_one_reader() -> None:
    folders = ("mmref", "data_shards", "tune", "jobs", "benchmarks", "tests/support")
    modules = [m for folder in folders for m in (ROOT / folder).rglob("*.py")]
    assert ONLY_HERE in modules
    others = {str(m.relative_to(ROOT)): found for m in modules if m != ONLY_HERE and (found := uses(m.read_text()))}
    assert not others, "read with mmref.storage.parquet: threads of pyarrow abort a process that ends right after"


def test_no_thread_of_a_pool_reads(file: Path) -> None:
    """A fresh process: here other tests have started pools already."""
    script = (
        "import sys, os\nfrom mmref.storage.parquet import open_parquet, parquet_batches, read_parquet\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "read_parquet(sys.argv[1])\nlist(parquet_batches(open_parquet(sys.argv[1]), ['a']))\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["0"], done.stderr


def test_a_process_that_ends_right_after_reading_a_segment_ends_well(tmp_path: Path) -> None:
    rows, columns = 2_000, 12
    for name, shape, kind in (("features", (rows, 4), "float32"), ("thumbnails", (rows, 2), "int64")):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, kind))
    np.save(tmp_path / "uids.npy", np.arange(rows))
    (tmp_path / "thumbnails.bin").write_bytes(b"")
    pq.write_table(pa.table({f"c{i}": np.arange(rows) for i in range(columns)}), tmp_path / "items.parquet")
    for _ in range(STARTS):
        command = [sys.executable, "-c", READ_AND_END, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{rows}\n", "")


def test_columns_and_batches(file: Path) -> None:
    assert read_parquet(file, ["b"]).to_pydict() == {"b": [str(i) for i in range(10)]}
    assert read_parquet(open_parquet(file)).num_rows == 10
    batches = list(parquet_batches(open_parquet(file), ["a"], 4))
    assert [len(b) for b in batches] == [4, 4, 2] and batches[0].schema.names == ["a"]


def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="Parquet"):
        read_parquet(tmp_path / "x")

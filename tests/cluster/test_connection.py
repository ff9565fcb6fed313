"""Which cluster a command joins, what a local one takes of its machine, and what others see of it."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmref.cluster import connection, resources
from mmref.cluster.address import cluster_address
from mmref.cluster.connection import connect, in_time, local_folder, object_store_bytes
from mmref.cluster.resources import container_cpus, cores, workers_that_fit
from mmref.cluster.seclusion import private_folder, write_token
from mmref.errors import ClusterStartError, ExtraMissingError
from mmref.terminal.run_command import run_command

GB = 1e9


@pytest.mark.parametrize(
    ("asked", "memory", "shm", "bytes_"),
    [
        (1.0, 64 * GB, 32 * GB, 1.0 * GB),
        (0.01, 64 * GB, 32 * GB, 0.1 * GB),
        (16.0, 16 * GB, 8 * GB, 4.8 * GB),  # a machine of 16 threads and 16 GB, a trial on each
        (30.0, 128 * GB, 64 * GB, 30.0 * GB),
        (30.0, 128 * GB, 0.064 * GB, 9.9 * GB),  # a container's /dev/shm: from 10 GB on Ray would refuse
        (30.0, 128 * GB, 20 * GB, 18.0 * GB),
        (30.0, 128 * GB, None, 30.0 * GB),
    ],
)
def test_the_object_store_is_as_large_as_the_machine_has_room_for(
    asked: float, memory: float, shm: float | None, bytes_: float
) -> None:
    assert object_store_bytes(asked, memory, shm) == pytest.approx(bytes_, rel=1e-6)


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_cores_are_those_a_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "container_cpus", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    assert cores() == 2


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, sys.maxsize),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, sys.maxsize),
        ({}, sys.maxsize),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, files: dict[str, str], cpus: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert container_cpus(tmp_path) == cpus


def test_without_ray_the_work_is_done_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert workers_that_fit(None) == workers_that_fit(0) == 0
    with pytest.raises(
        ExtraMissingError, match=r"work by 3 Ray actors needs the extra `train`, and ray is .*mmref\[train\].*--workers 0"
    ):
        workers_that_fit(3)
    with pytest.raises(ExtraMissingError, match="a Ray cluster needs the extra `train`"), connect():
        pass


def test_workers_are_as_many_as_the_machine_offers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(resources, "cores", lambda: 12)
    assert [workers_that_fit(n) for n in (None, 0, 3, 12)] == [12, 0, 3, 12] and capsys.readouterr().err == ""
    assert workers_that_fit(64) == 12
    assert capsys.readouterr().err == "mmref: 12 workers instead of 64: this machine offers no more CPUs\n"
    monkeypatch.setattr(resources, "cores", lambda: 2)
    assert [workers_that_fit(n) for n in (None, 8, 9)] == [2, 8, 8]  # logical ones
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # which may grow
    assert workers_that_fit(64) == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("http://127.0.0.1:8265", "the address of a cluster's jobs service: .*`ray job submit"),
        ("https://head", "jobs service"),
        ("ray://10.0.0.1:10001", "Ray Client's"),
        ("head", "is no address: give HOST:PORT"),
        ("10.0.0.1:99999", "is no address"),
        ("10.0.0.1:0", "is no address"),
        ("10.0.0.1:6379/x", "is no address"),
        ("a b:6379", "is no address"),
    ],
)
def test_addresses_of_another_kind_are_named(given: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    with (
        pytest.raises(ClusterStartError, match=f"RAY_ADDRESS={re.escape(given)}.*{message}.*unset RAY_ADDRESS"),
        connect(),
    ):
        pass


@pytest.mark.parametrize(
    ("named", "beside", "said"),
    [
        ("10.0.0.1:6379", "10.0.0.2:6379", "mmref: on the Ray cluster at 10.0.0.1:6379, which RAY_ADDRESS names\n"),
        ("", "10.0.0.2:6379", "mmref: on a Ray cluster of its own; to join the one that runs here, at 10.0.0.2:6379: export "
                              "RAY_ADDRESS=auto\n"),
        ("", None, ""),
    ],
)  # fmt: skip
def test_the_cluster_that_is_used_is_said(
    named: str, beside: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", named)
    monkeypatch.setattr(connection.ray_private, "started_cluster", lambda: beside)
    monkeypatch.setattr(connection, "_join", lambda address: None)
    monkeypatch.setattr(connection, "_start_local", lambda cpus, storage_gb: None)
    monkeypatch.setattr(connection, "named_address", contextlib.nullcontext)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with connect():
        pass
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("found, running, cluster", [("h:1", {"h:1"}, "h:1"), ("h:1", {"h:2"}, None), (None, {"h:1"}, None)])
def test_a_started_cluster_is_one_that_still_runs(found, running, cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: found)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: running)
    assert connection.ray_private.started_cluster() == cluster


@pytest.mark.parametrize(
    ("given", "meant"),
    [("", None), (" ", None), ("local", None), (" 10.0.0.1:6379 ", "10.0.0.1:6379"), ("[::1]:6379", "[::1]:6379"),
     ("head-0.ray.svc:1", "head-0.ray.svc:1")],
)  # fmt: skip
def test_addresses(given: str, meant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert cluster_address() == meant


def test_auto_needs_a_cluster_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address_or_die", none)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterStartError, match="RAY_ADDRESS=auto, and no Ray cluster runs"):
        cluster_address()


def test_a_cluster_that_is_gone_and_something_else_that_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("mmref.cluster.address.ANSWER_S", 1.5)
        with (
            pytest.raises(ClusterStartError, match=f"{address}: something listens, and is no cluster's head"),
            connect(),
        ):
            pass
    with (
        pytest.raises(ClusterStartError, match=f"no Ray cluster answers at RAY_ADDRESS={address}: .*refused"),
        connect(),
    ):
        pass


def test_a_start_that_takes_too_long_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "NOTICE_S", 0.05)
    with (
        pytest.raises(ClusterStartError, match="waited 2 s in vain for a place"),
        in_time("a place", 1.6),
        contextlib.suppress(Exception),  # as Ray's own loops do
    ):
        time.sleep(30)
    assert capsys.readouterr().err == "mmref: waiting for a place (up to 2 s) ...\n"
    with in_time("a place", 1.0):
        pass
    with pytest.raises(KeyboardInterrupt), in_time("a place", 1.0):  # somebody's Ctrl-C
        raise KeyboardInterrupt
    time.sleep(0.1)
    assert capsys.readouterr().err == "" and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_keeps_ray_from_starting_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(**_: object) -> None:
        raise Exception("\nThe current node timed out, says Ray.\nmore of it")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", fail)
    with (
        pytest.raises(ClusterStartError, match=r"Ray does not start on this machine .*: The current node .* says Ray.$"),
        connect(),
    ):
        pass


def test_a_machine_too_busy_for_ray_is_tried_again_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(**_: object) -> None:
        tried.append(1)
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(ClusterStartError, match=r"not up in time, 3 times over.*other programs want the cores"), connect():
        pass
    assert len(tried) == 3


def test_where_sessions_of_a_local_cluster_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 100))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", long)  # a scheduler's, for other things: sockets would not fit
    own = f"mmref-{os.getuid()}"
    assert local_folder() in (f"/tmp/{own}/ray", "/tmp/ray")
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(ClusterStartError, match=r"RAY_TMPDIR=.* is too long: .* more than 107 bytes"):
        local_folder()
    short = tempfile.mkdtemp(dir="/tmp", prefix="r")
    monkeypatch.setenv("HOME", short)
    monkeypatch.setenv("RAY_TMPDIR", "~/a")
    assert local_folder() == f"{short}/a/{own}/ray"
    Path(short, "b").write_text("a file")
    monkeypatch.setenv("RAY_TMPDIR", f"{short}/b")
    with pytest.raises(ClusterStartError, match=r"Ray cannot keep its sessions in .*/b: .*RAY_TMPDIR"):
        local_folder()
    shutil.rmtree(short)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize(("named", "after"), [("", "localhost,127.0.0.1,::1"), ("a.org, ::1", "a.org,::1,localhost,127.0.0.1"),
                                              ("*", "*")])  # fmt: skip
def test_this_machine_is_reached_directly(variable: str, named: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    run_command(lambda: 0)
    assert "no_proxy" not in os.environ
    monkeypatch.setenv(variable, "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", named)
    monkeypatch.setenv("no_proxy", "")
    run_command(lambda: 0)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == after
    assert urllib.request.proxy_bypass("127.0.0.1") and bool(urllib.request.proxy_bypass("b.org")) == (named == "*")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.ray
def test_a_local_cluster_is_closed_to_others(short_folder: Path) -> None:
    token = short_folder / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)  # as Ray writes it
    token.chmod(0o644)
    apart = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in apart}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "tests/support/local_cluster.py"], cwd=root, check=True, stdout=subprocess.PIPE, timeout=300,
        env=environment | {"HOME": str(short_folder), "RAY_TMPDIR": str(short_folder), "PYTHONPATH": str(root)},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["listening"]) > 5
    assert all(ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in found["listening"]), found
    assert found["modes"] == ["token", "token"] and found["token"] == "0o600" and found["on_clusters"]
    assert not found["open_to_others"] and found["exports"] == ["-1"]


def test_a_token_is_made_for_this_user_alone_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    write_token()
    token = tmp_path / ".ray" / "auth_token"
    written = token.read_text()
    assert len(written) == 64 and token.stat().st_mode & 0o777 == 0o600
    write_token()
    assert token.read_text() == written and [p.name for p in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize("home", ["/proc/nothing", "/dev/null"])
def test_a_token_needs_no_home_directory(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # so that what is set here ends with the test
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_token()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent.parent == tmp_path and token.parent.stat().st_mode & 0o777 == 0o700
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("limits, after", [((64, 64), None), ((64, 900), (900, 900)), ((100_000, 200_000), (100_000, 200_000))])
def test_files_that_may_be_open_are_enough_or_named(
    limits: tuple[int, int], after: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [limits]
    monkeypatch.setattr(resources.resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resources.resource, "setrlimit", lambda _, given: now.append(given))
    if after is None:
        with pytest.raises(ClusterStartError, match="may have 64 files open, and Ray needs 128"):
            connection.need_files()
    else:
        connection.need_files()
        assert now[-1] == after


def test_sessions_lie_where_nobody_else_looks(short_folder: Path) -> None:
    own = short_folder / f"mmref-{os.getuid()}"
    assert private_folder(str(short_folder)) == f"{own}/ray" and own.stat().st_mode & 0o777 == 0o700
    assert private_folder(str(short_folder)) == f"{own}/ray"
    own.chmod(0o755)  # or another's, made before us
    assert Path(private_folder(str(short_folder))).parent != own
    own.rmdir()
    own.symlink_to("/tmp")
    other = Path(private_folder(str(short_folder))).parent
    assert other != own and other.stat().st_mode & 0o777 == 0o700

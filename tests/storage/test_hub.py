"""`hf://user/repo` by huggingface_hub's own code, against a hub on the loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hub import TOKEN, asked_instead, running_hub, sha

from mmref.errors import HubError, HubTokenError, HubUnreachableError
from mmref.storage.hub import hub_folder, parse_hub, push_folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as running, asked_instead(running, monkeypatch, str(tmp_path / "cache")):
        running.repos["me/birds"] = [{"config.json": b"{}"}, {"config.json": b'{"a": 1}', "tokenizer/vocab.txt": b"a\nb\n"}]
        yield running


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize("given, found", [
    ("hf://me/birds", ("me/birds", None)), ("me/birds", ("me/birds", None)), ("hf://me/birds/", ("me/birds", None)),
    ("hf://me/birds@v1.0", ("me/birds", "v1.0")), ("hf://me/birds@refs/pr/3", ("me/birds", "refs/pr/3")),
    ("hf://Org-1/clip-vit.b_16", ("Org-1/clip-vit.b_16", None)),
])  # fmt: skip
def test_a_place_of_a_hub(given, found):
    assert parse_hub(given) == found


@pytest.mark.parametrize("given", ["hf://birds", "hf://", "hf://me/", "hf://me/birds/config.json", "hf://me/../x", "hf://me/a b"])
def test_what_is_no_place_of_a_hub_is_named(given):
    with pytest.raises(HubError, match=r"is no repository of a hub: write hf://USER/REPO"):
        hub_folder(given)


def test_a_repository_becomes_a_folder(hub):
    assert contents(hub_folder("hf://me/birds")) == hub.files("me/birds")
    assert contents(hub_folder(f"hf://me/birds@{sha('me/birds', 0)}")) == {"config.json": b"{}"}


def test_only_what_is_asked_for_is_downloaded(hub):
    assert contents(hub_folder("hf://me/birds", ["*.json"])) == {"config.json": b'{"a": 1}'}
    assert not any("vocab" in request for request in hub.requests)


def test_a_second_time_nothing_is_downloaded_and_no_network_is_needed(hub, monkeypatch):
    first = hub_folder("hf://me/birds")
    before = [r for r in hub.requests if "/resolve/" in r]
    assert hub_folder("hf://me/birds") == first
    assert [r for r in hub.requests if "/resolve/" in r] == before
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert hub_folder("hf://me/birds") == first


def test_what_is_not_there_is_named(hub):
    with pytest.raises(HubError, match=r"hf://me/fish: .*has no such model, or hides it.*\(now not set\)"):
        hub_folder("hf://me/fish")
    with pytest.raises(HubError, match="has no such revision"):
        hub_folder("hf://me/birds@v9")


def test_a_hub_that_does_not_answer_is_named(hub, monkeypatch):
    hub.broken = True
    with pytest.raises(HubError, match="me/birds"):
        hub_folder("hf://me/birds")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachableError, match=r"http://127.0.0.1:9 cannot be reached .*Look at the network"):
        hub_folder("hf://me/birds")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE is set"):
        hub_folder("hf://me/birds")


def test_a_folder_is_pushed_and_comes_back(hub, monkeypatch, tmp_path):
    made = tmp_path / "model"
    (made / "tokenizer").mkdir(parents=True)
    (made / "README.md").write_text("---\nlibrary_name: mmref\n---\n# Birds\n")
    (made / "tokenizer" / "vocab.txt").write_bytes(b"\0\1\2")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = push_folder(str(made), "hf://me/new", "Export of a run", private=True)
    assert url == f"{hub.endpoint}/me/new/commit/{hub.head('me/new')}" and "me/new" in hub.private
    assert contents(hub_folder("hf://me/new")) == contents(made) | {".gitattributes": hub.files("me/new")[".gitattributes"]}
    (made / "tokenizer" / "vocab.txt").rename(made / "words.txt")
    push_folder(str(made), "me/new", "Another")
    assert set(hub.files("me/new")) == {".gitattributes", "README.md", "words.txt"}, "files that went are gone there too"
    assert len(hub.repos["me/new"]) == 3


def test_pushing_without_a_token_that_may_is_named(hub, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("# Birds\n")
    with pytest.raises(HubTokenError, match=r"there is no token. Set HF_TOKEN"):
        push_folder(str(tmp_path), "hf://me/new", "x")
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-else")
    with pytest.raises(HubTokenError, match="refuses the token"):
        push_folder(str(tmp_path), "hf://me/new", "x")
    assert "me/new" not in hub.repos
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachableError, match="cannot be reached"):
        push_folder(str(tmp_path), "hf://me/new", "x")

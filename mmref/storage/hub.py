"""Models on a hub of Hugging Face's kind: `hf://user/repo` as a folder of this machine, and a folder sent there.

Which hub, which token and which cache are the settings of huggingface_hub: HF_ENDPOINT, HF_TOKEN (or `hf auth login`),
HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from mmref.errors import HubError, HubTokenError, HubUnreachableError
from mmref.extras import need

SCHEME = "hf://"
NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
PLACE = re.compile(rf"(?P<repo>{NAME}/{NAME})(?:@(?P<revision>[^\s@]+))?")
SAID = 300  # characters of an error of the library
T = TypeVar("T")


def hub_id(given: str) -> str | None:
    """The repository that a text names, `user/repo` or `user/repo@revision`; None for what can only be a path or another URL.

    Raises HubError for `hf://` with something else behind it.
    """
    name = given.removeprefix(SCHEME).rstrip("/")
    if given.startswith(SCHEME):
        parse_hub(given)
    return name if PLACE.fullmatch(name) else None


def parse_hub(place: str) -> tuple[str, str | None]:
    """`hf://user/repo` or `hf://user/repo@revision` as ("user/repo", revision or None); without `hf://` too. Raises HubError."""
    found = PLACE.fullmatch(place.removeprefix(SCHEME).rstrip("/"))
    if found is None:
        raise HubError(
            f"{place!r} is no repository of a hub: write {SCHEME}USER/REPO, or {SCHEME}USER/REPO@REVISION for a branch, a tag or "
            "a commit."
        )
    return found["repo"], found["revision"]


def hub_folder(place: str, patterns: list[str] | None = None) -> str:
    """The local folder of a repository's files, downloaded where they are not in huggingface_hub's cache yet.

    Args:
        place: `hf://user/repo`, or `hf://user/repo@revision` for a branch, a tag or a commit.
        patterns: of the files wanted, as `*.json`; by default all.

    Returns:
        A folder inside that cache, to be read only. Without a network it is the one of the last download.

    Raises:
        HubError: there is no such repository or revision, or the hub fails.
        HubTokenError: the repository wants a token, or another one.
        HubUnreachableError: the hub does not answer, and the cache does not hold all files.
    """
    repo, revision = parse_hub(place)
    hub = _library()
    return _asked(place, lambda: hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, endpoint=_endpoint()))


def hub_file(place: str, name: str) -> str | None:
    """A file of a repository, downloaded where it is not in the cache yet; None where the repository has no such file.

    Raises as `hub_folder`.
    """
    repo, revision = parse_hub(place)
    hub = _library()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def ask() -> str | None:
        try:
            return str(hub.hf_hub_download(repo, name, revision=revision, endpoint=_endpoint()))
        except LocalEntryNotFoundError:  # nobody answers, which says nothing of the repository
            raise
        except EntryNotFoundError:
            return None

    return _asked(place, ask)


def push_folder(folder: str, place: str, message: str, private: bool = False) -> str:
    """Send a folder to a repository, which is made where there is none; files of the repository that are not in the folder go.

    Args:
        folder: on this machine.
        place: `hf://user/repo`, or `hf://user/repo@branch` for a branch that is there.
        message: of the commit.
        private: whether a new repository is.

    Returns:
        The commit's URL.

    Raises:
        HubError, HubTokenError, HubUnreachableError: as `hub_folder`.
    """
    repo, revision = parse_hub(place)
    check_may_push(place)
    api = _library().HfApi(endpoint=_endpoint())

    def push() -> str:
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message, delete_patterns="*")
        return str(sent.commit_url)

    return _asked(place, push)


def check_may_push(place: str) -> None:
    """Raise HubError where a place is no repository, HubTokenError where there is no token at all."""
    parse_hub(place)
    if _library().get_token() is None:
        raise HubTokenError(
            f"{place} cannot be written: there is no token. Set HF_TOKEN to one with write access, or run `hf auth login`."
        )


def _library() -> Any:
    need("hub", "`hf://`")
    import huggingface_hub

    return huggingface_hub


def _endpoint() -> str | None:
    """The library reads its variable when it is first imported, which may have been before a program set it."""
    return os.environ.get("HF_ENDPOINT") or None


def _asked(place: str, ask: Callable[[], T]) -> T:
    """What the hub answers, its library's errors as ours."""
    import httpx
    from huggingface_hub import errors

    where = _endpoint() or "https://huggingface.co"
    # A name without `hf://` may have been meant for a folder.
    named = f"{place}:" if place.startswith(SCHEME) else f"{place} is no folder here, and"
    try:
        return ask()
    except errors.GatedRepoError:
        raise HubTokenError(f"{named} it is gated on {where}: ask for access on its page there, and set HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{named} the repository on {where} has no such revision.") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{named} {where} has no such model, or hides it: a private one needs HF_TOKEN with access to it (now "
            f"{'set' if _library().get_token() else 'not set'})."
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise HubTokenError(
                f"{named} {where} refuses the token ({status}): {_first_line(error)}. Set HF_TOKEN to one that has the right."
            ) from None
        raise HubError(f"{named} {where} fails: {_first_line(error)}. Try again later.") from None
    except (httpx.TransportError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        why = "HF_HUB_OFFLINE is set" if _is_offline() else _first_line(error)
        raise HubUnreachableError(
            f"{named} {where} cannot be reached ({why}), and the cache does not hold what is asked for. Look at the network, "
            "or give a folder of this machine."
        ) from None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return textwrap.shorten(line, SAID, placeholder=" ...")

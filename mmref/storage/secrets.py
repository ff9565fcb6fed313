"""URLs as messages tell them: without user, password and signature, since logs and reports are passed on."""

from __future__ import annotations

import re

WEB = re.compile(r"(?i)\s*https?://")
USER = re.compile(r"(?i)^(\s*https?://)[^/?#]*@")
IN_TEXT = re.compile(r"(?i)https?://[^\s'\"<>]+")


def without_user(place: str) -> str:
    """A place without the user and password of an http(s) URL; any other as it is."""
    return USER.sub(r"\1", place)


def told(place: str) -> str:
    """A place as messages tell it: an http(s) URL without user, password and query, which may be keys; any other as it is."""
    return without_user(place).partition("?")[0] if WEB.match(place) else place


def said(error: BaseException) -> str:
    """What an error says, with every URL as `told`: those of HTTP clients repeat what was asked for."""
    return IN_TEXT.sub(lambda url: told(url[0]), str(error))

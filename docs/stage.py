"""Stage the pages of the site: `python docs/stage.py OUT`, before `zensical build`; `make docs` does both.

The pages keep their places in the repository, so that a link between them is the same here and on a code host. What else a page
links to is brought along: a picture or a JSON file as it is, any other file as a page that shows it, a folder as a list of what
lies in it. The builder checks links between pages and their anchors; a link to nothing, and a page of docs/ that the navigation
misses, end the staging.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).parents[1]
AS_IT_IS = {".png", ".jpg", ".webp", ".svg", ".gif", ".json", ".css"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", "": "text"}
FENCE = re.compile(r"\s*(```+|~~~+)")
CODE = re.compile(r"(`+).*?\1")  # a link in code is none
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\)| \")")


def nav_pages(entry: object) -> Iterator[str]:
    """The files that an entry of the navigation names, with what lies below it."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for value in entry.values():
            yield from nav_pages(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from nav_pages(value)


class Staging:
    """Pages on their way from `root` to `out`, and what is wrong with them."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root, out
        self.errors: list[str] = []
        self._seen: set[Path] = set()

    def add(self, path: Path) -> None:
        """Write what a link to this file or folder of the repository leads to, once, and all that is linked from there."""
        if path in self._seen:
            return
        self._seen.add(path)
        place = self.out / self._staged(path).relative_to(self.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            place.write_text(self._page(path))
        elif path.suffix in AS_IT_IS:
            shutil.copyfile(path, place)
        else:
            place.write_text(self._listing(path))

    def _staged(self, path: Path) -> Path:
        if path.is_dir():
            return path / "files.md"
        return path if path.suffix in {".md", *AS_IT_IS} else path.with_name(path.name + ".md")

    def _page(self, path: Path) -> str:
        """The text of a page, with links to code made links to the pages that show it."""
        lines, fence = [], ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if mark := FENCE.match(line):
                if not fence:
                    fence = mark[1]
                elif mark[1].startswith(fence):
                    fence = ""
            elif not fence:
                code = [match.span() for match in CODE.finditer(line)]

                def replaced(match: re.Match[str], number: int = number, code: list[tuple[int, int]] = code) -> str:
                    inside = any(start <= match.start() < end for start, end in code)
                    return match[0] if inside else self._target(path, number, match[0])

                line = LINK.sub(replaced, line)
            lines.append(line)
        return "\n".join(lines) + "\n"

    def _target(self, page: Path, number: int, target: str) -> str:
        place, _, anchor = target.partition("#")
        if not place or re.match(r"[a-z]+:", place):
            return target
        path = Path(os.path.normpath(page.parent / unquote(place)))
        if not path.is_relative_to(self.root) or not path.exists():
            self.errors.append(f"{page.relative_to(self.root)}:{number}: {target} does not exist")
            return target
        self.add(path)
        staged = os.path.relpath(self._staged(path), page.parent)
        # A line of code has no anchor in its page.
        return f"{staged}#{anchor}" if anchor and path.suffix == ".md" else staged

    def _listing(self, path: Path) -> str:
        head = f"---\nsearch:\n  exclude: true\n---\n\n# `{path.relative_to(self.root)}`\n\n"
        if path.is_dir():
            names = (p.name + "/" * p.is_dir() for p in sorted(path.iterdir()) if p.name[0] not in "._")
            return head + "".join(f"- `{name}`\n" for name in names)
        language = LANGUAGES.get(path.suffix, "text")
        return f'{head}````{language} linenums="1"\n{path.read_text()}\n````\n'


def main(out: str) -> int:
    """Stage into a folder that is made anew; the exit status."""
    staging = Staging(ROOT, Path(out))
    shutil.rmtree(out, ignore_errors=True)
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = list(nav_pages(config["nav"]))
    for page in [*pages, *config["extra_css"]]:
        if (ROOT / page).exists():
            staging.add(ROOT / page)
        else:
            staging.errors.append(f"mkdocs.yml: {page} does not exist")
    missed = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")} - set(pages)
    staging.errors += [f"mkdocs.yml: the navigation misses {page}" for page in sorted(missed)]
    print(*staging.errors, sep="\n", file=sys.stderr, end="\n" if staging.errors else "")
    return 1 if staging.errors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stage the pages of the site.")
    parser.add_argument("out", metavar="OUT", help="folder, which is made anew")
    sys.exit(main(parser.parse_args().out))

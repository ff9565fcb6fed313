"""`mmref shards build folder`: a folder of folders, `object/image.jpg`, with captions beside the images.

Captions of an image are the lines of a `.txt` of its name, and what `captions.*` or `metadata.*` (as the imagefolder of
Hugging Face's `datasets` has it) say of it, in the root or in any folder on the way. `captions.txt` in an object's folder is
of all its images. Folders called train, val and test at the top are splits.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from mmref.data.folder import Found, describe, look_into
from mmref.errors import MMRefError, SampleError, SourceError
from mmref.shards.samples import DEFAULT_FRACTIONS, SPLIT_NAMES
from mmref.shards.sources.image_columns import CAPTION_NAMES, check_no_written_lists
from mmref.shards.sources.listed import ListedImage, ListedSource
from mmref.storage.cells import line_texts
from mmref.storage.image_places import Place
from mmref.storage.locations import folder_name, is_url, to_text
from mmref.storage.tables import Table, read_table
from mmref.storage.texts import read_lines

TABLES = ("captions", "metadata")  # names of tables of captions, whatever their ending
OF_OBJECT = "captions.txt"
SPLITS = {"train": "train", "val": "val", "test": "test", **SPLIT_NAMES}
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path", "folder", "object", "object_id")
OBJECT_COLUMN = "object_id"
FILE_KIND, FOLDER_KIND = "txt", "folder"  # kinds of captions that are in no column
FEW = 0.1  # of the pictures may lie deeper than object/picture where folders are plainly objects


class FolderSource(ListedSource):
    """An image a file.

    Args:
        root: a folder, or the URL prefix of one.
        captions: columns of tables of captions; None: the first there is of `CAPTION_NAMES`.
        caption_from_folder: an image without any other caption has the name of its object's folder.
        depth: folders between the root, or a split, and an image that name its object.
        strict: no caption at all is an error, and empty folders are left out by name.
        wrong: the error of whoever asks, where the folder cannot be listed.
    """

    def __init__(
        self,
        root: str,
        captions: Sequence[str] | None = None,
        caption_from_folder: bool = False,
        depth: int = 1,
        licence: str = "not stated",
        min_images: int = 1,
        fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
        resplit: bool = False,
        strict: bool = True,
        wrong: type[MMRefError] = SourceError,
    ) -> None:
        super().__init__("folder", folder_name(root), licence, min_images, fractions, resplit)
        self.root, self.captions, self.caption_from_folder, self.depth = root, captions, caption_from_folder, depth
        self.strict, self.wrong = strict, wrong

    def images(self) -> Iterable[ListedImage]:
        """Images in the order of their paths, which are their ids. Raises SourceError: there is no such folder, it cannot be
        listed, no table has a column that is named, or, for a build, an image is of two objects or none has a caption."""
        if not is_url(self.root) and not os.path.isdir(self.root):
            raise SourceError(f"{self.root} is no folder. A table is built with `mmref shards build table`.")
        found = look_into(self.root, self.wrong)
        for what, why in found.skipped:
            self.leave_out(what, why)
        self.closed, self.passed_over = found.closed, Counter(found.passed_over)
        images = self._listed(found)
        captions = _Captions(self, found, images)
        captions.read()
        if self.strict:
            if captions.contradictions:
                raise SourceError(captions.contradictions[0])
            self._part_pictures_of_a_table(images, captions)
        self.passed_over.subtract(captions.used)
        self.passed_over = +self.passed_over
        for name, image in images.items():
            told = captions.of(name)
            if not told and self.caption_from_folder and image.object_id:
                told = [(_spoken(image.object_id), FOLDER_KIND)]
            image.captions = [text for text, _ in told]
            if self.captions and len(self.captions) > 1:
                image.caption_kinds = [kind for _, kind in told]
        if self.strict and not any(image.captions for image in images.values()):
            raise SourceError(self._without_captions(len(images)))
        if self.passed_over:
            self.warnings.append(f"{sum(self.passed_over.values()):,} files passed over: {describe(self.passed_over)}")
        return list(images.values())

    def _part_pictures_of_a_table(self, images: Mapping[str, ListedImage], captions: _Captions) -> None:
        """Make each picture an object of its own where a table names them and all lie in one folder: that is where they are kept,
        as `images/` of an imagefolder, and no object."""
        folders = {image.object_id for image in images.values()}
        if len(images) > 1 and len(folders) == 1 and None not in folders and captions.names_pictures and not self.told_objects:
            for image in images.values():
                image.object_id = None
            self.warnings.append(
                f"all pictures are in {folders.pop()!r} and a table names them: each is an object. A column {OBJECT_COLUMN} of "
                "the table tells which are of one"
            )

    def _without_captions(self, count: int) -> str:
        said = "; ".join(f"{what}: {why}" for what, why in self.left_out[:3])
        return (
            f"{self.root}: none of {count:,} pictures has a caption. Expected are a .txt beside a picture with a caption a line, "
            f"{OF_OBJECT} in an object's folder, or captions.csv, captions.jsonl or metadata.jsonl with file_name and text. "
            "--caption-from-folder takes the names of the folders." + (f" The first that were left out: {said}" if said else "")
        )

    def _listed(self, found: Found) -> dict[str, ListedImage]:
        """Images by their names, with objects and splits."""
        folders = [name.split("/")[:-1] for name, _, _ in found.pictures]
        tops = {path[0] if path else "" for path in folders}
        named = {top for top in tops if top.lower() in SPLITS}
        has_splits = bool(named) and named == tops
        if named and not has_splits:
            other = sorted(tops - named)[0] or "the root itself"
            self.warnings.append(
                f"{', '.join(sorted(named))} may be splits, and {other!r} is none: each folder is taken as an object"
            )
        images, deeper, depths = {}, [], set()
        for (name, path, stamp), parts in zip(found.pictures, folders):
            split = SPLITS[parts[0].lower()] if has_splits else None
            own = parts[1:] if has_splits else parts
            depths.add(len(own))
            deeper += [name] if len(own) > self.depth else []
            object_id = to_text("/".join(own[: self.depth])) if len(own) >= self.depth else None
            images[name] = ListedImage(to_text(name), Place(path), [], object_id, split)
            if not self.strict:  # a source travels to every worker of a build
                self.stamps[to_text(name)] = stamp
        if deeper:
            self.warnings.append(
                f"pictures deeper than object/picture: {len(deeper):,} ({to_text(deeper[0])}, ...). The object is the "
                f"{'first folder' if self.depth == 1 else f'first {self.depth} folders'}; --depth takes more"
            )
        few = len(deeper) <= FEW * len(images)
        self.regular = few and min(depths, default=0) >= self.depth and len({image.object_id for image in images.values()}) > 1
        if self.strict:
            self._name_empty(found, folders)
        return images

    def _name_empty(self, found: Found, folders: Sequence[Sequence[str]]) -> None:
        """Leave out the folders below which no picture lies, the highest of each."""
        known = {f"{'/'.join(path[: i + 1])}/" for path in folders for i in range(len(path))}
        known |= {name for name, _ in found.skipped}
        empty = [name for name in found.folders if name and to_text(name) not in known and name not in known]
        nested = {name for name in empty if name[: name.rfind("/", 0, -1) + 1] in empty}
        for name in empty:
            if name not in nested:
                self.leave_out(to_text(name), "a folder without pictures")


class _Captions:
    """Captions of the images of a folder, by what they are told of: an image's own, and those of a folder. Each with its kind."""

    def __init__(self, source: FolderSource, found: Found, images: Mapping[str, ListedImage]) -> None:
        self.source, self.found, self.images = source, found, images
        self.used: Counter[str] = Counter()  # files, by ending
        self.contradictions: list[str] = []  # rows that say another object of an image than a row before
        self.names_pictures = False  # whether a row of a table is about a picture, not a folder
        self._tables: list[Table] = []
        self._own: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)  # by the image's name
        self._of_folder: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)  # by the folder's name and a slash
        self._told: dict[str, tuple[str, str]] = {}  # by the image's name: its object, and the row that says so
        self._folders = {f"{name.rsplit('/', 1)[0]}/" for name in images if "/" in name}
        self._folders |= {"/".join(f.split("/")[:i]) + "/" for f in self._folders for i in range(1, f.count("/"))}
        self._composed = {_nfc(name): name for name in [*images, *self._folders]}

    def of(self, name: str) -> list[tuple[str, str]]:
        """Captions of an image and their kinds: its own, then those of its folder and of those above."""
        parts = name.split("/")[:-1]
        above = ["/".join(parts[:i]) + "/" for i in range(len(parts), 0, -1)]
        return [*self._own[name], *(told for folder in above for told in self._of_folder.get(folder, ()))]

    def read(self) -> None:
        """Read every file of captions; one that cannot be read is left out. Raises SourceError where no table has a column of
        captions that is named."""
        beside = _beside([name for name, _ in self.found.texts if name.lower().endswith(".txt")], self.images)
        for name, path in self.found.texts:
            stem, ending = os.path.splitext(os.path.basename(name))
            folder = name.rpartition("/")[0]
            try:
                if name in beside:
                    lines = _lines(path)
                    for image in beside[name]:
                        self._own[image] += lines
                elif f"{stem}{ending}".lower() == OF_OBJECT:
                    self._take_object_s(name, folder, path)
                elif stem.lower() in TABLES and ending.lower() != ".txt":
                    self._take_table(name, folder, path)
                else:
                    continue
                self.used[ending.lower()] += 1
            except SourceError as error:
                self.source.leave_out(to_text(name), str(error).replace(path, "it"))
        self._check_columns()

    def _check_columns(self) -> None:
        """Raise SourceError for the first column of captions that is named and that no table has."""
        columns = {name for table in self._tables for name in table.names}
        if lost := [column for column in self.source.captions or () if column not in columns]:
            if not self._tables:
                raise SourceError(
                    f"{self.source.root} has no column {lost[0]!r}: no captions.csv, metadata.jsonl or the like lies there that "
                    "could be read. Leave --captions out."
                )
            names = list(dict.fromkeys(name for table in self._tables for name in table.names))
            places = ", ".join(table.place for table in self._tables)
            replace(self._tables[0], place=places, names=names).require({lost[0]: "--captions"})

    def _take_object_s(self, name: str, folder: str, path: str) -> None:
        """Raises SourceError."""
        if not folder:
            raise SourceError(
                f"it lies in no object's folder: a list of pictures with their captions is called captions.csv, with the columns "
                f"{FILE_COLUMNS[0]} and {CAPTION_NAMES[0]}"
            )
        self._of_folder[f"{folder}/"] += _lines(path)

    def _take_table(self, name: str, folder: str, path: str) -> None:
        """Raises SourceError."""
        table = read_table(path)
        self._tables.append(table)
        place = next((column for column in FILE_COLUMNS if column in table.names), None)
        if place is None:
            raise SourceError(f"no column of file names, only {', '.join(table.names)}: call it {FILE_COLUMNS[0]}")
        columns = self._caption_columns(table)
        object_column = OBJECT_COLUMN if OBJECT_COLUMN in table.names and place != OBJECT_COLUMN else None
        taken: list[tuple[str, list[tuple[str, str]]]] = []
        for row in table.rows([place, *columns, *([object_column] if object_column else [])]):
            try:
                meant = self._meant(folder, row.needed(place))
                texts = [(text, column) for column in columns for text in row.texts(column)]
                if not meant.endswith("/"):
                    self.names_pictures = True
                    if object_column and (object_id := row.text(object_column)):
                        self._tell_object(meant, object_id, f"{to_text(name)}, row {row.number}")
                taken.append((meant, texts))
            except SampleError as error:
                self.source.leave_out(f"{to_text(name)}, row {row.number}", str(error))
        for column in columns:
            captions = [text for _, texts in taken for text, kind in texts if kind == column]
            check_no_written_lists(path, column, pa.array(captions, pa.string()))
        for meant, texts in taken:
            (self._of_folder if meant.endswith("/") else self._own)[meant] += texts

    def _tell_object(self, image: str, object_id: str, row: str) -> None:
        """Take an object from a row. Raises SampleError where an earlier one says another, which is kept as a contradiction."""
        told, earlier = self._told.setdefault(image, (object_id, row))
        if told != object_id:
            why = f"image {to_text(image)!r} belongs to the objects {told!r} ({earlier}) and {object_id!r}"
            self.contradictions.append(
                f"{row}: {why}. An image shows one object: mend the table, or copy the file under another name if that is meant."
            )
            raise SampleError(why)
        self.images[image].object_id = object_id
        self.source.told_objects.add(object_id)

    def _caption_columns(self, table: Table) -> list[str]:
        """Raises SourceError."""
        if self.source.captions:
            if lost := [column for column in self.source.captions if column not in table.names]:
                raise SourceError(f"no column {lost[0]!r}, only {', '.join(table.names)}")
            return list(self.source.captions)
        found = [column for column in CAPTION_NAMES if column in table.names]
        if not found and OBJECT_COLUMN not in table.names:
            raise SourceError(f"no column of captions, only {', '.join(table.names)}: name it with --captions")
        return found[:1]

    def _meant(self, folder: str, cell: str) -> str:
        """The image, or the folder with a slash at its end, that a row of a table in `folder` is about. Raises SampleError."""
        for form in (cell, cell.replace("\\", "/")):
            name = posixpath.normpath(posixpath.join(folder, form))
            for known in (name, f"{name}/"):
                if known in self.images or known in self._folders:
                    return known
                if found := self._composed.get(_nfc(known)):
                    return found
        raise SampleError(f"there is no picture {cell!r}" + (f" in {folder}" if folder else ""))


def _spoken(object_id: str) -> str:
    """The name of a folder as words."""
    name = object_id.rsplit("/", 1)[-1].replace("_", " ").replace("-", " ")
    return " ".join(name.split()) or object_id


def _lines(path: str) -> list[tuple[str, str]]:
    """Captions of a text file, one a line. Raises SourceError."""
    try:
        return [(text, FILE_KIND) for text in line_texts(read_lines(path, SourceError), FILE_KIND)]
    except SampleError as error:
        raise SourceError(str(error)) from None


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _without_capitals(name: str) -> str:
    """A name whose last part has no capitals: folders stay apart."""
    folder, slash, base = _nfc(name).rpartition("/")
    return f"{folder}{slash}{base.casefold()}"


def _beside(texts: Iterable[str], images: Iterable[str]) -> dict[str, list[str]]:
    """For the .txt that have one the images of their name: to the letter, else in another form of Unicode, else with other
    capitals, where exactly one is meant."""
    named: defaultdict[str, list[str]] = defaultdict(list)  # images by what a text of theirs may be called
    for image in images:
        named[os.path.splitext(image)[0]].append(image)
        named[image].append(image)
    left: defaultdict[str, list[str]] = defaultdict(list)  # texts by their name without the ending
    for text in texts:
        left[os.path.splitext(text)[0]].append(text)
    found: dict[str, list[str]] = {text: named[stem] for stem in left.keys() & named.keys() for text in left[stem]}
    free = named.keys() - left.keys()
    stems = {stem for stem in left if stem not in named and f"{os.path.basename(stem)}.txt".lower() != OF_OBJECT}
    for form in (_nfc, _without_capitals):
        wanted, given = _grouped(stems, form), _grouped(free, form)
        for key in wanted.keys() & given.keys():
            if len(wanted[key]) == len(given[key]) == 1:
                (stem,), (name,) = wanted[key], given[key]
                found |= dict.fromkeys(left[stem], named[name])
                stems.discard(stem)
                free = free - {name}
    return found


def _grouped(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[form(name)].append(name)
    return groups

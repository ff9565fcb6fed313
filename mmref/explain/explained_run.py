"""A trained run under the glass: queries and objects of a shard set, explained by its best checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from mmref.data.captions import shortest, usable_captions
from mmref.data.decode import decode_rgb
from mmref.data.fit import Fit
from mmref.data.sample_reader import SampleReader, SplitIndex
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import load_tokens
from mmref.errors import QueryError, SampleError, ShardSetError
from mmref.evaluate.choose import trained_space
from mmref.evaluate.evaluation import CAPTIONS, Evaluation, chosen_before, is_own, open_run, view_of
from mmref.evaluate.features import Encoder, Floats, Queries, read_pixels, read_queries
from mmref.evaluate.gains import gains
from mmref.evaluate.protocols import Chosen
from mmref.evaluate.refinement import (
    Codes,
    ReferenceSpace,
    RefinementSettings,
    candidates,
    reference_similarity,
    refine,
)
from mmref.evaluate.split_features import SplitFeatures
from mmref.model.device import chosen_device
from mmref.model.mmref import build_model
from mmref.model.readout import read_captions, telling_words
from mmref.model.reference_rows import warm_rows
from mmref.retrieval.heat_maps import heat_maps, hidden
from mmref.run.checkpoints import fetched, load_model, load_object_ids, load_references
from mmref.run.row_file import are_set

SHOWN = 3  # images of an object, results of a query (and the first right one)
WORDS = 8  # telling words
MATCHED = 4  # references named with a result
OTHERS = 256  # references that telling words are held against
IMAGES_OF_OBJECT = 16  # at most, that a reference is made of
MAPS = ("caption", "reference", "image")


@dataclass(frozen=True)
class View:
    """An image and what hiding its parts costs in cosine with three features."""

    image_id: str
    object_id: str
    label: str  # the shortest caption of the object
    pixels: np.ndarray  # (H, W, 3) uint8, as the model sees it
    heat: dict[str, np.ndarray]  # each of MAPS there is -> (grid, grid)
    cosine: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class Move:
    """A result with its ranks, and the references with the largest parts of its gain."""

    image_id: str
    object_id: str
    label: str  # as of View
    rank: int
    before: int
    gain: float
    references: list[tuple[str, float]]
    right: bool | None = None  # None: nobody knows


@dataclass(frozen=True)
class Explanation:
    """What `mmref explain` shows of one query or object."""

    kind: str  # "query" | "object"
    title: str
    reference: str  # whose reference is read and mapped, and where it comes from; "" without references
    views: list[View]
    captions: list[str] = field(default_factory=list)  # of the object, as people wrote them
    read: str = ""  # the reference's text; "" where the run has no reconstruction head
    telling: list[tuple[str, float]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)  # of the references named: object id -> its shortest caption


@dataclass(frozen=True)
class Gallery:
    """The images of a split that can be read."""

    index: SplitIndex
    features: Floats  # (g, d)
    rows: np.ndarray  # (g,) their positions in the index

    @property
    def objects(self) -> np.ndarray:
        """(g,) object row of each."""
        return np.asarray(self.index.object_row)[self.rows].astype(np.int64)


class ExplainedRun:
    """The best checkpoint of a run and a split of a shard set.

    Args:
        data: shard set, by default the run's own.
        grid: cells of a heat map on each side: each map costs grid^2 + 1 images.
    """

    def __init__(self, run_dir: str, data: str | None = None, split: str = "test", grid: int = 7) -> None:
        if grid < 1:
            raise QueryError(f"--grid is {grid}: give at least 1 cell on each side.")
        self.run, self.config, self.checkpoint = open_run(run_dir, data)
        info = self.checkpoint
        self.shards, self.grid = ShardSet.open(data or self.config.data.root), grid
        if split not in self.shards.splits:
            raise ShardSetError(f"{self.shards.name} has no split `{split}`, only {self.shards.splits}.")
        self.own = is_own(self.config, self.shards.root)
        self.split, self.view = split, view_of(self.config, self.shards, split)
        self.device = chosen_device()
        self.tokens = load_tokens(self.config)
        self.model = build_model(self.config, self.tokens.vocab_size)
        with fetched(self.run, info, "model", "references") as folder:
            load_model(folder, self.model)
            references, ids = load_references(folder, info.meta).numpy(), load_object_ids(folder, info.meta)
        self.model.to(self.device).eval()
        self.encoder = Encoder(self.model, self.model, self.config.data, self.tokens, self.device)
        seen = are_set(references)
        self.space: ReferenceSpace | None = trained_space(self.config, references)
        self.references = references if seen.all() else references[seen]  # (m, K, d)
        self.reference_ids = [name for name, there in zip(ids, seen) if there]
        self.refinement = self._refinement()

    def _refinement(self) -> RefinementSettings:
        """What evaluation of this view chose for this checkpoint, else that of the run's own set; none where there was none."""
        if self.space is None:
            return RefinementSettings(weight=0.0)
        found = chosen_before(self.run, self.checkpoint, self.view).get(CAPTIONS, Chosen())
        if self.view and not found.chosen_on:
            found = chosen_before(self.run, self.checkpoint).get(CAPTIONS, Chosen())
        return found.settings

    # -- the split -----------------------------------------------------------------------------------------------------

    @cached_property
    def queries(self) -> Queries:
        """Every caption of the split."""
        return read_queries(self.shards.index(self.split))

    @cached_property
    def text(self) -> Floats:
        """(t, d) features of its distinct captions: for examples, and what dense codes are centred by."""
        return self.encode_texts(self.queries.texts)

    @cached_property
    def gallery(self) -> Gallery:
        """Every image of the split, encoded in this process. Raises QueryError where none can be read."""
        index, size = self.shards.index(self.split), self.config.eval.batch
        reader = SampleReader(index)
        images, rows, skipped = [], [], []
        for start in range(0, len(index), size):
            part = range(start, min(start + size, len(index)))
            pixels, bad = read_pixels(reader, part, self.config.data)
            usable = [i for i, problem in enumerate(bad) if not problem]
            skipped += [problem for problem in bad if problem]
            if usable:
                images.append(self.encoder.images(pixels[usable]))
                rows += [part[i] for i in usable]
        if not rows:
            raise QueryError(f"no image of {self.split} can be read: {skipped[0]}")
        return Gallery(index, np.concatenate(images), np.array(rows))

    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """(n, d) features, L2-normalised."""
        size = self.config.eval.batch
        return np.concatenate([self.encoder.texts(texts[i : i + size]) for i in range(0, len(texts), size)])

    @cached_property
    def _means(self) -> dict[str, Floats | None]:
        """What dense codes are centred by: mean coordinates of the captions, mean similarities of captions and images."""
        if self.space is None or self.refinement.kind != "dense":
            return dict.fromkeys(("code", "query", "item"))
        space, text = self.space, self.text
        query, item = (space.similarities(x).mean(0) for x in (text, self.gallery.features))
        return {"code": space.coordinates(text).mean(0), "query": query, "item": item}

    def _refined(self, text: Floats) -> tuple[Floats, Floats]:
        """Cosines (g,) of a text feature (d,) with the split's images, and the refined scores."""
        initial = text[None] @ self.gallery.features.T
        settings, space = self.refinement, self.space
        if settings.weight == 0 or space is None:
            return initial[0], initial[0]
        codes = space.encode(text[None], settings, self._means["code"]), self._image_codes
        inside = None if settings.top_p is None else candidates(initial, settings.top_p)
        return initial[0], refine(initial, reference_similarity(*codes), settings.weight, inside)[0]

    @cached_property
    def _image_codes(self) -> Codes:
        assert self.space is not None
        return self.space.encode(self.gallery.features, self.refinement, gallery=True)

    # -- queries -------------------------------------------------------------------------------------------------------

    def moved(self, count: int) -> list[str]:
        """Captions of the split whose first right result refinement moved most: half upwards, half downwards."""
        g, queries = self.gallery, self.queries
        features = SplitFeatures(g.index, queries, g.features, g.rows, self.text, [])
        evaluation = Evaluation(self.config, features, self.space, {CAPTIONS: Chosen(self.refinement)})
        before, after = evaluation.initial.first_rank, evaluation.refined.first_rank
        change = (before - after).astype(np.int64)  # positive: better
        once = np.unique(queries.text, return_index=True)[1]  # equal captions of several images: the first
        order = once[np.argsort(-change[once], kind="stable")].tolist()
        up = [i for i in order if change[i] > 0][: count - count // 2]
        down = [i for i in reversed(order) if change[i] < 0][: count // 2]
        rest = [i for i in order if i not in {*up, *down}][: count - len(up) - len(down)]
        return [queries.texts[int(queries.text[i])] for i in (*up, *down, *rest)]

    def explain_query(self, text: str) -> Explanation:
        """A sentence, one of the split's captions or any other. Raises QueryError for an empty one."""
        text, g, known = text.strip(), self.gallery, self.queries
        if not text:
            raise QueryError("the query is empty: give a sentence with --query.")
        feature = self.encode_texts([text])[0]
        initial, refined = self._refined(feature)
        order = np.argsort(-refined, kind="stable")
        before = np.argsort(np.argsort(-initial, kind="stable"), kind="stable") + 1
        owners = known.objects[np.array([known.texts[t] == text for t in known.text], bool)]
        shown = list(enumerate(order[:SHOWN].tolist(), 1))
        right = np.flatnonzero(np.isin(g.objects[order], owners))
        if len(right) and right[0] >= SHOWN:  # the first right one, where it is further down
            shown.append((int(right[0]) + 1, int(order[right[0]])))
        moves = [self._move(feature, at, rank, int(before[at]), float(refined[at] - initial[at]), owners) for rank, at in shown]
        row = self._matching_reference(feature, moves)
        reference = None if row is None else self.references[row]
        views = [
            self._view(g.index, int(g.rows[at]), m.label, feature, reference, f"rank {m.rank}, before refinement {m.before}")
            for (_, at), m in zip(shown, moves)
        ]
        if row is None or reference is None:
            return Explanation("query", text, "", views, moves=moves)
        read, telling = self._read(reference[None])
        name = self.reference_ids[row]
        captions = {i: self._train_captions(i) for i in dict.fromkeys([name, *(i for m in moves for i, _ in m.references)])}
        labels = {i: shortest(found) for i, found in captions.items() if found}
        return Explanation("query", text, name, views, captions[name], read, telling, moves, labels)

    def _move(self, query: Floats, at: int, rank: int, before: int, gain: float, owners: np.ndarray) -> Move:
        matched: list[tuple[str, float]] = []
        if self.space is not None and gain > 0:  # 0: no candidate of refinement
            means = self._means["query"], self._means["item"]
            parts = gains(self.space, self.refinement, query, self.gallery.features[at : at + 1], *means)[0]
            best = np.argsort(-parts, kind="stable")[:MATCHED]
            matched = [(self.reference_ids[i], float(parts[i])) for i in best if parts[i] > 0]
        g, own = self.gallery, int(self.gallery.objects[at])
        right = bool(np.isin(own, owners)) if len(owners) else None
        image_id, object_id = g.index.image_ids[int(g.rows[at])], g.index.object_ids[own]
        label = self.queries.shortest(own) or object_id
        return Move(image_id, object_id, label, rank, before, gain, matched, right)

    def _matching_reference(self, query: Floats, moves: list[Move]) -> int | None:
        """Row of the reference that gave the first result most; without refinement the nearest to the query."""
        if self.space is None:
            return None
        if moves[0].references:
            return self.reference_ids.index(moves[0].references[0][0])
        return int(self.space.nearest(query[None], 1)[0][0, 0])

    # -- objects -------------------------------------------------------------------------------------------------------

    def explain_object(self, object_id: str) -> Explanation:
        """An object of any split of the set. Raises QueryError where none has it."""
        split, row = self._find(object_id)
        index = self.shards.index(split)
        images = list(range(int(index.object_start[row]), int(index.object_start[row + 1])))
        reader, captions, captioned = SampleReader(index), [], []
        for i in images[:IMAGES_OF_OBJECT]:
            try:
                raw, name = reader.read(i), f"image {index.image_ids[i]}"
                decode_rgb(raw.image_bytes, name)
                found = [c for c, _ in usable_captions(raw.meta, name)]
            except SampleError:
                continue
            captions += found
            captioned.append((i, found[0]))
        if not captioned:
            raise QueryError(f"object {object_id!r} of {split} has no readable image with a caption.")
        texts = self.encode_texts(captions)
        reference, origin = self._reference_of(object_id, reader, [i for i, _ in captioned], texts)
        chosen = captioned[:SHOWN]
        features = self.encode_texts([c for _, c in chosen])
        label = shortest(captions)
        notes = ["" if c == label else f"caption: {c}" for _, c in chosen]  # what the map of the caption is of
        views = [self._view(index, i, label, f, reference, note) for (i, _), f, note in zip(chosen, features, notes)]
        read, telling = ("", []) if reference is None else self._read(reference[None])
        labels = {object_id: label}
        return Explanation("object", f"{object_id} ({split})", origin, views, captions, read, telling, labels=labels)

    def _find(self, object_id: str) -> tuple[str, int]:
        for split in self.shards.splits:
            ids = list(self.shards.index(split).object_ids)
            if object_id in ids:
                return split, ids.index(object_id)
        raise QueryError(f"{self.shards.name} has no object {object_id!r}: `mmref shards inspect` shows some of each split.")

    def _reference_of(
        self, object_id: str, reader: SampleReader, images: list[int], texts: Floats
    ) -> tuple[np.ndarray | None, str]:
        """An object's references (K, d), and whose they are: trained, or made of its features as `mmref references add` does."""
        if self.space is None:
            return None, ""
        if self.own and object_id in self.reference_ids:  # in another set it is another object's
            return self.references[self.reference_ids.index(object_id)], object_id
        pixels, bad = read_pixels(reader, images, self.config.data)
        usable = self.encoder.images(pixels[[not b for b in bad]])
        r = self.config.reference
        made = warm_rows(torch.from_numpy(usable), torch.from_numpy(texts), r.per_object, r.assign)
        return made.numpy(), f"{object_id}, not trained: the mean of its features"

    # -- what both are made of -----------------------------------------------------------------------------------------

    def _view(self, index: SplitIndex, image: int, label: str, caption: Floats, references: np.ndarray | None, note: str) -> View:
        """Heat maps of one image: the caption's, that of the reference nearest to it, and that of the image's own feature."""
        raw = SampleReader(index).read(image)
        pixels = Fit.of(self.config.data)(decode_rgb(raw.image_bytes, index.image_ids[image]))
        variants, size = np.stack(hidden(pixels, self.grid)), self.config.eval.batch
        with self.model.keeping_nothing():
            features = np.concatenate([self.encoder.images(variants[i : i + size]) for i in range(0, len(variants), size)])
        wanted = {"caption": caption, "image": features[0]}
        if references is not None:
            units = references / np.maximum(np.linalg.norm(references, axis=1, keepdims=True), 1e-12)
            wanted["reference"] = units[int((units @ features[0]).argmax())]
        names = [name for name in MAPS if name in wanted]
        targets = np.stack([wanted[name] for name in names])
        heat = dict(zip(names, heat_maps(features, targets, self.grid)))
        cosine = {name: float(features[0] @ wanted[name]) for name in names}
        object_id = index.object_ids[int(index.object_row[image])]
        return View(index.image_ids[image], object_id, label, pixels, heat, cosine, note)

    def _read(self, references: np.ndarray) -> tuple[str, list[tuple[str, float]]]:
        """Text and telling words of one object's references (1, K, d); nothing without a reconstruction head."""
        if self.model.reconstruct is None:
            return "", []
        length = self._caption_length
        own = torch.from_numpy(np.ascontiguousarray(references, np.float32)).to(self.device)
        chosen = np.random.default_rng(0).permutation(len(self.references))[:OTHERS]
        others = torch.from_numpy(self.references[chosen]).to(self.device)
        text = read_captions(self.model, self.tokens, own, length)[0]
        return text, telling_words(self.model, self.tokens, own, others, length, WORDS)[0]

    @cached_property
    def _caption_length(self) -> int:
        """Words of the split's median caption, in tokens."""
        texts = self.queries.texts
        some = np.random.default_rng(0).permutation(len(texts))[:512]
        ids, mask = self.tokens([texts[i] for i in some])
        inside = (mask > 0) & ~np.isin(ids, self.tokens.special_ids)
        return max(1, int(np.median(inside.sum(1))))

    @cached_property
    def _train_rows(self) -> dict[str, int]:
        """Rows of the training objects by id; {} where the set at hand is not the run's own, or has none."""
        if not self.own or "train" not in self.shards.splits:
            return {}
        return {i: row for row, i in enumerate(self.shards.index("train").object_ids)}

    def _train_captions(self, object_id: str) -> list[str]:
        """Captions of a training object, [] where the set at hand does not have it."""
        if object_id not in self._train_rows:
            return []
        index, row = self.shards.index("train"), self._train_rows[object_id]
        reader, captions = SampleReader(index), []
        for i in range(int(index.object_start[row]), int(index.object_start[row + 1]))[:IMAGES_OF_OBJECT]:
            try:
                captions += [c for c, _ in usable_captions(reader.read_meta(i), index.image_ids[i])]
            except SampleError:
                continue
        return captions

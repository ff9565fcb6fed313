"""Other ways to ask a split than by one caption at a time: by its images (re-identification), or by captions taken together.

Image to image: every image queries the split's other images, and a hit is another image of its object. With cameras the
gallery of a query also lacks the images of its object by its own camera, as Market-1501's protocol has it (Zheng et al.,
ICCV 2015): else near-copies out of one sequence would be the hits. Images of other objects by that camera stay.

Captions as one: a query is the mean of the features of all captions of an image, or of an object, normalised again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmref.config import Config
from mmref.data.sample_reader import SampleReader, SplitIndex
from mmref.errors import EvaluationError, SampleError
from mmref.evaluate.bootstrap import bootstrap_ci, paired_difference
from mmref.evaluate.choose import config_grid
from mmref.evaluate.class_protocol import class_queries
from mmref.evaluate.features import Floats
from mmref.evaluate.metrics import PerQuery, ScoreFn, evaluate_features, same_object, summarize
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, choose_refinement, refined_scores
from mmref.evaluate.split_features import SplitFeatures

IMAGE_TO_IMAGE, CAPTIONS_AS_ONE = "image_to_image", "captions_as_one"  # in metrics.json, and options of `eval`
SHOWN_FIELDS = 8  # of a sample, in an error


@dataclass(frozen=True)
class Chosen:
    """A refinement, what it was chosen on ("": nothing), and everything that was tried."""

    settings: RefinementSettings = field(default_factory=lambda: RefinementSettings(weight=0.0))
    chosen_on: str = ""
    tried: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As `refinement` of metrics.json, without what was tried."""
        settings = asdict(self.settings)
        return {**{name: settings[name] for name in ("weight", "top_r", "tau", "kind", "top_p")}, "chosen_on": self.chosen_on}


@dataclass(frozen=True)
class Protocol:
    """Queries of a split against its images.

    Args:
        queries: (q, d) L2-normalised features, with their objects (q,).
        gallery: (g, d) L2-normalised features, with their objects (g,).
        about: what metrics.json says of the queries.
        leave_out: takes items out of a query's gallery, as in `evaluate_features`.
    """

    queries: Floats
    objects: np.ndarray
    gallery: Floats
    gallery_objects: np.ndarray
    about: Mapping[str, Any]
    leave_out: ScoreFn | None = None

    def ranked(self, score_fn: ScoreFn | None = None) -> PerQuery:
        """What each query achieves, by the features alone or under a refinement."""
        given = self.queries, self.gallery, self.objects, self.gallery_objects
        return evaluate_features(*given, score_fn=score_fn, leave_out=self.leave_out)

    def choose(self, config: Config, space: ReferenceSpace | None, split: str) -> Chosen:
        """The best refinement of the config's grid on this split: no refinement where there are no references; nothing is
        chosen where no query has a hit in its gallery."""
        if space is None:
            return Chosen(chosen_on=split)
        if not self.ranked().valid.any():
            return Chosen()
        best, tried = choose_refinement(
            space, self.queries, self.gallery, self.objects, self.gallery_objects, config_grid(config), config.eval.metric,
            leave_out=self.leave_out,
        )  # fmt: skip
        return Chosen(best, split, tried)

    def scores(self, name: str, space: ReferenceSpace | None, chosen: Chosen, resamples: int) -> dict[str, Any]:
        """The block `name` of metrics.json.

        Raises:
            EvaluationError: no query has an image of its object in its gallery.
        """
        initial = refined = self.ranked()
        if not initial.valid.any():
            raise EvaluationError(
                f"`eval.{name}`: none of the {len(initial):,} queries has an image of its object in its gallery, so that there "
                f"is nothing to find ({', '.join(f'{k} {v}' for k, v in self.about.items())}). Leave that option out."
            )
        if space is not None:
            refined = self.ranked(refined_scores(space, chosen.settings, self.queries, self.gallery))
        return {
            **self.about,
            "n_queries": len(initial),
            "n_excluded": initial.n_excluded,
            "initial": summarize(initial),
            "refined": summarize(refined),
            "refinement": chosen.to_dict(),
            "ci95": bootstrap_ci(refined, self.objects, resamples),
            "ci95_initial": bootstrap_ci(initial, self.objects, resamples),
            "refinement_gain": paired_difference(initial, refined, self.objects, resamples),
        }


def protocols(config: Config, features: SplitFeatures) -> dict[str, Protocol]:
    """Those that `eval` asks for, by their names in metrics.json. Raises EvaluationError for a column of cameras that is not
    there."""
    found = {}
    if config.eval.image_to_image or config.eval.same_camera:
        found[IMAGE_TO_IMAGE] = image_to_image(features, config.eval.same_camera)
    if config.eval.captions_as_one != "none":
        found[CAPTIONS_AS_ONE] = captions_as_one(features, config.eval.captions_as_one)
    return found


def image_to_image(features: SplitFeatures, same_camera: str = "") -> Protocol:
    """Every image of a split queries the others.

    Args:
        same_camera: field of the samples' json that names the camera: images of one object by one camera do not meet. An
            image without it is taken as by a camera of its own. "": only the query itself is left out.
    """
    objects = features.image_objects
    about: dict[str, Any] = {"same_camera": same_camera}
    cameras = None
    if same_camera:
        named = _read_field(features.index, features.image_rows, same_camera)
        about["without_camera"] = named.count(None)
        apart = [value if value is not None else ("none", i) for i, value in enumerate(named)]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(apart))}
        cameras = np.array([numbers[value] for value in apart])

    def leave_out(rows: slice, scores: np.ndarray) -> np.ndarray:
        at = np.arange(rows.start, rows.stop)
        scores[at - rows.start, at] = -np.inf
        if cameras is not None:
            offsets, columns = same_object(objects[rows], objects)
            of = np.repeat(at, np.diff(offsets))
            same = cameras[columns] == cameras[of]
            scores[of[same] - rows.start, columns[same]] = -np.inf
        return scores

    return Protocol(features.image, objects, features.image, objects, about, leave_out)


def captions_as_one(features: SplitFeatures, of: str) -> Protocol:
    """The captions of each image, or of each object (`of`), as one query of all images."""
    q = features.queries
    queries, named = class_queries(features.text[q.text], q.images if of == "image" else q.objects)
    objects = np.asarray(features.index.object_row)[named].astype(np.int64) if of == "image" else named
    about = {"of": of, "n_captions": len(q.text)}
    return Protocol(queries, objects, features.image, features.image_objects, about)


def _read_field(index: SplitIndex, rows: np.ndarray, name: str) -> list[str | None]:
    """A field of the samples' json as text, None where a sample has none. Raises EvaluationError where none has it."""
    reader, known = SampleReader(index), dict[str, None]()
    found: list[str | None] = []
    for record in reader.read_metas(rows.tolist()):
        meta = {} if isinstance(record, SampleError) else record  # the image may be sound
        value = meta.get(name)
        found.append(None if value is None or isinstance(value, list | dict) else str(value))
        if value is None and len(known) < SHOWN_FIELDS:
            known |= dict.fromkeys(meta)
    if all(value is None for value in found):
        there = ", ".join(list(known)[:SHOWN_FIELDS]) or "none"
        raise EvaluationError(
            f"no sample of {index.split} has the field {name!r} that `eval.same_camera` names, only {there}. "
            f"Build the set with it (`mmref shards build table --keep {name}`)."
        )
    return found

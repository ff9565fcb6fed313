"""Reference-based refinement: training references as anchors in which queries and gallery items are compared again.

A test object has no reference of its own. Yet a query and an image of one new object resemble the same *known* objects,
so that how they resemble the references (their codes) is a second opinion on how alike they are:

    S = S_0 + weight * S_ref        on the top-p candidates of the first pass; the others keep S_0.

S_ref is in [0, 1] for both kinds of code, so that a candidate only gains. Hence items outside top-p keep their order
and rank after all candidates, without any sentinel: a candidate's score is at least its S_0, which is at least theirs,
and on equality the candidate has the lower gallery index. (docs/training.md, Refinement; the paper states that such a
similarity exists, its form is ours.)
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import groupby, product
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from scipy import sparse
from torch import Tensor

from mmref.errors import ConfigError, DenseCodesError, EvaluationError
from mmref.evaluate import on_device
from mmref.evaluate.metrics import METRIC_NAMES, PerQuery, ScoreFn, Scores, score_ranking, summarize
from mmref.evaluate.shares import ALONE, QueryShare
from mmref.run.row_file import References, blocks

Kind: TypeAlias = Literal["sparse", "dense", "expansion"]
Codes: TypeAlias = "sparse.csr_matrix | np.ndarray"
"""Unit rows, (N, m) sparse or (N, c) dense."""

# References are searched this many at a time.
_SHARD_ROWS = 1 << 20
# Similarities to references are made this many values at a time (64 MB of float32).
_BLOCK_VALUES = 1 << 24
# A sparse multiply-add costs about as much as this many dense ones: above it, a dense product is faster.
_SPARSE_COST = 100
# Dense codes of more bytes are refused, 8 GiB: other kinds of code need none of that.
DENSE_BYTES = 1 << 33
# Gallery items whose nearest references are found at a time.
_CODED = 1024
# Sparse codes over more objects than these are multiplied as they are, in memory.
_DENSE_ON_DEVICE = 1 << 17


@dataclass(frozen=True)
class RefinementSettings:
    """How results are refined. Costs no training: chosen on val from saved features, never on test.

    Raises:
        ConfigError: a value out of range.
    """

    kind: Kind = "sparse"
    """"sparse": softmax over the top_r nearest references; "dense": all similarities, centred per modality; "expansion": a
    query is expanded by the softmax-weighted mean of its top_r nearest references, gallery items stay as they are."""
    weight: float = 0.2
    """Weight of the reference-based similarity; 0 leaves the ranking as it is."""
    top_r: int = 32
    """References in a sparse code or an expansion; clipped to the number of references."""
    tau: float = 0.05
    """Temperature of their softmax."""
    top_p: int | None = None
    """Candidates of the first pass that are refined; None refines all."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"refinement kind is {self.kind!r}: choose one of {', '.join(get_args(Kind))}.")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"refinement weight is {self.weight}: it must be a finite number of at least 0.")
        if self.top_r < 1 or not self.tau > 0:
            raise ConfigError(f"refinement top_r = {self.top_r}, tau = {self.tau}: top_r >= 1 and tau > 0 are needed.")
        if self.top_p is not None and self.top_p < 1:
            raise ConfigError(f"refinement top_p is {self.top_p}: use at least 1, or none to refine every candidate.")


_DENSE = RefinementSettings(kind="dense")


def check_dense(items: int, objects: int) -> None:
    """Raise DenseCodesError where codes with a number for each of some items and objects are too large for the memory."""
    if (size := 4 * items * objects) > DENSE_BYTES:
        raise DenseCodesError(
            f"dense codes of {items:,} images or texts over {objects:,} objects with several references each would take "
            f"{size / 1e9:.1f} GB; at most {DENSE_BYTES / 1e9:.1f} GB are allowed. Leave them out: `--eval.refine_kinds "
            "'[sparse]'`. With one reference for each object (`reference.per_object`) they are as small as features."
        )


class ReferenceSpace:
    """The references of m objects as a space of codes. An object's similarity is that of its best reference.

    Args:
        references: (m, K, d), or an array (m, d) for K = 1; rows are normalised here, in the one copy that is made of them. A
            zero row was never set: it counts in nothing, and an object that has no other has cosine 0 with everything.
        kept: (n,) bool, which objects are taken; by default all.
    Raises:
        EvaluationError: a reference is not finite, or there are none.
    """

    def __init__(self, references: References, kept: np.ndarray | None = None) -> None:
        if isinstance(references, np.ndarray) and references.ndim == 2:
            references = references[:, None]
        if len(references.shape) != 3 or references.shape[0] == 0:
            raise EvaluationError(f"references have shape {references.shape}, expected (objects, references, features).")
        self.per_object, self.dim = references.shape[1:]
        self.n_objects = len(references) if kept is None else int(kept.sum())
        self._there = np.empty((self.n_objects, self.per_object), bool)
        self._rows = np.empty((self.n_objects * self.per_object, self.dim), np.float32)  # (m K, d)
        first = 0
        for at in blocks(references):
            some = np.asarray(references[at], np.float32)
            some = some if kept is None else some[kept[at]]
            if not np.isfinite(some).all():
                raise EvaluationError("references are not finite: the checkpoint comes from a run that diverged.")
            rows: np.ndarray = _unit(some)
            there = np.asarray(some.any(axis=2))
            there |= ~there.any(axis=1, keepdims=True)
            if not there.all():  # the object's first stands in: it changes no maximum over an object's references
                rows = np.where(there[..., None], rows, rows[np.arange(len(rows)), there.argmax(axis=1)][:, None])
            end = first + len(some)
            self._there[first:end] = there
            self._rows[first * self.per_object : end * self.per_object] = rows.reshape(-1, self.dim)
            first = end

    def nearest(self, features: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
        """The r nearest objects of each feature row: ids (N, r) int32 and cosines (N, r), descending. r <= m."""
        import faiss

        # The search is exact and takes a shard of the references at a time, so memory is (N, r) whatever m is.
        queries = np.ascontiguousarray(features, dtype=np.float32)
        ids = np.empty((len(queries), 0), np.int64)
        cosines = np.empty((len(queries), 0), np.float32)
        # The best r K rows hold those of the best r objects.
        wanted = r * self.per_object
        for start in range(0, len(self._rows), _SHARD_ROWS):
            shard = self._rows[start : start + _SHARD_ROWS]
            found, at = faiss.knn(queries, shard, min(wanted, len(shard)), metric=faiss.METRIC_INNER_PRODUCT)
            ids, cosines = np.hstack([ids, at + start]), np.hstack([cosines, found])
            # They are ordered by cosine, equal ones by the lower id. Rounded, as a product may differ in its last bits by where
            # a row lies in it.
            order = np.lexsort((ids, -np.round(cosines, 6)), axis=1)[:, :wanted]
            ids = np.take_along_axis(ids, order, axis=1)
            cosines = np.take_along_axis(cosines, order, axis=1)
        if self.per_object > 1:
            ids, cosines = _best_of_each(ids // self.per_object, cosines, r)
        return ids.astype(np.int32), cosines

    def encode(
        self, features: np.ndarray, settings: RefinementSettings, mean: np.ndarray | None = None, gallery: bool = False
    ) -> Codes:
        """Codes of L2-normalised features (N, d) of *one* modality, as unit rows.

        Args:
            gallery: these are what is searched, not what searches: expansion leaves them as they are.
            mean: for dense codes of a few features (a search service): `coordinates(many features).mean(0)` of the same
                modality. By default the mean of these features.
        """
        if settings.kind == "expansion" and gallery:
            return features
        if settings.kind != "dense":
            nearest = self.nearest(features, min(settings.top_r, self.n_objects))
            codes = self.sparse_codes(*nearest, settings.tau)
            return codes if settings.kind == "sparse" else self.expand(codes)
        coordinates = self.coordinates(features)
        coordinates -= coordinates.mean(axis=0) if mean is None else mean
        return _unit(coordinates)

    def expand(self, codes: sparse.csr_matrix) -> np.ndarray:
        """Mean of the references (of an object: of its unit references) with the weights of sparse codes: (N, d) unit rows."""
        return _unit(np.asarray(codes @ self.centres, dtype=np.float32))

    @cached_property
    def centres(self) -> np.ndarray:
        """(m, d) mean of each object's unit references."""
        rows = self._rows.reshape(self.n_objects, self.per_object, self.dim)
        return rows.mean(axis=1, where=self._there[..., None])

    def coordinates(self, features: np.ndarray) -> np.ndarray:
        """Features in coordinates (N, c) whose inner products are those of the similarities to all m objects.

        Raises DenseCodesError where c is m, and that is too much.
        """
        if self._factor is not None:
            return features @ self._factor.T
        check_dense(len(features), self.n_objects)
        return self.similarities(features)

    def mean(self, features: np.ndarray) -> np.ndarray:
        """(c,) mean coordinates of features (N, d), which centre the dense codes of their modality."""
        total: Any = 0
        block = max(1, _BLOCK_VALUES // (self.n_objects if self._factor is None else self.dim))
        for start in range(0, len(features), block):
            total = total + self.coordinates(features[start : start + block]).sum(0, np.float64)
        return np.asarray(total / len(features), np.float32)

    def similarities(self, features: np.ndarray) -> np.ndarray:
        """Cosines of features (N, d) with each object's best reference: (N, m)."""
        result = np.empty((len(features), self.n_objects), np.float32)
        for rows, similarity in self._similarities(features):
            result[rows] = similarity
        return result

    def _similarities(self, features: np.ndarray) -> Iterable[tuple[slice, np.ndarray]]:
        """(rows, their best cosine with each object (n, m)), a block of rows at a time."""
        block = max(1, _BLOCK_VALUES // len(self._rows))
        for start in range(0, len(features), block):
            rows = slice(start, min(start + block, len(features)))
            cosines = features[rows] @ self._rows.T  # (n, m K)
            if self.per_object > 1:
                cosines = cosines.reshape(-1, self.n_objects, self.per_object).max(axis=2)
            yield rows, cosines

    @cached_property
    def _factor(self) -> np.ndarray | None:
        """(d, d) T with R = Q T, Q orthonormal: R x and T x have the same inner products, means included.

        So with one reference per object and m > d, dense codes need d numbers instead of m. A maximum over several
        references is not linear and has no such short cut.
        """
        if self.per_object > 1 or self.n_objects <= self.dim:
            return None
        return np.asarray(np.linalg.qr(self._rows, mode="r"))

    def sparse_codes(self, ids: np.ndarray, cosines: np.ndarray, tau: float) -> sparse.csr_matrix:
        """Softmax over the given objects, as unit rows (N, m). Cosines are descending, so the first is the maximum."""
        # A cosine does not see the scale of a code: the softmax's denominator is left out.
        weights = _unit(np.exp((cosines - cosines[:, :1]) / np.float32(tau)))
        indptr = np.arange(0, ids.size + 1, ids.shape[1])
        return sparse.csr_matrix((weights.ravel(), ids.ravel(), indptr), shape=(len(ids), self.n_objects))


def reference_similarity(queries: Codes, gallery: Codes) -> np.ndarray:
    """S_ref of every pair, (q, G) float32 in [0, 1]: the cosine of sparse codes, (1 + cosine) / 2 of dense ones.

    Sparse codes share few references: their product is sparse as long as that pays, dense by blocks of the gallery
    after that (many references per code, or a few that everything resembles). Never more than (q, m) + (q, G) numbers.
    """
    if isinstance(queries, np.ndarray) or isinstance(gallery, np.ndarray):
        cosines = queries @ gallery.T
        cosines += 1
        cosines *= 0.5
        return np.clip(cosines, 0, 1, out=cosines)
    n_queries, n_objects = queries.shape
    n_gallery = gallery.shape[0]
    uses = [np.bincount(codes.indices, minlength=n_objects).astype(np.float64) for codes in (queries, gallery)]
    if uses[0] @ uses[1] * _SPARSE_COST <= float(n_queries) * n_objects * n_gallery:
        cosines = np.asarray((queries @ gallery.T).todense(), dtype=np.float32)
    else:
        cosines = np.empty((n_queries, n_gallery), np.float32)
        dense = queries.toarray()
        block = max(1, _BLOCK_VALUES // n_objects)
        for start in range(0, n_gallery, block):
            cosines[:, start : start + block] = dense @ gallery[start : start + block].toarray().T
    return np.clip(cosines, 0, 1, out=cosines)


def candidates(initial: Scores, top_p: int) -> Any:
    """(q, G) bool, the top_p items of each row of scores; of equal scores the lower gallery index is in."""
    if isinstance(initial, Tensor):
        return on_device.candidates(initial, top_p)
    n_gallery = initial.shape[1]
    if top_p >= n_gallery:
        return np.ones(initial.shape, dtype=bool)
    threshold = np.partition(initial, n_gallery - top_p, axis=1)[:, n_gallery - top_p, None]
    inside = initial >= threshold
    crowded = np.flatnonzero(inside.sum(axis=1) > top_p)  # more ties at the threshold than places left
    if len(crowded):
        above, at = initial[crowded] > threshold[crowded], initial[crowded] == threshold[crowded]
        places = top_p - above.sum(axis=1, keepdims=True)
        inside[crowded] = above | (at & (np.cumsum(at, axis=1) <= places))
    return inside


def refine(initial: Any, similarity: Any, weight: float, inside: Any = None) -> Any:
    """S = S_0 + weight * S_ref where `inside`, S_0 elsewhere; all (q, G), in memory or on a device. Weight 0 returns S_0."""
    if weight == 0:
        return initial
    gain = similarity * weight  # in fp32, as the scores are
    if inside is not None:
        gain *= inside
    gain += initial
    return gain


def refined_scores(space: ReferenceSpace, settings: RefinementSettings, queries: np.ndarray, gallery: np.ndarray) -> ScoreFn:
    """The score function of `evaluate_features` that refines: S_0 of a chunk of queries in, S out.

    Args:
        queries: (Nq, d) float32, all queries of the evaluation, L2-normalised: encoded once, here.
        gallery: (Ng, d) float32, L2-normalised.
    """
    if settings.weight == 0:
        return lambda rows, initial: initial
    query_codes, gallery_codes = space.encode(queries, settings), space.encode(gallery, settings, gallery=True)

    def score(rows: slice, initial: np.ndarray) -> np.ndarray:
        inside = None if settings.top_p is None else candidates(initial, settings.top_p)
        return refine(initial, reference_similarity(query_codes[rows], gallery_codes), settings.weight, inside)

    return score


def refinement_grid(
    kinds: Iterable[Kind] = ("sparse", "dense"),
    weights: Iterable[float] = (0.05, 0.1, 0.2, 0.4, 0.8),
    top_rs: Iterable[int] = (16, 64, 256),
    taus: Iterable[float] = (0.02, 0.05, 0.1),
    top_ps: Iterable[int | None] = (None,),
) -> list[RefinementSettings]:
    """Every combination; `top_rs` and `taus` do not matter to dense codes."""
    weights, top_ps = list(weights), list(top_ps)
    sparse_codes = list(product(top_rs, taus))
    grid: list[RefinementSettings] = []
    for kind in kinds:
        codes = sparse_codes if kind != "dense" else [(RefinementSettings.top_r, RefinementSettings.tau)]
        grid += [RefinementSettings(kind, w, r, tau, p) for (r, tau), p, w in product(codes, top_ps, weights)]
    return grid


def choose_refinement(
    space: ReferenceSpace,
    queries: np.ndarray,
    gallery: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    grid: Iterable[RefinementSettings] | None = None,
    metric: str = "mAP",
    chunk: int = 512,
    counted: np.ndarray | None = None,
    leave_out: ScoreFn | None = None,
    share: QueryShare = ALONE,
) -> tuple[RefinementSettings, list[dict[str, Any]]]:
    """The best settings on val features, and a table of everything tried.

    No refinement (weight 0) always competes and wins ties, so that refinement that does not help is declined.

    Args:
        queries, gallery: (Nq, d) and (Ng, d) float32 val features, L2-normalised, with their labels.
        grid: settings to try, `refinement_grid()` by default.
        metric: a metric of METRIC_NAMES, or several joined by "+": their sum is maximised.
        chunk: queries scored at a time.
        counted: (n,) rows of `queries` that the metrics are means over, repeats allowed; by default each row once.
        leave_out, share: as in `evaluate_features`.
    Returns:
        The best settings, and per settings tried {"kind", "weight", "top_r", "tau", "top_p", "R@1", ..., "objective"},
        the first without refinement.
    Raises:
        ConfigError: an unknown metric.
        EvaluationError: no val query has a hit in the gallery.
    """
    terms = metric.split("+")
    if unknown := [term for term in terms if term not in METRIC_NAMES]:
        raise ConfigError(f"refinement is chosen by {metric!r}: {unknown[0]!r} is none of {', '.join(METRIC_NAMES)}.")
    scored = score_refinements(space, queries, gallery, query_labels, gallery_labels, grid, chunk, leave_out, share)
    results = {s: summarize(found if counted is None else found.take(counted)) for s, found in scored.items()}
    objective = {settings: sum(result[term] for term in terms) for settings, result in results.items()}
    best = max(objective, key=lambda s: objective[s])  # max keeps the first: no refinement wins a tie
    return best, [{**asdict(s), **results[s], "objective": objective[s]} for s in objective]


def score_refinements(
    space: ReferenceSpace,
    queries: np.ndarray,
    gallery: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    grid: Iterable[RefinementSettings] | None = None,
    chunk: int = 512,
    leave_out: ScoreFn | None = None,
    share: QueryShare = ALONE,
) -> dict[RefinementSettings, PerQuery]:
    """What each query achieves without refinement (the first entry, weight 0) and under every setting of the grid.

    Arguments as in `choose_refinement`.
    """
    tried = [s for s in dict.fromkeys(refinement_grid() if grid is None else grid) if s.weight > 0]
    declined = replace(tried[0] if tried else RefinementSettings(), weight=0.0)
    # Settings that share a code lie side by side: each S_ref is made once, and used for all its weights.
    code_of = partial(_code, n_objects=space.n_objects)
    shared = [(code, list(group)) for code, group in groupby(sorted(tried, key=code_of), key=code_of)]
    codes = _SharedCodes(space, queries, gallery, [code for code, _ in shared], share)
    score, tables = share.scorer(queries, gallery), []
    for rows in share.chunks(len(queries), chunk):
        labels, initial = query_labels[rows], score(rows)
        if leave_out is not None:
            initial = leave_out(rows, initial)
        found = {declined: score_ranking(initial, labels, gallery_labels)}
        insides = {p: None if p is None else candidates(initial, p) for p in {s.top_p for s in tried}}
        for (_, group), similarity in zip(shared, codes.similarities(rows), strict=True):
            for settings in group:
                scores = refine(initial, similarity, settings.weight, insides[settings.top_p])
                found[settings] = score_ranking(scores, labels, gallery_labels)
        tables.append(np.concatenate([found[settings].table() for settings in (declined, *tried)], axis=1))
    width = len(fields(PerQuery))
    table = share.together(tables, len(queries), chunk, width * (1 + len(tried)))
    columns = np.split(table, 1 + len(tried), axis=1)
    return {settings: PerQuery.of_table(part) for settings, part in zip((declined, *tried), columns, strict=True)}


def _code(settings: RefinementSettings, n_objects: int) -> tuple[str, int, float]:
    """What a code depends on. Equal for top_r that are clipped to the same number, and for all dense settings."""
    if settings.kind == "dense":
        return "dense", 0, 0.0
    return settings.kind, min(settings.top_r, n_objects), settings.tau


class _SharedCodes:
    """Codes of all gallery items, and S_ref of a chunk of queries with them, for each of some (kind, r, tau).

    The nearest references are found once, for the largest r, and those of gallery items by all parts of a share.
    """

    def __init__(
        self, space: ReferenceSpace, queries: np.ndarray, gallery: np.ndarray, codes: list[tuple[str, int, float]],
        share: QueryShare,
    ) -> None:  # fmt: skip
        self.space, self.queries, self.codes, self.share = space, queries, codes, share
        self.nearest = max((r for kind, r, _ in codes if kind != "dense"), default=0)  # of a query
        if r := max((r for kind, r, _ in codes if kind == "sparse"), default=0):
            near = self._nearest(gallery, r)
        self.gallery: list[Any] = []
        self.mean: np.ndarray | None = None  # of the queries' coordinates
        for kind, r, tau in codes:
            if kind == "sparse":
                of_gallery: Codes = space.sparse_codes(near[0][:, :r], near[1][:, :r], tau)
            elif kind == "dense":
                of_gallery, self.mean = space.encode(gallery, _DENSE), space.mean(queries)
            else:
                of_gallery = gallery
            self.gallery.append(self._placed(of_gallery))

    def _nearest(self, features: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
        found = [self.space.nearest(features[rows], r) for rows in self.share.chunks(len(features), _CODED)]
        ids, cosines = ([part[i] for part in found] for i in (0, 1))
        together = partial(self.share.together, count=len(features), size=_CODED, width=r)
        return together(ids, dtype=np.int32), together(cosines, dtype=np.float32)

    def similarities(self, rows: slice) -> Iterable[Scores]:
        """S_ref (n, G) of some queries under each code in turn."""
        asked = self.queries[rows]
        near = self.space.nearest(asked, self.nearest) if self.nearest else None
        for (kind, r, tau), gallery in zip(self.codes, self.gallery, strict=True):
            if kind == "dense":
                codes: Codes = self.space.encode(asked, _DENSE, self.mean)
            else:
                assert near is not None
                codes = self.space.sparse_codes(near[0][:, :r], near[1][:, :r], tau)
                codes = codes if kind == "sparse" else self.space.expand(codes)
            yield self._similarity(codes, gallery)

    def _similarity(self, queries: Codes, gallery: Any) -> Scores:
        if isinstance(gallery, Tensor | on_device.SparseCodes):
            return on_device.similarity(self._placed(queries), gallery)
        found = reference_similarity(queries, gallery)
        return found if self.share.device is None else self.share.put(found)

    def _placed(self, codes: Codes) -> Any:
        """Codes where scores are made, but for sparse ones over more objects than a device should have dense."""
        if self.share.device is None:
            return codes
        if isinstance(codes, np.ndarray):
            return self.share.put(codes)
        if self.space.n_objects > _DENSE_ON_DEVICE:
            return codes
        shape = codes.shape[0], int(codes.indptr[1])
        objects, weights = codes.indices.reshape(shape).astype(np.int64), codes.data.reshape(shape)
        return on_device.SparseCodes(self.share.put(objects), self.share.put(weights), self.space.n_objects)


def _best_of_each(objects: np.ndarray, cosines: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """The first r different objects of each row and their cosines; (N, w) in descending order, w >= r K."""
    by_object = np.argsort(objects, axis=1, kind="stable")  # stable: an object's best stays first
    ordered = np.take_along_axis(objects, by_object, axis=1)
    again = np.zeros(objects.shape, dtype=bool)
    np.put_along_axis(again, by_object[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    first = np.argsort(again, axis=1, kind="stable")[:, :r]  # first occurrences, in their order
    return np.take_along_axis(objects, first, axis=1), np.take_along_axis(cosines, first, axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows over the last axis to length 1; zero rows stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))

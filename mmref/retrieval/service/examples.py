"""What a first visit to the page can begin with: sentences, and images of the index."""

from __future__ import annotations

from typing import Any

from mmref.retrieval.searcher import Searcher

SENTENCES = 4
IMAGES = 12
LONGEST = 80  # letters of a sentence that is offered
LOOKED_AT = 200  # items: an index may hold millions, and captions that are alike


def examples(searcher: Searcher) -> dict[str, Any]:
    """{"sentences", "items": ids}, from all over the index and the same at each visit.

    Sentences are captions of its items. Where these have none they are captions of the model's references, which at least are
    of the kind that it was trained with.
    """
    count = len(searcher)
    rows = [i * count // min(LOOKED_AT, count) for i in range(min(LOOKED_AT, count))]
    captions: list[str] = []
    if "caption" in searcher.metadata_columns:
        column = searcher.items["caption"]
        captions = [column[row].as_py() or "" for row in rows]
    fitting = _fitting(captions) or _fitting(searcher.reference_captions)
    return {
        "sentences": _spread(fitting, SENTENCES),
        "items": [searcher.items["id"][row].as_py() for row in _spread(rows, IMAGES)],
    }


def _fitting(captions: Any) -> list[str]:
    """The distinct ones that fit on a line."""
    return list(dict.fromkeys(text for caption in captions if 0 < len(text := str(caption).strip()) <= LONGEST))


def _spread(values: list[Any], most: int) -> list[Any]:
    """At most so many, evenly from the first to the last."""
    count = min(most, len(values))
    return [values[i * len(values) // count] for i in range(count)]

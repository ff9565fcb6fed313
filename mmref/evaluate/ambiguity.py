"""How much of what is lost at R@1 lies in the captions: those that are, or fit, what is said of several objects.

Whatever ranks a gallery for the words of a query gives the same words the same first result, which is of one object. Where a
caption is that of m objects in the gallery, the words do not say which is meant: with nothing to prefer one by, the first result
is right with probability 1 / m. The mean of 1 / m over the queries is the ceiling of R@1 in expectation.

That counts only captions that are the same word for word. A rule that people can follow finds more: a caption fits an object
whose captions have all of its words among them. The mean of 1 / m over the objects that fit is what a reader would score that
knows the words of every object and guesses among those that fit. It is no ceiling: one of them may still fit better, as "ear"
fits an ear better than an ear with a hearing aid.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

JOINERS = "\u200c\u200d"  # within words of Indic and Persian script


@functools.cache
def _word() -> re.Pattern[str]:
    """A word: letters, digits and the marks on them, which are no `\\w` but the vowels of Indic scripts and Thai."""
    marks = "".join(mark for mark in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(mark)[0] == "M")
    return re.compile(f"[\\w{marks}{JOINERS}]+")


def same_words(caption: str) -> str:
    """A caption in the form by which two are compared: Unicode's NFKC, without case, its words with single spaces between."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def ambiguity(texts: Sequence[str], text: NDArray[Any], objects: NDArray[Any], in_gallery: NDArray[np.bool_]) -> dict[str, Any]:
    """What ambiguous captions leave of R@1, as in metrics.json.

    Args:
        texts: (t,) distinct captions.
        text: (q,) row in `texts` of each query.
        objects: (q,) object of each query.
        in_gallery: (q,) whether the gallery has an image of that object; others count for nothing. At least one is there.

    Returns:
        {"n_same": queries whose words are a caption of several objects, "ceiling": percent, "n_fitting": queries that fit
        several objects by the rule, "guessing": percent}.
    """
    at, own = text[in_gallery], objects[in_gallery]
    forms: dict[str, int] = {}
    same = np.array([forms.setdefault(same_words(caption), len(forms)) for caption in texts])[at]
    pairs = np.unique(np.stack([same, own], 1), axis=0)
    alike = np.bincount(pairs[:, 0], minlength=len(forms))[same]  # (q,)
    fitting = _fitting(list(forms), same, own)[same]
    return {
        "n_same": int((alike > 1).sum()),
        "ceiling": 100.0 * float((1 / alike).mean()),
        "n_fitting": int((fitting > 1).sum()),
        "guessing": 100.0 * float((1 / fitting).mean()),
    }


def _fitting(forms: list[str], same: NDArray[Any], own: NDArray[Any]) -> NDArray[np.int64]:
    """How many objects each form (f,) fits; 1 for those without words, and those that no query has."""
    words = [set(_word().findall(form)) for form in forms]
    said_of: dict[str, set[int]] = {}
    for form, row in zip(same.tolist(), own.tolist()):
        for word in words[form]:
            said_of.setdefault(word, set()).add(row)
    found = np.ones(len(forms), np.int64)
    for form in np.unique(same).tolist():
        if words[form]:
            found[form] = len(set.intersection(*sorted((said_of[word] for word in words[form]), key=len)))
    return found

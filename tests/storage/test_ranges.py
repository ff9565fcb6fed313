"""Which requests bring wanted ranges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmref.storage import ranges
from mmref.storage.ranges import Range, requests


def spans(wanted: list[Range], gap: int = 10) -> list[tuple[str, int, int, list[int]]]:
    return [(r.whole.place, r.whole.start, r.whole.stop, r.wanted) for r in requests(wanted, lambda place: gap)]


def test_what_lies_near_comes_together_whatever_order_it_is_asked_in() -> None:
    wanted = [Range("a", 50, 5), Range("a", 0, 20), Range("b", 20, 5), Range("a", 30, 5)]
    assert spans(wanted) == [("a", 0, 35, [1, 3]), ("a", 50, 55, [0]), ("b", 20, 25, [2])]
    assert spans(wanted, gap=15) == [("a", 0, 55, [1, 3, 0]), ("b", 20, 25, [2])]


def test_a_request_does_not_grow_without_end() -> None:
    half = ranges.LONGEST // 2
    assert [r[3] for r in spans([Range("a", at * half, half) for at in range(5)])] == [[0, 1], [2, 3], [4]]
    assert spans([Range("a", 0, 3 * ranges.LONGEST)]) == [("a", 0, 3 * ranges.LONGEST, [0])]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 200), st.integers(0, 30)), max_size=20), st.integers(0, 40))
def test_each_range_lies_in_one_request(parts: list[tuple[str, int, int]], gap: int) -> None:
    wanted = [Range(*part) for part in parts]
    made = requests(wanted, lambda place: gap)
    assert sorted(n for request in made for n in request.wanted) == list(range(len(wanted)))
    for request in made:
        for n in request.wanted:
            own, whole = wanted[n], request.whole
            assert own.place == whole.place and whole.start <= own.start and own.stop <= whole.stop

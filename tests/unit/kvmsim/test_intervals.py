"""The index of intervals by what they touch, beside a scan of all of them."""

from __future__ import annotations

import random

import pytest

from kvmsim.slots.intervals import IntervalIndex


@pytest.mark.parametrize("seed", range(5))
def test_interval_index_finds_what_a_scan_finds(seed: int) -> None:
    random_, index = random.Random(seed), IntervalIndex[object]()
    every: list[tuple[int, int, object]] = []
    for _ in range(400):
        if every and random_.random() < 0.3:
            interval = every.pop(random_.randrange(len(every)))
            index.remove(*interval)
            with pytest.raises(KeyError):
                index.remove(*interval)
        else:
            start = random_.randrange(1000)
            every.append((start, start + random_.choice([1, 2, 3, 64, 500]), object()))
            index.add(*every[-1])
        start = random_.randrange(1100)
        end = start + random_.choice([1, 10, 300])
        found = list(index.touching(start, end))
        assert len(found) == len(set(found))
        assert set(found) == {value for low, high, value in every if low < end and start < high}
        assert len(index) == len(every)

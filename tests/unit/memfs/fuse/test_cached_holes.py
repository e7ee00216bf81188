"""CachedHoles is a set of pages, as long as it can remember them."""

from __future__ import annotations

import random

from memfs.contract.units import PageIndex, PageRange
from memfs.fuse.cached_holes import CachedHoles
from tests.helpers import one, pages

END = 5 * 512


def some_pages(choices: random.Random) -> PageRange:
    start = choices.randrange(END)
    return PageRange(PageIndex(start), PageIndex(min(END, start + choices.choice([1, 2, 40, 512, 1500]))))


def test_it_is_a_set_of_pages() -> None:
    choices = random.Random(17)
    holes, model = CachedHoles(1 << 10), set[int]()
    for _ in range(2000):
        changed, asked = some_pages(choices), some_pages(choices)
        if choices.random() < 0.4:
            holes.add(changed)
            model.update(range(changed.start, changed.end))
        else:
            holes.discard(changed)
            model.difference_update(range(changed.start, changed.end))
        runs = list(holes.runs(asked))
        assert [page for run in runs for page in range(run.start, run.end)] == sorted(
            page for page in model if page in asked
        )
        assert holes.first_runs(asked) == runs[:256]
        assert holes.count(asked) == sum(map(len, runs))
        assert len(holes) == len({page // 512 for page in model})


def test_a_long_range_costs_what_there_is_in_it() -> None:
    holes = CachedHoles(4)
    for page in (0, 511, 512, 1 << 40):
        holes.add(one(page))
    assert list(holes.runs(pages(0, 1 << 50))) == [one(0), one(511), one(512), one(1 << 40)]


def test_beyond_its_limit_it_remembers_nothing() -> None:
    holes = CachedHoles(2)
    holes.add(pages(0, 1024))
    assert not holes.unknown
    holes.add(one(5000))
    assert holes.unknown
    assert len(holes) == 0
    holes.add(one(1))
    assert len(holes) == 0


def test_a_range_of_which_too_much_is_to_be_remembered_costs_no_more_than_that() -> None:
    """A sparse file of exbibytes, which was open when memfs was killed: all of it may be in the cache."""
    holes = CachedHoles(1 << 10)
    holes.add(pages(0, 1 << 51))
    assert holes.unknown


def test_what_all_have_together_has_a_limit_as_well() -> None:
    holes = CachedHoles(1 << 10)
    holes.add(pages(0, 1024), 2)
    holes.add(pages(100, 200), 0)
    assert not holes.unknown
    holes.add(one(1024), 0)
    assert holes.unknown


def test_only_the_first_runs_are_asked_for_at_once() -> None:
    holes = CachedHoles(1 << 10)
    for page in range(0, 2000, 2):
        holes.add(one(page))
    assert holes.first_runs(pages(1, 1 << 20)) == [one(page) for page in range(2, 514, 2)]
    assert holes.count(pages(1, 1 << 20)) == 999

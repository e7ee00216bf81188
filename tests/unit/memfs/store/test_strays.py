"""What owners allocate by themselves: it is counted, and nobody pays for how many owners there ever were."""

from __future__ import annotations

import errno

import pytest

from memfs.contract.units import PAGE_SIZE
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.strays import Strays
from tests.helpers import new_backing, raises

MANY = 3000
FEW = 10


class Given:
    """A file that an owner allocates pages of, and how often somebody has looked."""

    looks = 0

    def __init__(self) -> None:
        self.pages = 0

    @property
    def stray_pages(self) -> int:
        Given.looks += 1
        return self.pages


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> type[Given]:
    monkeypatch.setattr(Given, "looks", 0)
    return Given


def test_work_of_a_call_does_not_grow_with_what_was_ever_registered(looks: type[Given]) -> None:
    backing = new_backing(MemfdBacking, 1 << 20)
    calls = (
        lambda: backing.used_pages,
        lambda: backing.free_pages,
        lambda: backing.reserve(1),
        lambda: backing.resize(1 << 20),
    )
    for _ in range(MANY):
        backing.watch(Given())
    for call in calls:
        before = looks.looks
        call()
        assert looks.looks - before <= FEW
    before = looks.looks
    with raises(errno.ENOSPC):
        backing.reserve(1 << 20)
    assert looks.looks - before <= 2 * FEW  # and for the sentence


def test_all_are_counted_in_turn(looks: type[Given]) -> None:
    strays, files = Strays(), [Given() for _ in range(100)]
    for file in files:
        strays.watch(file)
    for number, file in enumerate(files):
        file.pages = number
    before = looks.looks
    while strays.count() < sum(range(100)):
        assert looks.looks - before < 100
    assert strays.pages == sum(range(100))
    for file in files[50:]:
        strays.unwatch(file)
    strays.unwatch(Given())
    assert strays.pages == sum(range(50))


def test_few_are_counted_exactly_each_time() -> None:
    backing, files = new_backing(MemfdBacking, 8 * PAGE_SIZE), [Given(), Given()]
    for file in files:
        backing.watch(file)
        backing.watch(file)  # another owner
    files[0].pages, files[1].pages = 3, 4
    assert (backing.used_pages, backing.free_pages) == (7, 1)
    with raises(errno.ENOSPC):
        backing.reserve(2)
    files[0].pages = 0
    backing.reserve(2)
    assert backing.used_pages == 6

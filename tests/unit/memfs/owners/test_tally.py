"""What became of notifications is counted by kind."""

from __future__ import annotations

import pytest
import trio.testing

from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import ConvertBegin, Fallocate, FileId, InvalidateBegin, Notification
from memfs.contract.units import PageIndex, PageRange
from memfs.owners.outstanding import Outstanding
from memfs.owners.tally import BOUNDS, Tally

PAGES = PageRange(PageIndex(3), PageIndex(5))
RANGES = PageRanges.of([PAGES, PageRange(PageIndex(8), PageIndex(9))])


def test_each_is_in_the_buckets_of_all_bounds_that_it_is_within() -> None:
    tally = Tally()
    for seconds in (0.0, *BOUNDS, 11.0):
        tally.add(2, seconds)
        tally.check()
    said = tally.describe()
    assert said["buckets"] == {str(bound): number for number, bound in enumerate(BOUNDS, 2)}
    assert (said["count"], said["pages"]) == (len(BOUNDS) + 2, 2 * len(BOUNDS) + 4)
    assert (said["seconds"], said["longest"]) == (round(sum(BOUNDS) + 11, 6), 11.0)


@pytest.mark.parametrize(
    ("message", "kind", "pages"),
    [
        (Fallocate(FileId(1), PAGES), "Fallocate", 2),
        (InvalidateBegin(FileId(1), PAGES), "InvalidateBegin", 2),
        (ConvertBegin(FileId(1), FileId(2), True, RANGES), "ConvertBegin to private", 3),
        (ConvertBegin(FileId(1), FileId(2), False, RANGES), "ConvertBegin to shared", 3),
    ],
)
async def test_it_is_counted_when_it_is_acknowledged(
    autojump_clock: trio.testing.MockClock, message: Notification, kind: str, pages: int
) -> None:
    outstanding: Outstanding[str] = Outstanding()
    with outstanding.of("a", message) as pending:
        assert outstanding.describe() == {}
        await trio.sleep(0.5)
    outstanding.count(pending)
    assert outstanding.describe() == {
        kind: {
            "count": 1,
            "pages": pages,
            "seconds": 0.5,
            "longest": 0.5,
            "buckets": {str(bound): int(bound >= 0.5) for bound in BOUNDS},
        }
    }
    outstanding.check()

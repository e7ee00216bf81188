"""The ledger of notifications that have not been acknowledged."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.protocol.messages import Fallocate, FileId, InvalidateBegin
from memfs.contract.units import PageIndex, PageRange
from memfs.owners.outstanding import Outstanding

PAGES = PageRange(PageIndex(3), PageIndex(5))
BEGIN, FALLOCATE = InvalidateBegin(FileId(1), PAGES, 7), Fallocate(FileId(2), PAGES)


async def test_what_is_outstanding_is_known_by_owner() -> None:
    outstanding: Outstanding[str] = Outstanding()
    with outstanding.of("a", BEGIN) as first:
        assert (len(outstanding), set(outstanding.owners)) == (1, {"a"})
        with outstanding.of("a", FALLOCATE) as second, outstanding.of("b", BEGIN):
            assert (len(outstanding), set(outstanding.owners)) == (3, {"a", "b"})
            assert list(outstanding.by("a")) == [first, second]
            outstanding.check()
        assert list(outstanding.by("a")) == [first]
    assert (len(outstanding), set(outstanding.owners), list(outstanding.by("a"))) == (0, set(), [])
    outstanding.check()


async def test_nothing_is_polled_for_while_any_owner_is_late(autojump_clock: trio.testing.MockClock) -> None:
    """Its answer needs the event loop; and whoever asks for something else is not to wait for a poll as well."""
    outstanding: Outstanding[str] = Outstanding()
    assert outstanding.is_recent
    with outstanding.of("a", BEGIN):
        await trio.sleep(0.0005)
        with outstanding.of("b", BEGIN):
            assert outstanding.is_recent
        await trio.sleep(0.001)
        assert not outstanding.is_recent
        with outstanding.of("b", BEGIN), outstanding.of("a", FALLOCATE):
            assert not outstanding.is_recent
    with outstanding.of("b", BEGIN):
        assert outstanding.is_recent


async def test_it_is_described_for_people(autojump_clock: trio.testing.MockClock) -> None:
    outstanding: Outstanding[str] = Outstanding()
    with outstanding.of("a", BEGIN) as pending:
        await trio.sleep(2)
        said = {"notification": "InvalidateBegin", "file": 1, "pages": "[3, 5)", "request": 7, "age": 2.0}
        assert pending.describe() == said


async def test_who_waits_is_woken_by_the_first_of_any_owner() -> None:
    outstanding: Outstanding[str] = Outstanding()
    woken = []

    async def wait() -> None:
        await outstanding.wait()
        woken.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not woken
        with outstanding.of("a", BEGIN):
            pass  # acknowledged before anybody else runs
        await wait_all_tasks_blocked()
        assert woken == [True]
        with outstanding.of("a", BEGIN):
            await outstanding.wait()

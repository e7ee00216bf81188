"""The small parts of the KVM side, each by itself."""

from __future__ import annotations

import errno
import random

import numpy as np
import pytest

from kvmsim.arrays import runs
from kvmsim.mmu.invalidate import InvalidationState
from kvmsim.mmu.ownership import OwnershipTable, OwnershipViolation
from kvmsim.mmu.pte import PTE_PRIVATE, PTE_RWX, make_pte
from kvmsim.mmu.tlb import Tlb, TlbEntry
from kvmsim.side import Side
from kvmsim.slots.dirty import DirtyLog, pages_in
from kvmsim.slots.intervals import IntervalIndex
from kvmsim.vm_type import VmType
from memfs.contract.units import Gfn, GfnRange, Gpa, Pfn
from tests.helpers import raises


def gfns(start: int, end: int) -> GfnRange:
    return GfnRange(Gfn(start), Gfn(end))


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


def test_fault_must_retry_from_the_begin_on_and_after_the_end() -> None:
    state = InvalidationState()
    early = state.sample()
    state.begin("a", [gfns(4, 8)])
    assert state.must_retry(early, gfns(7, 9))
    assert not state.must_retry(early, gfns(8, 9)), "an invalidation elsewhere disturbs nobody while it runs"
    during = state.sample()
    state.end("a")
    assert state.must_retry(early, gfns(8, 9)), "it may have been decided by what is not true any more"
    assert state.must_retry(during, gfns(7, 8)), "what was sampled while it ran is older than its end"
    assert not state.must_retry(state.sample(), gfns(7, 8))


def test_invalidations_may_overlap() -> None:
    state = InvalidationState()
    state.begin("a", [gfns(0, 8)])
    state.begin("b", [gfns(4, 12)])
    state.end("a")
    assert state.must_retry(state.sample(), gfns(4, 5))
    assert not state.must_retry(state.sample(), gfns(0, 4))
    assert state.in_progress == 1


def test_private_frame_has_one_owner() -> None:
    table = OwnershipTable()
    vm, other = table.new_vm(), table.new_vm()
    table.assign(vm, gfns(10, 20), Pfn(0x3FFFC))  # over the end of an extent
    table.assign(vm, gfns(12, 13), Pfn(0x3FFFE))  # again is fine
    for number, wanted, pfn in (
        (vm, gfns(11, 12), 0x3FFFE),
        (other, gfns(12, 13), 0x3FFFE),
        (vm, gfns(0, 20), 0x3FFF0),
    ):
        with pytest.raises(OwnershipViolation):
            table.assign(number, wanted, Pfn(pfn))
    assert (table.owned, table.violations) == (10, 3)
    assert table.owner(Pfn(0x3FFF0)) is None, "a refused range was partly assigned"
    table.release(np.array([make_pte(0x40000, PTE_RWX | PTE_PRIVATE)]), 1)
    assert table.owner(Pfn(0x40000)) is None
    assert table.owner(Pfn(0x40001)) == (vm, 15)
    table.assign(other, gfns(0, 1), Pfn(0x40000))
    assert table.owned == 10


@pytest.mark.parametrize("span", [(3, 5), (0, 1 << 40)])
def test_tlb_forgets_a_range_and_counts(span: tuple[int, int]) -> None:
    tlb, memory = Tlb(capacity=4), memoryview(bytes(6))
    for gfn in range(6):
        tlb.fill(Gfn(gfn), TlbEntry(memory, gfn, Side.SHARED, dirty=False))
    assert list(tlb.entries) == [2, 3, 4, 5]
    tlb.flush(gfns(*span))
    assert list(tlb.entries) == [gfn for gfn in (2, 3, 4, 5) if not span[0] <= gfn < span[1]]
    assert (tlb.misses, tlb.flushes, tlb.flushed) == (6, 1, 4 - len(tlb.entries))


def test_dirty_log_cleans_what_it_is_told_to() -> None:
    log = DirtyLog(100)
    for page in (0, 63, 64, 99):
        log.mark(page)
    assert len(log.bitmap()) == 16
    cleaned = log.clear(64, 36, np.array([1, 0, 0, 0, 0], np.uint8))
    assert list(runs(pages_in(cleaned))) == [(64, 65)]
    assert list(runs(pages_in(log.bitmap()))) == [(0, 1), (63, 64), (99, 100)]
    for first, count in ((1, 64), (0, 36), (0, 101), (128, 1), (64, 0), (-64, 64)):
        with raises(errno.EINVAL, match="whole words"):
            log.clear(first, count, np.full(16, 255, np.uint8))
    with pytest.raises(OSError, match="shorter"):
        log.clear(0, 64, np.zeros(7, np.uint8))
    assert list(runs(pages_in(log.take()))) == [(0, 1), (63, 64), (99, 100)]
    assert not log.bitmap().any()


def test_vm_types_say_private_in_their_own_ways() -> None:
    assert VmType.SNP.decode(Gpa(5), encrypted=True) == (5, Side.PRIVATE)
    assert VmType.SNP.decode(Gpa(5)) == (5, Side.SHARED)
    assert VmType.DEFAULT.decode(Gpa(1 << 47)) == (1 << 47, Side.SHARED)
    for kind, bit in ((VmType.TDX_48, 47), (VmType.TDX_52, 51)):
        assert kind.decode(Gpa(1 << bit | 5)) == (5, Side.SHARED)
        assert kind.decode(Gpa(5)) == (5, Side.PRIVATE)
        with raises(errno.EFAULT):
            kind.decode(Gpa(5), encrypted=True)

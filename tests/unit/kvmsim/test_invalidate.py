"""seq, in_progress and the active ranges: when a fault must start again."""

from __future__ import annotations

from kvmsim.mmu.invalidate import InvalidationState
from memfs.contract.units import Gfn, GfnRange


def gfns(start: int, end: int) -> GfnRange:
    return GfnRange(Gfn(start), Gfn(end))


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

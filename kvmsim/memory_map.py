"""A picture of guest memory: which pages are private, allocated in the private file, and which mapped as shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvmsim.mmu.pte import select
from kvmsim.side import Side
from kvmsim.vm import VM
from memfs.contract.picture import Memory
from memfs.contract.runs import NO_RUNS, Runs, merged, runs_of
from memfs.contract.units import GfnRange, PageIndex, PageRange


def memory_of(vm: VM, gfns: GfnRange) -> Memory:
    """Return what there is of guest memory now, by gfn."""
    private, shared = runs_of(_private(vm, gfns)), _in_order([*_shared(vm, gfns)])
    return Memory.of(PageRange(PageIndex(gfns.start), PageIndex(gfns.end)), private, shared)


def draw(vm: VM, gfns: GfnRange, *, ascii_only: bool = False) -> str:
    """Return guest memory as rows of characters, one a page or one a group of pages if there are many.

    `ascii_only`: for a terminal that has no other characters.
    """
    return memory_of(vm, gfns).picture().text(ascii_only=ascii_only)


def write_picture(vm: VM, gfns: GfnRange, title: str, path: str) -> None:
    """Write it into a file, .png or .svg. Raises OSError."""
    Path(path).write_bytes(memory_of(vm, gfns).picture().file(title, path))


def _private(vm: VM, gfns: GfnRange) -> Iterator[tuple[int, int]]:
    slots = (slot for slot in vm.mmu.slots if slot.private is not None and slot.private.page_map is not None)
    for slot in sorted(slots, key=lambda slot: slot.gfns.start):
        part = slot.gfns.intersect(gfns)
        if part is None:
            continue
        assert slot.private is not None
        assert slot.private.page_map is not None
        for run in slot.private.page_map.runs(slot.pages_of(part)):
            here = slot.gfns_of(run)
            assert here is not None
            yield here.start, here.end


def _shared(vm: VM, gfns: GfnRange) -> Iterator[Runs]:
    for leaves in vm.mmu.table.leaves(gfns):
        chosen = np.flatnonzero(select(leaves.ptes, Side.SHARED))
        pages = len(leaves.gfns) // len(leaves.ptes)
        starts = leaves.gfns.start + chosen.astype(np.int64) * pages
        yield merged(np.stack((starts, starts + pages), axis=1))


def _in_order(parts: list[Runs]) -> Runs:
    return merged(np.concatenate(parts)) if parts else NO_RUNS

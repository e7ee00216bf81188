"""The owner of each private frame: what the RMP (SEV-SNP) and the PAMT (TDX) are to hardware.

A private frame belongs to one guest frame of one VM, until it is unmapped there. A second mapping is rejected, and
counted: in this system it cannot happen unless the store breaks its promise, which is exactly what such a table is for,
since a confidential guest does not believe the host's software.

The table is as sparse as memory: frames lie in extents of 1 GiB (memfs.contract.frame_numbers), and an extent's owners
are one array. There is one table for each memfs; VMs on the same one that are simulated in one process share it.
"""

from __future__ import annotations

from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from kvmsim.arrays import stretches
from kvmsim.mmu.pte import Ptes, pte_pfns
from memfs.contract.frame_numbers import EXTENT_PAGES
from memfs.contract.units import ORDER_1G, Gfn, GfnRange, Pfn

_VM_SHIFT: Final = 48  # an owner is vm << 48 | gfn; 0 is none, since VMs count from 1
MAX_VMS: Final = 1 << 15


class OwnershipViolation(Exception):
    """A private frame was about to be mapped that another gfn owns."""


class OwnershipTable:
    """Owners of private frames.

    >>> from memfs.contract.units import Gfn
    >>> table = OwnershipTable()
    >>> vm, other = table.new_vm(), table.new_vm()
    >>> table.assign(vm, GfnRange(Gfn(0), Gfn(4)), Pfn(100))
    >>> table.assign(other, GfnRange(Gfn(0), Gfn(1)), Pfn(102))
    Traceback (most recent call last):
    kvmsim.mmu.ownership.OwnershipViolation: frame 0x66 belongs to gfn 0x2 of VM 1
    """

    def __init__(self) -> None:
        self._extents: dict[int, npt.NDArray[np.int64]] = {}
        self._vms = 0
        self.owned = 0  #: frames
        self.violations = 0  #: mappings that were rejected

    def new_vm(self) -> int:
        """Return a number for a VM, never used again."""
        self._vms += 1
        assert self._vms < MAX_VMS
        return self._vms

    def assign(self, vm: int, gfns: GfnRange, pfn: Pfn) -> None:
        """Assign neighbouring frames from `pfn` on to neighbouring gfns; they may be theirs already.

        Raises OwnershipViolation, changing nothing.
        """
        if len(gfns) == 1:
            self._assign_one(vm, gfns.start, pfn)
            return
        parts = self._views(pfn, len(gfns))
        for owners, done in parts:
            wanted = self._wanted(vm, gfns, done, len(owners))
            foreign = np.flatnonzero((owners != 0) & (owners != wanted))
            if len(foreign):
                self._reject(pfn + done + int(foreign[0]), int(owners[foreign[0]]))
        for owners, done in parts:
            self.owned += len(owners) - int(np.count_nonzero(owners))
            owners[:] = self._wanted(vm, gfns, done, len(owners))

    def _assign_one(self, vm: int, gfn: Gfn, pfn: Pfn) -> None:
        owners, within = self._extent(pfn >> ORDER_1G), pfn & (EXTENT_PAGES - 1)
        current, wanted = int(owners[within]), (vm << _VM_SHIFT) + gfn
        if not current:
            owners[within] = wanted
            self.owned += 1
        elif current != wanted:
            self._reject(pfn, current)

    def assign_pages(self, vm: int, gfns: npt.NDArray[np.int64], pfns: npt.NDArray[np.int64]) -> None:
        """Do what `assign` does for single frames: int64 of shape (n,), each frame once.

        Raises OwnershipViolation, changing nothing.
        """
        wanted = gfns + (vm << _VM_SHIFT)
        extents = pfns >> ORDER_1G
        parts = []
        for start, end in stretches(extents):
            here = slice(start, end)
            owners, within = self._extent(int(extents[start])), pfns[here] & (EXTENT_PAGES - 1)
            current = owners[within]
            held = int(np.count_nonzero(current))
            if held and len(foreign := np.flatnonzero((current != 0) & (current != wanted[here]))):
                self._reject(int(pfns[start + foreign[0]]), int(current[foreign[0]]))
            parts.append((owners, within, wanted[here], end - start - held))
        for owners, within, values, new in parts:
            owners[within] = values
            self.owned += new

    def _reject(self, pfn: int, owner: int) -> NoReturn:
        self.violations += 1
        raise OwnershipViolation(
            f"frame {pfn:#x} belongs to gfn {owner & ((1 << _VM_SHIFT) - 1):#x} of VM {owner >> _VM_SHIFT}"
        )

    def _extent(self, number: int) -> npt.NDArray[np.int64]:
        if number not in self._extents:
            self._extents[number] = np.zeros(EXTENT_PAGES, np.int64)
        return self._extents[number]

    def release(self, ptes: Ptes, pages: int) -> None:
        """Release the frames of private leaves, each of `pages` frames."""
        pfns = pte_pfns(ptes)
        if len(pfns) == 1 or (np.diff(pfns) == pages).all():  # neighbours, as most are
            self.release_run(Pfn(int(pfns[0])), len(pfns) * pages)
            return
        if pages > 1:
            pfns = (pfns[:, None] + np.arange(pages)).ravel()
        self.release_frames(pfns)

    def release_run(self, pfn: Pfn, count: int) -> None:
        """Release neighbouring frames."""
        for owners, _ in self._views(pfn, count):
            self.owned -= int(np.count_nonzero(owners))
            owners[:] = 0

    def release_frames(self, pfns: npt.NDArray[np.int64]) -> None:
        """Release frames: int64 of shape (n,)."""
        extents = pfns >> ORDER_1G
        for start, end in stretches(extents):
            owners, within = self._extents[int(extents[start])], pfns[start:end] & (EXTENT_PAGES - 1)
            self.owned -= int(np.count_nonzero(owners[within]))
            owners[within] = 0

    def owner(self, pfn: Pfn) -> tuple[int, int] | None:
        """Return the (VM, gfn) that a frame belongs to; None if to none."""
        number, within = divmod(pfn, EXTENT_PAGES)
        owner = int(self._extents[number][within]) if number in self._extents else 0
        return (owner >> _VM_SHIFT, owner & ((1 << _VM_SHIFT) - 1)) if owner else None

    @staticmethod
    def _wanted(vm: int, gfns: GfnRange, done: int, count: int) -> npt.NDArray[np.int64]:
        first = (vm << _VM_SHIFT) + gfns.start + done
        return np.arange(first, first + count, dtype=np.int64)

    def _views(self, pfn: int, count: int) -> list[tuple[npt.NDArray[np.int64], int]]:
        """Return views of the owners of neighbouring frames, one an extent, and how many frames come before each."""
        parts, done = [], 0
        while done < count:
            number, within = divmod(pfn + done, EXTENT_PAGES)
            owners = self._extent(number)[within : within + count - done]
            parts.append((owners, done))
            done += len(owners)
        return parts

"""From a host frame number back to the bytes of host memory that it names: what the hardware does with an address.

memfs allots frame numbers in extents of 1 GiB, each for one aligned gibibyte of one file
(memfs.contract.frame_numbers), so a look-up per extent is enough to find the file, and the file is mapped in our
address space. Frames of memory without a store name their own address (kvmsim/slots/hva.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmsim.backing import GuestFile
from kvmsim.slots.hva import LOCAL_PFN, LocalMemory
from memfs.contract.frame_numbers import EXTENT_PAGES
from memfs.contract.protocol.messages import PfnRun
from memfs.contract.units import ByteOffset, PageIndex, Pfn, page_offset


@dataclass(frozen=True, slots=True)
class _Extent:
    file: GuestFile
    first_page: PageIndex  # the page that the extent's first frame holds; negative if frames are out of step


class FrameMap:
    """Which memory a frame is in."""

    def __init__(self) -> None:
        self._extents: dict[int, _Extent] = {}

    def add(self, file: GuestFile, run: PfnRun) -> None:
        """Remember which file an extent is of, as the store said."""
        assert run.pfn is not None
        number, within = divmod(run.pfn, EXTENT_PAGES)
        first, known = run.pages.start - within, self._extents.get(number)
        if known is None or known.file is not file or known.first_page != first:
            self._extents[number] = _Extent(file, PageIndex(first))

    def locate(self, pfn: Pfn) -> tuple[GuestFile | LocalMemory, ByteOffset]:
        """Return what a frame's memory is in, and where in it. Raises KeyError for a frame of an unknown extent."""
        if pfn >= LOCAL_PFN:
            return LocalMemory(pfn), ByteOffset(0)
        number, within = divmod(pfn, EXTENT_PAGES)
        extent = self._extents[number]
        return extent.file, page_offset(PageIndex(extent.first_page + within))

    def forget(self, file: GuestFile) -> None:
        """Forget a file's extents: it is not registered any more, and its frames may become those of others."""
        self._extents = {number: extent for number, extent in self._extents.items() if extent.file is not file}

"""Which pages of a slot were written: the bitmap of KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.

A slot with KVM_MEM_LOG_DIRTY_PAGES maps its pages read-only and small; the first store to each faults, is noted here
and made writable. When the log is taken, the pages become read-only again, so each page faults once a log. That is KVM
without PML. Rejected: collecting the dirty bits of PTEs when asked, since they would have to be saved at every unmap.

One bit a page, least significant first, in whole 64-bit words, as the ioctl has it.
"""

from __future__ import annotations

import errno
from typing import Final

import numpy as np
import numpy.typing as npt

from kvmsim.arrays import Numbers

_WORD: Final = 64  # bits; the granularity in which ranges are cleared

Bitmap = npt.NDArray[np.uint8]


class DirtyLog:
    """The bitmap of a slot of `pages` pages; all clean at first."""

    def __init__(self, pages: int) -> None:
        self.pages: Final = pages
        self._bits: Bitmap = np.zeros(-(-pages // _WORD) * _WORD // 8, np.uint8)

    def mark(self, page: int) -> None:
        """Mark a page, counted from the slot's first, as dirty."""
        self._bits[page // 8] |= 1 << page % 8

    def bitmap(self) -> Bitmap:
        """Return a copy: dtype uint8, one bit a page."""
        return self._bits.copy()

    def take(self) -> Bitmap:
        """Return the bitmap, and start a clean one."""
        taken, self._bits = self._bits, np.zeros_like(self._bits)
        return taken

    def clear(self, first: int, count: int, bits: Bitmap) -> Bitmap:
        """Clean those of `count` pages from `first` on whose bits are set (KVM_CLEAR_DIRTY_LOG).

        Returns which of them were dirty, as a bitmap of the whole slot. Raises OSError(EINVAL), changing nothing, as
        kvm_clear_dirty_log_protect does: ranges begin at a multiple of 64 pages and end at one or with the slot.
        """
        rest = self.pages - first
        if first % _WORD or not 0 <= first <= self.pages or not 0 < count <= rest or (count < rest and count % _WORD):
            raise OSError(errno.EINVAL, "not a range of whole words of the dirty log")
        if bits.dtype != np.uint8 or len(bits) < -(-count // 8):
            raise OSError(errno.EINVAL, "the bitmap is shorter than its range")
        chosen = np.unpackbits(bits[: -(-count // 8)], bitorder="little")
        chosen[count:] = 0
        mask = np.zeros_like(self._bits)
        mask[first // 8 : first // 8 + len(chosen) // 8] = np.packbits(chosen, bitorder="little")
        cleaned: Bitmap = self._bits & mask
        self._bits &= ~mask
        return cleaned


def pages_in(bits: Bitmap) -> Numbers:
    """Return the numbers of the pages whose bits are set, in order."""
    return np.flatnonzero(np.unpackbits(bits, bitorder="little"))

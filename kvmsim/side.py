"""Which of the two kinds of guest memory something is about."""

from __future__ import annotations

import enum


class Side(enum.Flag):
    """Memory that the host may touch, memory that only the guest may, or, where both are asked for, either.

    enum kvm_gfn_range_filter of include/linux/kvm_host.h. What is done for each fault compares by identity, since an
    operator of a flag takes as long as a look-up in the page table.
    """

    SHARED = 1
    PRIVATE = 2
    BOTH = SHARED | PRIVATE

    __hash__ = object.__hash__  # each value is one object; Enum would hash its name, in Python

    @staticmethod
    def of(private: bool) -> Side:
        """Return PRIVATE or SHARED."""
        return Side.PRIVATE if private else Side.SHARED

    def __str__(self) -> str:
        """Return its name in lower case, as reports have it."""
        return str(self.name).lower()

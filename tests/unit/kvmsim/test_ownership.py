"""The owner of each private frame: one, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest

from kvmsim.mmu.ownership import OwnershipTable, OwnershipViolation
from kvmsim.mmu.pte import PTE_PRIVATE, PTE_RWX, make_pte
from memfs.contract.units import Gfn, GfnRange, Pfn


def gfns(start: int, end: int) -> GfnRange:
    return GfnRange(Gfn(start), Gfn(end))


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

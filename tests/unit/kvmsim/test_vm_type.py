"""How a guest says that it means private memory, by the type of its VM."""

from __future__ import annotations

import errno

from kvmsim.side import Side
from kvmsim.vm_type import VmType
from memfs.contract.units import Gpa
from tests.helpers import raises


def test_vm_types_say_private_in_their_own_ways() -> None:
    assert VmType.SNP.decode(Gpa(5), encrypted=True) == (5, Side.PRIVATE)
    assert VmType.SNP.decode(Gpa(5)) == (5, Side.SHARED)
    assert VmType.DEFAULT.decode(Gpa(1 << 47)) == (1 << 47, Side.SHARED)
    for kind, bit in ((VmType.TDX_48, 47), (VmType.TDX_52, 51)):
        assert kind.decode(Gpa(1 << bit | 5)) == (5, Side.SHARED)
        assert kind.decode(Gpa(5)) == (5, Side.PRIVATE)
        with raises(errno.EFAULT):
            kind.decode(Gpa(5), encrypted=True)

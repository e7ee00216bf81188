"""How a guest says that it means private memory, by the type of its VM."""

from __future__ import annotations

import errno

import pytest

from kvmsim.side import Side
from kvmsim.vm_type import VmType
from memfs.contract.units import Gpa
from tests.helpers import raises


def test_vm_types_say_private_in_their_own_ways() -> None:
    assert VmType.SNP.decode(Gpa(5), encrypted=True) == (5, Side.PRIVATE)
    assert VmType.SNP.decode(Gpa(5)) == (5, Side.SHARED)
    assert VmType.DEFAULT.decode(Gpa(1 << 47)) == (1 << 47, Side.SHARED)
    for kind, bit in ((VmType.TDX_48, 47), (VmType.TDX_52, 51), (VmType.address_bits(40), 39)):
        assert kind.decode(Gpa(1 << bit | 5)) == (5, Side.SHARED)
        assert kind.decode(Gpa(5)) == (5, Side.PRIVATE)
        with raises(errno.EFAULT):
            kind.decode(Gpa(5), encrypted=True)


@pytest.mark.parametrize("bits", [0, 31, 53])
def test_vm_type_of_address_bits_that_no_processor_has_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"no processor has {bits} address bits"):
        VmType.address_bits(bits)

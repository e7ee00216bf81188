"""The engine of a vCPU that makes the accesses that its VMM has listed, and then halts: it takes no /dev/kvm."""

from __future__ import annotations

import errno
from typing import Any, Final

from kvmsim import ioctls
from kvmsim.engines.program import Hypercall, Load, Program, ProgramEngine, Store
from kvmsim.exits import Exit
from kvmsim.uapi import KVM_HC_MAP_GPA_RANGE
from kvmsim.vcpu import VCPU
from memfs.contract.units import Gpa

_U64: Final = (1 << 64) - 1
_MOST: Final = 1 << 11


def parse_accesses(payload: bytes) -> list[tuple[Any, ...]]:
    """Return the accesses of an array of struct kvmsim_access. Raises OSError(EINVAL)."""
    if len(payload) % ioctls.ACCESS.size or len(payload) > _MOST * ioctls.ACCESS.size:
        raise OSError(errno.EINVAL, f"an array of struct kvmsim_access is expected, of at most {_MOST}")
    accesses = list(ioctls.ACCESS.iter_unpack(payload))
    for _gpa, kind, size, _value in accesses:
        if kind > ioctls.ACCESS_HYPERCALL or (kind != ioctls.ACCESS_HYPERCALL and not 1 <= size <= 8):
            raise OSError(errno.EINVAL, "an access that is none, or not of 1 to 8 bytes")
    return accesses


class Accesses:
    """An engine whose accesses can be set anew."""

    def __init__(self) -> None:
        self.values: list[int] = []  #: what loads have found, and hypercalls have returned
        self._engine = ProgramEngine(self._program([]))

    def set(self, accesses: list[tuple[Any, ...]]) -> None:
        """Have it make other ones from the start."""
        self.values = []
        self._engine = ProgramEngine(self._program(accesses))

    def _program(self, accesses: list[tuple[Any, ...]]) -> Program:
        for gpa, kind, size, value in accesses:
            if kind == ioctls.ACCESS_HYPERCALL:
                self.values.append((yield Hypercall(KVM_HC_MAP_GPA_RANGE, (gpa, size, value))) & _U64)
            elif kind == ioctls.ACCESS_STORE:
                yield Store(Gpa(gpa), (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
            else:
                self.values.append(int.from_bytes((yield Load(Gpa(gpa), size)), "little"))

    async def run(self, vcpu: VCPU) -> Exit:
        """Go on until an exit."""
        return await self._engine.run(vcpu)

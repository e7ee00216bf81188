"""A virtual CPU: runs an engine until the VMM has to do something (KVM_RUN)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Protocol

from kvmsim.exits import Exit
from kvmsim.mmu.tlb import Tlb

if TYPE_CHECKING:
    from kvmsim.vm import VM


class Engine(Protocol):
    """What a vCPU executes."""

    async def run(self, vcpu: VCPU) -> Exit:
        """Go on where it stopped, until something has to be done outside; it is then called again."""


class VCPU:
    """A vCPU of a VM. Use `VM.create_vcpu`."""

    def __init__(self, vm: VM, vcpu_id: int, engine: Engine) -> None:
        self.id: Final = vcpu_id
        self.vm: Final = vm
        self.tlb: Final[Tlb[Any]] = Tlb()
        self._engine: Final = engine
        self.exits: Counter[str] = Counter()  #: by name

    async def run(self) -> Exit:
        """KVM_RUN: run until an exit. Raises OSError(EFAULT, ENOSPC), StoreGone if memfs is gone."""
        self.vm.check_alive()
        await self.vm.launch()
        exit_ = await self._engine.run(self)
        self.exits[exit_.name] += 1
        return exit_

"""Engines that run native code: which of them there can be here, and what they have in common.

    kvm        the real KVM: as fast as the processor (kvmsim/engines/kvm)
    unicorn    an emulator, some hundred times slower, where there is no /dev/kvm (kvmsim/engines/unicorn.py)

A guest is the same on both: what it finds itself in is user_mode.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from kvmsim.engines.kvm.machine import open_kvm_machine
from kvmsim.engines.kvm.uapi import Kvm, KvmUnavailable
from kvmsim.engines.kvm.userfaultfd import Userfaultfd, UserfaultfdUnavailable
from kvmsim.engines.registers import Registers
from kvmsim.mmu.radix import Radix
from kvmsim.vcpu import Engine
from kvmsim.vm import VM
from kvmsim.vm_type import VmType
from memfs.contract.units import GfnRange

ENGINES: Final = ("auto", "kvm", "unicorn")
_INSTALL_UNICORN: Final = "the Python package unicorn is not installed (pip install 'memfs-kvmsim[unicorn]')"


class EngineUnavailable(Exception):
    """Why an engine cannot be had here: one sentence, which says what to do."""


class NativeEngine(Engine, Protocol):
    """A vCPU that runs native code."""

    @property
    def registers(self) -> Registers:
        """The general registers, a copy; between two runs. Raises OSError(EBUSY) in the middle of an instruction."""

    @registers.setter
    def registers(self, values: Registers) -> None: ...

    def set_fs_base(self, address: int) -> None:
        """Set the base of FS, between two runs."""


class NativeMachine(Protocol):
    """A VM that runs native code."""

    def create(self, vcpu_id: int, ports: dict[int, Callable[[bytes], None]] | None = None) -> NativeEngine:
        """Create the engine of a vCPU; `ports`: what `out` to a port does, perhaps in another thread."""

    def project_range(self, gfns: GfnRange) -> None:
        """Prepare for the guest what the page table maps of a range."""

    def check(self, table: Radix) -> None:
        """Raise AssertionError on the first page that the guest can reach and the page table does not allow."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine that there can be here."""

    name: str
    why: str  #: a sentence's part
    vm_type: VmType  #: of the VMs it runs


def choose(name: str) -> Choice:
    """Return the engine of a name, one of ENGINES; `auto` is KVM where it can be. Raises EngineUnavailable."""
    if name == "unicorn":
        return _unicorn("as asked for")
    try:
        vm_type = _kvm_type()
    except (KvmUnavailable, UserfaultfdUnavailable) as error:
        if name == "kvm":
            raise EngineUnavailable(f"no engine kvm: {error}") from error
        try:
            return _unicorn(f"no engine kvm: {error}")
        except EngineUnavailable as other:
            raise EngineUnavailable(f"no engine kvm: {error}; {other}") from other
    return Choice("kvm", "this machine has /dev/kvm" if name == "auto" else "as asked for", vm_type)


def _kvm_type() -> VmType:
    """Return the type of VM that the real KVM runs. Raises KvmUnavailable, UserfaultfdUnavailable."""
    kvm = Kvm()
    try:
        Userfaultfd().close()
        return VmType.address_bits(kvm.address_bits)
    finally:
        kvm.close()


def _unicorn(why: str) -> Choice:
    try:
        import unicorn  # noqa: F401
    except ImportError as error:
        raise EngineUnavailable(f"no engine unicorn: {_INSTALL_UNICORN}") from error
    return Choice("unicorn", why, VmType.TDX_48)


@asynccontextmanager
async def open_machine(vm: VM, choice: Choice, pages_a_fault: int = 64) -> AsyncIterator[NativeMachine]:
    """Give a VM of the right type, whose slots are set, to an engine for the block. Raises OSError."""
    if choice.name == "kvm":
        async with open_kvm_machine(vm, pages_a_fault) as machine:
            yield machine
    else:
        from kvmsim.engines.unicorn import UnicornMachine

        emulated = UnicornMachine(vm)
        try:
            yield emulated
        finally:
            emulated.close()

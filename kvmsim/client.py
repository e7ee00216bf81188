"""Clients of `kvmsim serve`, for VMMs in Python: KVM's ioctls on descriptors of a service in another process.

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(0, KVM_MEM_FD, gpa=0, size=1 << 20, offset=0, fd=shared, private_fd=private)
        with vm.create_vcpu(0) as vcpu:
            vcpu.run()
            reason = vcpu.exit_reason

Each call is made in the calling thread, as an ioctl is; `call_in_trio` makes one in a task of trio, where a cancelled
KVM_RUN has come back before the cancellation goes on. What is said over the socket is in kvmsim/service/wire.py.

Guest memory is nowhere here: a VMM has the descriptors of its files, and struct kvm_run.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import trio

from kvmsim import ioctls, kvm_run
from kvmsim.service.paths import default_socket
from kvmsim.service.wire import INTERRUPT, MAX_DATAGRAM, MAX_FDS, Answer, Call
from kvmsim.uapi import KVM_MEM_FD
from memfs.contract.sys.rights import descriptors_in, space_for, to_rights

_MOST_CLEARED: Final = 1 << 18  # pages at a time: 32 KiB of bitmap


class Descriptor:
    """A descriptor of KVM's, which this owns: for /dev/kvm, a VM or a vCPU."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket: Final = sock

    def ioctl(
        self, number: int, argument: int = 0, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> tuple[Answer, list[int]]:
        """Make a call; returns the answer and the descriptors that came along, which the caller closes.

        Raises OSError with what KVM says, or ECONNRESET if the service is gone. A signal whose handler raises
        interrupts KVM_RUN.
        """
        self._send(Call(number, argument, payload), fds)
        try:
            return self._result(self._receive())
        except BaseException as error:
            if not isinstance(error, OSError):
                self._interrupt()
                for fd in self._receive()[1]:
                    os.close(fd)
            raise

    async def call_in_trio(
        self, number: int, argument: int = 0, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> tuple[Answer, list[int]]:
        """Do the same in a task of trio; cancelled, it interrupts the call and waits until it has come back."""
        self._send(Call(number, argument, payload), fds)
        try:
            await trio.lowlevel.wait_readable(self.socket)
        except trio.Cancelled:
            self._interrupt()
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(self.socket)
            for fd in self._receive()[1]:
                os.close(fd)
            raise
        return self._result(self._receive())

    def _send(self, call: Call, fds: Sequence[int]) -> None:
        try:
            self.socket.sendmsg([call.pack()], to_rights(fds))
        except BrokenPipeError as error:
            raise ConnectionResetError(errno.ECONNRESET, "the service is gone") from error

    def _interrupt(self) -> None:
        with suppress(OSError):
            self.socket.send(Call(INTERRUPT).pack())

    def _receive(self) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = self.socket.recvmsg(MAX_DATAGRAM, space_for(MAX_FDS), socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the service is gone")
        return data, list(descriptors_in(ancillary))

    def _result(self, received: tuple[bytes, list[int]]) -> tuple[Answer, list[int]]:
        data, fds = received
        answer = Answer.parse(data)
        if answer.errno:
            raise OSError(answer.errno, os.strerror(answer.errno))
        return answer, fds

    def check_extension(self, capability: int) -> int:
        """Return what there is of a capability (KVM_CHECK_EXTENSION); 0: nothing."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, capability)[0].value

    def close(self) -> None:
        """Close it."""
        self.socket.close()

    def __enter__(self) -> Self:
        """Use it in a with statement, at whose end it is closed."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Close it."""
        self.close()


class Kvm(Descriptor):
    """A connection to a service, which is what open("/dev/kvm") is. Raises OSError if nobody listens."""

    def __init__(self, path: str | None = None) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(path or default_socket())
        except BaseException:
            sock.close()
            raise
        super().__init__(sock)

    def create_vm(self) -> Vm:
        """Create a VM (KVM_CREATE_VM), which ends with the last descriptor of it and its vCPUs."""
        (fd,) = self.ioctl(ioctls.KVM_CREATE_VM)[1]
        return Vm(socket.socket(fileno=fd))


class Vm(Descriptor):
    """A VM."""

    def set_user_memory_region(
        self, slot: int, flags: int, *, gpa: int, size: int, offset: int = 0, fd: int = -1, private_fd: int = -1
    ) -> None:
        """Create, move or delete (`size` 0) a slot (KVM_SET_USER_MEMORY_REGION).

        With KVM_MEM_FD `fd` is the file of shared and `private_fd` that of private memory; without it, the slot is
        classic memory, of which `fd` is the file that the VMM has mapped.
        """
        fds = [each for each in (fd, private_fd) if each >= 0]
        if flags & KVM_MEM_FD:
            payload = ioctls.REGION_EXT.pack(slot, flags, gpa, size, offset, fd, private_fd)
        elif fd >= 0:
            payload = ioctls.REGION_MAPPED.pack(slot, flags, gpa, size, 0, offset)
        else:
            payload = ioctls.REGION.pack(slot, flags, gpa, size, 0)
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, payload=payload, fds=fds)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """Return a new guest_memfd of so many bytes (KVM_CREATE_GUEST_MEMFD), which the caller closes."""
        (fd,) = self.ioctl(ioctls.KVM_CREATE_GUEST_MEMFD, payload=ioctls.GUEST_MEMFD.pack(size, flags))[1]
        return fd

    def set_user_memory_region2(
        self, slot: int, flags: int, *, gpa: int, size: int, fd: int = -1, offset: int = 0, guest_memfd: int = -1
    ) -> None:
        """Create, move or delete (`size` 0) a slot in mainline's words (KVM_SET_USER_MEMORY_REGION2).

        `fd`: the file that the VMM has mapped; `offset`: in it, and in the guest_memfd.
        """
        fields = (slot, flags, gpa, size, 0, offset, guest_memfd)
        payload = ioctls.REGION2.pack(*fields) if fd < 0 else ioctls.REGION2_MAPPED.pack(*fields, offset)
        fds = [each for each in (fd, guest_memfd) if each >= 0]
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION2, payload=payload, fds=fds)

    def set_memory_attributes(self, gpa: int, size: int, attributes: int) -> None:
        """Make a range private (KVM_MEMORY_ATTRIBUTE_PRIVATE) or shared (0): KVM_SET_MEMORY_ATTRIBUTES."""
        payload = ioctls.MEMORY_ATTRIBUTES.pack(gpa, size, attributes, 0)
        self.ioctl(ioctls.KVM_SET_MEMORY_ATTRIBUTES, payload=payload)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Create a vCPU (KVM_CREATE_VCPU)."""
        fd, run = self.ioctl(ioctls.KVM_CREATE_VCPU, vcpu_id)[1]
        try:
            page = mmap.mmap(run, 0)
        finally:
            os.close(run)
        return Vcpu(socket.socket(fileno=fd), page)

    def get_dirty_log(self, slot: int) -> npt.NDArray[np.uint8]:
        """Return which pages of a slot were written (KVM_GET_DIRTY_LOG): a bit a page, least significant first."""
        (fd,) = self.ioctl(ioctls.KVM_GET_DIRTY_LOG, payload=ioctls.DIRTY_LOG.pack(slot, 0, 0))[1]
        with open(fd, "rb") as file:
            return np.frombuffer(file.read(), np.uint8)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: npt.NDArray[np.uint8]) -> None:
        """Have pages whose bits are set count as clean (KVM_CLEAR_DIRTY_LOG); `bitmap` begins with `first_page`."""
        for done in range(0, max(num_pages, 1), _MOST_CLEARED):
            pages = min(_MOST_CLEARED, num_pages - done)
            payload = ioctls.CLEAR_DIRTY_LOG.pack(slot, pages, first_page + done, 0)
            payload += bitmap[done // 8 : -(-(done + pages) // 8)].tobytes()
            self.ioctl(ioctls.KVM_CLEAR_DIRTY_LOG, payload=payload)

    def enable_capability(self, capability: int, value: int) -> None:
        """Enable a capability (KVM_ENABLE_CAP)."""
        self.ioctl(ioctls.KVM_ENABLE_CAP, payload=ioctls.CAPABILITY.pack(capability, 0, value, 0, 0, 0))

    @property
    def shared_bit(self) -> int:
        """The address bit by which its guest says that it means shared memory, as a mask."""
        return 1 << self.ioctl(ioctls.KVMSIM_SHARED_BIT)[0].value


class Vcpu(Descriptor):
    """A vCPU, and `page`, its struct kvm_run."""

    def __init__(self, sock: socket.socket, page: mmap.mmap) -> None:
        super().__init__(sock)
        self.page: Final = page

    def run(self) -> None:
        """Run it until an exit (KVM_RUN). Raises OSError: EINTR if it was interrupted, EFAULT."""
        self.ioctl(ioctls.KVM_RUN)

    async def run_in_trio(self) -> None:
        """Do the same in a task of trio."""
        await self.call_in_trio(ioctls.KVM_RUN)

    @property
    def exit_reason(self) -> int:
        """Why it has exited: KVM_EXIT_*."""
        return int(struct.unpack_from("<I", self.page, kvm_run.EXIT_REASON)[0])

    @property
    def memory_error(self) -> tuple[int, int, int]:
        """Of KVM_EXIT_MEMORY_ERROR: KVM_EXIT_MEM_MAP_*, gpa, bytes."""
        kind, gpa, size = kvm_run.MEMORY_ERROR.unpack_from(self.page, kvm_run.UNION)
        return kind, gpa, size

    @property
    def memory_fault(self) -> tuple[int, int, int]:
        """Of KVM_EXIT_MEMORY_FAULT, with which KVM_RUN raises EFAULT: flags, gpa, bytes."""
        flags, gpa, size = kvm_run.MEMORY_FAULT.unpack_from(self.page, kvm_run.UNION)
        return flags, gpa, size

    @property
    def mmio(self) -> tuple[int, bytes, bool]:
        """Of KVM_EXIT_MMIO: gpa, the bytes, whether it is a store."""
        gpa, data, size, is_write = kvm_run.MMIO.unpack_from(self.page, kvm_run.UNION)
        return gpa, data[:size], bool(is_write)

    def answer_mmio(self, data: bytes) -> None:
        """Give what a load from a device reads."""
        self.page[kvm_run.MMIO_DATA : kvm_run.MMIO_DATA + len(data)] = data

    def set_immediate_exit(self, value: bool) -> None:
        """Have KVM_RUN return at once, with EINTR, or not."""
        self.page[kvm_run.IMMEDIATE_EXIT] = value

    @property
    def registers(self) -> bytes:
        """Struct kvm_regs, of native code."""
        return self.ioctl(ioctls.KVM_GET_REGS)[0].payload

    @registers.setter
    def registers(self, registers: bytes) -> None:
        self.ioctl(ioctls.KVM_SET_REGS, payload=registers)

    @property
    def sregs(self) -> bytes:
        """Struct kvm_sregs, of native code."""
        return self.ioctl(ioctls.KVM_GET_SREGS)[0].payload

    @sregs.setter
    def sregs(self, sregs: bytes) -> None:
        self.ioctl(ioctls.KVM_SET_SREGS, payload=sregs)

    def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> int:
        """Map a range before the guest touches it (KVM_PRE_FAULT_MEMORY). Returns how many bytes are left."""
        answer, _ = self.ioctl(ioctls.KVM_PRE_FAULT_MEMORY, payload=ioctls.PRE_FAULT.pack(gpa, size, flags))
        return int(ioctls.PRE_FAULT.unpack(answer.payload)[1])

    def set_accesses(self, accesses: Sequence[tuple[int, int, int, int]]) -> None:
        """Have it make accesses, and run no code: gpa, ACCESS_*, bytes, value of each (ioctls.py)."""
        self.ioctl(ioctls.KVMSIM_SET_ACCESSES, payload=b"".join(ioctls.ACCESS.pack(*each) for each in accesses))

    @property
    def values(self) -> list[int]:
        """What the loads among them have found, and the hypercalls have returned, so far."""
        payload = self.ioctl(ioctls.KVMSIM_GET_VALUES)[0].payload
        return [value for (value,) in ioctls.VALUE.iter_unpack(payload)]

    def close(self) -> None:
        """Close it, and its struct kvm_run."""
        self.page.close()
        super().close()

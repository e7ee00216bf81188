"""`kvmsim serve`: VMMs in other processes than KVM, with descriptors of KVM's, over files of a mounted memfs."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from kvmsim import ioctls
from kvmsim.client import Kvm, Vcpu, Vm
from kvmsim.engines.registers import Registers
from kvmsim.ioctls import ACCESS_HYPERCALL, ACCESS_LOAD, ACCESS_STORE
from kvmsim.service.wire import INTERRUPT, MAX_DATAGRAM, Call
from kvmsim.uapi import (
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_IO,
    KVM_EXIT_MEM_MAP_PRIVATE,
    KVM_EXIT_MEM_MAP_SHARED,
    KVM_EXIT_MEMORY_ERROR,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_MEM_FD,
    KVM_MEM_LOG_DIRTY_PAGES,
)
from memfs.contract.units import PAGE_SIZE
from tests.helpers import raises, until

from .conftest import Memfs, memfs_command, state_of
from .native import choice_or_skip
from .service import Service, service

__all__ = ["service"]

SIZE = 1 << 20
FALLOC_FL_PUNCH_HOLE = 3  # with FALLOC_FL_KEEP_SIZE


class Files:
    """The two files of a VM, as its VMM has them."""

    def __init__(self, memfs: Memfs) -> None:
        memfs.run("truncate", "--size", str(SIZE), "shared")
        memfs.run(*memfs_command("create", "--seals", "guest", "private"))
        self.shared = os.open(memfs.path / "shared", os.O_RDWR)
        self.private = os.open(memfs.path / "private", os.O_RDWR)
        os.ftruncate(self.private, SIZE)

    def set_slot(self, vm: Vm, slot: int = 0) -> None:
        vm.set_user_memory_region(slot, KVM_MEM_FD, gpa=0, size=SIZE, offset=0, fd=self.shared, private_fd=self.private)

    def to_private(self, gpa: int) -> None:
        os.posix_fallocate(self.private, gpa, PAGE_SIZE)

    def close(self) -> None:
        os.close(self.shared)
        os.close(self.private)


@pytest.fixture
def files(memfs: Memfs) -> Iterator[Files]:
    opened = Files(memfs)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def new_vm(service: Service, files: Files) -> Iterator[tuple[Vm, Vcpu]]:
    with service.kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        files.set_slot(vm)
        yield vm, vcpu


def owners(memfs: Memfs) -> int:
    return int(state_of(memfs.path)["owners"])


# -- the RFC's interface ---------------------------------------------------------------------------------------------


def test_guest_memory_is_converted_by_a_vmm_that_has_none_of_it(service: Service, files: Files) -> None:
    with new_vm(service, files) as (vm, vcpu):
        shared = vm.shared_bit
        vcpu.set_accesses(
            [
                (0x2000, ACCESS_STORE, 8, 0x1111),  # private, and there is none yet
                (0x2000, ACCESS_LOAD, 8, 0),
                (0x5008 | shared, ACCESS_STORE, 4, 0x22222222),
                (0x2000 | shared, ACCESS_LOAD, 8, 0),  # private by now
                (0x3000, ACCESS_HYPERCALL, 1, 16),
                (SIZE, ACCESS_LOAD, 2, 0),
                (SIZE + 8, ACCESS_STORE, 2, 0x7788),
            ]
        )
        vcpu.run()
        assert vcpu.exit_reason == KVM_EXIT_MEMORY_ERROR
        assert vcpu.memory_error == (KVM_EXIT_MEM_MAP_PRIVATE, 0x2000, PAGE_SIZE)
        files.to_private(0x2000)
        vcpu.run()
        assert vcpu.values == [0x1111]
        assert vcpu.memory_error == (KVM_EXIT_MEM_MAP_SHARED, 0x2000, PAGE_SIZE)
        assert os.pread(files.shared, 4, 0x5008) == b"\x22" * 4
        with open("/proc/self/maps", encoding="utf-8") as maps:
            assert "private" not in "".join(line for line in maps if "memfs" in line)
        with raises(errno.EPERM):
            os.pread(files.private, 8, 0x2000)
        vcpu.run()  # nothing has been done about it
        assert vcpu.memory_error == (KVM_EXIT_MEM_MAP_SHARED, 0x2000, PAGE_SIZE)
        _punch(files.private, 0x2000)
        vcpu.run()
        assert vcpu.exit_reason == KVM_EXIT_HYPERCALL
        assert struct.unpack_from("<4Q", vcpu.page, 32) == (12, 0x3000, 1, 16)
        vcpu.page[88:96] = struct.pack("<q", -22)
        vcpu.run()
        assert (vcpu.exit_reason, vcpu.mmio) == (KVM_EXIT_MMIO, (SIZE, b"\0\0", False))
        vcpu.answer_mmio(b"\x34\x12")
        vcpu.run()
        assert (vcpu.exit_reason, vcpu.mmio) == (KVM_EXIT_MMIO, (SIZE + 8, b"\x88\x77", True))
        vcpu.run()
        assert vcpu.exit_reason == KVM_EXIT_HLT
        assert vcpu.values == [0x1111, 0, (1 << 64) - 22, 0x1234]


def _punch(fd: int, offset: int) -> None:
    command = ("fallocate", "--punch-hole", "--offset", str(offset), "--length", "4096", f"/proc/self/fd/{fd}")
    subprocess.run(command, pass_fds=(fd,), check=True)


def test_dirty_log_prefault_and_classic_memory(service: Service, files: Files) -> None:
    with service.kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(3) as vcpu:
        vm.set_user_memory_region(1, KVM_MEM_LOG_DIRTY_PAGES, gpa=0, size=SIZE - 0x3000, offset=0x3000, fd=files.shared)
        shared = vm.shared_bit
        vcpu.set_accesses([(shared | page * PAGE_SIZE, ACCESS_STORE, 1, 7) for page in (0, 64, 65)])
        assert vcpu.pre_fault_memory(0x10000, 0x4000) == 0
        assert os.fstat(files.shared).st_blocks > 0
        vcpu.run()
        assert vcpu.exit_reason == KVM_EXIT_HLT
        assert os.pread(files.shared, 1, 0x3000) == b"\x07"
        assert np.flatnonzero(np.unpackbits(vm.get_dirty_log(1), bitorder="little")).tolist() == [0, 64, 65]
        assert not vm.get_dirty_log(1).any()
        vm.enable_capability(ioctls.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
        vcpu.set_accesses([(shared | 0x40000, ACCESS_STORE, 1, 8)])
        vcpu.run()
        assert vm.get_dirty_log(1).any()
        vm.clear_dirty_log(1, 64, 64, np.full(8, 255, np.uint8))
        assert not vm.get_dirty_log(1).any()
        for log, why in (
            (lambda: vm.get_dirty_log(2), errno.ENOENT),
            (lambda: vm.clear_dirty_log(1, 1, 64, np.zeros(8, np.uint8)), errno.EINVAL),
            (lambda: vm.enable_capability(1, 1), errno.EINVAL),
            (lambda: vcpu.pre_fault_memory(0, 4096, flags=1), errno.EINVAL),
            (lambda: vcpu.pre_fault_memory(1 << 40, 4096), errno.ENOENT),
        ):
            with raises(why):
                log()


def test_what_kvm_refuses_is_refused_and_changes_nothing(service: Service, files: Files, tmp_path: Path) -> None:
    with service.kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        assert kvm.ioctl(ioctls.KVM_GET_API_VERSION)[0].value == 12
        assert kvm.ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE)[0].value == len(vcpu.page) == 3 * PAGE_SIZE
        assert kvm.check_extension(ioctls.KVM_CAP_PRE_FAULT_MEMORY) == 1
        assert vm.check_extension(9999) == 0
        elsewhere = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(elsewhere, SIZE)
        region = {"gpa": 0, "size": SIZE, "fd": files.shared, "private_fd": files.private}
        for call, why in (
            (lambda: kvm.ioctl(ioctls.KVM_CREATE_VM, 1), errno.EINVAL),
            (lambda: kvm.ioctl(ioctls.KVM_RUN), errno.ENOTTY),
            (lambda: vcpu.ioctl(ioctls.KVM_CREATE_VM), errno.ENOTTY),
            (lambda: vm.create_vcpu(0), errno.EEXIST),
            (lambda: vm.create_vcpu(1 << 40), errno.EINVAL),
            (lambda: vcpu.run(), errno.ENXIO),
            (lambda: vm.get_dirty_log(0), errno.ENXIO),
            (lambda: vm.set_user_memory_region(0, 0, gpa=0, size=SIZE), errno.EINVAL),
            (lambda: vm.set_user_memory_region(0, 0, gpa=0, size=0), errno.EINVAL),
            (lambda: vm.set_user_memory_region(0, KVM_MEM_FD, gpa=0, size=SIZE, fd=elsewhere), errno.EOPNOTSUPP),
            (lambda: vm.set_user_memory_region(0, KVM_MEM_FD, **{**region, "gpa": 5}), errno.EINVAL),
            (lambda: vm.set_user_memory_region(0, KVM_MEM_FD, **{**region, "size": 2 * SIZE}), errno.EINVAL),
            (lambda: vm.set_user_memory_region(0, KVM_MEM_FD, gpa=0, size=SIZE, fd=files.private), errno.EINVAL),
            (lambda: vm.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, payload=b"short"), errno.EINVAL),
            (
                lambda: vm.ioctl(
                    ioctls.KVM_SET_USER_MEMORY_REGION, payload=ioctls.REGION_EXT.pack(0, 4, 0, SIZE, 0, 9, 9)
                ),
                errno.EBADF,
            ),
        ):
            with raises(why):
                call()
        os.close(elsewhere)
        files.set_slot(vm)
        with service.kvm() as other, other.create_vm() as thief, raises(errno.EPERM):
            files.set_slot(thief)
        vm.set_user_memory_region(0, 0, gpa=0, size=0)
        with service.kvm() as other, other.create_vm() as heir:
            files.set_slot(heir)


# -- mainline's interface --------------------------------------------------------------------------------------------


def test_attributes_decide_who_is_private_over_several_slots(memfs: Memfs, files: Files, tmp_path: Path) -> None:
    """Guest_memfds, KVM_SET_USER_MEMORY_REGION2, KVM_SET_MEMORY_ATTRIBUTES, KVM_EXIT_MEMORY_FAULT."""
    private, half = ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE, SIZE // 2
    served = Service(tmp_path / "kvm.sock", "--memfs", memfs.path)
    try:
        with served.kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            assert vm.check_extension(ioctls.KVM_CAP_MEMORY_ATTRIBUTES) == private
            assert vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD) == 1
            guest_memfd = vm.create_guest_memfd(SIZE)
            assert not [name for name in os.listdir(memfs.path) if "guest_memfd" in name]
            for slot in (0, 1):
                vm.set_user_memory_region2(
                    *(slot, ioctls.KVM_MEM_GUEST_MEMFD),
                    gpa=slot * half,
                    size=half,
                    fd=files.shared,
                    offset=slot * half,
                    guest_memfd=guest_memfd,
                )
            shared, last, next_ = vm.shared_bit, half - PAGE_SIZE, half
            os.pwrite(files.shared, b"seen", last)
            vcpu.set_accesses(
                [
                    (shared | last, ACCESS_LOAD, 4, 0),
                    (last, ACCESS_LOAD, 4, 0),
                    (next_, ACCESS_STORE, 4, 0x11),
                    (next_, ACCESS_LOAD, 4, 0),
                    (shared | next_, ACCESS_LOAD, 4, 0),
                ]
            )
            for flags, gpa, attributes in ((private, last, private), (0, next_, 0)):
                with raises(errno.EFAULT):
                    vcpu.run()
                assert (vcpu.exit_reason, vcpu.memory_fault) == (KVM_EXIT_MEMORY_FAULT, (flags, gpa, PAGE_SIZE))
                vm.set_memory_attributes(last, 2 * PAGE_SIZE, attributes)  # of both slots
                assert os.pread(files.shared, 4, last) == bytes(4)
            vcpu.run()
            assert vcpu.exit_reason == KVM_EXIT_HLT
            assert vcpu.values == [int.from_bytes(b"seen", "little"), 0, 0x11, 0]
            with raises(errno.EPERM):
                os.pread(guest_memfd, 1, 0)
            region = {"gpa": SIZE, "size": half, "fd": files.shared, "guest_memfd": guest_memfd}
            for call, why in (
                (lambda: vm.create_guest_memfd(0), errno.EINVAL),
                (lambda: vm.create_guest_memfd(5), errno.EINVAL),
                (lambda: vm.create_guest_memfd(PAGE_SIZE, 1 << 9), errno.EINVAL),
                (lambda: vm.set_memory_attributes(0, PAGE_SIZE, 1), errno.EINVAL),
                (lambda: vm.set_memory_attributes(0, 0, private), errno.EINVAL),
                (lambda: vm.set_memory_attributes(5, PAGE_SIZE, private), errno.EINVAL),
                (lambda: vm.set_memory_attributes(0, 2 * SIZE, private), errno.EINVAL),
                (lambda: vm.set_memory_attributes((1 << 64) - PAGE_SIZE, PAGE_SIZE, private), errno.EINVAL),
                (lambda: vm.set_user_memory_region2(2, ioctls.KVM_MEM_GUEST_MEMFD, **region), errno.EINVAL),
                (lambda: vm.set_user_memory_region2(2, 0, gpa=SIZE, size=half), errno.EINVAL),
                (lambda: vm.set_user_memory_region2(2, 4, gpa=SIZE, size=half, fd=files.shared), errno.EBADF),
            ):
                with raises(why):
                    call()
            assert not os.fstat(guest_memfd).st_blocks
            os.close(guest_memfd)
            for slot in (0, 1):
                vm.set_user_memory_region2(slot, 0, gpa=0, size=0)
            with raises(errno.EINVAL):
                vm.set_memory_attributes(0, PAGE_SIZE, private)
        until(lambda: not owners(memfs))
        assert "Traceback" not in served.stop()
    finally:
        served.process.kill()
        served.process.communicate()


def test_without_a_memfs_there_is_no_guest_memfd(service: Service) -> None:
    with service.kvm() as kvm, kvm.create_vm() as vm:
        assert vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD) == 0
        with raises(errno.EOPNOTSUPP):
            vm.create_guest_memfd(PAGE_SIZE)


# -- interrupted, slow, hostile, dead --------------------------------------------------------------------------------


async def test_run_comes_back_when_it_is_interrupted(service: Service, files: Files, memfs: Memfs) -> None:
    with new_vm(service, files) as (vm, vcpu):
        vcpu.set_accesses([(vm.shared_bit | 0x8000, ACCESS_STORE, 1, 1)])
        vcpu.set_immediate_exit(True)
        with raises(errno.EINTR):
            vcpu.run()
        vcpu.set_immediate_exit(False)
        memfs.process.send_signal(signal.SIGSTOP)  # so that the page does not come
        try:
            with trio.move_on_after(0.3) as scope:
                await vcpu.run_in_trio()
            assert scope.cancelled_caught
        finally:
            memfs.process.send_signal(signal.SIGCONT)
        await vcpu.run_in_trio()
        assert vcpu.exit_reason == KVM_EXIT_HLT
        assert os.pread(files.shared, 1, 0x8000) == b"\x01"


def test_who_says_what_is_no_call_is_cut_off_alone(service: Service, files: Files) -> None:
    def raw(kvm: Kvm, data: bytes, fds: tuple[int, ...] = ()) -> bytes:
        kvm.socket.settimeout(10)
        rights = struct.pack(f"{len(fds)}i", *fds)
        kvm.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else [])
        try:
            return kvm.socket.recv(100)
        except ConnectionResetError:
            return b""

    lots = np.random.default_rng(1)
    with new_vm(service, files) as (vm, vcpu):
        for data in (b"\0", b"x" * 15, struct.pack("<IIQ", 0xAE01, 1, 0), bytes(MAX_DATAGRAM + 1)):
            with service.kvm() as kvm:
                assert raw(kvm, data) == b"", data[:20]
        with service.kvm() as kvm:
            assert raw(kvm, Call(0xAE00).pack(), (0, 0, 0)) == b""
        with service.kvm() as kvm:
            kvm.socket.send(Call(INTERRUPT).pack())
            assert kvm.ioctl(ioctls.KVM_GET_API_VERSION)[0].value == 12
            number = struct.pack("<i", errno.ENOTTY)
            for _ in range(200):
                assert raw(kvm, Call(int(lots.integers(1, 1 << 32)), 0, lots.bytes(40)).pack(), (0,))[:4] == number
        for handler in (ioctls.KVM_SET_USER_MEMORY_REGION, ioctls.KVM_CLEAR_DIRTY_LOG, ioctls.KVM_ENABLE_CAP):
            for size in (0, 1, 16, 24, 32, 40, 64, 104):
                with raises(*(errno.EINVAL, errno.EBADF, errno.ENOENT, errno.EEXIST)):
                    vm.ioctl(handler, payload=lots.bytes(size))
        vcpu.set_accesses([(0x1000, ACCESS_LOAD, 1, 0)])
        vcpu.page[:] = lots.bytes(len(vcpu.page))
        vcpu.set_immediate_exit(False)
        vcpu.run()
        assert vcpu.memory_error == (KVM_EXIT_MEM_MAP_PRIVATE, 0x1000, PAGE_SIZE)
    assert service.process.poll() is None


def test_vmm_that_reads_nothing_keeps_nobody_waiting(service: Service, files: Files) -> None:
    with service.kvm() as deaf:
        while select.select([], [deaf.socket], [], 0.3)[1]:
            deaf.socket.send(Call(ioctls.KVM_GET_API_VERSION).pack())
        with new_vm(service, files) as (_, vcpu):
            vcpu.set_accesses([])
            vcpu.run()
            assert vcpu.exit_reason == KVM_EXIT_HLT


def test_vm_ends_with_its_last_descriptor_and_with_its_vmm(service: Service, files: Files, memfs: Memfs) -> None:
    with service.kvm() as kvm:
        vm = kvm.create_vm()
        vcpu = vm.create_vcpu(0)
        files.set_slot(vm)
        vm.close()
        vcpu.set_accesses([])
        vcpu.run()
        assert owners(memfs)
        vcpu.close()
        until(lambda: not owners(memfs))
    program = (
        "import os, signal, sys; from kvmsim.client import Kvm\n"
        "vm = Kvm(sys.argv[1]).create_vm(); vcpu = vm.create_vcpu(0)\n"
        f"vm.set_user_memory_region(0, 4, gpa=0, size={SIZE}, fd={files.shared}, private_fd={files.private})\n"
        "print('ready', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", program, service.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=(files.shared, files.private)) as vmm:
        assert vmm.stdout is not None
        assert vmm.stdout.readline() == b"ready\n"
        assert owners(memfs)
        vmm.kill()
    until(lambda: not owners(memfs))
    with new_vm(service, files):
        pass


def test_memfs_that_dies_ends_its_vms_and_not_the_service(service: Service, files: Files, memfs: Memfs) -> None:
    with new_vm(service, files) as (_, vcpu):
        vcpu.set_accesses([(0x1000, ACCESS_LOAD, 1, 0)])
        memfs.kill()
        with raises(errno.EIO):
            for _ in range(100):
                vcpu.run()
                time.sleep(0.02)
        with service.kvm() as kvm:
            kvm.create_vm().close()


def test_socket_is_the_users_own_and_not_taken_from_another(service: Service, tmp_path: Path) -> None:
    assert os.stat(service.path).st_mode & 0o777 == 0o600
    command = [sys.executable, "-m", "kvmsim", "serve", "--socket"]
    (tmp_path / "file").touch()
    for path in (service.path, tmp_path / "file", tmp_path / "no" / "where"):
        second = subprocess.run([*command, path], capture_output=True, text=True, check=False, timeout=20)
        assert second.returncode == 1
        assert second.stderr.startswith(f"kvmsim: --socket {path}: ")
    service.process.kill()
    service.process.wait()
    assert os.path.exists(service.path)
    Service(Path(service.path)).stop()


# -- native code -----------------------------------------------------------------------------------------------------


def test_native_code_runs_as_its_vmm_sets_it_up(service: Service, files: Files) -> None:
    """Long mode at CPL 0, page tables and code in shared memory: it stores to private memory, and loads from there."""
    choice_or_skip("kvm")
    with new_vm(service, files) as (vm, vcpu):
        bit = vm.shared_bit
        # mov dword [0x2000], 42; mov al, [0x2000]; out 0x80, al; hlt
        code = bytes.fromhex("c7042500200000 2a000000 8a042500200000 e680 f4")
        os.pwrite(files.shared, struct.pack("<Q", bit | 0x11000 | 3), 0x10000)
        os.pwrite(files.shared, struct.pack("<Q", bit | 0x12000 | 3), 0x11000)
        # 2 MiB of private memory at 0, the same of shared memory behind it
        os.pwrite(files.shared, struct.pack("<QQ", 0x83, bit | 0x83), 0x12000)
        os.pwrite(files.shared, code, 0x14000)
        vcpu.sregs = _long_mode(vcpu.sregs, bit | 0x10000)
        vcpu.registers = Registers(rip=0x214000, rflags=2).pack()
        vcpu.run()
        assert vcpu.exit_reason == KVM_EXIT_MEMORY_ERROR
        assert vcpu.memory_error == (KVM_EXIT_MEM_MAP_PRIVATE, 0x2000, PAGE_SIZE)
        files.to_private(0x2000)
        vcpu.run()
        assert vcpu.exit_reason == KVM_EXIT_IO
        assert struct.unpack_from("<BBHIQ", vcpu.page, 32) == (1, 1, 0x80, 1, PAGE_SIZE)
        assert vcpu.page[PAGE_SIZE] == 42
        assert Registers.unpack(vcpu.registers).rax & 0xFF == 42
        vcpu.run()
        assert vcpu.exit_reason == KVM_EXIT_HLT


def _long_mode(sregs: bytes, page_table: int) -> bytes:
    def segment(kind: int, long_mode: bool) -> bytes:
        return struct.pack("<QIHBBBBBBBBBB", *(0, 0xFFFFFFFF, 8, kind, 1, 0, not long_mode, 1, long_mode, 1, 0, 0, 0))

    changed = bytearray(sregs)
    changed[: 6 * 24] = segment(11, True) + segment(3, False) * 5
    struct.pack_into("<QQQQQQ", changed, 8 * 24 + 2 * 16, 0x80000011, 0, page_table, 0x20, 0, 0x500)
    return bytes(changed)

"""The real KVM on memory of a memfs: a guest in long mode runs out of a mapped file, and sees what the shell punches.

The guest (64-bit code at CPL 3, page tables of its own, all of it in the file) adds what it finds at an address to what
it was given, stores the sum beside it, and leaves by `out`. Nothing of kvmsim is in here: this is what a VMM such as
QEMU does with a memory backend on memfs.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from kvmsim.uapi import KVM_EXIT_MMIO
from tests.model.real_kvm import (
    KVM_GET_SREGS,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_RUN,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    RealKvm,
    real_kvm_or_skip,
)

from .conftest import Memfs

KVM_EXIT_IO = 2
SIZE = 1 << 20
CODE, PML4, PDPT, PD, DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x10000
PORT = 0x42

# mov rax, [DATA]; add rax, rbx; mov [DATA + 8], rax; out PORT, al
PROGRAM = bytes.fromhex("488b042500000100 4801d8 4889042508000100 e642")
PRESENT, USER, LARGE = 1, 4, 0x80
ALL = PRESENT | 2 | USER


def segment(selector: int, kind: int, long_mode: int) -> bytes:
    """struct kvm_segment: flat, at privilege level 3."""
    return struct.pack(
        "=QIHBBBBBBBBBB", 0, 0xFFFFFFFF, selector, kind, 1, 3, 0 if long_mode else 1, 1, long_mode, 1, 0, 0, 0
    )


class Guest:
    """One vCPU in long mode."""

    def __init__(self, kvm: RealKvm, memory: mmap.mmap) -> None:
        self.vcpu = kvm.create_vcpu(0)
        size = fcntl.ioctl(kvm.kvm, KVM_GET_VCPU_MMAP_SIZE)
        self.run_page = mmap.mmap(self.vcpu, size)
        memory[CODE : CODE + len(PROGRAM)] = PROGRAM
        for table, entry in ((PML4, PDPT | ALL), (PDPT, PD | ALL), (PD, ALL | LARGE)):
            memory[table : table + 8] = struct.pack("=Q", entry)
        sregs = bytearray(312)
        fcntl.ioctl(self.vcpu, KVM_GET_SREGS, sregs)
        code, data = segment(0x1B, 11, 1), segment(0x23, 3, 0)
        sregs[: 6 * 24] = code + data * 5  # cs, ds, es, fs, gs, ss
        control = 8 * 24 + 2 * 16  # after tr, ldt, gdt, idt: cr0, cr2, cr3, cr4, cr8, efer
        struct.pack_into("=QQQQQQ", sregs, control, 0x80050033, 0, PML4, 0x20, 0, 0x500)
        fcntl.ioctl(self.vcpu, KVM_SET_SREGS, bytes(sregs))

    def add(self, number: int) -> int:
        """Run the program with rbx = number; its exit reason."""
        registers = [0] * 18  # rax, rbx, ..., rip, rflags
        registers[1], registers[16], registers[17] = number, CODE, 0x3002  # IOPL 3: `out` is allowed
        fcntl.ioctl(self.vcpu, KVM_SET_REGS, struct.pack("=18Q", *registers))
        fcntl.ioctl(self.vcpu, KVM_RUN, 0)
        return int(struct.unpack_from("=I", self.run_page, 8)[0])

    def close(self) -> None:
        self.run_page.close()
        os.close(self.vcpu)


@pytest.fixture
def memory(memfs: Memfs) -> Iterator[mmap.mmap]:
    memfs.run("truncate", "-s", str(SIZE), "guest.mem")
    fd = os.open(memfs.path / "guest.mem", os.O_RDWR)
    try:
        mapping = mmap.mmap(fd, SIZE)
    except OSError as error:
        pytest.skip(f"files cannot be mapped shared here: {error}")
    finally:
        os.close(fd)
    yield mapping
    mapping.close()


def address_of(memory: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(memory)
    try:
        return ctypes.addressof(view)
    finally:
        del view


def test_real_guest_runs_out_of_a_memfs_file_and_sees_a_punch(memfs: Memfs, memory: mmap.mmap) -> None:
    kvm = real_kvm_or_skip()
    try:
        assert kvm.set_region(0, 0, 0, SIZE, address_of(memory)) == 0
        guest = Guest(kvm, memory)
        try:
            memory[DATA : DATA + 8] = struct.pack("=Q", 1000)
            reason = guest.add(234)
            assert reason != KVM_EXIT_MMIO
            assert reason == KVM_EXIT_IO
            assert memory[DATA + 8 : DATA + 16] == struct.pack("=Q", 1234)
            # What the guest stored is in the file, and what is punched out of the file is gone for the guest.
            read = memfs.run("od", "-A", "n", "-t", "u8", "-j", str(DATA + 8), "-N", "8", "guest.mem")
            assert read.stdout.strip() == "1234"
            assert memfs.run("fallocate", "-p", "-o", str(DATA), "-l", "4096", "guest.mem").returncode == 0
            assert guest.add(7) == KVM_EXIT_IO
            assert memory[DATA : DATA + 16] == struct.pack("=QQ", 0, 7)
        finally:
            guest.close()
    finally:
        kvm.close()

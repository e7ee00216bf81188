"""What a kernel is booted with: the serial port, and what lies in guest memory."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from kvmsim.guests.bzimage import BOOT_PARAMS, COMMAND_LINE, PML4, boot_image
from kvmsim.guests.loading import LoadError
from kvmsim.guests.uart import FIRST_PORT, Uart

SIZE = 64 << 20


class Console:
    """A serial port, what it sent, and the levels of its interrupt line."""

    def __init__(self) -> None:
        self.sent, self.levels = bytearray(), list[bool]()
        self.uart = Uart(self.sent.extend, self.levels.append)

    def read(self, register: int) -> int:
        return self.uart.read(FIRST_PORT + register)

    def write(self, register: int, value: int) -> None:
        self.uart.write(FIRST_PORT + register, value)


def test_serial_port_sends_at_once_and_is_always_ready() -> None:
    console = Console()
    for value in b"hello":
        assert console.read(5) & 0x60 == 0x60
        console.write(0, value)
    assert console.sent == b"hello"
    assert console.levels == []


def test_serial_port_interrupts_for_what_is_typed_until_it_is_read() -> None:
    console = Console()
    console.uart.receive(b"a")
    assert console.levels == []
    console.write(1, 1)
    console.uart.receive(b"b")
    assert console.levels == [True]
    assert console.read(2) & 0x0F == 4
    assert [console.read(5) & 1, console.read(0), console.read(5) & 1, console.read(0), console.read(5) & 1] == [
        *(1, ord("a"), 1, ord("b"), 0),
    ]
    assert console.levels == [True, False]
    assert console.read(2) & 0x0F == 1


def test_serial_port_says_once_that_it_has_sent() -> None:
    console = Console()
    console.write(1, 2)
    assert console.levels == [True]
    assert [console.read(2) & 0x0F for _ in range(2)] == [2, 1]
    assert console.levels == [True, False]
    console.write(0, ord("x"))
    assert console.levels == [True, False, True]
    console.write(1, 0)
    assert console.levels == [True, False, True, False]


def test_serial_ports_divisor_hides_data_and_enable_registers() -> None:
    console = Console()
    console.write(3, 0x83)
    console.write(0, 1)
    console.write(1, 2)
    assert (console.read(0), console.read(1), bytes(console.sent)) == (1, 2, b"")
    console.write(3, 0x03)
    assert (console.read(1), console.read(3)) == (0, 3)
    for register in (2, 5, 6):  # not for writing
        console.write(register, 0xFF)
    console.write(7, 0x5A)
    assert console.read(7) == 0x5A


def kernel(**changes: bytes) -> bytes:
    """A bzImage of four sectors of set-up and one page of code."""
    image = bytearray(2560 + 4096)
    image[0x1F1] = 4
    image[0x200:0x206] = b"\xeb\x66HdrS"
    struct.pack_into("=H", image, 0x206, 0x20F)
    struct.pack_into("=H", image, 0x236, 1)
    struct.pack_into("=I", image, 0x238, 255)
    struct.pack_into("=QI", image, 0x258, 16 << 20, 8 << 20)
    image[2560:] = b"\xcc" * 4096
    for where, value in changes.items():
        at = int(where.removeprefix("at_"), 16)
        image[at : at + len(value)] = value
    return bytes(image)


def test_kernel_initrd_and_command_line_are_where_the_kernel_is_told() -> None:
    image = boot_image(kernel(), b"initrd", "quiet", SIZE)
    pieces = dict(image.pieces)
    params = pieces[BOOT_PARAMS]
    ramdisk, size = struct.unpack_from("=II", params, 0x218)
    assert (pieces[ramdisk], size, ramdisk % 4096) == (b"initrd", 6, 0)
    assert SIZE - 4096 <= ramdisk + size <= SIZE
    assert (struct.unpack_from("=I", params, 0x228)[0], pieces[COMMAND_LINE]) == (COMMAND_LINE, b"quiet\0")
    assert pieces[16 << 20] == b"\xcc" * 4096
    assert image.entry == (16 << 20) + 0x200
    assert params[0x1E8] == 2
    assert list(struct.iter_unpack("=QQI", params[0x2D0 : 0x2D0 + 40])) == [
        *((0, 0x9_FC00, 1), (1 << 20, SIZE - (1 << 20), 1)),
    ]
    spans = sorted((gpa, gpa + len(content)) for gpa, content in image.pieces)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_tables_map_four_gibibytes_to_themselves() -> None:
    tables = dict(boot_image(kernel(), b"", "", SIZE).pieces)[PML4]
    for address in (0, 5 << 20, SIZE, (4 << 30) - 1):
        table = PML4
        for shift in (39, 30, 21):
            (entry,) = struct.unpack_from("=Q", tables, table - PML4 + (address >> shift & 511) * 8)
            table = entry & ~0xFFF
        assert (entry & 0x83, entry >> 21) == (0x83, address >> 21)


@pytest.mark.parametrize(
    ("image", "size", "line", "why"),
    [
        (b"", SIZE, "", "no bzImage"),
        (kernel(at_202=b"xxxx"), SIZE, "", "no bzImage"),
        (kernel(at_206=b"\x00\x02"), SIZE, "", "no 64-bit entry point"),
        (kernel(at_236=b"\x00\x00"), SIZE, "", "no 64-bit entry point"),
        (kernel(at_1f1=b"\xff"), SIZE, "", "too small"),
        (kernel(at_258=b"\xff" * 8), SIZE, "", "too small"),
        (kernel(), 20 << 20, "", "too small: kernel and initrd need 25 MiB"),
        (kernel(), 4 << 30, "", "too large: at most 3 GiB"),
        (kernel(), SIZE, "x" * 255, "command line is too long"),
    ],
)
def test_what_cannot_be_booted_is_refused_with_the_reason(image: bytes, size: int, line: str, why: str) -> None:
    with pytest.raises(LoadError, match=why):
        boot_image(image, b"", line, size)

"""What a kernel is booted with: the serial port, and what lies in guest memory."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import AsyncIterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import trio

from kvmsim.guests.bzimage import BOOT_PARAMS, COMMAND_LINE, PML4, boot_image
from kvmsim.guests.console import Console
from kvmsim.guests.linux.kernel import ProgramDied
from kvmsim.guests.loading import LoadError
from kvmsim.guests.uart import FIRST_PORT, Uart
from tests.helpers import until_async

SIZE = 64 << 20


class Port:
    """A serial port, the levels of its interrupt line, and how often there was something for who serves it."""

    def __init__(self) -> None:
        self.levels, self.changes = list[bool](), 0
        self.uart = Uart(self.levels.append, self.changed)

    def changed(self) -> None:
        self.changes += 1

    def read(self, register: int) -> int:
        return self.uart.read(FIRST_PORT + register)

    def write(self, register: int, value: int) -> None:
        self.uart.write(FIRST_PORT + register, value)


def test_serial_port_is_ready_to_send() -> None:
    port = Port()
    for value in b"hello":
        assert port.read(5) & 0x60 == 0x60
        port.write(0, value)
    assert (port.uart.take_to_send(), port.uart.take_to_send()) == (b"hello", b"")
    assert (port.changes, port.levels) == (1, [])


def test_serial_port_interrupts_for_what_is_typed_until_it_is_read() -> None:
    port = Port()
    port.uart.receive(b"a")
    assert port.levels == []
    port.write(1, 1)
    port.uart.receive(b"b")
    assert port.levels == [True]
    assert port.read(2) & 0x0F == 4
    assert [port.read(5) & 1, port.read(0), port.read(5) & 1, port.read(0), port.read(5) & 1] == [
        *(1, ord("a"), 1, ord("b"), 0),
    ]
    assert port.levels == [True, False]
    assert port.read(2) & 0x0F == 1


def test_serial_port_says_once_that_it_has_sent() -> None:
    port = Port()
    port.write(1, 2)
    assert port.levels == [True]
    assert [port.read(2) & 0x0F for _ in range(2)] == [2, 1]
    assert port.levels == [True, False]
    port.write(0, ord("x"))
    assert port.levels == [True, False, True]
    port.write(1, 0)
    assert port.levels == [True, False, True, False]


def test_serial_ports_divisor_hides_data_and_enable_registers() -> None:
    port = Port()
    port.write(3, 0x83)
    port.write(0, 1)
    port.write(1, 2)
    assert (port.read(0), port.read(1), port.uart.take_to_send()) == (1, 2, b"")
    port.write(3, 0x03)
    assert (port.read(1), port.read(3)) == (0, 3)
    for register in (2, 5, 6):  # not for writing
        port.write(register, 0xFF)
    port.write(7, 0x5A)
    assert port.read(7) == 0x5A


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


def test_serial_port_that_nobody_empties_is_not_ready_until_somebody_does() -> None:
    """And a driver loses nothing that sends sixteen bytes each time that it is ready."""
    port = Port()
    port.write(1, 2)
    sent = b""
    while port.read(5) & 0x20:
        sent += bytes(range(16))
        for value in sent[-16:]:
            port.write(0, value)
        port.read(2)
    assert 1 << 10 < len(sent) < 1 << 16
    assert port.levels[-1] is False
    for _ in range(1 << 17):
        port.write(0, 0xFF)
    taken = port.uart.take_to_send()
    assert taken.startswith(sent)
    assert len(taken) - len(sent) <= 16
    assert (port.levels[-1], port.read(5) & 0x20) == (True, 0x20)


def test_serial_port_has_room_for_what_is_typed_until_it_is_full() -> None:
    port = Port()
    room = port.uart.room
    port.uart.receive(bytes(room))
    assert port.uart.room == 0
    with pytest.raises(AssertionError):
        port.uart.receive(b"x")
    while not port.uart.room:
        assert port.changes == 0
        port.read(0)
    assert (port.changes, 0 < port.uart.room < room) == (1, True)


class Ends:
    """A console between two pipes, and our ends of them."""

    def __init__(self) -> None:
        self.keyboard_end, self.keyboard = os.pipe()
        self.screen, self.screen_end = os.pipe()
        self.console = Console(lambda _: None, self.keyboard_end, self.screen_end)

    def guest_sends(self, data: bytes) -> None:
        for value in data:
            self.console.uart.write(FIRST_PORT, value)

    def close(self) -> None:
        for fd in (self.keyboard_end, self.keyboard, self.screen, self.screen_end):
            os.close(fd)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@pytest.mark.parametrize("blocking", [True, False])
async def test_screen_that_nobody_reads_holds_up_neither_guest_nor_keyboard(ends: Ends, blocking: bool) -> None:
    fcntl.fcntl(ends.screen_end, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(ends.screen_end, blocking)
    sent, shown = os.urandom(4096) + b"x" * 4096, b""
    with trio.fail_after(20):
        async with ends.console.served():
            await trio.to_thread.run_sync(ends.guest_sends, sent[:4096])
            await until_async(lambda: ends.console.uart.read(FIRST_PORT + 5) & 0x20)
            await trio.to_thread.run_sync(ends.guest_sends, sent[4096:])
            os.write(ends.keyboard, b"q")
            await until_async(lambda: ends.console.uart.read(FIRST_PORT + 5) & 1)
            assert ends.console.uart.read(FIRST_PORT) == ord("q")

            async def read() -> None:
                nonlocal shown
                while len(shown) < len(sent):
                    shown += await trio.to_thread.run_sync(os.read, ends.screen, 1000)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
    assert shown == sent


async def test_keyboard_is_read_no_faster_than_the_guest_reads() -> None:
    zero, null = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    console, taken = Console(lambda _: None, zero, null), 0
    with trio.fail_after(20):
        async with console.served():
            while taken < 2000:
                await until_async(lambda: not console.uart.room)
                while console.uart.read(FIRST_PORT + 5) & 1:
                    assert console.uart.read(FIRST_PORT) == 0
                    taken += 1
    os.close(zero)
    os.close(null)


@pytest.mark.parametrize("dies", [False, True])
async def test_last_words_are_shown(ends: Ends, dies: bool) -> None:
    async def run() -> None:
        async with ends.console.served():
            ends.guest_sends(b"panic")
            if dies:
                raise ProgramDied("the kernel died")

    with trio.fail_after(20):
        with pytest.raises(ProgramDied) if dies else nullcontext():
            await run()
        assert os.read(ends.screen, 100) == b"panic"


async def test_screen_that_is_gone_is_an_error_of_the_console(ends: Ends) -> None:
    gone = os.dup(ends.screen_end)
    os.close(ends.screen)
    ends.screen = gone
    ends.guest_sends(b"x")
    with trio.fail_after(20), pytest.raises(BrokenPipeError):
        async with ends.console.served():
            await trio.sleep_forever()

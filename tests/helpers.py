"""What the tests of both programs write over and over: ranges of pages, a backing, a call that must fail."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import trio

from memfs.contract.protocol.connection import Connection, Role
from memfs.contract.protocol.messages import Hello, Message
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageIndex, PageRange
from memfs.store.backing import Backing

T = TypeVar("T")

#: The first message of an owner, for processes that import nothing of memfs
HELLO = Connection(Role.OWNER).send(Hello())[1]


def datagram(kind: int, body: bytes = b"", number: int = 1, *, version: int = 1, length: int | None = None) -> bytes:
    """Return a message as it travels (docs/PROTOCOL.md, "On the wire"), packed by hand so that it may also be wrong."""
    return struct.pack("<HHIQ", version, kind, 16 + len(body) if length is None else length, number) + body


def packed(message: Message, number: int) -> bytes:
    """Return a message as it travels, whatever the protocol says of it."""
    return datagram(message.TYPE, message.pack(), number)


def pages(start: int, end: int) -> PageRange:
    """Return the pages from `start` to `end`, which is not one of them."""
    return PageRange(PageIndex(start), PageIndex(end))


def one(index: int) -> PageRange:
    """Return the range of one page."""
    return pages(index, index + 1)


def at(page: int) -> ByteOffset:
    """Return the offset in bytes at which a page begins."""
    return ByteOffset(page * PAGE_SIZE)


def not_none(value: T | None) -> T:
    """Return a value that is there, where its type says that it may not be."""
    assert value is not None
    return value


def new_backing(kind: Callable[[int], Backing], size: int) -> Backing:
    """Make a backing of `size` bytes. Skips the test where it is a tmpfs and there can be none."""
    try:
        return kind(size)
    except OSError as error:
        pytest.skip(f"no detached tmpfs: {error.strerror}")


@contextmanager
def raises(*errnos: int, match: str | None = None) -> Iterator[None]:
    """Expect an OSError with one of these errnos. `match` is searched for in its text, as pytest.raises does."""
    with pytest.raises(OSError, match=match) as caught:
        yield
    assert caught.value.errno in errnos, f"{_name(caught.value.errno)}, not {' or '.join(map(_name, errnos))}"


def _name(number: int | None) -> str:
    return errno.errorcode.get(number or 0, str(number))


def until(holds: Callable[[], object], seconds: float = 10) -> None:
    """Wait for what another process or thread does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


async def until_async(holds: Callable[[], object], seconds: float = 10) -> None:
    """Wait for what another process, thread or task does, and let the tasks of this one run meanwhile."""
    with trio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.001)


async def describe_nothing(most_bytes: int, user: int) -> str:
    """Describe a mount of which nothing is known."""
    return "{}"


def notify_nobody(message: bytes) -> None:
    """Notify a kernel that knows no inode."""
    raise OSError(errno.ENOENT, "no such inode")

"""The channel between the kernel and libfuse, with a socketpair in the kernel's place."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.logs import current_request
from memfs.fuse.abi import (
    BUFFER_SIZE,
    IN_HEADER,
    OUT_HEADER,
    Malformed,
    Opcode,
    Request,
    error_reply,
    invalidate_attributes,
    reply,
    unpack,
)
from memfs.fuse.backlog import Backlog
from memfs.fuse.channel import Amendment, Channel, Pyfuse3

GETATTR, AT_ONCE, LATER, SILENT, FAILS, BREAKS, OBSERVED = 3, 200, 201, 202, 203, 204, 205
AT_ONCE_AFTER_ALL = 206
NODE = 1
SO_SNDBUFFORCE = 32  # linux: asm-generic/socket.h


def request(opcode: int, unique: int, body: bytes = b"") -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, NODE, 0, 0, 0, 0, 0) + body


def interrupt(of: int) -> bytes:
    return request(Opcode.INTERRUPT, of | 1, struct.pack("=Q", of))


class Sides:
    """Both ends of a channel: what the kernel and what libfuse would hold, and the handlers in between."""

    def __init__(self) -> None:
        self.kernel, self.fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.may_go_on = trio.Event()
        self.finished: list[int] = []
        self.observed_while: list[int] = []  # the requests that were being worked on
        self.channel = Channel(
            os.dup(self.fuse.fileno()),
            {
                AT_ONCE: self.echo,
                LATER: self.later,
                SILENT: self.be_silent,
                FAILS: self.fail,
                BREAKS: self.break_down,
                AT_ONCE_AFTER_ALL: self.at_once_after_all,
                OBSERVED: Pyfuse3("immediate", self.observe),
            },
        )
        self.libfuse = socket.socket(fileno=self.channel.hand_over())
        for end in (self.kernel, self.libfuse):
            end.setblocking(False)

    async def run(self) -> None:
        try:
            await self.channel.run(lambda: None)
        finally:
            self.channel.close()
            self.kernel.close()
            self.fuse.close()
            self.libfuse.close()

    async def echo(self, request: Request) -> bytes:
        return bytes(request.body)

    async def be_silent(self, request: Request) -> None:
        pass

    async def later(self, request: Request) -> bytes:
        await self.may_go_on.wait()
        self.finished.append(request.unique)
        return bytes(request.body) or b"later"

    async def at_once_after_all(self, request: Request) -> bytes:
        if request.body:
            raise OSError(errno.EXDEV, "told to")
        self.finished.append(request.unique)
        return b"at once"

    async def fail(self, request: Request) -> bytes:
        raise OSError(errno.EXDEV, "told to")

    async def break_down(self, request: Request) -> bytes:
        unpack(struct.Struct("=Q"), request.body)
        raise ZeroDivisionError

    def observe(self, request: Request) -> Amendment:
        self.observed_while.append(current_request())

        def amend(reply: bytearray) -> None:
            reply[OUT_HEADER.size :] = bytes(reply[OUT_HEADER.size :]).upper()

        return amend

    async def answers(self) -> list[bytes]:
        """What the kernel has been answered, once nothing moves any more."""
        return await _drain(self.kernel)

    async def forwarded(self) -> list[bytes]:
        """What libfuse has been given, once nothing moves any more."""
        return await _drain(self.libfuse)


async def _drain(end: socket.socket) -> list[bytes]:
    await wait_all_tasks_blocked(0.01)
    got = []
    while True:
        try:
            got.append(end.recv(1 << 21))
        except BlockingIOError:
            return got


@pytest.fixture
async def sides(nursery: trio.Nursery) -> Sides:
    """A running channel."""
    sides = Sides()
    nursery.start_soon(sides.run)
    return sides


async def test_what_has_no_handler_goes_through_unchanged_both_ways(sides: Sides) -> None:
    sides.kernel.send(request(GETATTR, 2, b"body"))
    assert await sides.forwarded() == [request(GETATTR, 2, b"body")]
    notification = OUT_HEADER.pack(OUT_HEADER.size, 4, 0)
    for message in (reply(2, b"attributes"), error_reply(4, errno.ENOENT), notification):
        sides.libfuse.send(message)
        assert await sides.answers() == [message]


async def test_handlers_answer_and_libfuse_sees_nothing(sides: Sides) -> None:
    for opcode, body, answer in (
        (AT_ONCE, b"body", [reply(2, b"body")]),
        (SILENT, b"", []),
        (FAILS, b"", [error_reply(2, errno.EXDEV)]),
    ):
        sides.kernel.send(request(opcode, 2, body))
        assert await sides.answers() == answer
        assert await sides.forwarded() == []


async def test_handler_that_waits_holds_up_nobody(sides: Sides) -> None:
    for message in (request(LATER, 2), request(AT_ONCE, 4), request(GETATTR, 6)):
        sides.kernel.send(message)
    assert await sides.answers() == [reply(4)]
    assert await sides.forwarded() == [request(GETATTR, 6)]
    sides.may_go_on.set()
    assert await sides.answers() == [reply(2, b"later")]


async def test_body_of_a_request_that_waits_is_kept(sides: Sides) -> None:
    for message in (request(LATER, 2, b"body"), request(AT_ONCE, 4, b"other body")):
        sides.kernel.send(message)
    assert await sides.answers() == [reply(4, b"other body")]
    sides.may_go_on.set()
    assert await sides.answers() == [reply(2, b"body")]


async def test_handler_that_could_wait_and_does_not_has_answered_before_the_next_request(sides: Sides) -> None:
    messages = [request(AT_ONCE_AFTER_ALL, 2), request(AT_ONCE_AFTER_ALL, 4, b"x"), request(AT_ONCE, 6)]
    for message in messages:
        sides.kernel.send(message)
    assert await sides.answers() == [reply(2, b"at once"), error_reply(4, errno.EXDEV), reply(6)]
    assert sides.finished == [2]


async def test_who_reads_on_is_not_at_work_on_the_request_that_waits(sides: Sides) -> None:
    for message in (request(LATER, 2), request(OBSERVED, 4), request(LATER, 6), request(OBSERVED, 8)):
        sides.kernel.send(message)
    assert await sides.answers() == []
    assert sides.observed_while == [4, 8]
    sides.may_go_on.set()
    assert sorted(await sides.answers()) == [reply(2, b"later"), reply(6, b"later")]


async def test_tasks_get_a_turn_while_requests_keep_coming(nursery: trio.Nursery) -> None:
    """Or nothing that pyfuse3 answers would be answered."""
    sides = Sides()
    for number in range(100):
        sides.kernel.send(request(AT_ONCE_AFTER_ALL, 2 * number + 2))
    handled: list[int] = []

    async def task() -> None:
        while len(sides.finished) < 100:
            await trio.lowlevel.checkpoint()
            handled.append(len(sides.finished))

    nursery.start_soon(sides.run)
    await task()
    assert len([number for number in handled if 0 < number < 100]) >= 2, handled


async def test_handler_that_breaks_is_an_input_output_error(sides: Sides, caplog: pytest.LogCaptureFixture) -> None:
    sides.kernel.send(request(BREAKS, 2, bytes(8)))
    sides.kernel.send(request(BREAKS, 4))
    sides.kernel.send(request(AT_ONCE, 6))
    assert await sides.answers() == [error_reply(2, errno.EIO), error_reply(4, errno.EIO), reply(6)]
    assert "ZeroDivisionError" in caplog.text
    assert "a body of 0 bytes instead of 8" in caplog.text


@pytest.mark.parametrize(
    "malformed",
    [b"x", bytes(39), request(AT_ONCE, 2)[:-1], request(AT_ONCE, 2) + b"x", request(Opcode.INTERRUPT, 3)],
    ids=["a byte", "header cut", "claims more", "claims less", "interrupt of nothing"],
)
async def test_malformed_request_harms_nobody(sides: Sides, malformed: bytes, caplog: pytest.LogCaptureFixture) -> None:
    sides.kernel.send(malformed)
    await sides.answers()
    assert await sides.forwarded() == []
    assert caplog.records
    sides.kernel.send(request(AT_ONCE, 8))
    assert await sides.answers() == [reply(8)]


async def test_interrupted_handler_is_cancelled(sides: Sides) -> None:
    sides.kernel.send(request(LATER, 2))
    sides.kernel.send(request(LATER, 4))
    assert await sides.answers() == []
    sides.kernel.send(interrupt(2))
    assert await sides.answers() == [invalidate_attributes(NODE), error_reply(2, errno.EINTR)]
    assert await sides.forwarded() == []
    sides.may_go_on.set()
    assert await sides.answers() == [reply(4, b"later")]
    assert sides.finished == [4]


async def test_interrupt_right_behind_its_request_is_seen(nursery: trio.Nursery) -> None:
    """A busy daemon reads both at once, before the handler's task has begun."""
    sides = Sides()
    sides.kernel.send(request(LATER, 2))
    sides.kernel.send(interrupt(2))
    nursery.start_soon(sides.run)
    assert await sides.answers() == [invalidate_attributes(NODE), error_reply(2, errno.EINTR)]
    assert await sides.forwarded() == []


async def test_interrupt_of_what_libfuse_has_goes_to_libfuse(sides: Sides) -> None:
    sides.kernel.send(request(GETATTR, 2))
    sides.kernel.send(interrupt(2))
    assert await sides.forwarded() == [request(GETATTR, 2), interrupt(2)]


async def test_interrupt_that_comes_too_late_is_libfuse_s_to_refuse(sides: Sides) -> None:
    sides.kernel.send(request(AT_ONCE, 2))
    sides.kernel.send(interrupt(2))
    assert await sides.answers() == [reply(2)]
    assert await sides.forwarded() == [interrupt(2)]


async def test_amendment_changes_one_successful_reply(sides: Sides) -> None:
    for answer, expected in (
        (reply(2, b"word"), reply(2, b"WORD")),
        (error_reply(2, errno.EACCES), error_reply(2, errno.EACCES)),
        (reply(4, b"word"), reply(4, b"word")),
    ):
        sides.kernel.send(request(OBSERVED, 2))
        assert await sides.forwarded() == [request(OBSERVED, 2)]
        sides.libfuse.send(answer)
        assert await sides.answers() == [expected]
    sides.libfuse.send(reply(2, b"word"))  # the answer to the last request
    sides.libfuse.send(reply(2, b"word"))  # nobody asked
    assert await sides.answers() == [reply(2, b"WORD"), reply(2, b"word")]


async def test_large_requests_fit(sides: Sides) -> None:
    body = os.urandom(BUFFER_SIZE - IN_HEADER.size)
    try:
        for end in (sides.kernel, sides.fuse):
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20)
        sides.kernel.send(request(AT_ONCE, 2, body))
    except OSError as error:
        pytest.skip(f"the machine limits socket buffers: {error.strerror}")
    assert await sides.answers() == [reply(2, body)]


async def fill(sides: Sides) -> list[bytes]:
    """Have more sent to libfuse than fits into the socketpair. Returns all of it, in order."""
    asked = []
    for number in range(200):
        asked.append(request(GETATTR, 2 * number + 2, bytes(4096)))
        sides.kernel.send(asked[-1])
        await wait_all_tasks_blocked()
    return asked


async def test_libfuse_that_does_not_read_holds_up_nobody(sides: Sides) -> None:
    asked = await fill(sides)
    sides.kernel.send(request(AT_ONCE, 1000, b"body"))
    assert await sides.answers() == [reply(1000, b"body")]
    got = await sides.forwarded()
    assert 0 < len(got) < len(asked)
    while len(got) < len(asked) and (more := await sides.forwarded()):
        got += more
    assert got == asked


async def test_interrupted_request_that_libfuse_has_not_got_is_not_handed_on(sides: Sides) -> None:
    asked = await fill(sides)
    last = 2 * len(asked)
    sides.kernel.send(interrupt(last))
    assert await sides.answers() == [invalidate_attributes(NODE), error_reply(last, errno.EINTR)]
    got: list[bytes] = []
    while more := await sides.forwarded():
        got += more
    assert got == asked[:-1]


def test_requests_are_parsed_or_refused() -> None:
    parsed = Request.parse(memoryview(request(GETATTR, 7, b"abc")))
    assert (parsed.opcode, parsed.unique, parsed.nodeid, bytes(parsed.body)) == (GETATTR, 7, 1, b"abc")
    for wrong in (b"", request(GETATTR, 7)[:39], request(GETATTR, 7) + b"x"):
        with pytest.raises(Malformed):
            Request.parse(memoryview(wrong))


# -- turns ------------------------------------------------------------------------------------------------------------


def request_of(user: int, unique: int, opcode: int = AT_ONCE, body: bytes = b"") -> bytes:
    message = request(opcode, unique, body)
    header = list(IN_HEADER.unpack_from(message))
    header[4:7] = user, user, user
    return IN_HEADER.pack(*header) + body


async def test_a_user_with_many_requests_is_not_answered_more_often_than_one_with_one(sides: Sides) -> None:
    """However many others are queued before it, it is answered when it has been read."""
    for end in (sides.kernel, sides.fuse):
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 22)
    for number in range(300):
        sides.kernel.send(request_of(1000, 2 * number + 2))
    sides.kernel.send(request_of(1001, 9998))
    uniques = [OUT_HEADER.unpack_from(answer)[2] for answer in await sides.answers()]
    assert len(uniques) == 301
    assert uniques.index(9998) <= 150
    assert [unique for unique in uniques if unique != 9998] == [2 * number + 2 for number in range(300)]


async def test_what_later_requests_rely_on_is_seen_before_them(sides: Sides) -> None:
    """A RELEASE comes before whatever its caller asks then, although the kernel says that it is another user's."""
    seen = list[int]()

    async def note(request: Request) -> bytes:
        seen.append(request.unique)
        return b""

    sides.channel._handlers[Opcode.RELEASE] = sides.channel._handlers[AT_ONCE] = note
    for number in range(100):
        sides.kernel.send(request_of(1000, 2 * number + 2))
    sides.kernel.send(request_of(0, 1000, Opcode.RELEASE))
    sides.kernel.send(request_of(1001, 1002))
    await sides.answers()
    assert seen.index(1000) < seen.index(1002)


async def test_request_that_is_interrupted_before_its_turn_is_so_when_it_waits(sides: Sides) -> None:
    for number in range(60):
        sides.kernel.send(request_of(1000, 2 * number + 2))
    sides.kernel.send(request_of(1000, 500, LATER))
    sides.kernel.send(interrupt(500))
    answers = await sides.answers()
    assert error_reply(500, errno.EINTR) in answers
    assert len([answer for answer in answers if OUT_HEADER.unpack_from(answer)[2] == 500]) == 1


async def test_endless_row_of_large_requests_holds_up_nobody(sides: Sides) -> None:
    """Those that do not fit into the backlog are answered before it, but do not keep it from its turn."""
    for end in (sides.kernel, sides.fuse):
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 32 << 20)
    body, seen = bytes(1 << 20), list[int]()

    async def note(request: Request) -> bytes:
        seen.append(request.unique)
        if request.body and len(seen) < 200:  # its caller asks again
            sides.kernel.send(request_of(1000, 2 * len(seen) + 1000, AT_ONCE, body))
        return b""

    sides.channel._handlers[AT_ONCE] = note
    for number in range(8):
        sides.kernel.send(request_of(1000, 2 * number + 2, AT_ONCE, body))
    sides.kernel.send(request_of(1000, 100))
    sides.kernel.send(request_of(1001, 102))
    await sides.answers()
    assert len(seen) >= 200
    assert seen.index(100) < 50
    assert seen.index(102) < 50


def test_backlog_is_bounded_in_bytes() -> None:
    backlog, body = Backlog(lambda request: request.uid), bytes(1 << 20)
    added = [backlog.add(Request.parse(memoryview(request_of(1000, 2 * n + 2, AT_ONCE, body)))) for n in range(8)]
    assert added == [True] * 3 + [False] * 5
    assert backlog.add(Request.parse(memoryview(request_of(1000, 100))))
    assert backlog.add(Request.parse(memoryview(request_of(1001, 102, AT_ONCE, body))))
    assert [backlog.pop().unique for _ in range(5)] == [2, 102, 4, 6, 100]
    assert not backlog

"""The closer: a process that takes in, looks at and closes the descriptors that strangers send.

close(2) may have to ask the filesystem behind a descriptor (FUSE_FLUSH), and that may be one that never answers. A
thread that waits for it cannot even be killed; one of the daemon would keep the daemon's descriptors open when
the daemon is killed, above all /dev/fuse, and everybody who uses the mount would wait for ever instead of being told
that it is dead. The same goes for /proc/self/fdinfo of an epoll that somebody polls. So descriptors of strangers never
are the daemon's: it looks at what a datagram is (MSG_PEEK), and where descriptors come with it, it has the closer
receive them. In the daemon they are numbers: which closer has one, and its number there. The closer is forked by a
process that holds nothing (closer_process.py), and holds nothing else: no rights, no mount, no connection longer than
it takes to receive. Content comes from memory files only (memfds), which ask nobody, and those the closer hands on.

If it is killed, what it held is closed, and another one takes its place: a number from before is as one that is closed.
Until then, and if there can be no other, descriptors that come are dropped by the kernel, which asks nobody, and their
sender gets the answer that there is no space for them.

How many descriptors a user may have in the closer follows the rule for descriptors everywhere (store/shares.py).

Rejected: to get rid of what has come in without close(2) (dup2, exit and all else close in the same way); to hand on
what the daemon has received (it would still have to close its own).
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import logging
import os
import resource
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from memfs.contract.protocol.custody import Datagram
from memfs.contract.sys.peer_credentials import PeerCredentials
from memfs.owners import closer_process
from memfs.owners.closer_process import MAX_MESSAGE, UNANSWERED
from memfs.store.shares import Pool

log = logging.getLogger(__name__)

_TIMEOUT: Final = 5.0  # seconds for the closer to answer: it may have been stopped together with us
_BETWEEN: Final = 1.0  # seconds from one closer to the next
_FD_BITS: Final = 24  # of a number here that are the closer's own; the others say which closer
_GENERATIONS: Final = 64
_MSG_PEEK: Final = int(socket.MSG_PEEK)
_MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)
_INTS: Final = "i"


class NoCloser(OSError):
    """EIO: the closer that has a descriptor is gone, or there is none."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the process that looks at descriptors is gone")


@dataclass(slots=True, eq=False)
class _Job:
    """What was asked of the closer, and what it has answered; None: it is gone."""

    done: trio.Event = field(default_factory=trio.Event)
    answer: dict[str, Any] | None = None


class _Line:
    """The daemon's end of one closer.

    `generation` is part of the numbers of its descriptors; `held` counts them.
    """

    def __init__(self, held: Pool, generation: int, pid: int, calls: socket.socket, jobs: socket.socket) -> None:
        self.held: Final = held
        self.generation: Final = generation
        self.pid: Final = pid
        self.is_gone = False
        self.asked: Final[dict[int, _Job]] = {}
        self._calls: Final = calls
        self._jobs: Final = jobs
        self._last = UNANSWERED
        self._is_heard = False
        calls.settimeout(_TIMEOUT)
        jobs.setblocking(False)

    def number(self, fd: int) -> int:
        """Return the number here of a descriptor there."""
        return self.generation << _FD_BITS | fd

    def call(self, request: dict[str, Any], *fds: int) -> tuple[dict[str, Any], list[int]]:
        """Have the closer's first thread do something immediately.

        Raises NoCloser if it was gone before, and OSError(EIO) if it may have begun.
        """
        if self.is_gone:
            raise NoCloser
        try:
            socket.send_fds(self._calls, [json.dumps(request).encode()], fds)
        except OSError:
            self.lose()
            raise NoCloser from None
        try:
            data, got = self._answer()
        except OSError:
            data, got = b"", []
        if not data:
            self.lose()
            raise OSError(errno.EIO, "the process that receives descriptors has died meanwhile")
        for fd in got:
            os.set_inheritable(fd, False)
        return json.loads(data), got

    def _answer(self) -> tuple[bytes, list[int]]:
        """Return what the closer answers. Raises TimeoutError; if we stood still meanwhile, it has time once more."""
        began = time.monotonic()
        try:
            data, fds, _, _ = socket.recv_fds(self._calls, MAX_MESSAGE, 1)
        except TimeoutError:
            if time.monotonic() - began < 1.5 * _TIMEOUT:
                raise
            data, fds, _, _ = socket.recv_fds(self._calls, MAX_MESSAGE, 1)
        return data, fds

    async def ask(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """Have a thread of the closer do something, and wait for what it says; None if it is gone."""
        self._last += 1
        number, asked = self._last, _Job()
        self.asked[number] = asked
        try:
            await self.send(json.dumps({**job, "number": number}).encode())
        except trio.Cancelled:
            self.asked.pop(number, None)
            raise
        await asked.done.wait()
        return asked.answer

    def send_now(self, job: dict[str, Any]) -> None:
        """Have a thread of the closer do something, and wait for nothing."""
        data = json.dumps({**job, "number": UNANSWERED}).encode()
        try:
            self._jobs.send(data)
        except BlockingIOError:
            trio.lowlevel.spawn_system_task(self.send, data)
        except OSError:
            self.lose()

    async def send(self, data: bytes) -> None:
        """Send a job."""
        try:
            while not self.is_gone:
                try:
                    self._jobs.send(data)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._jobs)
                else:
                    return
        except (OSError, trio.ClosedResourceError):
            pass
        self.lose()

    async def hear(self) -> None:
        """Hear what the closer's threads say, until it is gone."""
        self._is_heard = True
        try:
            with contextlib.suppress(OSError, trio.ClosedResourceError):
                while not self.is_gone and await self._hear_one():
                    pass
            self.lose()
        finally:
            self._is_heard = False

    async def _hear_one(self) -> bool:
        await trio.lowlevel.wait_readable(self._jobs)
        data = self._jobs.recv(MAX_MESSAGE) if not self.is_gone else b""
        if data:
            answer = json.loads(data)
            if "closed" in answer:
                self.held.give_back(answer["closed"])
            job = self.asked.pop(answer["number"], None)
            if job is not None:
                job.answer = answer
                job.done.set()
        return bool(data)

    def lose(self) -> None:
        """Note that the closer is gone, and with it all that it held."""
        if not self.is_gone:
            log.error("the closer is gone: until there is another one, no client can send a descriptor")
        self.end()

    def end(self) -> None:
        """Let the closer end, as soon as all that it holds is closed. Nothing can be asked any more."""
        if not self.is_gone:
            self.is_gone = True
            self._calls.close()
            if self._is_heard:
                trio.lowlevel.notify_closing(self._jobs)
            self._jobs.close()
        for job in self.asked.values():
            job.done.set()
        self.asked.clear()


class Closer:
    """The daemon's end of all closers, of which there is one at a time. `start` it while there is one thread.

    `run` has to run for whoever waits for `look` and `close`.
    """

    def __init__(self, forker: socket.socket) -> None:
        self._forker: Final = forker
        closer_process.ask(forker)
        began = closer_process.answer(forker)
        if began is None:
            raise OSError(errno.EAGAIN, "there can be no more processes")
        self._line = self._begin(0, *began)

    def _begin(self, generation: int, pid: int, calls: socket.socket, jobs: socket.socket) -> _Line:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        held = Pool("descriptors that memfs looks at or closes", most, frozenset({0, os.geteuid()}))
        return _Line(held, generation, pid, calls, jobs)

    @classmethod
    def start(cls) -> Closer:
        """Fork the processes."""
        return cls(closer_process.start())

    @property
    def pid(self) -> int:
        """The process."""
        return self._line.pid

    def stop(self) -> None:
        """Let it end, as soon as all that it holds is closed. Nothing can be asked any more."""
        self._line.end()
        self._forker.close()

    async def run(self) -> None:
        """Hear what is answered, and have another closer in the place of one that is gone, until cancelled."""
        while True:
            await self._line.hear()
            began = None
            while began is None:
                await trio.sleep(_BETWEEN)  # whatever killed it may go on
                try:
                    closer_process.ask(self._forker)
                    await trio.lowlevel.wait_readable(self._forker)
                    began = closer_process.answer(self._forker)
                except closer_process.NoForker:
                    log.critical("there can be no other closer: no client can send a descriptor until the next mount")
                    return
            self._line = self._begin((self._line.generation + 1) % _GENERATIONS, *began)
            log.warning("there is another closer")

    @property
    def held(self) -> Pool:
        """The descriptors in the closer, by user."""
        return self._line.held

    def receive(self, user: int, sock: socket.socket, size: int, flags: int) -> Datagram:
        """Receive a user's datagram; all descriptors that come with it are the closer's, and here they are numbers.

        Raises OSError as recvmsg(2), BlockingIOError if there is nothing, EMFILE if the user has its share of the
        closer's descriptors, and EIO if the closer has died, and it is not known what has become of the datagram.
        """
        data, _, got, address = sock.recvmsg(size, 0, flags | _MSG_PEEK)
        if not got & _MSG_CTRUNC:
            sock.recv(1)
            return data, [], got, address
        got &= ~_MSG_CTRUNC
        line = self._line
        line.held.check(user)
        try:
            answer, _ = line.call({"do": "receive", "flags": flags}, sock.fileno())
        except NoCloser:
            sock.recv(1)
            return data, [], got | _MSG_CTRUNC, address
        if "errno" in answer:
            raise OSError(answer["errno"], "the process that receives descriptors has none left")
        numbers = array.array(_INTS, map(line.number, answer["fds"]))
        line.held.take(user, len(numbers))
        return data, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers.tobytes())], got | answer["flags"], address

    def close_connection(self, sock: socket.socket) -> bool:
        """Have the closer close a connection of ours, which may wait for what lies in its queue.

        Returns whether it does; then nothing remembers it here, however long that takes.
        """
        try:
            user = PeerCredentials.of(sock).uid
            fd = self._line.call({"do": "take"}, sock.fileno())[0]["fd"]
        except OSError:
            return False
        if fd < 0:
            return False
        sock.close()  # it is not the last one
        self._line.held.take(user)
        self._line.send_now({"do": "close", "user": user, "fd": fd})
        return True

    def fetch(self, number: int) -> int:
        """Return a descriptor here of a memory file that the closer has. Raises OSError(EINVAL) if it is not one."""
        line, fd = self._find(number)
        answer, fds = line.call({"do": "fetch", "fd": fd})
        if not fds:
            raise OSError(answer["errno"], "the content must come from a memfd that is sealed against shrinking")
        return fds[0]

    async def look(self, user: int, number: int) -> dict[str, str]:
        """Return what /proc says of a descriptor (fdinfo), and its "device" ("major:minor"). Raises OSError.

        It may take as long as its user likes.
        """
        line, fd = self._find(number)
        answer = await line.ask({"do": "look", "user": user, "fd": fd})
        if answer is None:
            raise NoCloser
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        info: dict[str, str] = answer["info"]
        return info

    async def close(self, user: int, number: int) -> None:
        """Close a descriptor; returns when it is closed, perhaps never. It is, also if cancelled then."""
        with contextlib.suppress(NoCloser):
            line, fd = self._find(number)
            await line.ask({"do": "close", "user": user, "fd": fd})

    def _find(self, number: int) -> tuple[_Line, int]:
        """Return the closer that has a descriptor, and its number there. Raises NoCloser if that is gone."""
        generation, fd = number >> _FD_BITS, number & (1 << _FD_BITS) - 1
        if generation != self._line.generation or self._line.is_gone:
            raise NoCloser
        return self._line, fd

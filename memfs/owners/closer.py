"""The closer: a process that takes in, looks at and closes the descriptors that strangers send.

close(2) may have to ask the filesystem behind a descriptor (FUSE_FLUSH), and that may be one that never answers. A
thread that waits for it cannot even be killed; one of the daemon would keep the daemon's descriptors open when
the daemon is killed, above all /dev/fuse, and everybody who uses the mount would wait for ever instead of being told
that it is dead. The same goes for /proc/self/fdinfo of an epoll that somebody polls. So descriptors of strangers never
are the daemon's: it looks at what a datagram is (MSG_PEEK), and where descriptors come with it, it has the closer
receive them. In the daemon they are the numbers that they have in the closer. The closer is forked before there is
anything worth holding, and holds nothing else: no rights, no mount, no connection longer than it takes to receive.

Its first thread receives, and does nothing that might take long. To look and to close there are a few threads for each
user, so a user's descriptors hold up that user. Content comes from memory files only (memfds), which ask nobody, and
those the closer hands on.

Without it (it was killed) descriptors that come are dropped by the kernel, which asks nobody, and their sender gets the
answer that there is no space for them.

Rejected: to get rid of what has come in without close(2) (dup2, exit and all else close in the same way); to hand on
what the daemon has received (it would still have to close its own).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import trio

from memfs import privileges
from memfs.contract.protocol.custody import Datagram
from memfs.contract.sys.fdinfo import fdinfo
from memfs.contract.sys.libc import device_of
from memfs.contract.sys.peer_credentials import PeerCredentials

log = logging.getLogger(__name__)

_THREADS: Final = 4  # for one user
_RETRY: Final = 500  # milliseconds, after there was no thread to be had
_TIMEOUT: Final = 5.0  # seconds for the closer to answer: it may have been stopped together with us
_MAX_MESSAGE: Final = 1024  # bytes
_MSG_PEEK: Final = int(socket.MSG_PEEK)
_MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)
_INTS: Final = "i"
_UNANSWERED: Final = 0  # the number of a job of which nobody waits for the end


class NoCloser(OSError):
    """EIO: the closer is gone."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the process that looks at descriptors is gone")


@dataclass(slots=True, eq=False)
class _Job:
    """What was asked of the closer, and what it has answered; None: it is gone."""

    done: trio.Event = field(default_factory=trio.Event)
    answer: dict[str, Any] | None = None


class Closer:
    """The daemon's end. `start` it while there is one thread, outside of an event loop."""

    def __init__(self, calls: socket.socket, jobs: socket.socket, pid: int) -> None:
        self.pid: Final = pid
        self._calls: Final = calls
        self._jobs: Final = jobs
        self._asked: Final[dict[int, _Job]] = {}
        self._last = 0
        self._is_read = False  # whether a task reads what comes of jobs
        self._is_gone = False
        calls.settimeout(_TIMEOUT)
        jobs.setblocking(False)

    @classmethod
    def start(cls) -> Closer:
        """Fork the process."""
        calls, its_calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        jobs, its_jobs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _be(its_calls, its_jobs)
        its_calls.close()
        its_jobs.close()
        return cls(calls, jobs, pid)

    def stop(self) -> None:
        """Let it end, as soon as all that it holds is closed. Nothing can be asked any more."""
        self._end()

    def receive(self, sock: socket.socket, size: int, ancillary: int, flags: int) -> Datagram:
        """Receive a datagram; descriptors that come with it are the closer's, and their numbers those that it has.

        Raises OSError as recvmsg(2), and BlockingIOError if there is nothing.
        """
        data, _, got, address = sock.recvmsg(size, 0, flags | _MSG_PEEK)
        if not got & _MSG_CTRUNC:
            sock.recv(1)
            return data, [], got, address
        got &= ~_MSG_CTRUNC
        try:
            answer, _ = self._call({"do": "receive", "ancillary": ancillary, "flags": flags}, sock.fileno())
        except NoCloser:
            sock.recv(1)
            return data, [], got | _MSG_CTRUNC, address
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array(_INTS, answer["fds"]).tobytes())
        return data, [rights], got | answer["flags"], address

    def close_connection(self, sock: socket.socket) -> bool:
        """Have the closer close a connection of ours, which may wait for what lies in its queue.

        Returns whether it does; then nothing remembers it here, however long that takes.
        """
        try:
            user = PeerCredentials.of(sock).uid
            fd = self._call({"do": "take"}, sock.fileno())[0]["fd"]
        except OSError:
            return False
        if fd < 0:
            return False
        sock.close()  # it is not the last one
        job = json.dumps({"do": "close", "user": user, "fd": fd, "number": _UNANSWERED}).encode()
        try:
            self._jobs.send(job)
        except BlockingIOError:
            trio.lowlevel.spawn_system_task(self._send, job)
        except OSError:
            self._lose()
        return True

    def fetch(self, fd: int) -> int:
        """Return a descriptor here of a memory file that the closer has. Raises OSError(EINVAL) if it is not one."""
        answer, fds = self._call({"do": "fetch", "fd": fd})
        if not fds:
            raise OSError(answer["errno"], "the content must come from a memfd that is sealed against shrinking")
        return fds[0]

    async def look(self, user: int, fd: int) -> dict[str, str]:
        """Return what /proc says of a descriptor (fdinfo), and its "device" ("major:minor"). Raises OSError.

        It may take as long as its user likes.
        """
        answer = await self._ask({"do": "look", "user": user, "fd": fd})
        if answer is None:
            raise NoCloser
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        info: dict[str, str] = answer["info"]
        return info

    async def close(self, user: int, fd: int) -> None:
        """Close a descriptor; returns when it is closed, perhaps never. It is, also if cancelled then."""
        await self._ask({"do": "close", "user": user, "fd": fd})

    def _call(self, request: dict[str, Any], *fds: int) -> tuple[dict[str, Any], list[int]]:
        """Have the closer's first thread do something immediately. Raises NoCloser."""
        if self._is_gone:
            raise NoCloser
        try:
            socket.send_fds(self._calls, [json.dumps(request).encode()], fds)
            data, got = self._answer()
        except OSError:
            data, got = b"", []
        if not data:
            self._lose()
            raise NoCloser
        for fd in got:
            os.set_inheritable(fd, False)
        return json.loads(data), got

    def _answer(self) -> tuple[bytes, list[int]]:
        """Return what the closer answers. Raises TimeoutError; if we stood still meanwhile, it has time once more."""
        began = time.monotonic()
        try:
            data, fds, _, _ = socket.recv_fds(self._calls, _MAX_MESSAGE, 1)
        except TimeoutError:
            if time.monotonic() - began < 1.5 * _TIMEOUT:
                raise
            data, fds, _, _ = socket.recv_fds(self._calls, _MAX_MESSAGE, 1)
        return data, fds

    async def _ask(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """Have a thread of the closer do something, and wait for what it says; None if it is gone."""
        self._last += 1
        number, asked = self._last, _Job()
        self._asked[number] = asked
        if not self._is_read and not self._is_gone:
            self._is_read = True
            trio.lowlevel.spawn_system_task(self._read)
        try:
            await self._send(json.dumps({**job, "number": number}).encode())
        except trio.Cancelled:
            self._asked.pop(number, None)
            raise
        await asked.done.wait()
        return asked.answer

    async def _send(self, data: bytes) -> None:
        try:
            while not self._is_gone:
                try:
                    self._jobs.send(data)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._jobs)
                else:
                    return
        except (OSError, trio.ClosedResourceError):
            pass
        self._lose()

    async def _read(self) -> None:
        """Read what the closer's threads say."""
        try:
            with contextlib.suppress(OSError, trio.ClosedResourceError):
                while not self._is_gone and await self._read_one():
                    pass
            self._lose()
        finally:
            self._is_read = False

    async def _read_one(self) -> bool:
        await trio.lowlevel.wait_readable(self._jobs)
        data = self._jobs.recv(_MAX_MESSAGE) if not self._is_gone else b""
        if data:
            answer = json.loads(data)
            job = self._asked.pop(answer["number"])
            job.answer = answer
            job.done.set()
        return bool(data)

    def _lose(self) -> None:
        """Note that the closer is gone, and with it all that it held."""
        if not self._is_gone:
            log.error("the closer is gone: no client can send a descriptor any more")
        self._end()

    def _end(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._calls.close()
            if self._is_read:
                trio.lowlevel.notify_closing(self._jobs)
            self._jobs.close()
        for job in self._asked.values():
            job.done.set()
        self._asked.clear()


# -- the process -------------------------------------------------------------------------------------------------------


def _be(calls: socket.socket, jobs: socket.socket) -> NoReturn:
    """Be the closer, until the daemon is gone."""
    try:
        _hold_nothing_but(calls, jobs)
        _serve(calls, jobs)
    finally:
        os._exit(0)


def _hold_nothing_but(calls: socket.socket, jobs: socket.socket) -> None:
    """Give up all else that was the daemon's, its rights included, and what signals mean to it."""
    with open("/proc/self/comm", "w") as name:  # for ps(1)
        name.write("memfs-closer")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, calls.fileno(), jobs.fileno()}:
        with contextlib.suppress(OSError):  # that with which the directory was read
            os.close(fd)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(number, signal.SIG_IGN)  # it ends with the daemon
    privileges.drop(setuid_helper=False, keep=frozenset())


def _serve(calls: socket.socket, jobs: socket.socket) -> None:
    hands = _Hands(jobs)
    poll = select.poll()
    for each in (calls, jobs):
        poll.register(each, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll(_RETRY if hands.is_short else None)]
        hands.start_threads()
        if calls.fileno() in ready:
            data, fds, _, _ = socket.recv_fds(calls, _MAX_MESSAGE, 1)
            if not data:
                return
            _answer(calls, json.loads(data), fds)
        if jobs.fileno() in ready:
            data = jobs.recv(_MAX_MESSAGE)
            if not data:
                return
            hands.do(json.loads(data))


def _answer(calls: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    if request["do"] == "fetch":
        try:
            fcntl.fcntl(request["fd"], fcntl.F_GET_SEALS)  # which only memory files have
        except OSError:
            calls.send(json.dumps({"errno": errno.EINVAL}).encode())
        else:
            socket.send_fds(calls, [b"{}"], [request["fd"]])
        return
    if request["do"] == "take":
        calls.send(json.dumps({"fd": fds[0] if fds else -1}).encode())
        return
    (connection,) = fds
    received = array.array(_INTS)
    with socket.socket(fileno=connection) as sock:  # the daemon has it as well
        try:
            _, ancillary, flags, _ = sock.recvmsg(1, request["ancillary"], request["flags"])
        except OSError:
            ancillary, flags = [], 0
    for _, _, data in ancillary:
        received.frombytes(data[: len(data) - len(data) % received.itemsize])
    calls.send(json.dumps({"fds": list(received), "flags": flags & _MSG_CTRUNC}).encode())


@dataclass(slots=True)
class _Queue:
    """What is to be done for a user, and how many threads do it."""

    jobs: deque[dict[str, Any]] = field(default_factory=deque)
    threads: int = 0


class _Hands:
    """The threads that do what may take long."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers: Final = answers
        self._lock: Final = threading.Lock()
        self._users: Final[dict[int, _Queue]] = {}
        self.is_short = False  #: whether there are jobs for which there was no thread

    def do(self, job: dict[str, Any]) -> None:
        """Have a thread do it."""
        with self._lock:
            queue = self._users.setdefault(job["user"], _Queue())
            queue.jobs.append(job)
        self._start_thread(job["user"])

    def start_threads(self) -> None:
        """Try again what there was no thread for."""
        if self.is_short:
            self.is_short = False
            for user in list(self._users):
                self._start_thread(user)

    def _start_thread(self, user: int) -> None:
        with self._lock:
            queue = self._users.get(user)
            if queue is None or not queue.jobs or queue.threads >= _THREADS:
                return
            queue.threads += 1
        try:
            threading.Thread(target=self._work, args=[user, queue], daemon=True).start()
        except RuntimeError:  # Python's for EAGAIN
            with self._lock:
                queue.threads -= 1
            self.is_short = True

    def _work(self, user: int, queue: _Queue) -> None:
        while True:
            with self._lock:
                if not queue.jobs:
                    queue.threads -= 1
                    if not queue.threads:
                        del self._users[user]
                    return
                job = queue.jobs.popleft()
            answer = {"number": job["number"], **_act(job)}
            if job["number"] != _UNANSWERED:
                self._answers.send(json.dumps(answer).encode())


def _act(job: dict[str, Any]) -> dict[str, Any]:
    fd = job["fd"]
    if job["do"] == "look":
        try:
            return {"info": {**fdinfo(fd), "device": device_of(fd)}}
        except OSError as error:
            return {"errno": error.errno}
    with contextlib.suppress(OSError):  # closed all the same (close(2))
        os.close(fd)
    return {}

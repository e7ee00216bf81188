"""The closer's process, and the one that it is forked by.

The closer's first thread receives, and does nothing that might take long. To look and to close there are a few threads
for each user, so a user's descriptors hold up that user. All descriptors of a message are received, however many are
wanted of it: one that does not fit is closed by the kernel, in recvmsg(2), and that may take as long as any close(2).

A process that may be killed has to be forked again, and the daemon, which by then has a mount, threads and clients, is
not one to fork. So it forks a process first that has nothing but the socket on which it is asked for a closer, and
forks one each time. Rejected: to execute Python anew (its files may be other ones by then, or out of reach).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from memfs import privileges
from memfs.contract.sys.fdinfo import fdinfo
from memfs.contract.sys.libc import device_of, set_thread_name

MAX_MESSAGE: Final = 4096  #: bytes
MOST_SENT: Final = 253  #: descriptors in one message: SCM_MAX_FD (linux/include/net/scm.h)
UNANSWERED: Final = 0  #: the number of a job of which nobody waits for the end

_THREADS: Final = 4  # for one user
_RETRY: Final = 500  # milliseconds, after there was no thread to be had
_MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)
_INTS: Final = "i"
_ANCILLARY: Final = socket.CMSG_SPACE(MOST_SENT * array.array(_INTS).itemsize)


def start() -> socket.socket:
    """Fork the process that forks closers, and return the socket on which it is asked for one (`ask`)."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            _hold_nothing_but(its, name="memfs-fork")
            _fork_closers(its)
        finally:
            os._exit(0)
    its.close()
    return ours


class NoForker(OSError):
    """ECONNRESET: the process that forks closers is gone."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the process that forks closers is gone")


def ask(forker: socket.socket) -> None:
    """Ask for a closer. Raises NoForker."""
    try:
        forker.send(b"fork")
    except OSError as error:
        raise NoForker from error


def answer(forker: socket.socket) -> tuple[int, socket.socket, socket.socket] | None:
    """Return the PID of the closer that was asked for, and its sockets: of calls and of jobs. Raises NoForker.

    None: there can be no more processes, or descriptors.
    """
    try:
        data, fds, _, _ = socket.recv_fds(forker, MAX_MESSAGE, 2)
    except OSError:
        data, fds = b"", []
    if not data:
        raise NoForker
    if len(fds) != 2:
        for fd in fds:
            os.close(fd)
        return None
    for fd in fds:
        os.set_inheritable(fd, False)
    calls, jobs = (socket.socket(fileno=fd) for fd in fds)
    return int(data), calls, jobs


def _fork_closers(asked: socket.socket) -> None:
    """Fork a closer each time that one is asked for, until the daemon is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for one
    while asked.recv(MAX_MESSAGE):
        calls, its_calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        jobs, its_jobs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with calls, its_calls, jobs, its_jobs:
            try:
                pid = os.fork()
            except OSError:
                asked.send(b"0")
                continue
            if pid == 0:
                try:
                    _hold_nothing_but(its_calls, its_jobs, name="memfs-closer")
                    _serve(its_calls, its_jobs)
                finally:
                    os._exit(0)
            socket.send_fds(asked, [str(pid).encode()], [calls.fileno(), jobs.fileno()])


def _hold_nothing_but(*sockets: socket.socket, name: str) -> None:
    """Give up all else that was the daemon's, its rights included, and what signals mean to it."""
    set_thread_name(name)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *(each.fileno() for each in sockets)}:
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
            data, fds, _, _ = socket.recv_fds(calls, MAX_MESSAGE, 1)
            if not data:
                return
            _answer(calls, json.loads(data), fds)
        if jobs.fileno() in ready:
            data = jobs.recv(MAX_MESSAGE)
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
    if not fds:  # there is no descriptor left even for the connection
        calls.send(json.dumps({"fds": [], "errno": errno.EMFILE}).encode())
        return
    (connection,) = fds
    received = array.array(_INTS)
    with socket.socket(fileno=connection) as sock:  # the daemon has it as well
        try:
            _, ancillary, flags, _ = sock.recvmsg(1, _ANCILLARY, request["flags"])
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
    return {"closed": job["user"]}

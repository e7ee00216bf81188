"""Serving descriptors of KVM's over a socket: `serve`.

Each connection is a task, which answers one call after the other; a VMM that does not read its answers, or whose call
takes long, keeps nobody else waiting. A connection that says what is no call is closed, and so is what it stands for.

The socket is its owner's: whoever can connect can have VMs of any memory whose files it can open, and as many as
MOST_DESCRIPTORS allows.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import Counter
from contextlib import suppress
from typing import Final

import trio

from kvmsim import ioctls
from kvmsim.backing import StoreGone
from kvmsim.service.capabilities import check_extension
from kvmsim.service.descriptors import close_in_thread
from kvmsim.service.machines import ServedVm
from kvmsim.service.run_page import SIZE
from kvmsim.service.target import Handler, Target
from kvmsim.service.wire import INTERRUPT, MAX_DATAGRAM, MAX_FDS, Answer, Call, WireError
from kvmsim.vm_type import VmType
from memfs.contract.sys.peer_credentials import PeerCredentials
from memfs.contract.sys.rights import descriptors_in, space_for, to_rights

log = logging.getLogger(__name__)

MOST_DESCRIPTORS: Final = 4096  #: of KVM's, that one user can have
_FLAGS: Final = socket.MSG_CMSG_CLOEXEC
_RIGHTS_SIZE: Final = space_for(MAX_FDS)


class Service(Target):
    """What /dev/kvm is: it creates VMs. `vm_type`: theirs; `directory`: on a memfs, where guest_memfds are made."""

    def __init__(self, nursery: trio.Nursery, vm_type: VmType, directory: str | None) -> None:
        self._nursery: Final = nursery
        self._directory: Final = directory
        self._type: Final = vm_type
        self._created = 0
        self._open: Counter[int] = Counter()  # descriptors, by uid
        self.handlers: dict[int, Handler] = {
            ioctls.KVM_GET_API_VERSION: self._version,
            ioctls.KVM_CHECK_EXTENSION: self._check_extension,
            ioctls.KVM_GET_VCPU_MMAP_SIZE: self._mmap_size,
        }

    async def _version(self, _: Call, __: tuple[int, ...]) -> Answer:
        return Answer(ioctls.KVM_API_VERSION)

    async def _check_extension(self, call: Call, _: tuple[int, ...]) -> Answer:
        return check_extension(call, makes_guest_memfds=self._directory is not None)

    async def _mmap_size(self, _: Call, __: tuple[int, ...]) -> Answer:
        return Answer(SIZE)

    async def handle(self, call: Call, fds: tuple[int, ...]) -> tuple[Answer, tuple[int, ...], Target | None]:
        """Answer a call."""
        if call.number == ioctls.KVM_CREATE_VM:
            if call.argument:
                raise OSError(errno.EINVAL, "there is one type of VM here, 0")
            self._created += 1
            vm = ServedVm(f"kvmsim-{os.getpid()}-vm-{self._created}", self._type, self._directory)
            return Answer(), (), vm
        return await super().handle(call, fds)

    def accept(self, sock: trio.socket.SocketType) -> None:
        """Serve a connection to the socket. One that is too many is closed."""
        with suppress(OSError):
            uid = PeerCredentials.of(sock).uid
            if self._open[uid] < MOST_DESCRIPTORS:
                self.serve(sock, self, uid)
                return
            log.warning("uid %d has %d descriptors open, and gets no more", uid, MOST_DESCRIPTORS)
        sock.close()

    def serve(self, sock: trio.socket.SocketType, target: Target, uid: int) -> None:
        """Have a socket stand for something from now on."""
        self._open[uid] += 1
        target.opened()
        if isinstance(target, ServedVm):
            self._nursery.start_soon(target.live)
        self._nursery.start_soon(self._serve, sock, target, uid)

    async def _serve(self, sock: trio.socket.SocketType, target: Target, uid: int) -> None:
        try:
            await _Session(sock, target, self, uid).serve()
        except WireError as error:
            log.warning("a VMM of uid %d is cut off: %s", uid, error)
        except OSError as error:  # it has gone
            log.info("a VMM of uid %d: %s", uid, error)
        finally:
            sock.close()
            target.closed()
            self._open[uid] -= 1
            if not self._open[uid]:
                del self._open[uid]

    def descriptor(self, target: Target, uid: int) -> int:
        """Return a descriptor that stands for something, to be sent. Raises OSError(EMFILE)."""
        if self._open[uid] >= MOST_DESCRIPTORS:
            raise OSError(errno.EMFILE, f"one user can have {MOST_DESCRIPTORS} descriptors")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.serve(trio.socket.from_stdlib_socket(ours), target, uid)
        return theirs.detach()


class _Session:
    """One connection."""

    def __init__(self, sock: trio.socket.SocketType, target: Target, service: Service, uid: int) -> None:
        self._socket: Final = sock
        self._target: Final = target
        self._service: Final = service
        self._uid: Final = uid
        self._ended: WireError | None = None
        self._has_gone = False

    async def serve(self) -> None:
        """Answer calls until the other end is closed. Raises WireError, OSError."""
        while not self._has_gone and (incoming := await self._receive()) is not None:
            call, fds = incoming
            try:
                if call.number == INTERRUPT:  # KVM_RUN has returned meanwhile
                    continue
                answer, rights = await self._answer(call, fds)
            finally:
                await close_in_thread(fds)
            try:
                if self._ended is not None:
                    raise self._ended
                await self._send(answer, rights)
            finally:
                await close_in_thread(rights)

    async def _answer(self, call: Call, fds: tuple[int, ...]) -> tuple[Answer, tuple[int, ...]]:
        answer: Answer | None = None
        rights: tuple[int, ...] = ()
        async with trio.open_nursery() as nursery:
            if call.number == ioctls.KVM_RUN:
                nursery.start_soon(self._watch)
            answer, rights = await self._handle(call, fds)
            nursery.cancel_scope.cancel()
        return answer, rights

    async def _handle(self, call: Call, fds: tuple[int, ...]) -> tuple[Answer, tuple[int, ...]]:
        try:
            answer, rights, another = await self._target.handle(call, fds)
            if another is not None:
                try:
                    rights = (self._service.descriptor(another, self._uid), *rights)
                except OSError:
                    another.opened()
                    another.closed()
                    await close_in_thread(rights)
                    raise
        except OSError as error:
            log.debug("ioctl %#x: %s", call.number, error)
            return Answer(-1, errno=error.errno or errno.EIO), ()
        except StoreGone as error:
            log.warning("ioctl %#x: %s", call.number, error)
            return Answer(-1, errno=errno.EIO), ()
        except Exception:
            log.exception("ioctl %#x", call.number)
            return Answer(-1, errno=errno.EIO), ()
        return answer, rights

    async def _watch(self) -> None:
        """While KVM_RUN runs: be there for what interrupts it."""
        while True:
            try:
                incoming = await self._receive()
                if incoming is not None:
                    await close_in_thread(incoming[1])
                    if incoming[0].number != INTERRUPT:
                        raise WireError("a second call before the first is answered")
            except (WireError, OSError) as error:
                self._ended = error if isinstance(error, WireError) else WireError(str(error))
                incoming = None
            self._target.interrupt()
            if incoming is None:
                self._has_gone = True
                return

    async def _receive(self) -> tuple[Call, tuple[int, ...]] | None:
        """Return the next call; None at the end."""
        data, ancillary, flags, _ = await self._socket.recvmsg(MAX_DATAGRAM + 1, _RIGHTS_SIZE, _FLAGS)
        fds = tuple(descriptors_in(ancillary))
        try:
            if not data:
                if fds:
                    await close_in_thread(fds)
                return None
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise WireError(f"more than {MAX_FDS} descriptors, or {MAX_DATAGRAM} bytes")
            return Call.parse(data), fds
        except WireError:
            await close_in_thread(fds)
            raise

    async def _send(self, answer: Answer, rights: tuple[int, ...]) -> None:
        await self._socket.sendmsg([answer.pack()], to_rights(rights))


async def serve(listener: socket.socket, vm_type: VmType, directory: str | None = None) -> None:
    """Serve a listening socket, for ever. `directory`: on a memfs, where guest_memfds are made."""
    async with trio.open_nursery() as nursery:
        service = Service(nursery, vm_type, directory)
        accepting = trio.socket.from_stdlib_socket(listener)
        while True:
            try:
                sock, _ = await accepting.accept()
            except OSError as error:  # EMFILE among them
                log.warning("a VMM could not connect: %s", error)
                await trio.sleep(0.1)
                continue
            service.accept(sock)

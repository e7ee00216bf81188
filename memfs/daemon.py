"""One mounted memfs: puts the parts together, runs them, and takes them apart again, whichever way it ends.

    kernel -- Channel -- Names, Requests ----------\\
                  \\----- pyfuse3 -- Operations ----- Tree, OpenFiles, File -- Backing
    owners -- Server -- Registry ------------------/

It ends when the filesystem is unmounted (the kernel closes the channel) or on SIGINT or SIGTERM (we unmount). In both
cases the socket is removed and every file's memory is freed.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

from memfs import privileges
from memfs.contract.aio.nurseries import open_flat_nursery
from memfs.contract.logs import fields
from memfs.contract.units import SECTORS_PER_PAGE, pages_to_bytes
from memfs.fuse.channel import Channel
from memfs.fuse.mount import FuseMount, MountError, mount_fuse
from memfs.fuse.names import Names
from memfs.fuse.observers import Observers
from memfs.fuse.operations import Operations
from memfs.fuse.passthrough import Passthrough, Wanted
from memfs.fuse.requests import Requests
from memfs.options import MountOptions, RemountOptions
from memfs.owners.admission import Clients
from memfs.owners.listener import listening
from memfs.owners.registry import Registry
from memfs.owners.server import Server
from memfs.store.backing import Backing, open_backing
from memfs.store.file import File
from memfs.store.seals import format_seals
from memfs.tree.inode import Ino
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import Tree
from memfs.tree.xattrs import Control, Xattrs

log = logging.getLogger(__name__)
#: what SIGUSR1 asks for is logged at whatever level
state_log = logging.getLogger("memfs.state")
state_log.setLevel(logging.INFO)

_MOST_FILES: Final = 1000  # in the log; the rest is only counted
_LEAST_BYTES: Final = 64  # that each of those takes in JSON


@dataclass(frozen=True, slots=True)
class Settings:
    """What a memfs is started with. `mountpoint` is absolute and real; `socket_path` absolute."""

    mountpoint: str
    socket_path: str
    options: MountOptions
    check: bool = False  #: verify every invariant before the end (for tests)


async def serve(settings: Settings, ready: Callable[[list[str]], None]) -> None:
    """Mount and serve until unmounted or told to stop.

    `ready` is called when the mount answers, with sentences about what could not be had. Raises MountError or
    OptionError if it cannot be mounted; then nothing is left behind.
    """
    _raise_descriptor_limit()
    backing, no_tmpfs = open_backing(settings.options)
    options = settings.options
    with listening(settings.socket_path, options.socket_mode, options.socket_group) as listener:
        mount = mount_fuse(settings.mountpoint, settings.options)
        notes = [note for note in (mount.note, no_tmpfs) if note]
        unable = None
        if backing.accounted:
            unable = "files live on memfds, whose limit memfs can only keep if every write goes by it"
        passthrough = Passthrough(mount.fuse_fd, Wanted(settings.options.passthrough), unable)
        memfs = _Memfs(settings, mount, backing, passthrough)
        try:
            privileges.drop(setuid_helper=mount.note is not None)
            await memfs.run(listener, lambda: ready(notes))
        finally:
            try:
                if settings.check:
                    memfs.check()
            except AssertionError as error:
                log.critical("broken invariant: %s", error)
                raise
            finally:
                memfs.close()


class _Memfs:
    """The parts of one mount."""

    def __init__(self, settings: Settings, mount: FuseMount, backing: Backing, passthrough: Passthrough) -> None:
        options = settings.options
        self._settings: Final = settings
        self._mount: Final = mount
        self._backing: Final = backing
        self._passthrough: Final = passthrough
        self._tree: Final = Tree(self._new_file, options.nr_inodes, options.mode, options.uid, options.gid)
        self._handles: Final = OpenFiles(self._tree, passthrough)
        control = Control(settings.socket_path, self.describe_in, self.remount)
        self._attributes: Final = Xattrs(self._tree, control)
        self._registry: Final = Registry(self._tree, options.notify_timeout)
        self._clients: Final = Clients(options.socket_mode, options.socket_group)

    def _new_file(self, ino: Ino, seals: int) -> File:
        return File(self._backing, ino, seals)

    async def run(self, listener: socket.socket, ready: Callable[[], None]) -> None:
        """Serve the mount and the socket, until either the mount or we are to end."""
        initialized, unmounted = trio.Event(), trio.Event()
        handlers = {
            **Names(self._tree, self._handles, self._attributes, self._backing).handlers,
            **Requests(self._tree, self._handles).handlers,
        }
        observers = Observers(self._tree, self._passthrough, initialized.set)
        channel = Channel(self._mount.fuse_fd, handlers, observers.observers)
        observers.max_message = channel.max_message
        noatime = self._settings.options.atime == "noatime"
        operations = Operations(self._tree, self._handles, self._attributes, self._backing, noatime=noatime)
        pyfuse3.init(operations, f"/dev/fd/{channel.hand_over()}", options=set())
        server = Server(listener, self._clients, self._registry, self._tree, self._mount.device)
        try:
            async with open_flat_nursery() as nursery:
                nursery.start_soon(pyfuse3.main)
                nursery.start_soon(channel.run, unmounted.set)
                nursery.start_soon(self._unmount_on_signal, unmounted, server)
                nursery.start_soon(self._log_state_on_signal)
                nursery.start_soon(self._backing.reaper.run)
                nursery.start_soon(self._end, unmounted, server, nursery.cancel_scope)
                await initialized.wait()
                if self._passthrough.wanted is Wanted.ON and not self._passthrough.in_force:
                    raise MountError(f"option passthrough=on: {self._passthrough.why_not}")
                await _in_a_thread(self._mount.attach)
                nursery.start_soon(server.run)
                ready()
        finally:
            self._mount.unmount()
            self._handles.backing_ids = None
            pyfuse3.terminate()
            pyfuse3.close(unmount=False)
            channel.close()

    def describe(self) -> dict[str, Any]:
        """The state of the mount, for `memfs stat`."""
        owners = self._registry.owners.values()
        return {
            "mountpoint": self._settings.mountpoint,
            "socket": self._settings.socket_path,
            "backing": self._backing.kind,
            "guest-sealed files": "never swapped" if self._backing.guest_pinned else "may be swapped",
            "passthrough": "on" if self._passthrough.in_force else f"off: {self._passthrough.why_not}",
            "size": pages_to_bytes(self._backing.total_pages),
            "used": pages_to_bytes(self._backing.total_pages - self._backing.free_pages),
            "nr_inodes": self._tree.space.nr_inodes,
            "inodes used": len(self._tree.inodes),
            "open handles": len(self._handles),
            "owners": len(owners),
            "registered files": sum(len(owner.registrations) for owner in owners),
            "owners fenced": self._registry.fenced,
            "connections": self._clients.connections,
            "turned away": self._clients.rejected,
            "acknowledged": sum(owner.acknowledged for owner in owners),
            "pending": len(self._registry.outstanding),
        }

    def describe_in(self, most_bytes: int) -> str:
        """The state as JSON, with as many owners, files and notifications as fit into so many bytes."""
        most = most_bytes // _LEAST_BYTES
        while True:
            text = json.dumps({**self.describe(), "registry": self._registry.describe(most)})
            if len(text) <= most_bytes or not most:
                return text
            most //= 2

    async def _log_state_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for _ in signals:
                self._log_state()

    def _log_state(self) -> None:
        state_log.info(
            "state", extra=fields(**{name.replace(" ", "_"): value for name, value in self.describe().items()})
        )
        for owner in self._registry.describe():
            files, pending = owner.pop("files"), owner.pop("pending")
            state_log.info("owner", extra=fields(**owner))
            for each in files:
                state_log.info("registered file", extra=fields(owner=owner["owner"], **each))
            for each in pending:
                state_log.info("pending notification", extra=fields(owner=owner["owner"], **each))
        for inode in islice(self._tree.files(), _MOST_FILES):
            stat = inode.stat()
            state_log.info(
                "file",
                extra=fields(
                    ino=inode.ino,
                    size=stat.size,
                    pages=stat.blocks // SECTORS_PER_PAGE,
                    links=stat.nlink,
                    holds=inode.holds,
                    seals=format_seals(inode.file.seals) or "none",
                ),
            )

    def remount(self, options: RemountOptions) -> None:
        """Change size and number of inodes. Raises OSError(EINVAL), changing nothing, below what is in use."""
        if options.nr_inodes is not None:
            self._tree.space.check_limit(options.nr_inodes)
        if options.size is not None:
            self._backing.resize(options.size)
        if options.nr_inodes is not None:
            self._tree.space.set_limit(options.nr_inodes)

    async def _unmount_on_signal(self, unmounted: trio.Event, server: Server) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                log.info("%s: unmounting", signal.Signals(number).name)
                await server.end()  # so that nothing waits for an owner any more
                await _in_a_thread(self._mount.unmount)  # fusermount3 may ask us something before it lets go
                unmounted.set()  # or hidden, while somebody still uses it: that one gets errors from now on

    async def _end(self, unmounted: trio.Event, server: Server, scope: trio.CancelScope) -> None:
        await unmounted.wait()
        await server.end()
        scope.cancel()

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        self._tree.check()
        self._handles.check()
        self._registry.check()
        # Who has a file open through passthrough may go on writing while we count, even after the end of the mount.
        free = self._backing.free_pages
        in_files = sum(inode.stat().blocks for inode in self._tree.inodes.values()) // SECTORS_PER_PAGE
        least, most = sorted(self._backing.total_pages - now for now in (free, self._backing.free_pages))
        assert least <= in_files <= most, f"{least} to {most} pages in use, {in_files} in files"

    def close(self) -> None:
        """Free everything."""
        for owner in list(self._registry.owners.values()):
            self._registry.end(owner)
        self._handles.close()
        self._tree.close()
        self._backing.close()


async def _in_a_thread(function: Callable[[], None]) -> None:
    """Call what may block in a thread, however many of those that there may be are held up."""
    await trio.to_thread.run_sync(function, limiter=trio.CapacityLimiter(1))


def _raise_descriptor_limit() -> None:
    """Every file in use takes a descriptor here: as many as we may have, and as root as the kernel can."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except ValueError:  # Python's for EPERM: without CAP_SYS_RESOURCE only the soft limit can be raised
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def default_socket_path(mountpoint: str) -> str:
    """Where owners find the memfs mounted on a directory: NAME.sock, NAME being the path with dashes for slashes.

    >>> default_socket_path("/mnt/guest")  # doctest: +SKIP
    '/run/memfs/mnt-guest.sock'

    Without root it is in the user's runtime directory ($XDG_RUNTIME_DIR), or a directory of the user's in /tmp.
    """
    return _run_path(mountpoint, "sock")


def default_log_path(mountpoint: str) -> str:
    """Where a memfs that runs in the background logs: NAME.log beside the default socket."""
    return _run_path(mountpoint, "log")


def _run_path(mountpoint: str, suffix: str) -> str:
    if os.geteuid() == 0:
        directory = "/run/memfs"
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        directory = os.path.join(runtime, "memfs")
    else:
        directory = f"/tmp/memfs-{os.geteuid()}"
    return os.path.join(directory, f"{mountpoint.strip('/').replace('/', '-')}.{suffix}")

r"""One mounted memfs: puts the parts together, runs them, and takes them apart again, whichever way it ends.

    kernel -- Channel -- handlers (fuse/opcodes.py) -- Tree, OpenFiles, File -- Backing
                  \----- pyfuse3                     /
    owners -- Server -- Registry --------------------/

It ends when the filesystem is unmounted (the kernel closes the channel) or on a signal (we unmount; signals.py). In
both cases the socket is removed and every file's memory is freed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final, TypeVar

import pyfuse3
import trio

from memfs import __version__, garbage, memory_limit
from memfs.contract import logs
from memfs.contract.aio.nurseries import open_flat_nursery
from memfs.contract.aio.threads import NoThread
from memfs.contract.logs import fields
from memfs.contract.sizes import shown_bytes
from memfs.contract.sys.mount_changes import mount_changes
from memfs.contract.units import SECTORS_PER_PAGE, pages_to_bytes
from memfs.fuse.channel import Channel
from memfs.fuse.files import FileHandlers
from memfs.fuse.init import Init
from memfs.fuse.ioctl import IoctlHandlers
from memfs.fuse.mount import MountError
from memfs.fuse.names import NameHandlers
from memfs.fuse.opcodes import who_answers
from memfs.fuse.operations import Operations
from memfs.fuse.page_cache import PageCache
from memfs.fuse.passthrough import Passthrough, Wanted
from memfs.fuse.xattrs import XattrHandlers
from memfs.keeper import Worker, keep
from memfs.loaded import Loaded
from memfs.opening import Opened
from memfs.options import RemountOptions
from memfs.owners import closer_process
from memfs.owners.admission import Clients
from memfs.owners.closer import Closer
from memfs.owners.registry import Registry
from memfs.owners.server import Server
from memfs.service_manager import ServiceManager
from memfs.signals import Meaning, receiving
from memfs.state.journal import NO_JOURNAL, Journal
from memfs.store.file import File
from memfs.store.seals import format_seals
from memfs.survival import Survival, dying
from memfs.tree.access_times import AccessTimes
from memfs.tree.holdings import Holdings
from memfs.tree.inode import Ino, RegularFile
from memfs.tree.open_files import OpenFiles
from memfs.tree.rebuild import keys_of
from memfs.tree.tree import Tree
from memfs.tree.xattrs import Control, Xattrs

log = logging.getLogger(__name__)
#: what SIGUSR1 asks for is logged at whatever level
state_log = logging.getLogger("memfs.state")
state_log.setLevel(logging.INFO)

_T = TypeVar("_T")

_RETRY: Final = 0.5  # seconds, after there was no descriptor or no thread
_MOST_FILES: Final = 1000  # in the log; the rest is only counted


def run(open_it: Callable[[], Opened], ready: Callable[[list[str]], None], not_kept: Iterable[int] = ()) -> None:
    """Open a mount, and serve it until unmounted, or until a signal asks for the end.

    `ready` is called when the mount answers, with sentences about what could not be had. The descriptors that are
    `not_kept` are for that. Raises what `open_it` raises, UpgradeError, and MountError if it cannot be mounted as asked
    for; then nothing is left behind. If the mount is to survive, this process becomes the keeper, and exits in the end.
    """
    forker = closer_process.start()
    opened = open_it()
    garbage.collect_no_more(young=not opened.settings.check)
    worker = keep(opened, not_kept) if opened.no_survival is None else Worker()
    closer = Closer(forker)
    trio.run(_serve, opened, worker, closer, ready)


async def _serve(opened: Opened, worker: Worker, closer: Closer, ready: Callable[[list[str]], None]) -> None:
    with receiving(logs_to_file=logs.is_to_file()) as received:
        try:
            with dying(opened, worker):
                memfs = _Memfs(opened, worker, closer)
            try:
                with dying(opened, worker):
                    await memfs.run(lambda: ready(memfs.notes(opened.notes)), received)
            finally:
                opened.listener.close()  # before files are freed: that may take long, and the name may be wanted
                try:
                    if opened.settings.check:
                        with _broken_is_logged():
                            memfs.check()
                finally:
                    memfs.close()
        finally:
            opened.listener.close()
            closer.stop()


class _Memfs:
    """The parts of one mount."""

    def __init__(self, opened: Opened, worker: Worker, closer: Closer) -> None:
        options = opened.settings.options
        self._settings: Final = opened.settings
        self._opened: Final = opened
        self._worker: Final = worker
        self._closer: Final = closer
        self._socket_path: Final = opened.listener.path
        self._mount: Final = opened.mount
        self._backing: Final = opened.backing
        unable = None
        if self._backing.accounted:
            unable = "files live on memfds, whose limit memfs can only keep if every write goes by it"
        self._passthrough: Final = Passthrough(self._mount.fuse_fd, Wanted(options.passthrough), unable)
        self._kept: Final = opened.journal()
        self._journal: Final[Journal] = self._kept or NO_JOURNAL
        nr_inodes = min(options.nr_inodes, self._backing.most_files)
        self._tree: Final = Tree(
            *(self._new_file, nr_inodes, options.mode, options.uid, options.gid),
            inode32=options.inode32,
            journal=self._journal,
            is_known=self._mount.is_known,
        )
        self._holdings: Final = Holdings.of_process(self._backing.most_files if self._backing.accounted else 0)
        self._open_files: Final = OpenFiles(self._tree, self._passthrough, self._holdings, self._journal)
        self._page_cache: Final = PageCache(self._mount.notify)
        control = Control(self._socket_path, self.describe_in, self.remount, self._locks, options.pagesize)
        self._access_times: Final = AccessTimes()
        self._memory_limit: Final = memory_limit.MemoryLimit.of_this_process()
        self._xattrs: Final = Xattrs(self._tree, control)
        self._registry: Final = Registry(
            *(self._tree, options.notify_timeout, self._mount.invalidate_attributes, self._holdings, self._journal)
        )
        self._manager: Final = ServiceManager()
        listener = opened.listener
        self._clients: Final = Clients(listener.mode, listener.group, self._holdings.descriptors)
        self._survival: Final = Survival(
            *(opened, worker, self._kept, self._tree, self._open_files, self._page_cache, self._access_times),
            self._registry.coming_back,
        )

    def _new_file(self, ino: Ino, seals: int) -> File:
        return File(self._backing, ino, seals, journal=self._journal, held=True)

    async def run(self, ready: Callable[[], None], received: AsyncIterator[tuple[Meaning, str]]) -> None:
        """Serve the mount and the socket, until either the mount or we are to end."""
        before = self._survival.take_over()
        initialized, unmounted = trio.Event(), trio.Event()
        files = FileHandlers(self._tree, self._open_files, self._backing, self._page_cache)
        xattrs = XattrHandlers(self._xattrs)
        idmapped = os.geteuid() == 0

        def negotiated() -> None:
            if before is not None:
                self._passthrough.try_it(self._open_files.backing_ids)
                self._survival.serves()
            initialized.set()

        table = who_answers(
            Init(self._passthrough, xattrs, negotiated, idmapped=idmapped, journal=self._journal),
            NameHandlers(self._tree, self._open_files, files, self._xattrs, self._access_times),
            files,
            xattrs,
            IoctlHandlers(self._tree, self._open_files, self._mount.invalidate_attributes),
        )
        channel = Channel(self._mount.fuse_fd, table, self._journal)
        pyfuse3.init(Operations(), f"/dev/fd/{channel.hand_over()}", options=set())
        server = Server(
            *(self._opened.listener.socket, self._clients, self._closer, self._registry, self._tree),
            self._mount.device,
        )
        try:
            with dying(self._opened, self._worker):
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(pyfuse3.main)
                    nursery.start_soon(channel.run, unmounted.set, before)
                    nursery.start_soon(self._obey, received, unmounted, server)
                    nursery.start_soon(self._backing.run)
                    nursery.start_soon(self._closer.run)
                    nursery.start_soon(self._end, unmounted, server, Loaded(), nursery.cancel_scope)
                    await initialized.wait()
                    if before is None:  # before that the kernel has not heard of passthrough
                        self._passthrough.try_it()
                        self._set_access_times(self._settings.options.atime, self._settings.options.diratime)
                    if self._passthrough.wanted is Wanted.ON and not self._passthrough.in_force:
                        raise MountError(f"option passthrough=on: {self._passthrough.why_not}")
                    await _in_a_thread(self._mount.attach)
                    self._worker.attached()
                    await nursery.start(self._follow_access_times)
                    nursery.start_soon(server.run)
                    nursery.start_soon(self._manager.run, self._status)
                    if before is not None:
                        nursery.start_soon(self._survival.clear_up)
                        nursery.start_soon(self._registry.coming_back.wait)
                    if self._worker.is_first:
                        ready()
                    nursery.start_soon(self._survival.watch_keeper)
        finally:
            self._mount.unmount()
            self._passthrough.end()
            pyfuse3.terminate()
            pyfuse3.close(unmount=False)
            channel.close()

    def notes(self, so_far: Iterable[str | None]) -> list[str]:
        """Return what people are to be told when it is mounted: what could not be had, and what it means."""
        limit = memory_limit.warning(self._memory_limit.lowest, pages_to_bytes(self._backing.total_pages))
        return [note for note in (*so_far, self._passthrough.note, limit) if note]

    def describe(self) -> dict[str, Any]:
        """Return the state of the mount, for `memfs stat`: sizes in bytes, the rest numbers and names."""
        owners = self._registry.owners.values()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mountpoint": self._settings.mountpoint,
            "options": self._settings.options.said,
            "socket": self._socket_path,
            "backing": self._backing.kind,
            "huge": self._settings.options.tmpfs_options.get("huge", "never"),
            "guest_swappable": not self._backing.guest_pinned,
            "guest_page_size": self._backing.guest_granule,
            **self._backing.describe(),
            "passthrough": self._passthrough.in_force,
            "no_passthrough_because": self._passthrough.why_not,
            "size": pages_to_bytes(self._backing.total_pages),
            "used": pages_to_bytes(self._backing.used_pages),
            "memory_limit": self._memory_limit.lowest,
            "survives": self._opened.no_survival is None,
            "no_survival_because": self._opened.no_survival,
            "generation": self._survival.generation,
            "restarts": self._survival.restarts,
            "last_outage": self._survival.outage,
            "keeper_socket": self._opened.successors.path if self._opened.successors is not None else None,
            "nr_inodes": self._tree.space.nr_inodes,
            "inodes_used": self._tree.inodes.count,
            "open_handles": len(self._open_files),
            "descriptors": self._holdings.descriptors.size,
            "descriptors_used": self._holdings.descriptors.used,
            "page_maps": self._holdings.page_maps.size,
            "page_maps_used": self._holdings.page_maps.used,
            "owners": len(owners),
            "registered_files": sum(len(owner.registrations) for owner in owners),
            "owners_fenced": self._registry.fenced,
            "connections": self._clients.connections,
            "rejected": self._clients.rejected,
            "acknowledged": sum(owner.acknowledged for owner in owners),
            "pending": len(self._registry.outstanding),
            "notifications": self._registry.outstanding.describe(),
            "conversions": self._backing.converted.describe(),
            "freed_backlog": pages_to_bytes(self._backing.reaper.pages),
        }

    def _status(self) -> str:
        """Return the state in a few words, for a service manager."""
        used, size = (pages_to_bytes(each) for each in (self._backing.used_pages, self._backing.total_pages))
        return f"{shown_bytes(used)} of {shown_bytes(size)} in use, {len(self._registry.owners)} owners"

    async def describe_in(self, most_bytes: int, user: int) -> str:
        """Return the state as JSON for a user, with as many owners, files and notifications as fit.

        Whose connection an owner is sees it; root and the user that mounted see all of them.
        """
        pools = self._holdings.descriptors, self._holdings.page_maps
        state = {**self.describe(), **{f"your_{pool.what.replace(' ', '_')}": pool.of(user) for pool in pools}}
        left = most_bytes - len(json.dumps({**state, "registry": []}))
        sees_all = user in (0, os.geteuid())
        registry = await self._registry.describe(left, user, lambda owner: sees_all or owner.user == user)
        return json.dumps({**state, "registry": registry})

    def _locks(self, inode: RegularFile) -> str:
        return json.dumps(self._registry.describe_locks(inode))

    async def _log_state(self) -> None:
        state_log.info("state", extra=fields(**self.describe()))
        for owner in await self._registry.describe(sys.maxsize, "log"):
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
        """Change size and number of inodes. Raises OSError, changing nothing: EINVAL below what is in use."""
        if options.nr_inodes is not None:
            self._tree.space.check_limit(options.nr_inodes)
        if options.size is not None:
            self._backing.resize(options.size)
            self._survival.size_changed()
        if options.nr_inodes is not None:
            self._tree.set_limit(min(options.nr_inodes, self._backing.most_files))

    async def _obey(self, received: AsyncIterator[tuple[Meaning, str]], unmounted: trio.Event, server: Server) -> None:
        """Do what signals ask for."""
        async for meaning, name in received:
            match meaning:
                case Meaning.LOG_STATE:
                    await self._log_state()
                case Meaning.REOPEN_LOG:
                    self._manager.reloading()
                    logs.reopen()
                    self._manager.reloaded()
                case Meaning.END:
                    self._survival.leave_to_next_keeper()
                    log.info("%s: unmounting", name)
                    await server.end()  # so that nothing waits for an owner any more
                    with contextlib.suppress(NoThread):  # then it is done here, at the end of `run`
                        await _in_a_thread(self._mount.unmount)  # fusermount3 may ask us something before it lets go
                    unmounted.set()  # or hidden, while somebody still uses it: that one gets errors from now on

    async def _follow_access_times(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Set access times as the mount says, whenever mount(8) mounts it again with other options.

        The kernel does not tell a FUSE server of that, but it tells everybody of changes of mounts.
        """
        with mount_changes() as changed:  # now, while there are descriptors
            task_status.started()
            await self._see_access_times()
            while True:
                await changed()
                await self._see_access_times()

    async def _see_access_times(self) -> None:
        said = await self._mounted_access_times()
        if said not in (None, (self._access_times.atime, self._access_times.diratime)):
            assert said is not None
            self._set_access_times(*said)

    async def _mounted_access_times(self) -> tuple[str, bool] | None:
        while True:
            try:
                return await _in_a_thread(self._mount.access_times)
            except OSError as error:  # no descriptor or thread is left: others go on without the latest access times
                log.warning("the options of the mount cannot be read now: %s", error.strerror)
                await trio.sleep(_RETRY)

    def _set_access_times(self, atime: str, diratime: bool) -> None:
        self._access_times.atime, self._access_times.diratime = atime, diratime
        if self._passthrough.in_force:  # otherwise the daemon reads, and not the program
            self._backing.set_access_times(atime)

    async def _end(self, unmounted: trio.Event, server: Server, loaded: Loaded, scope: trio.CancelScope) -> None:
        await unmounted.wait()
        self._manager.stopping()
        await server.end()
        if self._settings.check:
            with _broken_is_logged():
                garbage.check()  # now: what the mount itself consists of need not be freed one by one
                loaded.check()
        scope.cancel()

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        self._tree.check()
        self._open_files.check()
        self._page_cache.check()
        if self._kept is not None:
            self._kept.check(keys_of(self._tree) | self._open_files.keys | self._registry.coming_back.keys)
        self._registry.check()
        self._holdings.check()
        # A program that has a file open in passthrough mode may write while we count, even after the end of the mount.
        before = self._backing.used_pages
        in_files = sum(inode.stat().blocks for inode in self._tree.inodes.all()) // SECTORS_PER_PAGE
        least, most = sorted((before, self._backing.used_pages))
        assert least <= in_files <= most, f"{least} to {most} pages in use, {in_files} in files"

    def close(self) -> None:
        """Free everything."""
        for owner in list(self._registry.owners.values()):
            self._registry.end(owner)
        self._open_files.close()
        self._tree.close()
        self._backing.close()
        if self._kept is not None:
            self._kept.close()


@contextlib.contextmanager
def _broken_is_logged() -> Iterator[None]:
    """Log what an AssertionError says, which goes on."""
    try:
        yield
    except AssertionError as error:
        log.critical("broken invariant: %s", error)
        raise


async def _in_a_thread(function: Callable[[], _T]) -> _T:
    """Call what may block in a thread, however many of those that there may be are held up. Raises NoThread."""
    try:
        return await trio.to_thread.run_sync(function, limiter=trio.CapacityLimiter(1))
    except RuntimeError as error:  # Python's for EAGAIN
        raise NoThread from error

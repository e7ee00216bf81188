"""What a memfs is made of that outlives the process which serves it: the backing, the mount and the socket.

It is opened first, with root's rights, and then they are given up. If the mount is to survive (keeper.py), one process
after the other serves the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from memfs import privileges
from memfs.contract import logs
from memfs.fuse.mount import FuseMount, mount_fuse
from memfs.options import MountOptions, OptionError
from memfs.owners.listener import Listener, ListenError, listen, listen_on, prepare_directory
from memfs.run_files import default_paths
from memfs.state.journal import LogJournal
from memfs.store.backing import Backing
from memfs.store.open_backing import open_backing
from memfs.store.tmpfs_backing import TmpfsBacking
from memfs.upgrade import Predecessor

log = logging.getLogger(__name__)

_TOO_FEW_RIGHTS: Final = "files live on memfds, which end with the process"
_TOO_OLD: Final = "before Linux 6.15 page maps are memfds, which end with the process"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a memfs is started with. `mountpoint` is absolute and real; `socket_paths` are absolute."""

    mountpoint: str
    socket_paths: Sequence[str]  #: the first that can be had counts
    options: MountOptions
    handed_over: int | None = None  #: a descriptor of the socket, if there is one already
    log_beside_socket: bool = False  #: whether the log's name goes by the socket's
    check: bool = False  #: verify every invariant before the end (for tests)


@dataclass(slots=True)
class Opened:
    """A mount that nobody serves yet, or no longer."""

    settings: Settings
    backing: Backing
    listener: Listener
    mount: FuseMount
    no_survival: str | None  #: why it does not survive its process, a sentence for people; None if it does
    notes: list[str] = field(default_factory=list)  #: what could not be had
    successors: Listener | None = None  #: where a keeper of other code may ask for it
    predecessor: Predecessor | None = None  #: the keeper that is to hand it over
    was_served: bool = False  #: whether other processes have served it
    is_stored: bool = False  #: whether a service manager has it as well, and goes on with it when all processes die

    def journal(self) -> LogJournal | None:
        """Open the journal in which the state is; None if it does not survive. Raises UnreadableState."""
        if self.no_survival is not None:
            return None
        assert isinstance(self.backing, TmpfsBacking)
        assert self.backing.state is not None
        return LogJournal(self.backing.state.root)

    def close(self) -> None:
        """Unmount, and remove the sockets."""
        self.listener.close()
        if self.successors is not None:
            self.successors.close()
        self.mount.unmount()


def open_mount(settings: Settings) -> Opened:
    """Mount, open the backing and listen; keep no more rights than it takes to serve that.

    Raises MountError, ListenError, OptionError or OSError, and then nothing is left behind. Blocking.
    """
    options = settings.options
    backing, about_backing = open_backing(options)
    no_survival = _no_survival(options, backing)
    if settings.handed_over is None:
        listener = listen(settings.socket_paths, options.socket_mode, options.socket_group)
    else:
        listener = listen_on(settings.handed_over)
    try:
        if settings.log_beside_socket:
            logs.prefer(f"{os.path.splitext(listener.path)[0]}.log")
        mount = mount_fuse(settings.mountpoint, options)
    except BaseException:
        listener.close()
        raise
    notes = [*([mount.note] if mount.note else []), *about_backing]
    successors = listen_to_successors(settings.mountpoint) if no_survival is None else None
    privileges.drop(setuid_helper=mount.note is not None)
    return Opened(settings, backing, listener, mount, no_survival, notes, successors)


def listen_to_successors(mountpoint: str) -> Listener | None:
    """Listen for keepers of other code, which only root may be. None, which is logged: there can be no upgrade."""
    paths = default_paths(mountpoint, "keeper")
    try:
        prepare_directory(os.path.dirname(paths[0]))
        return listen(paths, 0o600, None)
    except (ListenError, OSError) as error:
        log.warning("no upgrade while it is mounted: %s", error)
        return None


def _no_survival(options: MountOptions, backing: Backing) -> str | None:
    """Return why a mount will not survive its process; None if it will. Raises OptionError."""
    if options.survive == "off":
        return "switched off (survive=off)"
    why = None
    if not isinstance(backing, TmpfsBacking):
        why = _TOO_FEW_RIGHTS
    elif backing.state is None:
        why = _TOO_OLD
    if why is not None and options.survive == "on":
        raise OptionError(f"option survive=on: {why}")
    return why

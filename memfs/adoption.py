"""A mount that another process has made is gone on with: by a keeper of other code, or after all its processes died.

It consists of six descriptors, whatever there is on it. What else is to be known of it is written beside the state, in
a file that is called `mount`; and what was known of its files is in the log (state/log.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from memfs import __version__, privileges, service_manager
from memfs.fuse.mount import FuseMount, is_connected
from memfs.handed_over import KEPT
from memfs.opening import Opened, Settings, listen_to_successors
from memfs.options import MountOptions, OptionError
from memfs.owners.listener import Listener, ListenError, listen
from memfs.state.log import UnreadableState, check_readable
from memfs.store.tmpfs_backing import Roots, State, TmpfsBacking
from memfs.upgrade import Predecessor

_FILE: Final = "mount"
_FORMAT: Final = 1
_MOST_BYTES: Final = 1 << 20


class AdoptionError(Exception):
    """Why a mount cannot be gone on with: a sentence. Nothing has changed."""


def descriptors(opened: Opened) -> list[int]:
    """Return the descriptors of a mount that survives, in the order of KEPT."""
    roots = _roots(opened)
    return [
        *(opened.mount.fuse_fd, roots.ordinary, roots.guests, roots.state.root, roots.state.read_only),
        opened.listener.socket.fileno(),
    ]


def _roots(opened: Opened) -> Roots:
    assert isinstance(opened.backing, TmpfsBacking)
    assert opened.backing.roots is not None
    return opened.backing.roots


def write_down(opened: Opened) -> None:
    """Write beside the state what is to be known of a mount besides. Raises OSError."""
    roots, settings, mount = _roots(opened), opened.settings, opened.mount
    written = {
        "format": _FORMAT,
        "version": __version__,
        "mountpoint": settings.mountpoint,
        "options": settings.options.said,
        "socket": opened.listener.path,
        "handed_over": opened.listener.handed_over,
        "log_beside_socket": settings.log_beside_socket,
        "check": settings.check,
        "mount_id": mount.mount_id,
        "device": mount.device,
        "note": mount.note,
        "guest_pinned": roots.guest_pinned,
    }
    partial = f"{_FILE}.new"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=roots.state.root)
    with os.fdopen(fd, "w") as file:
        json.dump(written, file)
    os.replace(partial, _FILE, src_dir_fd=roots.state.root, dst_dir_fd=roots.state.root)


def adopt(fds: Sequence[int], predecessor: Predecessor | None = None) -> Opened:
    """Return the mount that consists of these descriptors, in the order of KEPT; they are its own then.

    `predecessor` is a keeper that has it still, and is to hand it over. No more rights are kept than it takes to serve
    the mount. Raises AdoptionError.
    """
    fuse, ordinary, guests, state, read_only, listener = fds
    try:
        check_readable(state)
        written = _read(state)
        options = MountOptions.parse(written["options"])
        socket_path = written["socket"]
        settings = Settings(
            written["mountpoint"],
            [socket_path],
            options,
            log_beside_socket=written["log_beside_socket"],
            check=written["check"],
        )
        mount = FuseMount(settings.mountpoint, fuse, written["mount_id"], written["device"], note=written["note"])
        roots = Roots(ordinary, guests, State(state, read_only), guest_pinned=written["guest_pinned"])
        size, tmpfs_options = options.size, options.tmpfs_options
        backing = TmpfsBacking(size, tmpfs_options, options.pagesize, options.min_size or 0, roots)
        if os.path.lexists(socket_path):
            listening = Listener.of_descriptor(socket_path, listener, handed_over=written["handed_over"])
        else:  # somebody has removed it
            listening = listen([socket_path], options.socket_mode, options.socket_group)
            os.close(listener)  # now: by its number `adopt_kept` sees that it is another one
    except (UnreadableState, OptionError, ListenError) as error:
        raise AdoptionError(str(error)) from error
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise AdoptionError(f"what is written of the mount cannot be read: {error!r}") from error
    if predecessor is not None:
        successors: Listener | None = Listener.of_descriptor(*predecessor.listener)
    else:
        successors = listen_to_successors(settings.mountpoint)
    privileges.drop(setuid_helper=mount.note is not None)
    opened = Opened(settings, backing, listening, mount, None, successors=successors, predecessor=predecessor)
    opened.was_served = True
    return opened


def adopt_kept(kept: Mapping[str, int]) -> Opened | None:
    """Return the mount whose descriptors a service manager has kept. None, and they are let go, if it has ended.

    Raises AdoptionError.
    """
    if not kept:
        return None
    if kept.keys() >= set(KEPT) and is_connected(kept[KEPT[0]]):
        opened = adopt([kept[name] for name in KEPT])
        opened.is_stored = True
        if (listener := opened.listener.socket.fileno()) != kept[KEPT[-1]]:
            service_manager.forget(KEPT[-1])
            service_manager.store(KEPT[-1], listener, watched=False)
        return opened
    for name, fd in kept.items():
        service_manager.forget(name)
        os.close(fd)
    return None


def store(opened: Opened) -> None:
    """Give the descriptors of a mount to the service manager, if there is one."""
    for name, fd in zip(KEPT, descriptors(opened), strict=True):
        opened.is_stored = service_manager.store(name, fd, watched=name == KEPT[0])


def _read(state: int) -> Mapping[str, Any]:
    with os.fdopen(os.open(_FILE, os.O_RDONLY | os.O_CLOEXEC, dir_fd=state)) as file:
        written: dict[str, Any] = json.loads(file.read(_MOST_BYTES))
    if written["format"] != _FORMAT:
        raise AdoptionError(f"the mount was written down in format {written['format']}; this memfs reads {_FORMAT}")
    return written

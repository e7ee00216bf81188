"""`memfs doctor`: what memfs can do on this machine, for this user, and what is missing for the rest.

What depends on the kernel, on rights and on the container is found out by mounting a small memfs and asking it, since
no version number says it. The rest is read where the kernel says it.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from memfs.cli.command import CommandError, Commands
from memfs.cli.mount import Mount, start
from memfs.cli.mounts import unmount
from memfs.cli.states import state_of
from memfs.contract.on_memfs import locate
from memfs.contract.sizes import format_size
from memfs.contract.sys.hugetlb import Pool, pool_sizes
from memfs.contract.terminal import printable
from memfs.options import MountOptions

_HELPER: Final = "/sbin/mount.fuse.memfs"
_MANY_FILES: Final = 100_000  # open at once


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one thing: whether it is there, and what that means or what to do."""

    name: str
    there: bool
    words: str
    needed: bool = False  #: nothing works without it


def add_to(commands: Commands) -> None:
    """Add the command to those of `memfs`."""
    parser = commands.add_parser("doctor", help="say what memfs can do here", description=_run.__doc__)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Say what memfs can do on this machine, for this user, and what is missing. Exit code 1: it cannot mount."""
    findings = list(examine())
    width = max(len(each.name) for each in findings)
    for each in findings:
        mark = "yes" if each.there else "NO " if each.needed else "no "
        print(f"{mark}  {each.name:{width}}  {printable(each.words)}")
    if not all(each.there for each in findings if each.needed):
        sys.exit(1)


def examine() -> Iterator[Finding]:
    """Yield what is found out, what is needed first."""
    yield _fuse()
    yield from _by_a_mount()
    yield Finding("mount(8) and fstab", os.access(_HELPER, os.X_OK), f"{_HELPER}; `make install` puts it there")
    helper = shutil.which("fusermount3")
    yield Finding("mount without root", helper is not None, helper or "install fusermount3 (Debian package fuse3)")
    yield _open_files()
    yield from _huge_pages()
    yield _userfaultfd()
    yield Finding("/dev/kvm", os.access("/dev/kvm", os.R_OK | os.W_OK), "kvmsim needs none; tests compare with it")


def _fuse() -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        what_to_do = "load the fuse module (modprobe fuse), or let this container have the device"
        return Finding("/dev/fuse", False, f"{error.strerror}: {what_to_do}", needed=True)
    return Finding("/dev/fuse", True, f"Linux {os.uname().release}", needed=True)


def _by_a_mount() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory(prefix="memfs-doctor-", ignore_cleanup_errors=True) as directory:
        mountpoint = os.path.join(os.path.realpath(directory), "mnt")
        os.mkdir(mountpoint)
        options = MountOptions.parse(f"size=1m,survive=auto,socket={mountpoint}.sock")
        try:
            start(Mount(mountpoint, options, log_file=f"{mountpoint}.log"))
        except CommandError as error:
            yield Finding("mount", False, str(error), needed=True)
            return
        try:
            with locate(mountpoint) as mount:
                state = state_of(mount)
        finally:
            unmount(mountpoint, lazy=True)
        yield Finding("mount", True, f"files lie on {state['backing']}", needed=True)
        yield _of(state, "passthrough", "no_passthrough_because", "the kernel reads, writes and maps files itself")
        yield _of(state, "survives", "no_survival_because", "a mount goes on when its daemon is killed")
        pinned = not state["guest_swappable"]
        yield Finding(
            "private pages stay",
            pinned,
            "never swapped" if pinned else "may be swapped, unless root mounts, on Linux 6.4",
        )


def _of(state: dict[str, Any], name: str, why_not: str, words: str) -> Finding:
    return Finding(name, bool(state[name]), words if state[name] else str(state[why_not]))


def _open_files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if os.geteuid() == 0:
        limit = int(Path("/proc/sys/fs/nr_open").read_text())
    what_to_do = "" if limit >= _MANY_FILES else "; raise fs.nr_open, or `ulimit -Hn` of an ordinary user"
    return Finding("many open files", limit >= _MANY_FILES, f"{limit} at once{what_to_do}")


def _huge_pages() -> Iterator[Finding]:
    with suppress(OSError):
        said = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
        chosen = said.partition("[")[2].partition("]")[0]
        yield Finding("huge=", chosen != "deny", f"transparent_hugepage/shmem_enabled is {chosen}")
    for size in pool_sizes():
        pool = Pool(size)
        what_to_do = "" if pool.pages else f"; fill the pool by writing to {pool.setting}"
        yield Finding(f"pagesize={format_size(size)}", pool.pages > 0, f"{pool.pages} pages in the pool{what_to_do}")


def _userfaultfd() -> Finding:
    try:
        anybody = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    except OSError:
        return Finding("userfaultfd", False, "the kernel is built without CONFIG_USERFAULTFD")
    may = anybody or os.geteuid() == 0 or os.access("/dev/userfaultfd", os.R_OK | os.W_OK)
    return Finding("userfaultfd", may, "of mappings in passthrough mode" if may else "vm.unprivileged_userfaultfd is 0")

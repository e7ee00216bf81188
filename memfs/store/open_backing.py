"""Opening the backing that the mount options ask for, with a sentence for whatever of that cannot be had.

A backing raises OSError as the kernel does; what is wrong with which option, and what to do, is said here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from memfs.contract.sizes import format_size
from memfs.contract.sys.hugetlb import Pool, pool_sizes
from memfs.options import MountOptions, OptionError
from memfs.store.backing import Backing
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.tmpfs_backing import TmpfsBacking

_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def open_backing(options: MountOptions) -> tuple[Backing, list[str]]:
    """Open the backing that is asked for, or memfds where there can be no tmpfs; with sentences for people.

    Raises OptionError for an option that cannot be had.
    """
    backing, notes = _open(options)
    if not backing.guest_pinned:
        notes.append("private memory can be swapped: that it stays takes backing=tmpfs, root of the host and Linux 6.4")
    return backing, notes


def _open(options: MountOptions) -> tuple[Backing, list[str]]:
    asked_for = [*(["pagesize"] if options.pagesize else []), *options.tmpfs_options]
    if options.backing == "memfd":
        if asked_for:
            raise OptionError(f"option {asked_for[0]} is for backing=tmpfs")
        return MemfdBacking(options.size), []
    if options.pagesize is not None and options.pagesize not in pool_sizes():
        sizes = ", ".join(map(format_size, pool_sizes())) or "none at all"
        raise OptionError(
            f"option pagesize={format_size(options.pagesize)}: this kernel has no such huge pages (but {sizes})"
        )
    try:
        backing = TmpfsBacking(options.size, options.tmpfs_options, options.pagesize, options.min_size or 0)
    except OSError as error:
        if error.filename == "min_size":
            raise OptionError(_too_small(options)) from error
        if error.filename in options.tmpfs_options:
            raise OptionError(f"option {error.filename}: this kernel's tmpfs does not take it") from error
        if asked_for:
            raise OptionError(f"option {asked_for[0]} needs CAP_SYS_ADMIN") from error
        reason = os.strerror(error.errno or 0)
        return MemfdBacking(options.size), [
            f"no detached tmpfs ({reason}): files live on memfds, and memfs keeps size="
        ]
    return backing, [*_about_pool(options), *_about_huge(options)]


def _too_small(options: MountOptions) -> str:
    """Say why there is no `min_size`, and how to make the pool larger."""
    assert options.pagesize is not None
    assert options.min_size is not None
    pool, wanted = Pool(options.pagesize), -(-options.min_size // options.pagesize)
    size, pages, available = format_size(options.pagesize), pool.pages, pool.available
    enough = pages + max(0, wanted - available)
    return (
        f"option min_size={format_size(options.min_size)} takes {wanted} pages of {size}; the pool has {pages}, of "
        f"which {available} can be had (echo {enough} > {pool.setting})"
    )


def _about_pool(options: MountOptions) -> list[str]:
    """Say that no guest-sealed file can have memory, if it is so."""
    if options.pagesize is None or (pool := Pool(options.pagesize)).available or options.min_size:
        return []
    size = format_size(options.pagesize)
    return [f"the pool of {size} pages is empty, so guest-sealed files get no memory (echo N > {pool.setting})"]


def _about_huge(options: MountOptions) -> list[str]:
    """Say that there are no huge pages on a tmpfs, or more than wanted, if the kernel is set so."""
    try:
        chosen = re.search(r"\[(\w+)\]", _SHMEM_ENABLED.read_text())
    except OSError:  # a kernel without: then its tmpfs has refused the option
        return []
    setting = chosen[1] if chosen else ""
    if setting == "deny" and (huge := options.tmpfs_options.get("huge")):
        return [f"option huge={huge} has no effect: {_SHMEM_ENABLED} says deny"]
    if setting == "force" and options.pagesize is None:
        return [f"guest-sealed files take more memory than is counted: {_SHMEM_ENABLED} says force"]
    return []

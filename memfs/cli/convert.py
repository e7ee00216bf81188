"""The command `memfs convert`: pages change sides between two files, by one call for up to 512 ranges of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from memfs.cli.progress import progress
from memfs.contract.conversion import MAX_RANGES, convert, key_of
from memfs.contract.on_memfs import OnMemfs, naming
from memfs.contract.page_ranges import PageRanges
from memfs.contract.sizes import format_size
from memfs.contract.units import PageRange, pages_to_bytes

_BY_FALLOCATE: Final = (
    "conversion in one operation is not supported here (no passthrough, or an old owner): fallocate the pages in one "
    "file, and punch them out of the other (fallocate -p)"
)


def convert_files(
    shared: OnMemfs, private: OnMemfs, ranges: Sequence[PageRange], *, to_private: bool, preserve: bool
) -> None:
    """Convert ranges of pages, with a progress bar, which of a single call shows only that it goes on.

    Raises OSError as `memfs.contract.conversion.convert` says; what calls before had converted stays.
    """
    with naming(private.path):
        try:
            together = PageRanges.of(ranges)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from error
    fds = [file.open(os.O_RDWR) for file in (shared, private)]
    try:
        _check(shared, private, fds, together)
        with naming(shared.path):
            key = key_of(fds[0])
        listed = list(together)
        total = pages_to_bytes(together.pages)
        calls = -(-len(listed) // MAX_RANGES)
        with progress("convert", total if calls > 1 else None) as bar, naming(private.path):
            for first in range(0, len(listed), MAX_RANGES):
                part = listed[first : first + MAX_RANGES]
                try:
                    convert(fds[1], key, part, to_private=to_private, preserve=preserve)
                except OSError as error:
                    raise OSError(error.errno, _sentence(error, preserve=preserve)) from error
                bar(sum(pages.nbytes for pages in part))
    finally:
        for fd in fds:
            os.close(fd)


def _check(shared: OnMemfs, private: OnMemfs, fds: Sequence[int], ranges: PageRanges) -> None:
    """Say what the kernel's EINVAL and EBADF would leave open."""
    for file, fd, is_private in zip((shared, private), fds, (False, True), strict=True):
        if ("guest" in file.get("user.memfs.seals").split(",")) is not is_private:
            is_what = "is not guest-sealed, as private memory is" if is_private else "is guest-sealed: private memory"
            raise OSError(errno.EINVAL, is_what, file.path)
        if os.fstat(fd).st_size < pages_to_bytes(ranges.end):
            raise OSError(errno.EINVAL, f"ends before byte {pages_to_bytes(ranges.end)}", file.path)
    granule = os.fstat(fds[1]).st_blksize
    for pages in ranges:
        if pages.offset % granule or pages.nbytes % granule:
            asked, size = f"{pages.offset}:{pages.nbytes}", format_size(granule)
            raise OSError(errno.EINVAL, f"{asked} is not whole huge pages: give multiples of {size}", private.path)
    if len({os.fstat(fd).st_dev for fd in fds}) > 1:
        raise OSError(errno.EXDEV, f"lies on another memfs than {shared.path}", private.path)


def _sentence(error: OSError, *, preserve: bool) -> str:
    """Return what an errno of the call means, and what to do, where its own words leave that open."""
    if error.errno == errno.EPERM:
        why = "a seal or a flag of one of the files forbids it, or the files have different owners"
        allowed = "; --preserve needs a VM that owns the private file and allows it" if preserve else ""
        return f"{error.strerror}: {why}{allowed}"
    if error.errno == errno.EOPNOTSUPP and not preserve:
        return _BY_FALLOCATE
    return str(error.strerror)

"""Initial content: guest-sealed files are filled before their guests run, and not any more afterwards.

What is copied and how it is measured, store/measurement.py says.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os

import trio

from memfs.contract.aio.threads import Threads
from memfs.contract.units import ByteOffset, PageRange, page_ceil
from memfs.store.file import File


async def populate(file: File, pages: PageRange, source: int, start: ByteOffset) -> bytes:
    """Fill pages of a file with what is in a memfd, a descriptor of which is `source`, from byte `start` on.

    Returns the measurement so far, 48 bytes. Raises OSError: EINVAL if the file is not guest-sealed, for pages past its
    end, and if there is no such memfd; EBUSY if the guest has been launched; ENOSPC, and then nothing was allocated.
    Once begun it runs to its end: content that is there and was not measured would be a lie.
    """
    _check_source(source, start, pages.nbytes)
    async with file.locked():
        image = file.initial_image()
        if image.launched:
            raise OSError(errno.EBUSY, "the guest has been launched")
        if pages.end > page_ceil(ByteOffset(file.size)):
            raise OSError(errno.EINVAL, "past the end of the file")
        with trio.CancelScope(shield=True):
            allocated = await file.ensure_allocated(pages)
            try:
                copy = functools.partial(image.copy_in, pages, file.fd, source, start, file.granule)
                await Threads.here().run(copy)
            finally:  # they are there
                if file.owner is not None:
                    await file.owner.fallocate(allocated)
                image.populated()  # in the step in which it is answered
        return image.measurement


def launch(file: File) -> bytes:
    """Launch the guest: nothing can be populated any more. Call within `locked`.

    Returns the measurement, 48 bytes. Raises OSError(EINVAL) if the file is not guest-sealed.
    """
    return file.initial_image().launch()


def _check_source(fd: int, start: ByteOffset, length: int) -> None:
    """Raise OSError(EINVAL) unless a descriptor is of a memfd with these bytes, which it will keep.

    Asks nothing that a filesystem could take its time to answer: F_GET_SEALS is for memory only.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK:
        raise OSError(errno.EINVAL, "the content must come from a memfd that is sealed against shrinking")
    try:
        size = os.fstat(fd).st_size
        readable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
    except OSError:
        size, readable = 0, False
    if not readable or start + length > size:
        raise OSError(errno.EINVAL, f"no {length} bytes to read from byte {start} on")

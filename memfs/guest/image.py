"""What a guest-sealed file is filled with before its guest runs, and the measurement of it.

Nobody on the host can write to a guest-sealed file, so a guest's first memory (firmware, kernel) gets there in another
way: as TDX and SNP have it, the store copies it in and measures what it copied, until the guest is launched. After that
nothing more goes in. The measurement is

    SHA-384 over, for each page in the order they were populated:  u64 page index (little-endian), 4096 bytes of content

so whoever knows the image and the order can compute it, and a page that was put elsewhere, twice or not at all shows.
Pages that were allocated and not populated are zero and are not measured.

The content comes from a memfd, which unlike other files cannot make us wait, and which is sealed against shrinking, so
that all of it is there. What is hashed is our copy: who changes the memfd meanwhile changes both or neither.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from typing import Final

import numpy as np
import trio

from memfs.file import File
from memfs.units import PAGE_SIZE, ByteOffset, PageRange, page_ceil

_BLOCK: Final = 512  # pages that are copied at a time: no more than IOV_MAX
_RECORD: Final = np.dtype([("page", "<u8"), ("content", "V", PAGE_SIZE)])


class InitialImage:
    """One file's initial content, and whether that is final. It belongs to the file, as `File.image`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha384()
        self.launched = False

    @property
    def measurement(self) -> bytes:
        """SHA-384 of what was populated so far, 48 bytes."""
        return self._hash.digest()

    def copy_in(self, pages: PageRange, target: int, source: int, start: ByteOffset) -> None:
        """Copy pages that are allocated into a file, from byte `start` of another, and measure them. Blocks for long.

        `target` and `source` are descriptors.
        """
        records = np.empty(_BLOCK, _RECORD)
        memory = memoryview(records.view(np.uint8).data)
        size, first = _RECORD.itemsize, _RECORD.itemsize - PAGE_SIZE
        contents = [memory[at + first : at + size] for at in range(0, _BLOCK * size, size)]
        for block in pages.chunks(_BLOCK):
            buffers = contents[: len(block)]
            records["page"][: len(block)] = np.arange(block.start, block.end)
            read = os.preadv(source, buffers, start + block.offset - pages.offset)
            written = os.pwritev(target, buffers, block.offset)
            assert read == written == block.nbytes, f"{read} bytes read, {written} written of {block.nbytes}"
            self._hash.update(memory[: len(block) * size])


async def populate(file: File, pages: PageRange, source: int, start: ByteOffset) -> bytes:
    """Fill pages of a file with what is in a memfd, a descriptor of which is `source`, from byte `start` on.

    Returns the measurement so far, 48 bytes. Raises OSError: EINVAL if the file is not guest-sealed, for pages past its
    end, and if there is no such memfd; EBUSY if the guest has been launched; ENOSPC, and then nothing was allocated.
    Once begun it runs to its end: content that is there and was not measured would be a lie.
    """
    _check_source(source, start, pages.nbytes)
    async with file.locked():
        image = _image_of(file)
        if image.launched:
            raise OSError(errno.EBUSY, "the guest has been launched")
        if pages.end > page_ceil(ByteOffset(file.size)):
            raise OSError(errno.EINVAL, "past the end of the file")
        with trio.CancelScope(shield=True):
            await file.make_present(pages)
            try:
                await trio.to_thread.run_sync(image.copy_in, pages, file.fd, source, start)
            finally:  # they are there
                if file.owner is not None:
                    await file.owner.fallocate(pages)
        return image.measurement


def launch(file: File) -> bytes:
    """The guest begins to run: nothing can be populated any more. Call within `locked`.

    Returns the measurement, 48 bytes. Raises OSError(EINVAL) if the file is not guest-sealed.
    """
    image = _image_of(file)
    image.launched = True
    return image.measurement


def _image_of(file: File) -> InitialImage:
    if not file.guest:
        raise OSError(errno.EINVAL, "not guest-sealed")
    if file.image is None:
        file.image = InitialImage()
    return file.image


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

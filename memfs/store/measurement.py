"""What a guest-sealed file is filled with before its guest runs, and the measurement of it.

Nobody on the host can write to a guest-sealed file, so a guest's first memory (firmware, kernel) gets there in another
way: as TDX and SNP have it, the store copies it in and measures what it copied, until the guest is launched. After that
nothing more goes in. The measurement is

    SHA-384 over, for each page in the order they were populated:  u64 page index (little-endian), 4096 bytes of content

so whoever knows the image and the order can compute it, and a page that was put elsewhere, twice or not at all shows.
Pages that were allocated and not populated are zero and are not measured.

The content comes from a memfd, which unlike other files cannot make us wait, and which is sealed against shrinking, so
that all of it is there. What is hashed is our copy: who changes the memfd meanwhile changes both or neither.

When a file is populated and launched is said in owners/populate.py.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

import numpy as np

from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange

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

"""Traces of a program's memory accesses: read from valgrind's lackey, kept as .npz.

`valgrind --tool=lackey --trace-mem=yes PROGRAM` prints a line an access:

    I  04001a30,3       an instruction of 3 bytes was fetched
     L 1ffeffe7e0,8     8 bytes were loaded
     S 1ffeffe7d8,8     8 bytes were stored
     M 0421c7c8,4       4 bytes were loaded and stored again

Addresses are the program's; a guest has less memory than a program has address space. So the program's pages, in the
order of their addresses, are laid onto guest pages from gpa 0 on without gaps; an access that crosses a page becomes
two, and one of hundreds of bytes (fxsave stores 512) several. What remains is what matters to memory: which pages, in
which order, read or written.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from memfs.contract.units import PAGE_SIZE, Gpa

RECORD: Final = np.dtype([("gpa", "<u8"), ("size", "u1"), ("write", "?")])
MAX_ACCESS: Final = 1 << 14  #: bytes; XSAVE with all of AMX's state stores 11,008
_MAX_RECORD: Final = 255  # bytes
_CUT: Final = 128  # bytes: what is longer than a record becomes several of these
_LINE: Final = re.compile(r"(?:I | L| S| M) ([0-9a-fA-F]{1,16}),(\d{1,5})$")
_GLUED: Final = re.compile(r"(?:I | L| S| M) [0-9a-fA-F]{6,16},\d")
_FORMAT: Final = "kvmsim-trace-1"
_MAX_UNPACKED: Final = 2 << 30  # bytes; that is some 400 million accesses


class TraceError(ValueError):
    """A trace that cannot be used: one sentence."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A program's accesses. `records`: shape (n,), dtype RECORD, no record crosses a page, in program order."""

    records: npt.NDArray[np.void]
    command: str  #: what was traced
    glued: int = 0  #: lines of lackey's that were left out, since the program's output stands in them as well

    @property
    def memory_size(self) -> int:
        """How much guest memory it needs, in bytes."""
        return (int(self.records["gpa"].max()) // PAGE_SIZE + 1) * PAGE_SIZE if len(self.records) else 0

    def at(self, gpa: Gpa) -> Trace:
        """Return the same accesses to memory from a gpa on, the beginning of a page."""
        records = self.records.copy()
        records["gpa"] += np.uint64(gpa)
        return Trace(records, self.command, self.glued)

    def save(self, path: Path) -> None:
        """Write a .npz. Addresses are stored as 32-bit differences, which compress well."""
        gpas = self.records["gpa"].astype(np.int64)
        if len(gpas) and gpas.max() >= 1 << 31:
            raise TraceError("a trace of more than 2 GiB of memory cannot be saved")
        with open(path, "wb") as file:  # of a name without .npz, numpy would make another
            np.savez_compressed(
                file,
                format=_FORMAT,
                command=self.command,
                steps=np.diff(gpas, prepend=0).astype(np.int32),
                sizes=self.records["size"],
                writes=np.packbits(self.records["write"]),
            )

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a .npz that `save` wrote. Raises TraceError; OSError if it cannot be read at all."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as parts:
                _check_sizes(parts.zip)
                if str(parts["format"]) != _FORMAT:
                    raise TraceError("it is of another format")
                return cls(_assemble(parts["steps"], parts["sizes"], parts["writes"]), str(parts["command"]))
        except OSError:
            raise
        except TraceError as error:
            raise TraceError(f"{path}: not a trace: {error}") from error
        except Exception as error:  # numpy's and zipfile's, of which numpy's recommends to unpickle the file
            raise TraceError(f"{path}: not a trace; `kvmsim convert` makes one of what valgrind wrote") from error


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Reject what would take too much memory: a few kilobytes of zeros can be unpacked to more than there is."""
    if sum(member.file_size for member in archive.infolist()) > _MAX_UNPACKED:
        raise TraceError(f"it would take more than {_MAX_UNPACKED >> 20} MiB")


def _assemble(
    steps: npt.NDArray[np.int32], sizes: npt.NDArray[np.uint8], writes: npt.NDArray[np.uint8]
) -> npt.NDArray[np.void]:
    if [part.dtype.str for part in (steps, sizes, writes)] != ["<i4", "|u1", "|u1"]:
        raise TraceError("its parts are not what they should be")
    if steps.ndim != 1 or sizes.shape != steps.shape or writes.shape != ((len(steps) + 7) // 8,):
        raise TraceError("its parts do not fit together")
    gpas = np.cumsum(steps, dtype=np.int64)
    records = np.empty(len(steps), RECORD)
    records["gpa"], records["size"] = gpas, sizes
    records["write"] = np.unpackbits(writes, count=len(steps))
    if len(gpas) and (gpas.min() < 0 or sizes.min() == 0 or (gpas % PAGE_SIZE + sizes > PAGE_SIZE).any()):
        raise TraceError("an access is empty, negative or crosses a page")
    return records


def read_lackey(lines: Iterable[str], command: str = "") -> Trace:
    """Make a trace of lackey's output. Lines that are none of its (valgrind's ==, the program's own) are skipped.

    So are those in which an access and the program's output stand together, which are counted (`Trace.glued`). Raises
    TraceError if there is no access at all, or one that no processor makes.
    """
    addresses: list[int] = []
    sizes: list[int] = []
    writes: list[bool] = []
    glued = 0
    for number, line in enumerate(lines, 1):
        match = _LINE.match(line.rstrip("\n"))
        if not match:
            glued += _GLUED.search(line) is not None
            continue
        address, size = int(match[1], 16), int(match[2])
        if not 0 < size <= MAX_ACCESS or address + size > 1 << 64:
            raise TraceError(f"line {number}: an access of {size} bytes at {address:#x}")
        for is_write in {"S": [True], "M": [False, True]}.get(line[1], [False]):
            start, end = address, address + size
            while start < end:
                length = min(end - start, PAGE_SIZE - start % PAGE_SIZE)
                length = length if length <= _MAX_RECORD else _CUT
                addresses.append(start)
                sizes.append(length)
                writes.append(is_write)
                start += length
    if not addresses:
        raise TraceError("no memory accesses; is it the output of valgrind --tool=lackey --trace-mem=yes?")
    records = np.empty(len(addresses), RECORD)
    programs = np.array(addresses, np.uint64)
    _, dense = np.unique(programs // PAGE_SIZE, return_inverse=True)
    records["gpa"] = dense.astype(np.uint64) * PAGE_SIZE + programs % PAGE_SIZE
    records["size"], records["write"] = sizes, writes
    return Trace(records, command, glued)

"""Mount options in tmpfs's spelling and with tmpfs's meaning (tmpfs(5)), parsed once into a value.

Nothing is ignored: an option that is unknown, misspelt, given without the value it needs or with one that it does not
take is refused by name, before anything is mounted. Defaults are tmpfs's: half of RAM, an inode for every page of
that, mode 1777, root's ownership becomes the caller's.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from memfs.units import PAGE_SIZE, pages_to_bytes

_SUFFIXES: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class OptionError(ValueError):
    """A mount option that cannot be; the sentence names it."""


def total_ram() -> int:
    """The machine's memory in bytes."""
    return pages_to_bytes(os.sysconf("SC_PHYS_PAGES")) * (os.sysconf("SC_PAGE_SIZE") // PAGE_SIZE)


def parse_size(text: str) -> int:
    """A size in bytes: a number with k, m, g, t, or % of the machine's memory; rounded up to whole pages.

    >>> parse_size("64m")
    67108864

    Raises ValueError.
    """
    match = re.fullmatch(r"(\d+)([kmgt%]?)", text.lower())
    if not match:
        raise ValueError("not a size; give bytes, or a number with k, m, g, t or %")
    number, suffix = int(match[1]), match[2]
    nbytes = total_ram() * number // 100 if suffix == "%" else number * _SUFFIXES[suffix]
    if not 0 < nbytes < 1 << 62:
        raise ValueError("not a size that memory can have")
    return (nbytes + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE


def _parse_count(text: str) -> int:
    match = re.fullmatch(r"(\d+)([kmg]?)", text.lower())
    if not match or int(match[1]) == 0:
        raise ValueError("not a positive number")
    return int(match[1]) * _SUFFIXES[match[2]]


def _parse_mode(text: str) -> int:
    if not re.fullmatch(r"[0-7]{1,4}", text):
        raise ValueError("not an octal mode between 0 and 7777")
    return int(text, 8)


def _parse_uid(text: str) -> int:
    try:
        return int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ValueError("no such user") from None


def _parse_gid(text: str) -> int:
    try:
        return int(text) if text.isdecimal() else grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError("no such group") from None


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What a memfs is mounted with."""

    size: int = field(default_factory=lambda: total_ram() // 2 // PAGE_SIZE * PAGE_SIZE)  #: bytes
    nr_inodes: int = field(default_factory=lambda: total_ram() // 2 // PAGE_SIZE)
    mode: int = 0o1777  #: permissions of the root directory
    uid: int = field(default_factory=os.geteuid)
    gid: int = field(default_factory=os.getegid)
    allow_other: bool = False  #: let users other than the one who mounted it in

    @classmethod
    def parse(cls, text: str) -> MountOptions:
        """Parse what follows `-o`: options separated by commas.

        >>> MountOptions.parse("size=1g,mode=700").size
        1073741824

        Raises OptionError.
        """
        values: dict[str, Any] = {}
        for item in filter(None, text.split(",")):
            name, equals, value = item.partition("=")
            if name in _FLAGS:
                if equals:
                    raise OptionError(f"option {name} takes no value, got {item!r}")
                values[name] = True
            elif name in _VALUES:
                if not value:
                    raise OptionError(f"option {name} needs a value: {name}=...")
                try:
                    values[name] = _VALUES[name](value)
                except ValueError as error:
                    raise OptionError(f"option {item!r}: {error}") from None
            else:
                known = ", ".join(sorted([*_FLAGS, *(f"{key}=" for key in _VALUES)]))
                raise OptionError(f"unknown option {name!r}; known are {known}")
        return replace(cls(), **values)


_FLAGS: Final = frozenset({"allow_other"})
_VALUES: Final[dict[str, Callable[[str], Any]]] = {
    "size": parse_size,
    "nr_inodes": _parse_count,
    "mode": _parse_mode,
    "uid": _parse_uid,
    "gid": _parse_gid,
}

"""Mount options in tmpfs's spelling and with tmpfs's meaning (tmpfs(5)), parsed once into a value.

Nothing is ignored: an option that is unknown, misspelt, given without the value it needs or with one that it does not
take is refused by name, before anything is mounted. For a few that mount(8) passes on there is nothing to do.

Numbers are read as the kernel reads them. Defaults are tmpfs's: half of RAM, an inode for every page of that, mode
1777, root's ownership becomes the caller's.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from memfs.contract.sizes import format_size, parse_count, parse_number, parse_size, total_ram
from memfs.contract.sys.hugetlb import Pool
from memfs.contract.units import ORDER_1G, ORDER_2M, PAGE_SIZE, pages_to_bytes

_PAGE_SIZES: Final = tuple(pages_to_bytes(1 << order) for order in (ORDER_2M, ORDER_1G))
_NO_ID: Final = (1 << 32) - 1  # to chown(2) it means none
REMOUNT: Final = "remount"  #: in the options of mount(8): change those of what is mounted


class OptionError(ValueError):
    """A mount option that is refused, in a sentence that names it."""


def _parse_count(text: str) -> int:
    count = parse_count(text)
    if not 0 < count < 1 << 50:
        raise ValueError("not a number of what memory can hold")
    return count


def _parse_seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise ValueError("not a positive number of seconds")
    return float(text)


def _parse_mode(text: str) -> int:
    if not re.fullmatch(r"0*[0-7]{1,4}", text):
        raise ValueError("not an octal mode between 0 and 7777")
    return int(text, 8)


def _parse_socket_mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{1,3}", text):
        raise ValueError("not an octal mode between 0 and 777")
    return int(text, 8)


def _parse_uid(text: str) -> int:
    try:
        return _parse_id(text) if text[:1].isdecimal() else pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ValueError("no such user") from None


def _parse_gid(text: str) -> int:
    try:
        return _parse_id(text) if text[:1].isdecimal() else grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError("no such group") from None


def _parse_id(text: str) -> int:
    number = parse_number(text)
    if number >= _NO_ID:
        raise ValueError("not a number that a user or group can have")
    return number


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return text

    return parse


def _parse_path(text: str) -> str:
    return os.path.abspath(text)


def _parse_pagesize(text: str) -> int:
    try:
        nbytes = parse_size(text)
    except ValueError:
        nbytes = 0
    if nbytes not in _PAGE_SIZES:
        raise ValueError(f"not {' or '.join(map(format_size, _PAGE_SIZES))}")
    return nbytes


def _parse_blocks(text: str) -> int:
    return _parse_count(text) * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What a memfs is mounted with."""

    size: int = field(default_factory=lambda: total_ram() // 2 // PAGE_SIZE * PAGE_SIZE)  #: bytes
    nr_inodes: int = field(default_factory=lambda: total_ram() // 2 // PAGE_SIZE)
    inode32: bool = False  #: inode numbers have 32 bits
    mode: int = 0o1777  #: permissions of the root directory
    uid: int = field(default_factory=os.geteuid)
    gid: int = field(default_factory=os.getegid)
    pagesize: int | None = None  #: bytes, of the huge pages that guest-sealed files lie on; None: on a tmpfs
    min_size: int | None = None  #: bytes of those that are reserved
    huge: str | None = None  #: huge pages of the backing tmpfs; None: always if guests have some, else never
    mpol: str | None = None  #: NUMA policy of the backing tmpfs
    noswap: bool = False  #: the backing tmpfs is never swapped
    ro: bool = False
    atime: str = "relatime"  #: relatime, noatime or strictatime
    diratime: bool = True  #: whether that goes for directories, too
    suid: bool = False
    dev: bool = False
    exec: bool = True
    symfollow: bool = True  #: symbolic links are followed
    #: what stands in /proc/mounts in the place of a device; mount(8) takes it for a path, if there is one of that name
    fsname: str = "none"
    default_permissions: bool = True  #: the kernel checks permissions; memfs is never mounted otherwise
    allow_other: bool = False  #: let users in other than the one who mounted it
    socket: str | None = None  #: where owners connect
    socket_mode: int = 0o600  #: who may connect: write permission is what counts
    socket_group: int | None = None  #: gid of the socket; None: the daemon's
    passthrough: str = "auto"
    backing: str = "tmpfs"  #: where files live
    survive: str = "off"  #: whether what is mounted outlives the daemon's process
    notify_timeout: float = 5.0  #: seconds that an owner may take to act on a notification
    said: str = field(default="", compare=False)  #: all of them, as they were given

    @classmethod
    def parse(cls, text: str) -> MountOptions:
        """Parse what follows `-o`: options separated by commas. Of two that contradict each other the later wins.

        >>> MountOptions.parse("size=1g,mode=700").size
        1073741824

        Raises OptionError.
        """
        values = _parse_values(text, _FLAGS, _VALUES)
        pagesize = values.get("pagesize")
        values = _parse_values(text, _FLAGS, {**_VALUES, **_sizes_of(pagesize)})
        options = replace(cls(), **values, said=text)
        if options.min_size is not None and pagesize is None:
            raise OptionError("option min_size is for pages of hugetlbfs: say pagesize=2M or 1G")
        if options.min_size is not None and options.min_size > options.size:
            raise OptionError("option min_size: more than size= allows")
        return options

    @property
    def tmpfs_options(self) -> dict[str, str | None]:
        """The options that go to the backing tmpfs, which gives them their meaning."""
        huge = self.huge or ("always" if self.pagesize else "never")
        options: dict[str, str | None] = {} if huge == "never" else {"huge": huge}
        if self.mpol is not None:
            options["mpol"] = self.mpol
        if self.noswap:
            options["noswap"] = None
        return options


@dataclass(frozen=True, slots=True)
class RemountOptions:
    """What can be changed while mounted; None leaves it as it is."""

    size: int | None = None  #: bytes
    nr_inodes: int | None = None

    @classmethod
    def parse(cls, text: str, pagesize: int | None = None) -> RemountOptions:
        """Parse them, separated by commas; `pagesize` as it was mounted with. Raises OptionError."""
        known = {**_VALUES, **_sizes_of(pagesize)}
        return cls(**_parse_values(text, {}, {name: known[name] for name in _LIMITS}))


def divide_remount(text: str, mounted: MountOptions) -> tuple[str, list[str]]:
    """Divide what follows `-o` of `memfs remount` into what the daemon changes, and flags that the kernel changes.

    >>> divide_remount("remount,rw,noatime,size=2g,huge=always", MountOptions.parse("size=1g,huge=always"))
    ('size=2g', ['rw', 'noatime'])

    `mounted` is what the memfs was mounted with. Raises OptionError for what nobody changes, unless it is so already.
    """
    limits, flags = list[str](), list[str]()
    known = {**_VALUES, **_sizes_of(mounted.pagesize)}
    for item in _items(text):
        if item == REMOUNT:
            continue
        values = _parse_values(item, _FLAGS, known)
        if item.partition("=")[0] in _LIMITS:
            limits.append(item)
        elif item in OF_THE_KERNEL:
            flags.append(item)
        elif any(getattr(mounted, name) != value for name, value in values.items()):
            raise OptionError(f"option {item!r} cannot be changed while it is mounted; unmount it and mount it anew")
    return ",".join(limits), flags


def in_force(said: str, flags: Collection[str], size: int, nr_inodes: int) -> str:
    """Return what is in force of a mounted memfs, as after `-o`: what it was mounted with, as it was changed since.

    >>> in_force("size=1g,noexec,huge=always", {"ro", "nosuid", "nodev", "relatime"}, 2 << 30, MountOptions().nr_inodes)
    'huge=always,ro,exec,size=2G'

    `flags` is what the kernel keeps (proc_pid_mountinfo(5)); `size` in bytes. Raises OptionError.
    """
    mounted = MountOptions.parse(said)
    now = MountOptions.parse(",".join(["suid", "dev", "strictatime", *sorted(OF_THE_KERNEL.intersection(flags))]))
    now = replace(now, size=size, nr_inodes=nr_inodes)
    names = {name: key for name, (key, _) in [*_VALUES.items(), *_FLAGS.items()]}
    known = {*(names[name] for name in OF_THE_KERNEL), "size", "nr_inodes"}
    changed = {key for key in known if getattr(now, key) != getattr(mounted, key)}
    kept = [item for item in _items(said) if names.get(item.partition("=")[0]) not in changed]
    flag_of = {key: name for name, (key, value) in reversed(_FLAGS.items()) if getattr(now, key) == value}
    values = {"size": f"size={format_size(size)}", "nr_inodes": f"nr_inodes={nr_inodes}"}
    return ",".join([*kept, *({**flag_of, **values}[key] for key in (*reversed(flag_of), *values) if key in changed)])


def _items(text: str) -> Iterator[str]:
    return filter(None, text.split(","))


def _sizes_of(pagesize: int | None) -> dict[str, tuple[str, Callable[[str], int]]]:
    """Return how sizes are parsed if guests have huge pages: % means of their pool, as on hugetlbfs."""
    if pagesize is None:
        return {}

    def parse(text: str) -> int:
        try:
            pool = Pool(pagesize).pages * pagesize
        except OSError:  # no such pool: that will be said
            pool = total_ram()
        if not pool and text.endswith("%"):
            raise ValueError(f"the pool of {format_size(pagesize)} pages is empty")
        return parse_size(text, pool)

    return {name: (name, parse) for name in ("size", "min_size")}


def _parse_values(
    text: str, flags: dict[str, tuple[str, Any]], values: dict[str, tuple[str, Callable[[str], Any]]]
) -> dict[str, Any]:
    """Return fields and their values; `flags` and `values` say which field an option means and how to parse it."""
    parsed: dict[str, Any] = {}
    for item in _items(text):
        name, equals, value = item.partition("=")
        if item in _NOTHING_TO_DO or item.startswith(_OF_OTHER_PROGRAMS):
            continue
        if name in flags:
            if equals:
                raise OptionError(f"option {name} takes no value, got {item!r}")
            key, parsed_value = flags[name]
            parsed[key] = parsed_value
        elif name in values:
            if not value:
                raise OptionError(f"option {name} needs a value: {name}=...")
            key, parse = values[name]
            try:
                parsed[key] = parse(value)
            except ValueError as error:
                raise OptionError(f"option {item!r}: {error}") from None
        else:
            known = ", ".join(sorted([*flags, *(f"{key}=" for key in values)]))
            raise OptionError(f"unknown option {name!r}; known are {known}")
    return parsed


#: What mount(8) passes on: when to mount, and how what is written gets to a disk
_NOTHING_TO_DO: Final = frozenset(
    (
        *("defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers"),
        *("owner", "noowner", "group", "nogroup", "mand", "nomand", "iversion", "noiversion"),
        *("norelatime", "nostrictatime", "sync", "async", "dirsync", "lazytime", "nolazytime", "silent", "loud"),
    )
)
_OF_OTHER_PROGRAMS: Final = ("x-", "X-", "comment=", "user=")
_FLAGS: Final[dict[str, tuple[str, Any]]] = {
    "allow_other": ("allow_other", True),
    "default_permissions": ("default_permissions", True),
    "ro": ("ro", True),
    "rw": ("ro", False),
    "noatime": ("atime", "noatime"),
    "relatime": ("atime", "relatime"),
    "strictatime": ("atime", "strictatime"),
    "atime": ("atime", "relatime"),
    "diratime": ("diratime", True),
    "nodiratime": ("diratime", False),
    "suid": ("suid", True),
    "nosuid": ("suid", False),
    "dev": ("dev", True),
    "nodev": ("dev", False),
    "exec": ("exec", True),
    "noexec": ("exec", False),
    "symfollow": ("symfollow", True),
    "nosymfollow": ("symfollow", False),
    "noswap": ("noswap", True),
    "inode32": ("inode32", True),
    "inode64": ("inode32", False),
}
_VALUES: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "size": ("size", parse_size),
    "nr_blocks": ("size", _parse_blocks),
    "nr_inodes": ("nr_inodes", _parse_count),
    "mode": ("mode", _parse_mode),
    "uid": ("uid", _parse_uid),
    "gid": ("gid", _parse_gid),
    "pagesize": ("pagesize", _parse_pagesize),
    "min_size": ("min_size", parse_size),
    "fsname": ("fsname", str),
    "huge": ("huge", _one_of("never", "always", "within_size", "advise")),
    "mpol": ("mpol", str),
    "socket": ("socket", _parse_path),
    "socket_mode": ("socket_mode", _parse_socket_mode),
    "socket_group": ("socket_group", _parse_gid),
    "passthrough": ("passthrough", _one_of("on", "off", "auto")),
    "backing": ("backing", _one_of("tmpfs", "memfd")),
    "survive": ("survive", _one_of("auto", "on", "off")),
    "notify_timeout": ("notify_timeout", _parse_seconds),
}
_LIMITS: Final = ("size", "nr_blocks", "nr_inodes")  # what the daemon changes while it is mounted
OF_THE_KERNEL: Final = frozenset(
    name for name, (key, _) in _FLAGS.items() if key in ("ro", "atime", "diratime", "suid", "dev", "exec", "symfollow")
)

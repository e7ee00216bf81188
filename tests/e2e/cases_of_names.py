"""Cases of test_completeness.py about names, rights and limits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import Any

from .cases import CASES, PAGE, Case, attempt, case, child, libc, shell, users
from .conftest import run
from .tools import skip_without

# -- directories -----------------------------------------------------------------------------------------------


class Entries:
    """readdir(3) by hand."""

    def __init__(self, directory: Path) -> None:
        self._stream = libc.opendir(os.fsencode(directory))
        assert self._stream

    def next(self) -> str | None:
        entry = libc.readdir(self._stream)
        return None if not entry else os.fsdecode(ctypes.string_at(entry + 19))

    def rest(self) -> list[str]:
        return list(iter(self.next, None))

    def tell(self) -> int:
        return int(libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        libc.seekdir(self._stream, position)

    def close(self) -> None:
        libc.closedir(self._stream)


@case
def readdir_under_change(directory: Path) -> Any:
    """Names that were there all the time come exactly once, whatever happens to others meanwhile."""
    for number in range(1500):
        (directory / f"keep-{number}").touch()
        (directory / f"drop-{number}").touch()
    with contextlib.closing(Entries(directory)) as entries:
        seen = [entries.next() for _ in range(700)]
        for number in range(1500):
            (directory / f"drop-{number}").unlink()
            (directory / f"new-{number % 500}").touch()
            if number % 3 == 0:
                (directory / f"keep-{number}").rename(directory / f"moved-{number}")
        seen += entries.rest()
    kept = sorted(name for name in seen if name and name.startswith("keep-") and int(name[5:]) % 3)
    assert kept == sorted(f"keep-{number}" for number in range(1500) if number % 3)
    twice = len(seen) - len(set(seen))
    return twice, sorted(set(os.listdir(directory)))


@case
def telldir_and_seekdir(directory: Path) -> Any:
    for number in range(500):
        (directory / f"{number}").touch()
    answers = []
    with contextlib.closing(Entries(directory)) as entries:
        everything, positions = [], []
        while True:
            positions.append(entries.tell())
            name = entries.next()
            if name is None:
                break
            everything.append(name)
        for index in (400, 3, 250, 0, 499):
            entries.seek(positions[index])
            answers.append(entries.next() == everything[index])
        entries.seek(positions[100])
        answers.append(entries.rest() == everything[100:])
    answers.append(len(set(positions)) == len(positions))
    return answers, sorted(everything)


@case
def removed_directory(directory: Path) -> Any:
    (directory / "d").mkdir()
    fd = os.open(directory / "d", os.O_RDONLY)
    (directory / "d").rmdir()
    answers = [
        os.listdir(fd),
        os.fstat(fd).st_nlink,
        attempt(lambda: os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))),
        attempt(lambda: os.mkdir("e", dir_fd=fd)),
        attempt(lambda: os.stat("..", dir_fd=fd).st_nlink > 0),
        attempt(lambda: os.rmdir(".", dir_fd=fd)),
    ]
    os.close(fd)
    return answers


@case
def deep_paths(directory: Path) -> Any:
    script = """
import os
for level in range(300):
    os.mkdir("d" * 20)
    os.chdir("d" * 20)
open("bottom", "w").close()
try:
    print(len(os.getcwd()) > 4096)
except OSError as error:
    print(error.errno)
print(sorted(os.listdir(".")))
for level in range(300):
    os.chdir("..")
print(sorted(os.listdir(".")))
"""
    return child(script, directory), shell("rm -rf d*; ls", directory)


@case
def long_symlinks(directory: Path) -> Any:
    return [
        (length, attempt(lambda n: os.symlink("x" * n, directory / f"{n}"), length),
         attempt(lambda n: len(os.readlink(directory / f"{n}")), length))
        for length in (1, 127, 128, 4094, 4095, 4096)
    ]  # fmt: skip


@case
def loops_and_other_filesystems(directory: Path) -> Any:
    for number in range(45):
        os.symlink(f"{number + 1}", directory / f"{number}")
    (directory / "45").touch()
    (directory / "d" / "e").mkdir(parents=True)
    elsewhere = Path("/dev/shm") / f"memfs-test-{os.getpid()}"
    return [
        *(attempt(lambda n: os.stat(directory / f"{n}").st_size, number) for number in (0, 4, 5, 6, 10)),
        attempt(lambda: os.rename(directory / "45", elsewhere)),
        attempt(lambda: os.link(directory / "45", elsewhere)),
        attempt(lambda: os.rename(directory / "d", directory / "d" / "e" / "f")),
        attempt(lambda: os.rename(directory / "d" / "e", directory / "d")),
        attempt(lambda: os.rename(directory / "d" / ".", directory / "x")),
        attempt(lambda: os.rmdir(directory / "d" / "e" / ".")),
        attempt(lambda: os.rmdir(directory / "d" / "..")),
        attempt(lambda: os.rmdir(directory.parent)),
        attempt(lambda: os.unlink(directory / "d")),
        attempt(lambda: os.link(directory / "d", directory / "hard")),
    ]


# -- who may what -----------------------------------------------------------------------------------------------------


@case
def setuid_is_dropped(directory: Path) -> Any:
    return _drop(directory, 0o6777, 0o4777, 0o2777)


@case
def setgid_without_execution_is_dropped(directory: Path) -> Any:
    return _drop(directory, 0o6767, 0o2767)


def _drop(directory: Path, *modes: int) -> Any:
    """What is left of setuid and setgid after each way to change a file, by a stranger and by root."""
    ways: dict[str, tuple[str, tuple[Any, ...]]] = {
        "write": ("write", (0, b"x")),
        "pwrite": ("pwrite", (0, b"x", 10)),
        "ftruncate": ("ftruncate", (0, 5)),
        "same size": ("ftruncate", (0, 0)),
        "fallocate": ("fallocate", (0, 0, 0, PAGE)),
        "punch": ("fallocate", (0, 3, 0, PAGE)),
        "truncate": ("truncate", ("f", 5)),
        "open": ("open", (1, "f", os.O_WRONLY | os.O_TRUNC, 0)),
        "chown": ("chown", ("f", -1, 13000, True)),
        "map": ("map_write", (0, 0, b"x")),
    }
    answers = []
    with users(directory) as who:
        for mode in modes:
            for name, (call, arguments) in ways.items():
                for user in ("alice", "root"):
                    who["root"]("open", 1, "f", os.O_CREAT | os.O_RDWR, 0o600)
                    who["root"]("fchown", 1, 0, 0)
                    who["root"]("ftruncate", 1, PAGE if name == "map" else 0)
                    who["root"]("fchmod", 1, mode)
                    who[user]("open", 0, "f", os.O_RDWR, 0)
                    done = who[user](call, *arguments)
                    answers.append((oct(mode), name, user, done, who["root"]("stat", "f")[1][0]))
                    who["root"]("chown", "f", 12001, -1, True)
                    answers.append(who["root"]("stat", "f")[1][0])
                    who[user]("close", 0)
                    who[user]("close", 1)
                    who["root"]("close", 1)
                    who["root"]("unlink", "f")
    return answers


@case
def chown_to_nobody(directory: Path) -> Any:
    """chown(-1, -1) of a setuid file by somebody who is not its owner."""
    with users(directory) as who:
        steps = [who["root"]("open", 0, "f", os.O_CREAT | os.O_RDWR, 0o600), who["root"]("fchmod", 0, 0o4777)]
        return steps, who["alice"]("chown", "f", -1, -1, True), who["root"]("stat", "f")


@case
def sticky_directories(directory: Path) -> Any:
    answers = []
    with users(directory) as who:
        answers += [who["root"]("mkdir", "d", 0o777), who["root"]("chmod", "d", 0o1777)]
        answers += [who["alice"]("open", 0, "d/f", os.O_CREAT | os.O_RDWR, 0o666), who["alice"]("mkdir", "d/e", 0o777)]
        answers += [who["bob"]("open", 0, "d/g", os.O_CREAT | os.O_RDWR, 0o666)]
        answers += [who["bob"](*call) for call in (("unlink", "d/f"), ("rename", "d/f", "d/x", 0), ("rmdir", "d/e"))]
        answers += [who["bob"]("rename", "d/g", "d/f", 0), who["bob"]("rename", "d/g", "d/f", 2)]
        answers += [who["bob"]("link", "d/f", "d/l", False), who["alice"]("rename", "d/f", "d/h", 0)]
        # protected_regular and protected_fifos, which sysctl may have switched on
        answers += [who["bob"]("open", 1, "d/h", os.O_CREAT | os.O_RDWR, 0o666), who["bob"]("listdir", "d")]
    return answers


@case
def setgid_directories(directory: Path) -> Any:
    answers = []
    with users(directory) as who:
        answers += [who["root"]("mkdir", "d", 0o777), who["root"]("chown", "d", 0, 13000, True)]
        answers += [who["root"]("chmod", "d", 0o2777)]
        for user in ("alice", "bob", "root"):
            answers += [who[user]("umask", 0), who[user]("mkdir", f"d/{user}", 0o755)]
            answers += [who[user]("open", 0, f"d/{user}.f", os.O_CREAT | os.O_RDWR, 0o2775)]
            answers += [who[user]("mknod", f"d/{user}.p", stat.S_IFIFO | 0o2770, 0)]
            answers += [who[user]("symlink", "x", f"d/{user}.s")]
            answers += [who[user]("open", 0, "d", os.O_TMPFILE | os.O_RDWR, 0o2775)]
            answers += [who[user]("chmod", f"d/{user}.f", 0o2755), who[user]("chown", f"d/{user}.f", -1, 12001, True)]
        answers += [
            who["root"]("stat", f"d/{name}") for name in who["root"]("listdir", "d")[1] if not name.endswith(".s")
        ]
    return answers


ACL_SCRIPTS = {
    "acl": "umask 022; touch f; setfacl -m u:12001:rw,g:13000:r f; getfacl -n f; ls -l f | cut -c1-11; "
    "chmod g-w f; getfacl -n f; setfacl -b f; getfacl -n f; ls -l f | cut -c1-11",
    "default acl": "umask 022; mkdir d; setfacl -d -m u:12001:rwx,g::rx,o::- d; touch d/f; mkdir d/e; touch d/e/g; "
    "getfacl -n d d/f d/e d/e/g; stat -c %A d/f d/e d/e/g; umask 077; touch d/h; getfacl -n d/h",
    "acl refused": "touch f; ln -s f s; setfacl -m u:12001:rw s; getfacl -n f; setfacl -d -m u:1:r f; "
    "setfattr -n system.posix_acl_access -v 0x00 f; getfattr -m - -d f",
    "acl and mode": "umask 0; mkdir d; setfacl -d -m u::rw,g::r,o::- d; touch d/f; mkdir d/e; mkfifo d/p; "
    "stat -c '%n %A' d/*; setfacl -m m::x d; stat -c %A d; setfacl -k d; getfacl -n d",
}  # fmt: skip


def _acl(name: str) -> Case:
    return lambda directory: shell(ACL_SCRIPTS[name], directory)


CASES.update({name: _acl(name) for name in ACL_SCRIPTS})


@case
def acl_decides(directory: Path) -> Any:
    skip_without("setfacl")
    with users(directory) as who:
        answers = [who["root"]("open", 0, "f", os.O_CREAT | os.O_RDWR, 0o600), who["bob"]("open", 0, "f", os.O_RDWR, 0)]
        set_ = [run("setfacl", "-m", "u:12002:rw", directory / "f").returncode]
        return answers, set_, who["bob"]("open", 0, "f", os.O_RDWR, 0), who["alice"]("open", 0, "f", os.O_RDONLY, 0)


# -- limits ---------------------------------------------------------------------------------------------------------


@case
def attribute_limits(directory: Path) -> Any:
    path = directory / "f"
    path.touch()
    answers: list[Any] = []
    for size in (0, 1, 1000, 65535, 65536, 65537):
        answers.append(attempt(os.setxattr, path, "user.a", bytes(size)))
        answers.append(attempt(lambda: len(os.getxattr(path, "user.a"))))
    answers += [attempt(os.setxattr, path, "user." + "n" * length, b"") for length in (249, 250, 251)]
    many = 0
    with contextlib.suppress(OSError):
        for many in range(2000):
            os.setxattr(path, f"user.{many:0100}", b"")
    answers.append(attempt(lambda: len(os.listxattr(path))))
    return answers


@case
def attributes_are_limited(directory: Path) -> Any:
    """Xattrs of files take room (of the inodes', on a tmpfs), so that nobody fills the machine with them."""
    before = os.statvfs(directory).f_ffree
    (directory / "f").touch()
    for number in range(20):
        os.setxattr(directory / "f", f"user.{number}", bytes(10000))
    used = before - os.statvfs(directory).f_ffree
    (directory / "f").unlink()
    return used


@case
def links_are_counted(directory: Path) -> Any:
    before = os.statvfs(directory).f_ffree
    (directory / "f").touch()
    for number in range(10):
        os.link(directory / "f", directory / f"{number}")
    return before - os.statvfs(directory).f_ffree


@case
def more_than_fits(directory: Path) -> Any:
    answers = [
        shell("dd if=/dev/zero of=f bs=1M count=20 2>&1 | sed 's/copied.*//'; stat -c '%s %b' f; rm f", directory)
    ]
    answers += [
        shell("fallocate -l 10M f; fallocate -l 10M g; stat -c '%s %b' g; fallocate -l 6M g; echo x > h", directory)
    ]
    answers += [shell("stat -c '%s %b' *; cat h; truncate -s 1T f; stat -c '%s %b' f; rm *; ls", directory)]
    return answers


@case
def more_inodes_than_fit(directory: Path) -> Any:
    made = 0
    try:
        for made in range(6000):
            (directory / f"{made}").touch()
    except OSError as error:
        answer = errno.errorcode[error.errno or 0], os.statvfs(directory).f_ffree
    for number in range(made):
        (directory / f"{number}").unlink()
    return made, answer

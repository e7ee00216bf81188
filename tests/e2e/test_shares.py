"""One user has open what it can, and others, root among them, go on to open files, register them and connect."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.helpers import HELLO, raises, until

from .conftest import Memfs, MountMemfs, run, state_of
from .tools import skip_without

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as several users, so it needs root")

ALICE, BOB = 12001, 12002
FEW = 512  # descriptors that the daemon may have

#: As a user, opens files of a directory with these flags until that is refused, or a number of them is open; says how
#: many it has, and the errno; then closes one and tries again, and holds them until its input ends
OPENS = """
import os, sys
user, flags, most = map(int, sys.argv[1:4])
os.setresgid(user, user, user); os.setresuid(user, user, user)
held, refused = [], 0
while len(held) < most and not refused:
    try: held.append(os.open(f"{user}-{len(held)}", flags, 0o600))
    except OSError as error: refused = error.errno
again = ""
if refused:
    os.close(held.pop())
    os.sync()
    for _ in range(1000):  # the kernel releases what was closed a bit later
        try: held.append(os.open(f"{user}-{len(held)}", flags, 0o600)); again = "again"; break
        except OSError: pass
print(len(held), refused, again, flush=True)
sys.stdin.read()
"""


@contextmanager
def opening(memfs: Memfs, user: int, most: int = FEW, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[tuple[int, int]]:
    """Have a user open files for as long as the block: how many, and with which errno others are refused."""
    command = [sys.executable, "-c", OPENS, str(user), str(flags), str(most)]
    with subprocess.Popen(command, cwd=memfs.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            held, refused, *again = process.stdout.readline().split()
            assert again == (["again"] if int(refused) else [])
            yield int(held), int(refused)
        finally:
            process.stdin.close()


@pytest.fixture
def scarce(mount_memfs: MountMemfs, request: pytest.FixtureRequest) -> Memfs:
    """A memfs whose daemon may have few descriptors, which anybody may use."""
    skip_without("setpriv", "prlimit")
    within = ["setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource", "prlimit", f"--nofile={FEW}"]
    memfs = mount_memfs(
        f"size=64m,allow_other,mode=1777,socket_mode=0666{getattr(request, 'param', '')}", within=within
    )
    memfs.expected += ["a file is not opened: user ", "are left for all"]
    return memfs


@pytest.mark.parametrize("scarce", ["", ",backing=memfd"], ids=["tmpfs", "memfd"], indirect=True)
@pytest.mark.parametrize("seals", [b"", b"guest"], ids=["ordinary", "guest-sealed"])
def test_no_user_gets_all_descriptors(scarce: Memfs, seals: bytes) -> None:
    os.setxattr(scarce.path, "user.memfs.default_seals", seals)
    with opening(scarce, ALICE) as (alice, refused):
        assert refused == errno.EMFILE
        assert 20 < alice < FEW / 2
        assert not (scarce.path / f"{ALICE}-{alice}").exists()  # what was refused has made nothing
        with opening(scarce, BOB) as (bob, refused):
            assert refused == errno.EMFILE
            assert 5 < bob < alice
            with opening(scarce, 0, 8) as (root, refused):
                assert (root, refused) == (8, 0)
                said = state_of(scarce.path)
                assert alice + bob + root <= said["descriptors_used"] < said["descriptors"] < FEW
                assert (said["page_maps_used"] > 0) == (bool(seals) or str(said["backing"]) == "memfd")
                assert said["your_descriptors"] >= 8
    with opening(scarce, BOB, alice) as (bob, refused):
        assert (bob, refused) == (alice, 0)


def test_user_s_connections_count_as_well(scarce: Memfs) -> None:
    """Files that it has open and connections are one share; the socket of others is none of it."""
    connect = """
import os, socket, sys
os.chdir(os.path.dirname(sys.argv[1]))  # on the way are directories that are not for everybody
os.setresuid(int(sys.argv[2]), int(sys.argv[2]), 0)
held, hello = [], bytes.fromhex(sys.argv[-1])
while len(held) < 300:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(os.path.basename(sys.argv[1]))
    try:
        sock.send(hello)
        if sock.recv(100)[2:4] != b'\\2\\0': break  # HelloReply
    except ConnectionError: break
    held.append(sock)
print(len(held))
"""
    scarce.socket.parent.chmod(0o711)
    command = [sys.executable, "-c", connect, str(scarce.socket)]
    before = state_of(scarce.path)["descriptors_used"]
    assert 20 < int(run(*command, str(ALICE), HELLO.hex()).stdout) < FEW / 2
    # connections of who has ended are closed a bit later
    until(lambda: state_of(scarce.path)["descriptors_used"] == before)
    with opening(scarce, ALICE):
        assert run(*command, str(ALICE), HELLO.hex()).stdout == "0\n"
        assert 20 < int(run(*command, str(BOB), HELLO.hex()).stdout) < FEW / 2


@pytest.mark.parametrize("scarce", [",backing=memfd"], indirect=True)
def test_files_that_take_descriptors_are_as_many_as_statfs_says(scarce: Memfs) -> None:
    """Each memfd takes a descriptor; so many inodes there may be, and then it is ENOSPC, as ever."""
    free = os.statvfs(scarce.path).f_ffree
    assert FEW / 4 < free < FEW / 2 + 1
    for number in range(free):
        (scarce.path / str(number)).touch()
    with raises(errno.ENOSPC):
        (scarce.path / "one more").touch()
    assert (scarce.path / "0").read_bytes() == b""

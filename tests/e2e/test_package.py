"""The Debian package in a fresh Debian: lintian, fstab and mount(8), and a real systemd that starts the units.

It takes minutes and downloads a Debian, so it is run by `make deb-check` only. The Debian lies in a mount namespace, on
an overlay, so each test finds it as it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import run
from .guides import compare, session
from .tools import skip_without_mount_namespace

ROOT = Path(__file__).parents[2]
OF_THE_PACKAGE = "fuse3,mount,python3,python3-numpy,python3-prometheus-client,python3-rich"
PACKAGES = f"{OF_THE_PACKAGE},dbus,prometheus,qemu-system-x86,systemd,systemd-sysv"
GUIDE = (ROOT / "docs" / "guides" / "fresh-debian.md").read_text()
pytestmark = [
    pytest.mark.skipif("MEMFS_CHECK_PACKAGE" not in os.environ, reason="make deb-check runs it"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed"),
    pytest.mark.timeout(900),
]

#: Mount a copy of the Debian $1, with the package $2 beside it, on $3, and run $4 there as its first process.
SETUP = """
set -e
mount -t tmpfs tmpfs "$3"
mkdir "$3/upper" "$3/work" "$3/root"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$3/upper,workdir=$3/work" "$3/root"
cd "$3/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs dev
for device in null zero full random urandom tty fuse; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/shm dev/pts root/out
mount --bind "$5" root/out
cp "$2" root/memfs.deb
cp "$5/script" root/script
cp "$5/test.service" etc/systemd/system/
mkdir old
pivot_root . old
exec env container=other chroot . sh -c "umount --lazy /old && rmdir /old && exec $4"
"""
SERVICE = """
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sh -c "bash {flags} /root/script >/root/out/said 2>&1 </dev/null"
ExecStopPost=/bin/sh -c "echo $EXIT_STATUS >/root/out/code; systemctl --force exit"
"""
SYSTEMD = "/lib/systemd/systemd --system --unit=test.service --log-target=console --show-status=no"
BY_SYSTEMD = """
dpkg --install /root/memfs.deb
trap 'systemctl status --no-pager memfs@mnt-guest memfs-metrics mnt-guest.mount || :' EXIT
absent() { if grep "$@"; then exit 1; fi; }
echo MEMFS_OPTIONS=size=64m >/etc/memfs/mnt-guest.conf
systemctl start memfs@mnt-guest
grep 'none /mnt/guest fuse.memfs' /proc/mounts
systemctl show --property=StatusText memfs@mnt-guest | grep '0 of 64.0M in use, 0 owners'
echo MEMFS_METRICS_LISTEN=127.0.0.1:19753 >/etc/memfs/metrics.conf
systemctl start memfs-metrics
cat >scrape <<END
import time, urllib.request
for attempt in range(100):
    try:
        print(urllib.request.urlopen("http://127.0.0.1:19753/metrics").read().decode())
        break
    except OSError:
        time.sleep(0.1)
END
python3 scrape | grep '^memfs_size_bytes{mountpoint="/mnt/guest"} 6.7108864e+07'
systemctl stop memfs-metrics
pid=$(systemctl show --property=MainPID --value memfs@mnt-guest)
systemctl reload memfs@mnt-guest
test "$pid" = "$(systemctl show --property=MainPID --value memfs@mnt-guest)"
touch /mnt/guest/shared
memfs create --seals guest --size 16m /mnt/guest/private
kvmsim run --shared /mnt/guest/shared --private /mnt/guest/private --mem 16m | grep 'every byte was as stored'
kill -KILL "$pid"
restarted() {
    now=$(systemctl show --property=MainPID --value memfs@mnt-guest)
    test "$now" != 0 && test "$now" != "$pid" && test "$(systemctl is-active memfs@mnt-guest)" = active
}
until restarted; do sleep 0.1; done
test ! -e /mnt/guest/shared
systemctl kill --signal=KILL memfs@mnt-guest
systemctl stop memfs@mnt-guest
absent fuse.memfs /proc/mounts
systemctl start memfs@mnt-guest.socket
absent fuse.memfs /proc/mounts
python3 -I - <<END
import socket, sys
sys.path.insert(0, "/usr/lib/memfs")
from memfs.contract.protocol.connection import Connection, Role
from memfs.contract.protocol.messages import Hello
owner = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
owner.connect("/run/memfs/mnt-guest.sock")
connection = Connection(Role.OWNER)
owner.send(connection.send(Hello(name="early"))[1])
print(connection.receive(owner.recv(1024)).message)
END
grep 'none /mnt/guest fuse.memfs' /proc/mounts
systemctl stop memfs@mnt-guest.socket memfs@mnt-guest
absent fuse.memfs /proc/mounts
test ! -e /run/memfs/mnt-guest.sock
echo MEMFS_OPTIONS=size=64m,survive=on >/etc/memfs/mnt-guest.conf
systemctl start memfs@mnt-guest
echo content >/mnt/guest/file
pid=$(systemctl show --property=MainPID --value memfs@mnt-guest)
systemctl kill --signal=KILL memfs@mnt-guest
grep content /mnt/guest/file
until restarted; do sleep 0.1; done
pid=$(systemctl show --property=MainPID --value memfs@mnt-guest)
kill -KILL "$pid"
grep content /mnt/guest/file
until restarted; do sleep 0.1; done
pid=$(systemctl show --property=MainPID --value memfs@mnt-guest)
memfs upgrade /mnt/guest
until restarted; do sleep 0.1; done
grep memfs@mnt-guest "/proc/$(systemctl show --property=MainPID --value memfs@mnt-guest)/cgroup"
grep content /mnt/guest/file
systemctl stop memfs@mnt-guest
absent fuse.memfs /proc/mounts
cp /usr/share/doc/memfs/examples/mnt-guest.mount /etc/systemd/system/
sed -i s/16g/64m/ /etc/systemd/system/mnt-guest.mount
systemctl daemon-reload
systemctl start mnt-guest.mount
grep 'none /mnt/guest fuse.memfs rw,relatime' /proc/mounts
systemctl stop mnt-guest.mount
absent fuse.memfs /proc/mounts
"""


@pytest.fixture(scope="module")
def package() -> Path:
    [package] = (ROOT / "dist").glob("memfs_*.deb")
    return package


@pytest.fixture(scope="module")
def debian() -> Path:
    """A Debian of the same release, which is kept for the next time."""
    directory = ROOT / "build" / "debian"
    if not (directory / "complete").exists():
        release = next(
            line.partition("=")[2]
            for line in Path("/etc/os-release").read_text().splitlines()
            if line.startswith("VERSION_CODENAME=")
        )
        run("rm", "-rf", directory)
        made = run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, directory, timeout=800)
        assert made.returncode == 0, made.stdout[-500:] + made.stderr
        (directory / "complete").touch()
    return directory


@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed")
def test_lintian_finds_nothing(package: Path) -> None:
    result = run("lintian", "--fail-on=error,warning", package, timeout=300)
    assert result.returncode == 0, result.stdout


def run_in(debian: Path, package: Path, directory: Path, script: str, flags: str = "") -> tuple[str, str]:
    """Have a real systemd run a script in a fresh Debian; return what it printed, and its exit code."""
    skip_without_mount_namespace()
    laid, out = directory / "laid", directory / "out"
    laid.mkdir()
    out.mkdir()
    (out / "script").write_text(script)
    (out / "test.service").write_text(SERVICE.format(flags=flags))
    namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--ipc", "--uts", "--propagation=private"]
    command = ["unshare", *namespaces, "sh", "-c", SETUP, "sh", str(debian), str(package), str(laid), SYSTEMD, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said = (out / "said").read_text() if (out / "said").exists() else done.stdout + done.stderr
    assert (out / "code").exists(), said
    return said, (out / "code").read_text().strip()


def test_guide_in_a_fresh_debian(package: Path, debian: Path, tmp_path: Path) -> None:
    compare(GUIDE, run_in(debian, package, tmp_path, session(GUIDE))[0])


def test_units_under_systemd(package: Path, debian: Path, tmp_path: Path) -> None:
    said, code = run_in(debian, package, tmp_path, BY_SYSTEMD, "-ex")
    assert code == "0", said

"""Ordinary tools on a mounted memfs: what they say and leave behind must be what they say and leave on a tmpfs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .conftest import Memfs, run
from .tools import skip_without, tools_in

SCRIPTS = {
    "fallocate": "fallocate -l 4M f; stat -c '%s %b' f; du -k f",
    "fallocate keep size": "fallocate -n -l 1M f; stat -c '%s %b' f",
    "fallocate offset": "fallocate -o 8192 -l 4096 f; stat -c '%s %b' f",
    "punch": "fallocate -l 1M f; fallocate -p -o 4096 -l 4096 f; stat -c '%s %b' f",
    "punch unaligned": "yes | head -c 20000 > f; fallocate -p -o 100 -l 9000 f; sha256sum f; stat -c '%s %b' f",
    "punch past the end": "echo x > f; fallocate -p -o 1M -l 1M f; stat -c '%s %b' f",
    "zero range": "fallocate -z -l 4096 f; fallocate -c -l 4096 f; fallocate -i -l 4096 f",
    "truncate": "truncate -s 1M f; stat -c '%s %b' f; truncate -s 100 f; "
    "stat -c '%s %b' f; truncate -s +5 f; stat -c %s f",
    "dd": "dd if=/dev/zero of=f bs=1M count=3 seek=2 2>&1 | sed 's/copied.*//'; stat -c '%s %b' f",
    "sparse copy": "yes | head -c 1M > f; fallocate -p -o 64K -l 512K f; cp --sparse=always f g; cmp f g; stat -c %s g",
    "append": "echo one > f; echo two >> f; cat f",
    "truncate on open": "echo long line > f; echo x > f; cat f; stat -c %s f",
    "links": "echo x > f; ln f g; ln -s f s; stat -c '%h %F' f g s; rm f; cat g; cat s",
    "rename over": "echo 1 > f; echo 2 > g; mv f g; cat g; ls",
    "rename directories": "mkdir -p a/b c; mv a c; find . | sort; mv c/a/b c/a/b 2>&1",
    "rmdir": "mkdir d; touch d/x; rmdir d; rm d/x; rmdir d; ls",
    "modes": "umask 027; touch f; mkdir d; chmod 4755 f; "
    "chmod g+s d; stat -c '%a %F' f d; touch d/x; mkdir d/y; stat -c %a d/x d/y",
    "setfattr": "touch f; setfattr -n user.a -v 1 f; getfattr -d f; "
    "setfattr -x user.a f; getfattr -d f; setfattr -x user.a f",
    "many": "for i in $(seq 500); do echo $i > $i; done; ls | wc -l; rm 1*; ls | wc -l; cat 250",
    "list": "touch a; mkdir b; ls -a; stat -c '%s %h' .",
    "times": "touch -d '2001-02-03 04:05:06.789' f; stat -c '%y %x' f; "
    "echo x >> f; [ $(stat -c %Y f) -gt 1000000000 ] && echo later",
    "special": "mkfifo p; stat -c %F p; (echo through > p &); cat p",
    "enospc": "dd if=/dev/zero of=f bs=1M count=100 2>&1 | sed 's/copied.*//'; stat -c %s f; "
    "rm f; df --output=used . | tail -1",
    "fallocate enospc": "fallocate -l 40M f; fallocate -l 40M g; stat -c '%s %b' f g; df --output=used . | tail -1",
    "unlinked": "exec 3<>f; echo data >&3; rm f; cat /proc/self/fd/3; ls",
    "names": "touch $(printf 'x%.0s' $(seq 255)); touch $(printf 'x%.0s' $(seq 256)); ls | wc -c",
}


def outcome(directory: Path, script: str) -> tuple[str, str, int]:
    directory.mkdir()
    result = run("bash", "-c", script, cwd=directory, env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    return result.stdout, result.stderr, result.returncode


def test_tools_do_what_they_do_on_tmpfs(memfs: Memfs, tmpfs: Path, subtests: pytest.Subtests) -> None:
    for number, (name, script) in enumerate(SCRIPTS.items()):
        with subtests.test(name):
            skip_without(*tools_in(script))
            expected = outcome(tmpfs / str(number), script)
            assert outcome(memfs.path / str(number), script) == expected
            assert expected[0] or expected[1], "a script that says nothing compares nothing"
            for root in (memfs.path, tmpfs):
                subprocess.run(["rm", "-rf", str(root / str(number))], check=True)


def test_df_is_tmpfs_s(memfs: Memfs, tmpfs: Path) -> None:
    for root in (memfs.path, tmpfs):
        run("fallocate", "-l", "10M", root / "f")
    columns = "--output=size,used,avail,pcent"
    assert run("df", columns, memfs.path).stdout == run("df", columns, tmpfs).stdout
    memfs.run("rm", "f")
    assert run("df", "--output=used", memfs.path).stdout.split()[-1] == "0"

"""There is no full collection, however much there is, and what would have needed one is found."""

from __future__ import annotations

import subprocess
import sys

#: Allocates four times what would have been looked at several times over
PROGRAM = """
import gc
from memfs import garbage
from memfs.tree.inode import Symlink

class Other:
    pass

garbage.collect_no_more(young={young})
before = [generation["collections"] for generation in gc.get_stats()]
kept = [Symlink(number, 0o120777, 0, 0, b"target", None) for number in range(200_000)]
now = [generation["collections"] for generation in gc.get_stats()]
print([many - few > 0 for many, few in zip(now, before)])
del kept
other = Other()
other.itself = other
del other
garbage.check()
link = Symlink(1, 0o120777, 0, 0, b"target", None)
link.page = link
del link
try:
    garbage.check()
except AssertionError as error:
    print(error)
garbage.check()
"""


def said_by(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_only_the_young_are_collected() -> None:
    left = "left to the garbage collector: 1 Symlink"
    assert said_by(PROGRAM.format(young=True)) == ["[True, True, False]", left]
    assert said_by(PROGRAM.format(young=False)) == ["[False, False, False]", left]

"""What the daemon does needs no code that is not loaded yet."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
import numpy as np
from memfs import daemon
from memfs.contract.page_map import ABSENT, ALLOCATED, PageMap
from memfs.contract.page_ranges import PageRanges
from memfs.loaded import Loaded

loaded = Loaded()
page_map = PageMap(os.memfd_create("map"))
ranges = PageRanges(np.array([[1, 3], [5, 9], [5000, 5001]]))
for state in (ALLOCATED, ABSENT):
    page_map.set_all(ranges, state)
loaded.check()
import colorsys
try:
    loaded.check()
except AssertionError as error:
    print(error)
"""


def test_what_is_imported_late_is_said() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("imported while the mount was served: colorsys\n", "")

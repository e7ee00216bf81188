"""The bitmap of dirty pages: what KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG do to it."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kvmsim.arrays import runs
from kvmsim.slots.dirty import DirtyLog, pages_in
from tests.helpers import raises


def test_dirty_log_cleans_what_it_is_told_to() -> None:
    log = DirtyLog(100)
    for page in (0, 63, 64, 99):
        log.mark(page)
    assert len(log.bitmap()) == 16
    cleaned = log.clear(64, 36, np.array([1, 0, 0, 0, 0], np.uint8))
    assert list(runs(pages_in(cleaned))) == [(64, 65)]
    assert list(runs(pages_in(log.bitmap()))) == [(0, 1), (63, 64), (99, 100)]
    for first, count in ((1, 64), (0, 36), (0, 101), (128, 1), (64, 0), (-64, 64)):
        with raises(errno.EINVAL, match="whole words"):
            log.clear(first, count, np.full(16, 255, np.uint8))
    with pytest.raises(OSError, match="shorter"):
        log.clear(0, 64, np.zeros(7, np.uint8))
    assert list(runs(pages_in(log.take()))) == [(0, 1), (63, 64), (99, 100)]
    assert not log.bitmap().any()

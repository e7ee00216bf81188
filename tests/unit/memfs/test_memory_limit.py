"""The lowest limit counts, whichever version of cgroups says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfs.memory_limit import MemoryLimit, warning


@pytest.mark.parametrize(
    ("said", "lowest"),
    [
        (["max\n"], None),
        (["9223372036854771712\n"], None),
        (["max\n", "4096\n", "8192\n"], 4096),
        (["8192\n", None, "9223372036854771712\n"], 8192),
        ([None], None),
        ([], None),
    ],
)
def test_lowest(tmp_path: Path, said: list[str | None], lowest: int | None) -> None:
    files = [tmp_path / str(number) for number in range(len(said))]
    for file, text in zip(files, said, strict=True):
        if text is not None:
            file.write_text(text)
    assert MemoryLimit(files).lowest == lowest


def test_warning_is_for_a_limit_that_files_could_reach() -> None:
    assert warning(None, 1 << 40) is None
    assert warning(1 << 30, 512 << 20) is None
    assert "allows 1073741824 bytes" in str(warning(1 << 30, 1 << 30))  # memfs takes something for itself

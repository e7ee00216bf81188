"""What /proc says of a descriptor, without asking the filesystem behind it: that may be us, or hang."""

from __future__ import annotations

from itertools import islice


def fdinfo(fd: int | str) -> dict[str, str]:
    """Read /proc/self/fdinfo of a descriptor (proc_pid_fdinfo(5)): what it has for all kinds of them, nothing else.

    Raises OSError. May block for as long as the descriptor's owner likes (an epoll that somebody polls).
    """
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in islice(lines, 4))}

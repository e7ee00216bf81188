"""What a predecessor had read comes again: by age, before all else, and in shares like everything."""

from __future__ import annotations

import errno
import os
import random
import socket

import pytest
import trio

from memfs.contract.aio.turns import SHARE, Turns
from memfs.fuse.abi import IN_HEADER, RESENT
from memfs.fuse.intake import Intake, Unmounted


async def test_what_comes_again_is_answered_by_age_and_leaves_others_their_turn() -> None:
    turns = Turns.here()
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fuse.setblocking(False)
    with kernel, fuse:
        numbers = list(range(2, 2 * SHARE * 2, 2))
        for number in random.Random(0).sample(numbers, len(numbers)):
            kernel.send(IN_HEADER.pack(IN_HEADER.size, 3, number | RESENT, 1, 0, 0, 0, 0, 0))
        kernel.send(IN_HEADER.pack(IN_HEADER.size, 3, 1000, 1, 0, 0, 0, 0, 0))
        intake = Intake(fuse.fileno(), turns, lambda number, error: None)
        intake.take_over()
        answered = list[int]()
        in_share = shares = 0
        while len(answered) <= len(numbers):
            request = intake.next()
            if request is None:
                assert intake.share_is_over
                assert in_share == SHARE
                await trio.lowlevel.checkpoint()
                intake.begin_share()
                in_share = 0
                shares += 1
            else:
                answered.append(request.number)
                turns.total += 1
                in_share += 1
        assert answered == [*numbers, 1000]
        assert shares == 1


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ECONNABORTED])
async def test_unmounted_while_a_request_is_read(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The kernel says one of two things, by how far it had come with the request."""

    def readv(fd: int, buffers: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "readv", readv)
    with pytest.raises(Unmounted):
        Intake(-1, Turns.here(), lambda number, error: None).next()

"""What is said on the socket of `kvmsim serve`: an ioctl and its answer, one datagram each. Nothing here does I/O.

The socket is of type SOCK_SEQPACKET, and a connection is a descriptor of KVM's: the one to the socket is /dev/kvm, and
the answers to KVM_CREATE_VM and KVM_CREATE_VCPU bring one for the VM and for the vCPU. So a descriptor can be passed
on, inherited and closed as with KVM, and what it stands for ends with the last. On each there is one call at a time.

    call      u32 number of the ioctl   u32 0              u64 argument   then the structure, and what it points to
    answer    i32 errno, 0 if none      u32 0              i64 value      then the structure, where KVM writes it back

All is little-endian. Number 0, INTERRUPT, is a signal to whoever waits for KVM_RUN on that descriptor; it has no
answer of its own. Descriptors go along (SCM_RIGHTS) in the order in which the structure names them, and the numbers in
the structure say no more than that there is one (-1: none).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

INTERRUPT: Final = 0
MAX_PAYLOAD: Final = 1 << 16  #: bytes
MAX_FDS: Final = 2  #: of a call or an answer

_CALL: Final = struct.Struct("<IIQ")
_ANSWER: Final = struct.Struct("<iIq")
MAX_DATAGRAM: Final = _CALL.size + MAX_PAYLOAD


class WireError(Exception):
    """What came is no call, or no answer: one sentence. The connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class Call:
    """An ioctl. `argument`: its third one, if that is a number."""

    number: int
    argument: int = 0
    payload: bytes = b""

    def pack(self) -> bytes:
        """Return the datagram."""
        return _CALL.pack(self.number, 0, self.argument) + self.payload

    @classmethod
    def parse(cls, data: bytes) -> Call:
        """Return what a datagram says. Raises WireError.

        >>> Call.parse(Call(0xAE01, 7, b"more").pack())
        Call(number=44545, argument=7, payload=b'more')
        """
        number, zero, argument = _unpack(_CALL, data)
        _check(data, zero)
        return cls(number, argument, data[_CALL.size :])


@dataclass(frozen=True, slots=True)
class Answer:
    """What an ioctl comes to."""

    value: int = 0
    payload: bytes = b""
    errno: int = 0

    def pack(self) -> bytes:
        """Return the datagram."""
        return _ANSWER.pack(self.errno, 0, self.value) + self.payload

    @classmethod
    def parse(cls, data: bytes) -> Answer:
        """Return what a datagram says. Raises WireError."""
        number, zero, value = _unpack(_ANSWER, data)
        _check(data, zero)
        if number < 0:
            raise WireError(f"errno {number}")
        return cls(value, data[_ANSWER.size :], number)


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, int, int]:
    if len(data) < layout.size:
        raise WireError(f"a datagram of {len(data)} bytes is none of ours")
    first, zero, last = layout.unpack_from(data)
    return first, zero, last


def _check(data: bytes, zero: int) -> None:
    if zero:
        raise WireError("bytes that are to be 0 are not")
    if len(data) > MAX_DATAGRAM:
        raise WireError(f"a datagram of more than {MAX_DATAGRAM} bytes")

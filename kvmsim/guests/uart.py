"""A 16550 serial port, as far as Linux's driver uses one: the console of a guest that is a whole kernel.

Its registers are read and written in the vCPU's thread, an exit each, and what is typed comes from the event loop, so
there is a lock, under which nobody waits: the port has two queues, and whoever serves it (console.py) fills one and
empties the other. A guest that sends faster than somebody reads finds the transmitter not empty, as on any serial line;
what it sends all the same is lost.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

FIRST_PORT: Final = 0x3F8
PORTS: Final = range(FIRST_PORT, FIRST_PORT + 8)
IRQ: Final = 4

_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCRATCH = range(8)
_IER_RX, _IER_TX = 1, 2
_IIR_NONE, _IIR_TX, _IIR_RX, _IIR_FIFOS = 1, 2, 4, 0xC0
_LCR_DLAB: Final = 0x80
_LSR_READY, _LSR_EMPTY = 0x01, 0x60
_MSR_THERE: Final = 0xB0  # carrier, ready, clear to send
_LOAD: Final = 16  # bytes that a driver sends once it has seen that the transmitter is empty
_MOST_TO_SEND: Final = 4096
_MOST_RECEIVED: Final = 256


class Uart:
    """The port. `set_irq` gets the level of the interrupt line when that changes.

    `changed` is called when there is something to send, or room for what is typed, and there was none. Both are called
    in whichever thread it is, and must not wait.
    """

    def __init__(self, set_irq: Callable[[bool], None], changed: Callable[[], None]) -> None:
        self._set_irq: Final = set_irq
        self._changed: Final = changed
        self._lock: Final = threading.Lock()
        self._registers: Final = bytearray(8)
        self._divisor: Final = bytearray((12, 0))
        self._received: Final[deque[int]] = deque()
        self._to_send = bytearray()
        self._is_sent = True  # the guest has not been told yet that the transmitter is empty
        self._level = False

    @property
    def room(self) -> int:
        """How many bytes may be typed now; none until half of the queue is empty, so that few turns are taken."""
        free = _MOST_RECEIVED - len(self._received)
        return free if free >= _MOST_RECEIVED // 2 else 0

    def receive(self, data: bytes) -> None:
        """Take what somebody has typed, at most `room`."""
        with self._lock:
            assert len(data) <= self.room, f"{len(data)} bytes are received, and there is room for {self.room}"
            self._received.extend(data)
            self._update()

    def take_to_send(self) -> bytes:
        """Return what the guest has sent since; then the transmitter is empty."""
        with self._lock:
            data, self._to_send = bytes(self._to_send), bytearray()
            self._is_sent = self._is_sent or len(data) >= _MOST_TO_SEND
            self._update()
        return data

    def read(self, port: int) -> int:
        """Return what `in` reads from a port of PORTS."""
        with self._lock:
            value = self._read(port - FIRST_PORT)
            self._update()
            return value

    def write(self, port: int, value: int) -> None:
        """Take what `out` writes to a port of PORTS."""
        with self._lock:
            self._write(port - FIRST_PORT, value)
            self._update()

    def _read(self, register: int) -> int:
        if register in (_DATA, _IER) and self._registers[_LCR] & _LCR_DLAB:
            return self._divisor[register]
        match register:
            case 0:
                value = self._received.popleft() if self._received else 0
                if len(self._received) == _MOST_RECEIVED // 2:
                    self._changed()
                return value
            case 2:
                cause = self._cause()
                if cause == _IIR_TX:
                    self._is_sent = False
                return cause | _IIR_FIFOS
            case 5:
                return (_LSR_EMPTY if self._is_empty else 0) | (_LSR_READY if self._received else 0)
            case 6:
                return _MSR_THERE
        return self._registers[register]

    def _write(self, register: int, value: int) -> None:
        if register in (_DATA, _IER) and self._registers[_LCR] & _LCR_DLAB:
            self._divisor[register] = value
        elif register == _DATA:
            if not self._to_send:
                self._changed()
            if len(self._to_send) < _MOST_TO_SEND + _LOAD:
                self._to_send.append(value)
            self._is_sent = self._is_empty
        elif register == _IER:
            if value & _IER_TX and not self._registers[_IER] & _IER_TX:
                self._is_sent = self._is_empty
            self._registers[_IER] = value & 0x0F
        elif register not in (_IIR, _LSR, _MSR):
            self._registers[register] = value

    @property
    def _is_empty(self) -> bool:
        return len(self._to_send) < _MOST_TO_SEND

    def _cause(self) -> int:
        enabled = self._registers[_IER]
        if enabled & _IER_RX and self._received:
            return _IIR_RX
        return _IIR_TX if enabled & _IER_TX and self._is_sent else _IIR_NONE

    def _update(self) -> None:
        level = self._cause() != _IIR_NONE
        if level != self._level:
            self._level = level
            self._set_irq(level)

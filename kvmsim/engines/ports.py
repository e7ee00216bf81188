"""What a guest of native code can say by `out`, whichever engine runs it.

KVM's hypercall instructions differ between vendors and are refused at CPL 3; an I/O port is the same everywhere.
"""

from __future__ import annotations

from typing import Final

PORT_HYPERCALL: Final = 0x4B  #: a hypercall: number in rax, arguments in rbx, rcx and rdx, the result in rax
PORT_HALT: Final = 0xF4  #: the end; al is the exit code (QEMU: isa-debug-exit)
PORT_CONSOLE: Final = 0x3F8  #: a byte of text (the data port of the first 16550)

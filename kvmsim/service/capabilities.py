"""Which of KVM's capabilities there are here."""

from __future__ import annotations

from typing import Final

from kvmsim import ioctls
from kvmsim.service.wire import Answer, Call
from kvmsim.uapi import KVM_MAX_VCPU_ID, KVM_USER_MEM_SLOTS

_CAPABILITIES: Final = {
    ioctls.KVM_CAP_USER_MEMORY: 1,
    ioctls.KVM_CAP_NR_VCPUS: 64,
    ioctls.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPU_ID,
    ioctls.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_ID,
    ioctls.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    ioctls.KVM_CAP_READONLY_MEM: 1,
    ioctls.KVM_CAP_IMMEDIATE_EXIT: 1,
    ioctls.KVM_CAP_SYNC_REGS: 1,
    ioctls.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 1,
    ioctls.KVM_CAP_PRE_FAULT_MEMORY: 1,
    ioctls.KVM_CAP_USER_MEMORY2: 1,
    ioctls.KVM_CAP_MEMORY_FAULT_INFO: 1,
    ioctls.KVM_CAP_MEMORY_ATTRIBUTES: ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE,
}


def check_extension(call: Call, *, makes_guest_memfds: bool) -> Answer:
    """Answer KVM_CHECK_EXTENSION, of /dev/kvm or of a VM; 0: it is not here."""
    if call.argument == ioctls.KVM_CAP_GUEST_MEMFD:
        return Answer(makes_guest_memfds)
    return Answer(_CAPABILITIES.get(call.argument, 0))

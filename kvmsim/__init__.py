"""kvmsim: the KVM side of fd-based guest private memory, in userspace."""

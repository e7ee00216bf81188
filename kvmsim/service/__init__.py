"""kvmsim as a process of its own, which VMMs reach over a socket as they reach KVM through /dev/kvm."""

"""The engine that runs native code: the real KVM on kvmsim's memory."""

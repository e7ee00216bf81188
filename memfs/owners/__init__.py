"""Processes that own files: their connections, what they registered, and how they are notified."""

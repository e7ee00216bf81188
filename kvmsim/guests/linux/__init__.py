"""Unmodified static Linux programs as guests: a kernel for one process, in Python."""

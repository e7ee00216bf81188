"""Engines: the code that a vCPU can execute."""

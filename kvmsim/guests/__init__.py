"""Guests of native code: what is loaded into guest memory, and what answers them."""

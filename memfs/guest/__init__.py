"""The contract between the backing store and the owners of its files (RFC patch 01, guest_ops and guest_mem_ops)."""

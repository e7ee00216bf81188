"""What a vCPU can execute."""

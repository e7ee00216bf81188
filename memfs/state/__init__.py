"""What must outlive the daemon's process: after-images of everything that it knows, in a log in memory."""

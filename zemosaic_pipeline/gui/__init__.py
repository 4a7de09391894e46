"""ZeMosaic's window: the process that it starts, the queue that it reads, what its filter window looks up by name."""

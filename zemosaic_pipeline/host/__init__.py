"""What the process asks of its machine: folders, threads, resources; and how it tells of its progress."""

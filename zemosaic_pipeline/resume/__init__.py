"""What a stopped run leaves for the next: pieces on disk, and the fingerprints that tell whether they still fit."""

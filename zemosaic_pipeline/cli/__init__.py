"""The command line: its options, what it prints, the dry run.

The engine is handed in by `zemosaic_worker`."""

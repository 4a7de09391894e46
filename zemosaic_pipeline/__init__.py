"""The worker's rooms, by subject; docs/architecture.md draws them.

Imports only run down, as that page orders the rooms; tests/test_layout.py reads them."""

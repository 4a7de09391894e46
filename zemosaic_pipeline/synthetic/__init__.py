"""Known skies: the panels and the night of the demonstrations, tests and benchmarks."""

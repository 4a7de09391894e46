"""The pixel functions, their compilations for CPU and CUDA, and the switch between the two."""

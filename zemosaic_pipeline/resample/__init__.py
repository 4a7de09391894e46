"""From tiles on disk to blocks of the mosaic.

Output grid, certified coordinate meshes, surveys, coarse measurement, coadd."""

"""The seven phases of a run, a module or two each, in order.

`zemosaic_worker.make_mosaic` is their table of contents."""

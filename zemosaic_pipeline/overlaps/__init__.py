"""What the overlap of two tiles says of their gains and levels.

It sees coarse arrays only; `zemosaic_photometry` is made of it."""

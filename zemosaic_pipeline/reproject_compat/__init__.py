"""All that knows the reproject package: its coadd as an engine, and ours in the place of its coadd."""

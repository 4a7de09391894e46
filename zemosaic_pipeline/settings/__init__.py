"""Every setting once, from loosely typed values to typed ones; and the keys of ZeMosaic's window."""

"""Stars: found and measured, matched between frames, used to align frames and to judge them."""

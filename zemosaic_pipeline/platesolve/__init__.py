"""Plate solving by programs of others: ASTAP and astrometry.net's solve-field."""

"""Skies, files and places that many tests share."""

"""FITS in and out: files found and judged, headers and WCS read, tiles opened, mosaics and previews written."""

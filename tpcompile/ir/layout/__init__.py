"""Where every weight is stored: segments, index ranges, selections."""

"""What every stage speaks of: placements, markers, sizes, names, layouts of weights."""

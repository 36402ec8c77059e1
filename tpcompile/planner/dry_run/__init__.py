"""What a model would take on the ranks: memory and time, as plain data."""

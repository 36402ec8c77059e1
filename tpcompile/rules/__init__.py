"""What every operator allows: one line each."""

"""What ranks agree on, and the groups that they talk over."""

"""A sharded model at work."""

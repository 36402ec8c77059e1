"""A sharded model's programs on disk, and run without the model."""

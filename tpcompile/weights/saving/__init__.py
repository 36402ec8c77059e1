"""Writes a sharded model as an ordinary checkpoint."""

"""Decides the placement of every value, and what is reported about it."""

"""Strategies by name: what the words in a plan mean."""

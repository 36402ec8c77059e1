"""Strategies that users write themselves."""

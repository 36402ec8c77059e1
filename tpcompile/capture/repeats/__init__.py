"""Repeated layers, captured once."""

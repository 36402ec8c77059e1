"""Captured programs on disk, and shared between ranks."""

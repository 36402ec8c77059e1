"""Reads a checkpoint of safetensors: every rank only the slices that it holds."""

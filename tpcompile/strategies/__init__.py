"""Plans of transformers, by name."""

"""Key-value caches as inputs and outputs of a program."""

"""What a model would take on the ranks: its programs, run on tensors without values."""

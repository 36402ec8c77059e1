"""A rank's share of the weights: sharded, gathered, loaded, saved."""

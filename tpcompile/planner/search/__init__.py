"""The search for the cheapest placements."""

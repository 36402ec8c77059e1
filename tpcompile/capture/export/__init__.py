"""One call, exported as a flat, functional graph."""

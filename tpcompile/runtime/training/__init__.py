"""A sharded model in transformers' ``Trainer``, and in what is made of it."""

"""From a model and an example call to one functional graph at global shapes."""

"""Runs a sharded model beside the model as the python that it is, and says where they part."""

"""Measured experiments: a recipe, its command and its result, one folder each."""

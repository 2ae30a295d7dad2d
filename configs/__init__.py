"""Packaged recipes: one flat YAML each, found by name (`mmlong fit -c image/cells256`)."""

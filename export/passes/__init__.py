"""A graph into an equal graph: one pass per file, each returns how often it fired. Knows no torch module."""

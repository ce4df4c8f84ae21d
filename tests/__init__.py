"""A package by name, so that no other `tests` that some library brings along is found in its place."""

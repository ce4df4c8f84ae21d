"""Fault injection into real runs; each module has some sections of the table."""

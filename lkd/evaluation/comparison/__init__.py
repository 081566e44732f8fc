"""Losses × students × paired seeds."""

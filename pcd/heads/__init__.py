"""Heads by name."""

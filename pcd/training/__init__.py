"""Losses, phases, schedule, loop and checkpoints."""

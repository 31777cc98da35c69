"""The loop around a head: rows, targets, schedule, checkpoints."""

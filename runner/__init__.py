"""What a run does: sweep (points, cells, plan, launch), data, training, checkpoints, tracking."""

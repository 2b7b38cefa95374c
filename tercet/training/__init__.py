"""The one training loop: steps, schedules, checkpoints, log."""

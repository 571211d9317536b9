"""What a run leaves: checkpoints, logs, outputs, figures, and where it ran."""

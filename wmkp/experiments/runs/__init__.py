"""The files of a run: checkpoints, logs, outputs, figures and provenance."""

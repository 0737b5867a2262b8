"""What makes a run survive: checkpoints and how it goes on from one, signals, hangs, steps that fail, files that a
crash leaves whole. Knows nothing of what becomes of its number."""

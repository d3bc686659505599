"""Weights on disk and in memory: checkpoints read, written and kept, and models of which a rank has only its part."""

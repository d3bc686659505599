"""Executes programs: stages, microbatches, transports and the executor. Knows the values of ``ir`` and the errors only."""

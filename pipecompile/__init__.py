"""pipecompile: a compiler that makes a pipeline-parallel training program out of an unmodified PyTorch model."""

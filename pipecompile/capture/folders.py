"""Folders whose code is not the user's."""

from __future__ import annotations

from pathlib import Path

import torch

TORCH = str(Path(torch.__file__).parent)
OURS = str(Path(__file__).parent)
"""The tracer's own, whose wrappers stand between torch and the model."""
OUTSIDE = (TORCH, OURS, "<")
"""What the names of files begin with that are not the user's; "<" is code that was made from text."""

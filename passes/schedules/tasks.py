"""Short names for the four compute instructions, as every schedule writes them."""

from __future__ import annotations

from pipecompile.ir import Instruction


def forward(stage: int, microbatch: int) -> Instruction:
    return Instruction("FORWARD", stage, microbatch)


def backward(stage: int, microbatch: int) -> Instruction:
    """Input and weight gradients in one go."""
    return Instruction("BACKWARD", stage, microbatch)


def backward_input(stage: int, microbatch: int) -> Instruction:
    return Instruction("BACKWARD_INPUT", stage, microbatch)


def backward_weight(stage: int, microbatch: int) -> Instruction:
    return Instruction("BACKWARD_WEIGHT", stage, microbatch)

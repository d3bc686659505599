"""The operation that guards a decision: the model's code asked for a tensor's value, and the answer was compiled in.

``torch.ops.pipecompile.expect(value, answer, where)`` raises BatchError if the value has become another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipecompile.errors import BatchError

torch.library.define("pipecompile::expect", "(Tensor value, Scalar answer, str where) -> ()")


@torch.library.impl("pipecompile::expect", "CompositeExplicitAutograd")
def _expect(value: Tensor, answer: float, where: str) -> None:
    if value.is_meta or value.item() == answer:
        return
    raise BatchError(
        f"the model's code at {where} asks for a value that is now {value.item()}, but was {answer} when the pipeline "
        "was compiled, and what follows was compiled for that; give batches that agree there, or compile with that "
        "module in opaque=[...]"
    )


torch.library.register_fake("pipecompile::expect", lambda value, answer, where: None)
EXPECT = torch.ops.pipecompile.expect.default
torch.fx.node.has_side_effect(EXPECT)
EXPECT_TARGET = "pipecompile.expect.default"

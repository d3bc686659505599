"""Stage 1 of 2 (counted from 0).

Receives
    mul_2  float32[2, 8]  from stage 0

Gives
    loss  float32[]  (the step's result)

Reads of the batch: input_
Parameters: 0 tensors, 0 bytes
Cost of a microbatch: forward 3.4e-05 ms, backward 6.8e-05 ms, 136 bytes kept for backward
"""

import torch
import torch.nn.functional as F

from pipecompile.runtime import Stage

aten = torch.ops.aten


class Stage1(Stage):
    def forward(self, batch, mul_2):
        input_ = batch[0]
        # the model itself, and its loss
        add = aten.add_.Tensor(self.steps, 1)
        broadcast_tensors, broadcast_tensors_2 = aten.broadcast_tensors.default([mul_2, input_])
        loss = F.mse_loss(broadcast_tensors, broadcast_tensors_2)
        return (loss,)

"""Stage 0 of 2 (counted from 0).

Gives
    mul_2  float32[2, 8]  to stage 1

Reads of the batch: input_
Parameters: 3 tensors, 160 bytes
Cost of a microbatch: forward 4.9e-05 ms, backward 9.8e-05 ms, 196 bytes kept for backward
"""

from pipecompile.runtime import Stage


class Stage0(Stage):
    def _replicated(self, batch):
        """Cheap values without a gradient that every reading stage computes."""
        input_ = batch[0]
        # the model itself, and its loss
        gt = input_ > 0
        mul = input_ * gt
        return (gt, mul)

    def forward(self, batch):
        gt, mul = self._replicated(batch)
        encode = self.encode(mul)
        norm = self.norm(encode)
        # the model itself, and its loss
        matmul = norm @ self.encode.weight
        mul_2 = matmul * gt
        return (mul_2,)

"""Stage 0 of 2 (counted from 0).

Gives
    matmul  float32[2, 8]  to stage 1

Reads of the batch: input_
Parameters: 3 tensors, 160 bytes
Cost of a microbatch: forward 3.3e-05 ms, backward 6.6e-05 ms, 132 bytes kept for backward
"""

from pipecompile.runtime import Stage


class Stage0(Stage):
    def _replicated(self, batch):
        """Cheap values without a gradient that every reading stage computes."""
        input_ = batch[0]
        # the model itself, and its loss
        gt = input_ > 0
        mul = input_ * gt
        return (mul,)

    def forward(self, batch):
        (mul,) = self._replicated(batch)
        encode = self.encode(mul)
        norm = self.norm(encode)
        # the model itself, and its loss
        matmul = norm @ self.encode.weight
        return (matmul,)

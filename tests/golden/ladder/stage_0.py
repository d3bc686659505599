"""Stage 0 of 3 (counted from 0).

Gives
    relu    float32[2, 8]  to stage 1
    relu_2  float32[2, 8]  to stage 1

Reads of the batch: x
Parameters: 4 tensors, 576 bytes
Cost of a microbatch: forward 9.6e-05 ms, backward 0.000192 ms, 384 bytes kept for backward
"""

from pipecompile.runtime import Stage


class Stage0(Stage):
    def forward(self, batch):
        x = batch["x"]
        rungs = self.rungs[0](x)
        # the model itself, and its loss
        add = rungs + x
        relu = add.relu()
        rungs_2 = self.rungs[1](relu)
        # the model itself, and its loss
        add_2 = rungs_2 + x
        relu_2 = add_2.relu()
        return (relu, relu_2)

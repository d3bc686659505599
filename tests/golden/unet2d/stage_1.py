"""Stage 1 of 3 (counted from 0).

Receives
    input_tensor     float32[2, 32, 8, 8]  from stage 0
    temb             float32[2, 64]  from stage 0
    hidden_states_4  float32[2, 32, 8, 8]  from stage 0
    hidden_states_2  float32[2, 16, 8, 8]  from stage 0

Gives
    add  float32[2, 32, 8, 8]  to stage 2

Parameters: 54 tensors, 353,024 bytes
Cost of a microbatch: forward 0.331 ms, backward 0.661 ms, 1,322,752 bytes kept for backward
"""

import torch
import torch.nn.functional as F

from pipecompile.runtime import Stage


class Stage1(Stage):
    def forward(self, batch, input_tensor, temb, hidden_states_4, hidden_states_2):
        batch_size = batch["sample"].size(0)
        hidden_states_6 = self.mid_block.resnets[1](input_tensor, temb)
        # up_blocks.0
        input_tensor_2 = torch.cat([hidden_states_6, hidden_states_4], 1)
        hidden_states_7 = self.up_blocks[0].resnets[0](input_tensor_2, temb)
        attentions = self.up_blocks[0].attentions[0](hidden_states_7)
        # up_blocks.0
        input_tensor_3 = torch.cat([attentions, hidden_states_2], 1)
        hidden_states_8 = self.up_blocks[0].resnets[1](input_tensor_3, temb)
        # up_blocks.0.attentions.1
        view = hidden_states_8.view(batch_size, 32, 64)
        transpose = view.transpose(1, 2)
        transpose_2 = transpose.transpose(1, 2)
        group_norm = self.up_blocks[0].attentions[1].group_norm(transpose_2)
        # up_blocks.0.attentions.1
        transpose_3 = group_norm.transpose(1, 2)
        to_q = self.up_blocks[0].attentions[1].to_q(transpose_3)
        to_k = self.up_blocks[0].attentions[1].to_k(transpose_3)
        to_v = self.up_blocks[0].attentions[1].to_v(transpose_3)
        # up_blocks.0.attentions.1
        view_2 = to_q.view(batch_size, -1, 4, 8)
        transpose_4 = view_2.transpose(1, 2)
        view_3 = to_k.view(batch_size, -1, 4, 8)
        transpose_5 = view_3.transpose(1, 2)
        view_4 = to_v.view(batch_size, -1, 4, 8)
        transpose_6 = view_4.transpose(1, 2)
        scaled_dot_product_attention = F.scaled_dot_product_attention(transpose_4, transpose_5, transpose_6)
        transpose_7 = scaled_dot_product_attention.transpose(1, 2)
        reshape = transpose_7.reshape(batch_size, -1, 32)
        to_out = self.up_blocks[0].attentions[1].to_out[0](reshape)
        # up_blocks.0.attentions.1
        transpose_8 = to_out.transpose(-1, -2)
        reshape_2 = transpose_8.reshape(batch_size, 32, 8, 8)
        add = reshape_2 + hidden_states_8
        return (add,)

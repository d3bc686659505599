"""Stage 2 of 4 (counted from 0).

Receives
    hidden_states_5  float32[2, 12, 32]  from stage 1
    hidden_states_7  float32[2, 10, 32]  from stage 1
    position_bias_2  float32[1, 4, 10, 10]  from stage 1

Gives
    encoder_hidden_states          float32[2, 12, 32]  to stage 3
    encoder_decoder_position_bias  float32[1, 4, 10, 12]  to stage 3
    hidden_states_11               float32[2, 10, 32]  to stage 3

Parameters: 19 tensors, 66,176 bytes
Cost of a microbatch: forward 0.0491 ms, backward 0.0982 ms, 196,448 bytes kept for backward
"""

from pipecompile.runtime import Stage


class Stage2(Stage):
    def forward(self, batch, hidden_states_5, hidden_states_7, position_bias_2):
        encoder_hidden_states = self.encoder.final_layer_norm(hidden_states_5)
        hidden_states_8_result = self.decoder.block[0].layer[1](hidden_states_7, key_value_states=encoder_hidden_states)
        hidden_states_8 = hidden_states_8_result[0]
        encoder_decoder_position_bias = hidden_states_8_result[1]
        hidden_states_9 = self.decoder.block[0].layer[2](hidden_states_8)
        hidden_states_10 = self.decoder.block[1].layer[0](hidden_states_9, position_bias=position_bias_2)[0]
        hidden_states_11 = self.decoder.block[1].layer[1](
            hidden_states_10, key_value_states=encoder_hidden_states, position_bias=encoder_decoder_position_bias
        )[0]
        return (encoder_hidden_states, encoder_decoder_position_bias, hidden_states_11)

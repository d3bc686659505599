"""Wav2Vec2 with the CTC loss: it takes the labels that are no padding, whose number depends on the batch."""

import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


def family() -> Case:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        conv_dim=[16, 16, 16],
        conv_stride=[5, 2, 2],
        conv_kernel=[10, 3, 3],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,
        mask_time_prob=0.0,
        ctc_zero_infinity=True,
    )
    labels = torch.randint(4, 30, (SAMPLES, 4))
    labels[::2, 3] = -100
    return Wav2Vec2ForCTC(config), {"input_values": torch.randn(SAMPLES, 400), "labels": labels}, None

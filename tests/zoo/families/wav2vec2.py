"""Wav2Vec2: a convolutional feature encoder under a transformer, here as a classifier of sounds."""

import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


def family() -> Case:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        num_labels=5,
        classifier_proj_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
    )
    batch = {"input_values": torch.randn(SAMPLES, 800), "labels": torch.randint(5, (SAMPLES,))}
    return Wav2Vec2ForSequenceClassification(config), batch, None

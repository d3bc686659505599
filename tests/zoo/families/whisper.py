"""Whisper: convolutions over a spectrogram, an encoder, and a decoder that attends to it."""

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES, VOCABULARY, tokens


def family() -> Case:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    batch = {"input_features": torch.randn(SAMPLES, 8, 32), "labels": tokens(8)}
    return WhisperForConditionalGeneration(config), batch, None

"""Models that read sound."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.base import Architecture, Specimen, last_hidden, logits

__all__ = ["ALL"]


def _whisper() -> Specimen:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=40,
        d_model=128,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=512,
        max_source_positions=100,
    )

    def batch(number: int) -> Tensor:
        return torch.randn(4, 40, 200, generator=torch.Generator().manual_seed(number))  # (count, mel bins, frames)

    return Specimen(WhisperEncoder(config).eval(), batch, last_hidden)


def _wav2vec2() -> Specimen:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        conv_dim=(64,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=32,
    )

    def batch(number: int) -> Tensor:
        return torch.randn(2, 16000, generator=torch.Generator().manual_seed(number))  # (count, samples): a second

    return Specimen(Wav2Vec2ForCTC(config).eval(), batch, logits)


ALL = (
    Architecture("Whisper, encoder", "transformers", _whisper),
    Architecture("wav2vec 2.0", "transformers", _wav2vec2),
)

"""Models that read text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.base import Architecture, Specimen, last_hidden, logits, tokens

__all__ = ["ALL"]

VOCABULARY, LENGTH = 1000, 48
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "num_labels": 8,
}


def _of(model: nn.Module, compared: Any = logits) -> Specimen:
    return Specimen(model.eval(), tokens(VOCABULARY, LENGTH), compared)


def _bert() -> Specimen:
    from transformers import BertConfig, BertForSequenceClassification

    def batch(number: int) -> dict[str, Tensor]:
        given = tokens(VOCABULARY, LENGTH)(number)
        lengths = torch.randint(LENGTH // 2, LENGTH, (8, 1), generator=torch.Generator().manual_seed(number))
        return {**given, "attention_mask": (torch.arange(LENGTH) < lengths).long()}

    return Specimen(BertForSequenceClassification(BertConfig(**BERT)).eval(), batch, logits)


def _distilbert() -> Specimen:
    from transformers import DistilBertConfig, DistilBertForTokenClassification

    config = DistilBertConfig(vocab_size=VOCABULARY, dim=128, n_layers=3, n_heads=4, hidden_dim=512, num_labels=8)
    return _of(DistilBertForTokenClassification(config))


def _roberta() -> Specimen:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return _of(RobertaForMaskedLM(RobertaConfig(**BERT, max_position_embeddings=64)))


def _albert() -> Specimen:
    from transformers import AlbertConfig, AlbertModel

    return _of(AlbertModel(AlbertConfig(**BERT, embedding_size=64)), last_hidden)


def _deberta() -> Specimen:
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32)
    return _of(DebertaV2Model(config), last_hidden)


def _t5() -> Specimen:
    from transformers import T5Config, T5EncoderModel

    return _of(
        T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4)),
        last_hidden,
    )


def _bart() -> Specimen:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=64,
        use_cache=False,
    )
    return _of(BartModel(config), last_hidden)


def _gpt2() -> Specimen:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _of(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=3, n_head=4, n_positions=64)))


def _opt() -> Specimen:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        ffn_dim=512,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=128,
    )
    return _of(OPTForCausalLM(config))


LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _llama() -> Specimen:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _of(LlamaForCausalLM(LlamaConfig(**LLAMA)))


def _mixtral() -> Specimen:
    from transformers import MixtralConfig, MixtralForCausalLM

    return _of(MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)))


def _mamba() -> Specimen:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, state_size=8, use_cache=False)
    return _of(MambaModel(config), last_hidden)


ALL = (
    Architecture("BERT", "transformers", _bert),
    Architecture("DistilBERT", "transformers", _distilbert),
    Architecture("RoBERTa", "transformers", _roberta),
    Architecture("ALBERT, layers shared", "transformers", _albert),
    Architecture("DeBERTa-v2", "transformers", _deberta),
    Architecture("T5, encoder", "transformers", _t5),
    Architecture("BART", "transformers", _bart),
    Architecture("GPT-2", "transformers", _gpt2),
    Architecture("OPT", "transformers", _opt),
    Architecture("Llama", "transformers", _llama),
    Architecture("Mixtral, experts", "transformers", _mixtral),
    Architecture("Mamba", "transformers", _mamba),
)

"""Small models of transformers with random weights, and sentences to give them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

LENGTH, HIDDEN, WIDE = 6, 32, 48


def common(attention: str) -> dict[str, Any]:
    """What small configurations have in common."""
    return {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": WIDE,
            "attn_implementation": attention}  # fmt: skip


def bert_config(attention: str = "sdpa") -> transformers.BertConfig:
    return transformers.BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=4, **common(attention))


def bert(attention: str = "sdpa") -> nn.Module:
    return transformers.BertForSequenceClassification(bert_config(attention))


def gpt2(attention: str = "sdpa") -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_embd=HIDDEN, n_layer=2, n_head=2, n_inner=WIDE, n_positions=32, bos_token_id=1,
            eos_token_id=2, attn_implementation=attention,
        )
    )  # fmt: skip


def weighted(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with weights that are far from 0, so that little differences show."""
    generator = torch.Generator().manual_seed(0)
    model = model.to(torch.float64).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def sentences(lengths: list[int], width: int = LENGTH) -> dict[str, Any]:
    """Random tokens, padded on the right, always the same for a row and length."""
    ids, mask = torch.zeros((2, len(lengths), width), dtype=torch.int64)
    for row, length in enumerate(lengths):
        drawn = torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(100 * row + length))
        ids[row, :length], mask[row, :length] = drawn, 1
    return {"input_ids": ids, "attention_mask": mask}

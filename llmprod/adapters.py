"""Adapters: small trained layers between those of a frozen encoder."""

import torch
from transformers import PreTrainedModel


class Adapter(torch.nn.Module):
    """A bottleneck with a residual connection that starts as the identity (Houlsby et al. 2019, section 2.1)."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.down, self.up = torch.nn.Linear(width, size), torch.nn.Linear(size, width)
        torch.nn.init.normal_(self.down.weight, std=0.01)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            torch.nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adds the output of the bottleneck to the hidden states."""
        return hidden + self.up(torch.nn.functional.gelu(self.down(hidden)))


def add_adapters(encoder: PreTrainedModel, size: int) -> None:
    """Adds an adapter after the attention and the feed-forward block of every layer of a BERT-like encoder."""
    for layer in encoder.encoder.layer:
        attention = layer.attention  # the last matrix of MPNet's has another place
        last = (attention.output, "dense") if hasattr(attention, "output") else (attention.attn, "o")
        for block, name in (last, (layer.output, "dense")):
            matrix = getattr(block, name)
            setattr(block, name, torch.nn.Sequential(matrix, Adapter(matrix.out_features, size)))

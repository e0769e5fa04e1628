"""A transformer encoder for texts, trained from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.backbones.embedding import TokenEmbedding
from metarun.errors import ConfigError
from metarun.tasks.class_store import padding_mask


class TextTransformer(nn.Module):
    """Word vectors with learned positions, encoder layers, and the mean over words.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.1, with layer normalisation before each
    block (Xiong et al. 2020), which trains without warm-up, and without dropout. The dataset gives words in
    their order (`dataset.ngrams=[]`).

    Args:
        item_shape: passed by the builder: [L].
        vocabulary: passed by the builder: the number of token ids.
        width: the size of a word's vector.
        layers, heads: of the encoder.
        adapts: whether word vectors are adapted to each task; False: they are the same for all tasks.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        vocabulary: int,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        adapts: bool = False,
    ) -> None:
        super().__init__()
        if min(width, layers, heads) < 1 or width % heads:
            raise ConfigError(f"backbone.width={width}: must be a multiple of backbone.heads={heads}")
        self.embedding = TokenEmbedding(vocabulary, width, shared=not adapts)
        self.positions = nn.Parameter(torch.randn(item_shape[0], width) * width**-0.5)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.features = width

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, L] to vectors [B, width]."""
        words = self.embedding(ids).squeeze(-2).mT + self.positions  # [B, L, width]
        padding = ~padding_mask(ids)
        # An empty text would have no word to attend to, and its attention would be NaN.
        padding = padding & ~padding.all(1, keepdim=True)
        encoded = self.encoder(words, src_key_padding_mask=padding)
        present = (~padding).unsqueeze(-1).to(encoded.dtype)
        return (encoded * present).sum(1) / present.sum(1)

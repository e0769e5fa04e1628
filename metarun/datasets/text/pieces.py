"""Texts as the token ids of an encoder, for an encoder that is trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.backbones.encoder import blaming, load_tokenizer
from metarun.datasets.text.encoder import Encoder
from metarun.datasets.text.tokens import length_remark
from metarun.datasets.text.vectors import refusing_learned
from metarun.errors import DataError
from metarun.tasks.class_store import PADDING, tokens
from metarun.tasks.spec import PretrainedNetwork

ENCODED = 4096  # texts that are cut into tokens at once
MOST = 1 << 17  # tokens of a text; no encoder takes as many


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of an encoder, and what a network for its token ids is.

    Args:
        content: the tokenizer as the library tokenizers writes it, JSON.
        length: the most tokens of a text.
        vocabulary: the number of different token ids.
        network: the encoder.
    """

    content: str = field(repr=False)
    length: int
    vocabulary: int
    network: PretrainedNetwork

    @classmethod
    def of(cls, encoder: Encoder) -> Tokenizer:
        """That of an encoder. Raises DataError, ConfigError."""
        loaded = load_tokenizer(encoder.name, encoder.folder)
        if not getattr(loaded, "is_fast", False):
            raise DataError(
                f"{encoder.folder}: has no tokenizer.json, which dataset.finetune=true needs; save its fast "
                "tokenizer there, or set dataset.finetune=false"
            )
        network = PretrainedNetwork(
            json.dumps(encoder.config),
            encoder.width,
            loaded.pad_token_id,
            encoder.first_token,
            encoder.source,
        )
        vocabulary = encoder.config.get("vocab_size") or len(loaded)
        most = min(encoder.most(loaded), MOST)
        return cls(loaded.backend_tokenizer.to_str(), most, vocabulary, network)

    @classmethod
    def loads(cls, learned: str, content: str) -> Tokenizer:
        """The tokenizer that `dumps` describes. Raises ConfigError."""
        with refusing_learned():
            stated = json.loads(learned)
            network = PretrainedNetwork(**stated.pop("network"))
            made = cls(content, network=network, **stated)
            made.check()
            return made

    def check(self) -> None:
        """Raise ValueError for values that no tokenizer has: they may be from somebody's checkpoint."""
        network = self.network
        whole = (self.length, self.vocabulary, network.width, network.padding)
        texts = (network.config, network.source)
        if not (
            all(type(number) is int for number in whole)
            and all(isinstance(text, str) for text in texts)
            and isinstance(network.first_token, bool)
            and 0 < self.length <= MOST
            and 0 <= network.padding < self.vocabulary
        ):
            raise ValueError("out of range")

    def dumps(self) -> str:
        """All but the content, as JSON."""
        stated = asdict(self)
        del stated["content"]
        return json.dumps(stated).replace("$", "\\u0024")

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """The token ids of texts, cut to `length`, and the length of each before that."""
        with blaming(self.network.source):
            import tokenizers

            tokenizer: Any = tokenizers.Tokenizer.from_str(self.content)
            tokenizer.no_padding()
            ids: list[list[int]] = []
            lengths: list[int] = []
            for start in range(0, len(texts), ENCODED):
                block = list(texts[start : start + ENCODED])
                tokenizer.no_truncation()
                lengths += [len(each.ids) for each in tokenizer.encode_batch(block)]
                tokenizer.enable_truncation(self.length)
                ids += [each.ids for each in tokenizer.encode_batch(block)]
        return ids, lengths


@dataclass(frozen=True)
class Pieces:
    """An encoding of texts: the token ids of an encoder, each plus 1, since 0 is padding.

    Args:
        encoder: the encoder; its files are only read if `given` is None.
        given: its tokenizer, from a checkpoint.
    """

    encoder: Encoder
    given: Tokenizer | None = None
    item_dtype: ClassVar[torch.dtype] = torch.int64
    decode = staticmethod(tokens)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.given or Tokenizer.of(self.encoder)

    @property
    def item_shape(self) -> tuple[int, ...]:
        return (self.tokenizer.length,)

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocabulary + 1

    def knowing(self, texts: Iterable[str], cached_as: str) -> Pieces:
        return self  # a second for 20,000 texts: not worth a cache

    def encode(self, texts: Sequence[str], languages: Sequence[str] = ()) -> tuple[Tensor, list[int]]:
        """The ids of texts, int32 [texts, length] with padding at their ends, and each text's own length."""
        found, lengths = self.tokenizer.encode(texts)
        ids = torch.full((len(texts), self.tokenizer.length), PADDING, dtype=torch.int32)
        for row, own in zip(ids, found, strict=True):
            row[: len(own)] = torch.tensor(own, dtype=torch.int32) + 1
        if len(ids) and int(ids.max()) > self.tokenizer.vocabulary:
            raise DataError(
                f"{self.encoder.name}: its tokenizer has more tokens than its network; name another"
            )
        return ids, lengths

    def remarks(self, texts: Sequence[str], lengths: Sequence[int]) -> list[str]:
        return [length_remark(lengths, self.tokenizer.length)]

"""Texts as token ids: words and their character n-grams, hashed.

Hashing needs no vocabulary. A checkpoint reads texts of any language and of any other dataset, and the test
classes cannot leak into a vocabulary.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metarun.tasks.class_store import PADDING, tokens

BUCKETS = 1 << 16  # different token ids; 0 is padding


@dataclass(frozen=True)
class Tokens:
    """How texts become token ids.

    Args:
        ngrams: the lengths of the character n-grams of each word, whose ids follow that of the word; empty:
            words alone, in their order.
        length: the most ids of a text; the rest is cut.
    """

    ngrams: tuple[int, ...]
    length: int
    vocabulary: ClassVar[int | None] = BUCKETS
    item_dtype: ClassVar[torch.dtype] = torch.int64
    decode = staticmethod(tokens)

    @property
    def item_shape(self) -> tuple[int, ...]:
        return (self.length,)

    def knowing(self, texts: Iterable[str], cached_as: str) -> Tokens:
        return self  # they are not worth a cache

    def encode(self, texts: Sequence[str], languages: Sequence[str] = ()) -> tuple[Tensor, list[int]]:
        """The ids of texts, int32 [texts, length] with padding at their ends, and each text's own length."""
        known: dict[str, list[int]] = {}  # by what stands between white space
        ids = torch.full((len(texts), self.length), PADDING, dtype=torch.int32)
        lengths = []
        for row, text in zip(ids, texts, strict=True):
            found: list[int] = []
            for chunk in normalised(text).split():
                if chunk not in known:
                    known[chunk] = self.ids_of(chunk)
                found += known[chunk]
            lengths.append(len(found))
            row[: len(found)] = torch.tensor(found[: self.length], dtype=torch.int32)
        return ids, lengths

    def remarks(self, texts: Sequence[str], lengths: Sequence[int]) -> list[str]:
        return [length_remark(lengths, self.length)]

    def ids_of(self, chunk: str) -> list[int]:
        """The ids of the words between two white spaces, each followed by those of its n-grams."""
        found = []
        for word in words(chunk):
            marked = f"<{word}>"  # so that beginnings and ends of words differ from their middles
            grams = [marked[i : i + n] for n in self.ngrams for i in range(len(marked) - n + 1)]
            found += [bucket(f"word {word}"), *(bucket(gram) for gram in grams)]
        return found


def normalised(text: str) -> str:
    """A text without differences of case and of compatible characters (Unicode NFKC and case folding)."""
    return unicodedata.normalize("NFKC", text).casefold()


def words(text: str) -> list[str]:
    """Words, punctuation marks and symbols; combining marks stay with their letters.

    The pattern `\\w+` would cut words at combining marks, which most scripts of Africa and India have.
    """
    return "".join(c if is_word(c) else f" {c} " for c in text).split()


def is_word(token: str) -> bool:
    """Whether a token is neither a punctuation mark nor a symbol."""
    return unicodedata.category(token[0])[0] not in "PS"


def bucket(token: str) -> int:
    """The id of a token, from 1 to BUCKETS - 1."""
    return zlib.crc32(token.encode("utf-8", "surrogatepass")) % (BUCKETS - 1) + 1


def length_remark(lengths: Sequence[int], most: int) -> str:
    """The lengths of texts in tokens, and how many were cut, for a message."""
    half, nearly = (int(torch.tensor(lengths, dtype=torch.float64).quantile(share)) for share in (0.5, 0.99))
    cut = sum(length > most for length in lengths)
    return (
        f"tokens of a text: {half} (median), {nearly} (99 %); {cut:,} of {len(lengths):,} texts cut to {most}"
    )

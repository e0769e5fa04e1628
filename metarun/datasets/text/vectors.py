"""Texts as vectors of a trained model, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from metarun.errors import ConfigError
from metarun.storage.cached_arrays import memmap_cached
from metarun.storage.files import encoded
from metarun.tasks.class_store import numbers

VERSION = 1  # of what is in a cache entry
ALL = ""  # in place of a language: the mean of all texts


class Model(Protocol):
    """A trained model that gives each text a vector; equal models give equal vectors."""

    @property
    def width(self) -> int:
        """The size of a vector, known without loading the model. Raises DataError."""

    @property
    def source(self) -> str:
        """The path of the model's file or folder."""

    @property
    def mark(self) -> str:
        """All that vectors depend on beside the texts: files with their sizes and times, and settings."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of texts.

        Returns:
            Vectors, float32 [texts, width]; and int32 [texts, 2]: how many tokens a text has, and how many
            of them have no part in its vector.

        Raises:
            DataError, ConfigError: the model cannot be read or used.
        """

    def remark(self, counts: Tensor) -> str:
        """What users should know about texts with these counts [texts, 2]."""


@dataclass(frozen=True)
class Known:
    """Vectors of texts that are computed already.

    Args:
        rows: the number of each text.
        vectors: float32 [texts, width].
        counts: int32 [texts, 2], see `Model.encode`.
    """

    rows: Mapping[str, int]
    vectors: Tensor
    counts: Tensor

    def of(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The vectors and the counts of some of the texts."""
        rows = torch.tensor([self.rows[text] for text in texts], dtype=torch.int64)
        return self.vectors[rows], self.counts[rows]


@dataclass(frozen=True)
class Vectors:
    """An encoding of texts: vectors of a model, of unit length, or zeros for a text without any.

    Args:
        model: the model.
        means: what is taken off the vectors of each language (`centred`), as JSON; "": nothing.
        known: vectors that need not be computed again.
    """

    model: Model
    means: str = ""
    known: Known | None = field(default=None, compare=False, repr=False)
    vocabulary: ClassVar[int | None] = None
    item_dtype: ClassVar[torch.dtype] = torch.float32
    decode = staticmethod(numbers)

    @property
    def item_shape(self) -> tuple[int, ...]:
        return (self.model.width,)

    def encode(self, texts: Sequence[str], languages: Sequence[str] = ()) -> tuple[Tensor, list[int]]:
        vectors, counts = self._known(texts).of(texts)
        if self.means:
            means = means_from(self.means, self.model.width)
            vectors = vectors - torch.stack(
                [means.get(language, means[ALL]) for language in languages or [ALL] * len(texts)]
            )
        return vectors, counts[:, 0].tolist()

    def remarks(self, texts: Sequence[str], lengths: Sequence[int]) -> list[str]:
        return [self.model.remark(self._known(texts).of(texts)[1])]

    def knowing(self, texts: Iterable[str], cached_as: str) -> Vectors:
        """This encoding with the vectors of some texts, from the cache or computed now.

        Args:
            texts: in any order, with repetitions.
            cached_as: the name of the dataset in the cache.
        """
        return replace(self, known=cached(self.model, sorted(set(texts)), cached_as))

    def centred(self, texts: Sequence[str], languages: Sequence[str]) -> Vectors:
        """This encoding without the mean of each language.

        Texts in a language that is not among these, or is not known, lose the mean of all.

        Args:
            texts: of the training classes.
            languages: of each of them; "" where there are none.
        """
        vectors = self._known(texts).of(texts)[0].double()
        means = {ALL: vectors.mean(0)}
        for language in sorted({*languages} - {ALL}):
            means[language] = vectors[torch.tensor([each == language for each in languages])].mean(0)
        rounded = {name: [float(f"{x:.6g}") for x in mean.tolist()] for name, mean in means.items()}
        return replace(self, means=json.dumps(rounded, ensure_ascii=False).replace("$", "\\u0024"))

    def _known(self, texts: Sequence[str]) -> Known:
        if self.known is not None and all(text in self.known.rows for text in texts):
            return self.known
        every = sorted(set(texts))
        return known(every, *map(torch.from_numpy, self.model.encode(every)))


def means_from(text: str, width: int) -> dict[str, Tensor]:
    """The mean of each language from the JSON that `centred` wrote. Raises ConfigError for anything else."""
    try:
        means = {
            str(name): torch.tensor(mean, dtype=torch.float32) for name, mean in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"dataset.learned: is not what metarun wrote ({type(error).__name__})") from None
    if ALL not in means or any(mean.shape != (width,) for mean in means.values()):
        raise ConfigError(
            f"dataset.learned: is of vectors of another size than {width}; use the model of training"
        )
    return means


def known(texts: Sequence[str], vectors: Tensor, counts: Tensor) -> Known:
    """Vectors of texts, scaled to unit length."""
    lengths = vectors.square().sum(1, keepdim=True).sqrt()
    return Known({text: i for i, text in enumerate(texts)}, vectors / lengths.clamp(min=1e-12), counts)


def cached(model: Model, texts: Sequence[str], cached_as: str) -> Known:
    """The vectors of texts, from the cache or computed now. Raises DataError, ConfigError."""
    digest = hashlib.sha256(encoded(f"{VERSION}\0{model.mark}\0" + "\0".join(texts))).hexdigest()
    name = re.sub(r"[^\w.]+", "_", cached_as)

    def build(write: Callable[[bytes], object]) -> dict[str, Any]:
        for array in model.encode(texts):
            write(np.ascontiguousarray(array).tobytes())
        return {}

    content, _ = memmap_cached(f"{name}-vectors-{digest[:24]}", build, source=model.source)
    vectors, counts = content.split([len(texts) * model.width * 4, len(texts) * 2 * 4])
    shape = len(texts), -1
    return known(texts, vectors.view(torch.float32).view(shape), counts.view(torch.int32).view(shape))

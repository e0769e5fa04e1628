"""Texts as vectors of a trained model, computed once and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from metarun.errors import ConfigError, DataError, first_line
from metarun.storage.cached_arrays import memmap_cached
from metarun.storage.files import add_bytes, encoded
from metarun.tasks.class_store import numbers

VERSION = 1  # of what is in a cache entry
ALL = ""  # in place of a language: the mean of all texts


class Model(Protocol):
    """A trained model that gives each text a vector; equal models give equal vectors.

    Attributes:
        setting: the setting of a dataset that names the model, "encoder" or "vectors".
    """

    @property
    def setting(self) -> str: ...

    @property
    def width(self) -> int:
        """The size of a vector, known without loading the model. Raises DataError."""

    @property
    def source(self) -> str:
        """The path of the model's file or folder."""

    @property
    def digest(self) -> str:
        """A SHA-256 sum of the model's files, which other files at the same path do not have."""

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

    def at(self, other: Any) -> Any:
        """This model in the place of another one of the same class, with its own settings."""

    def remark(self, counts: Tensor) -> str:
        """What users should know about texts with these counts [texts, 2]."""


@dataclass(frozen=True)
class Known:
    """Vectors of texts that are computed already.

    Args:
        rows: the number of each text.
        vectors: float32 [texts, width].
        counts: int32 [texts, 2], see `Model.encode`.
        digest: of the model.
    """

    rows: Mapping[str, int]
    vectors: Tensor
    counts: Tensor
    digest: str

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
        digest: of the model that a run was trained with, which the model here must have; "": any.
        known: vectors that need not be computed again.
    """

    model: Model
    means: str = ""
    digest: str = ""
    known: Known | None = field(default=None, compare=False, repr=False)
    vocabulary: ClassVar[int | None] = None
    item_dtype: ClassVar[torch.dtype] = torch.float32
    decode = staticmethod(numbers)

    @classmethod
    def like(cls, model: Model, learned: str | None) -> Vectors:
        """The vectors that `learned` is of, see `dumps`; None: nothing is known. Raises ConfigError."""
        if learned is None:
            return cls(model)
        with refusing_learned():
            content = json.loads(learned)
            if not isinstance(content.get("model"), str):  # of an older checkpoint: the means alone
                return cls(model, learned)
            return cls(model, json.dumps(content["means"]) if content["means"] else "", content["model"])

    def dumps(self) -> str:
        """What a checkpoint keeps: the means, and the digest of the model; as JSON."""
        content = {"model": self.digest, "means": json.loads(self.means) if self.means else None}
        return json.dumps(content, ensure_ascii=False).replace("$", "\\u0024")

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
        known = self.checked(cached(self.model, sorted(set(texts)), cached_as))
        return replace(self, known=known, digest=known.digest)

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
        return replace(self, means=json.dumps(rounded))

    def _known(self, texts: Sequence[str]) -> Known:
        if self.known is not None and all(text in self.known.rows for text in texts):
            return self.known
        every = sorted(set(texts))
        digest = self.digest and self.model.digest
        vectors, counts = map(torch.from_numpy, self.model.encode(every))
        return self.checked(known(every, vectors, counts, digest))

    def checked(self, found: Known) -> Known:
        """Raise DataError if vectors are not of the model that a run was trained with."""
        if self.digest and found.digest != self.digest:
            raise DataError(
                f"{self.model.source}: is not the model that the run was trained with, whose vectors are "
                f"others; restore that one, or say where it is now with dataset.{self.model.setting}=PATH"
            )
        return found


@contextlib.contextmanager
def refusing_learned() -> Iterator[None]:
    """A context in which errors of a setting that metarun wrote are one line."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ConfigError(
            f"dataset.learned: is not what metarun wrote ({type(error).__name__}); leave it out"
        ) from None


def means_from(text: str, width: int) -> dict[str, Tensor]:
    """The mean of each language from the JSON that `centred` wrote. Raises ConfigError for anything else."""
    with refusing_learned():
        means = {
            str(name): torch.tensor(mean, dtype=torch.float32) for name, mean in json.loads(text).items()
        }
        if ALL not in means or any(mean.shape != (width,) for mean in means.values()):
            raise ValueError("of another size")
    return means


def digest_of(files: Iterable[Path]) -> str:
    """A SHA-256 sum of the bytes of files, whatever their names. Raises DataError if one cannot be read."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.stat().st_size} ".encode())
        try:
            add_bytes(digest, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    return digest.hexdigest()


def known(texts: Sequence[str], vectors: Tensor, counts: Tensor, digest: str) -> Known:
    """Vectors of texts, scaled to unit length."""
    lengths = vectors.square().sum(1, keepdim=True).sqrt()
    rows = {text: i for i, text in enumerate(texts)}
    return Known(rows, vectors / lengths.clamp(min=1e-12), counts, digest)


def cached(model: Model, texts: Sequence[str], cached_as: str) -> Known:
    """The vectors of texts, from the cache or computed now. Raises DataError, ConfigError."""
    digest = hashlib.sha256(encoded(f"{VERSION}\0{model.mark}\0" + "\0".join(texts))).hexdigest()
    name = re.sub(r"[^\w.]+", "_", cached_as)

    def build(write: Callable[[bytes], object]) -> dict[str, Any]:
        for array in model.encode(texts):
            write(np.ascontiguousarray(array).tobytes())
        return {"model": model.digest}

    content, metadata = memmap_cached(f"{name}-vectors-{digest[:24]}", build, source=model.source)
    vectors, counts = content.split([len(texts) * model.width * 4, len(texts) * 2 * 4])
    shape = len(texts), -1
    digest = metadata.get("model") or model.digest  # entries of older versions have none
    return known(texts, vectors.view(torch.float32).view(shape), counts.view(torch.int32).view(shape), digest)

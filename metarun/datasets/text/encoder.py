"""Texts as pooled outputs of a Hugging Face encoder."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metarun.backbones.encoder import INSTALL, blaming, load_network, load_tokenizer, pooled
from metarun.datasets.text.tokens import length_remark
from metarun.datasets.text.vectors import digest_of
from metarun.errors import ConfigError, DataError, first_line
from metarun.reporting.console import Bar, inform
from metarun.storage.files import user_path

BATCH = 64  # texts that are encoded at once
TOKENISED = 4096  # texts that are split into tokens at once
FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "1_Pooling/config.json"]  # of a model
POOLING = "1_Pooling/config.json"  # of the library sentence-transformers
WIDTHS = ("hidden_size", "d_model", "dim", "n_embd")  # what configs call the size of a vector


@dataclass(frozen=True)
class Encoder:
    """The outputs of a model for the tokens of a text, averaged over the tokens.

    A folder of sentence-transformers that pools by the first token is pooled so; its further layers are not
    applied. Weights are read from safetensors only, and code in the folder is never run.

    Args:
        name: a folder, or the name of a model on the Hugging Face Hub, which is downloaded once.
        length: the most tokens of a text; the rest is cut.
    """

    name: str
    length: int
    setting: ClassVar[str] = "encoder"

    @property
    def source(self) -> str:
        return os.path.abspath(self.folder)

    @property
    def folder(self) -> Path:
        return folder_of(self.name)

    @property
    def files(self) -> list[Path]:
        """The files that the vectors depend on."""
        return sorted({path for pattern in FILES for path in self.folder.glob(pattern)})

    @property
    def mark(self) -> str:
        stated = [(path.relative_to(self.folder), path.stat()) for path in self.files]
        known = "\n".join(f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in stated)
        return f"encoder {self.source} {self.length}\n{known}"

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says. Raises DataError if there is none."""
        return read_json(self.folder / "config.json", "name the folder of an encoder of Hugging Face")

    @property
    def width(self) -> int:
        for key in WIDTHS:
            if isinstance(width := self.config.get(key), int) and width > 0:
                return width
        raise DataError(
            f"{self.folder / 'config.json'}: has no hidden_size; name the folder of a text encoder"
        )

    @property
    def first_token(self) -> bool:
        """Whether the vector of a text is that of its first token."""
        path = self.folder / POOLING
        stated = read_json(path, "remove the file for averages") if path.exists() else {}
        return bool(stated.get("pooling_mode_cls_token")) or stated.get("pooling_mode") == "cls"

    @property
    def digest(self) -> str:
        return digest_of(self.files)

    def at(self, other: Encoder) -> Encoder:
        return replace(self, name=other.name)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        model = load_network(self.name, self.folder)
        tokenizer = load_tokenizer(self.name, self.folder)
        most = self.most(tokenizer)
        vectors = np.empty((len(texts), self.width), np.float32)
        with blaming(self.name, self.folder), torch.inference_mode(), torch.random.fork_rng([]):
            tokens, lengths = tokenised(tokenizer, texts, most)
            order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # similar lengths: little padding
            with Bar(f"encode with {Path(self.name).name}", len(texts), "texts", transient=True) as bar:
                for start in range(0, len(order), BATCH):
                    rows = order[start : start + BATCH]
                    batch = padded([tokens[i] for i in rows], tokenizer.pad_token_id)
                    outputs = model(**batch).last_hidden_state
                    vectors[rows] = pooled(outputs, batch["attention_mask"], self.first_token).numpy()
                    bar.advance(len(rows))
        cut = [max(length - most, 0) for length in lengths]
        return vectors, np.array([lengths, cut], np.int32).T

    def most(self, tokenizer: Any) -> int:
        """The most tokens of a text."""
        positions = self.config.get(
            "max_position_embeddings"
        )  # -1 or null where any number of tokens will do
        limits = [self.length, tokenizer.model_max_length, positions]
        return min(limit for limit in limits if isinstance(limit, int) and limit > 0)

    def remark(self, counts: Tensor) -> str:
        return length_remark(counts[:, 0].tolist(), self.length)


@functools.lru_cache
def folder_of(name: str) -> Path:
    """The folder of a model; one of the Hugging Face Hub is downloaded if it is not on this machine.

    Raises:
        DataError: there is no such folder and no such model, or the Hub cannot be reached.
        ConfigError: the library is missing.
    """
    path = user_path(name)
    if path.is_dir():
        return path
    if path.is_file() or name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise DataError(
            f"dataset.encoder={name}: is not a folder; name one, or a model of the Hugging Face Hub"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise ConfigError(
            f"dataset.encoder={name}: there is no such folder, and a model of the Hugging Face Hub needs "
            f"{INSTALL}"
        ) from None
    disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except Exception:  # it is not on this machine
        pass
    inform(f"{name}: downloading from the Hugging Face Hub")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:
        raise DataError(
            f"dataset.encoder={name}: there is no such folder, and the Hugging Face Hub does not give it "
            f"({first_line(error)})"
        ) from None


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "no such file" if not path.exists() else f"is not JSON ({first_line(error)})"
        raise DataError(f"{path}: {reason}; {advice}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object; {advice}")
    return content


def tokenised(tokenizer: Any, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[int]]:
    """The token ids of texts, cut to `most`, and the length of each before that."""
    ids: list[list[int]] = []
    lengths: list[int] = []
    for start in range(0, len(texts), TOKENISED):
        block = list(texts[start : start + TOKENISED])
        ids += tokenizer(block, truncation=True, max_length=most)["input_ids"]
        lengths += map(len, tokenizer(block, verbose=False)["input_ids"])
    return ids, lengths


def padded(ids: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Token ids of a batch and their mask, both [B, tokens], with padding at the end."""
    longest = max(map(len, ids))
    rows = [[*own, *[padding] * (longest - len(own))] for own in ids]
    mask = [[1] * len(own) + [0] * (longest - len(own)) for own in ids]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}

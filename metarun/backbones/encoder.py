"""Hugging Face encoders as networks that are trained, and what frozen ones have in common with them."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.backbones.adapter import SameLength
from metarun.errors import ConfigError, DataError, MetarunError, first_line
from metarun.storage.files import user_path
from metarun.tasks.class_store import padding_mask
from metarun.tasks.spec import PretrainedNetwork

INSTALL = "pip install 'metarun[text]'"
UNUSED = "pooler."  # weights that a model may lack, because they are not used here
# Settings in a config.json that name files, code or types of numbers. Also dropped: those that begin with _.
DROPPED = (
    *("auto_map", "architectures", "torch_dtype", "dtype", "quantization_config", "transformers_version"),
    *("attn_implementation", "experts_implementation", "use_kernels"),
)
OWN: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class FineTuned(nn.Sequential):
    """A Hugging Face encoder that is trained: pooled outputs for the tokens of a text, scaled to one length.

    It starts from pretrained weights, and so as the vectors of the same encoder without training (with
    `backbone=adapter`). Dropout is off, so that a loss depends on the weights and the texts alone.

    Args:
        encoder: passed by the builder: the network; the dataset knows it (`dataset.finetune=true`).
        length: the length of the features.
        adapts: whether gradient-based methods adapt the encoder to each task, with a copy of it per task;
            False: all tasks share it, and only the outer loop trains it.

    Raises:
        ConfigError: the texts are not prepared for an encoder, or a package is missing.
        DataError: the network is no text encoder.
    """

    def __init__(self, encoder: PretrainedNetwork | None, length: float = 3.0, adapts: bool = False) -> None:
        if encoder is None:
            raise ConfigError(
                "backbone=encoder: needs dataset.encoder=FOLDER_OR_NAME and dataset.finetune=true; set both, "
                "or choose backbone=bag"
            )
        if length <= 0:
            raise ConfigError(f"backbone.length={length}: must be above 0")
        layer = EncoderLayer(encoder, shared=not adapts)
        super().__init__(layer, SameLength(length))
        self.features = layer.width


class EncoderLayer(nn.Module):
    """Token ids [B, L], each plus 1 and 0 for padding, to pooled outputs [B, width]; see `FineTuned`."""

    loops_over_tasks = True  # its code has branches on values, for which vmap has no rule

    def __init__(self, pretrained: PretrainedNetwork, shared: bool) -> None:
        super().__init__()
        self.network = network_of(pretrained)
        self.width = pretrained.width
        self.first_token, self.padding = pretrained.first_token, pretrained.padding
        self.source, self.shared_by_tasks = pretrained.source, shared

    def load_weights(self) -> None:
        """Load the pretrained weights; called at the start of a new run. Raises DataError, ConfigError."""
        weights = load_network(self.source, user_path(self.source)).state_dict()
        if missing := self.network.load_state_dict(weights, strict=False).missing_keys:
            raise DataError(f"{self.source}: has no weight {missing[0]}; name another model")

    def train(self, mode: bool = True) -> EncoderLayer:
        super().train(mode)
        self.network.eval()  # without dropout
        return self

    def forward(self, ids: Tensor) -> Tensor:
        if ids.device.type == "cpu":  # shapes need not be fixed, and most texts are short
            ids = ids[:, : max(int(padding_mask(ids).any(0).sum()), 1)]
        mask = padding_mask(ids)
        outputs = self.network(
            input_ids=torch.where(mask, ids - 1, self.padding), attention_mask=mask.long()
        ).last_hidden_state
        return pooled(outputs, mask, self.first_token)

    def on_tasks(self, own: dict[str, Tensor], ids: Tensor, tasks: int) -> Tensor:
        """Ids [T, B, L] to vectors [T, B, width], by the weights of each task."""
        if self.shared_by_tasks:
            return self(ids.flatten(0, 1)).unflatten(0, (tasks, -1))
        weights = ({name: p[t] for name, p in own.items()} for t in range(tasks))
        return torch.stack([functional_call(self, p, (one,)) for p, one in zip(weights, ids, strict=True)])


def pooled(outputs: Tensor, mask: Tensor, first_token: bool) -> Tensor:
    """The vectors of texts [B, width].

    Args:
        outputs: for each token, [B, L, width].
        mask: [B, L], 0 for padding.
        first_token: whether the vector is the output for the first token; False: the mean over tokens.
    """
    if first_token:
        return outputs[:, 0]
    weights = mask.unsqueeze(-1).to(outputs.dtype)
    return (outputs * weights).sum(1) / weights.sum(1).clamp(min=1)


def network_of(pretrained: PretrainedNetwork) -> nn.Module:
    """The network that a description is of, with random weights.

    The description may be from somebody's checkpoint: nothing but a text network of the library itself is
    built, and nothing is read from a file or downloaded.

    Raises:
        ConfigError, DataError: see `FineTuned`.
    """
    with blaming(pretrained.source), torch.random.fork_rng([]):
        transformers = library()
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

        stated: dict[str, Any] = json.loads(pretrained.config)
        kind = stated.pop("model_type", None)
        known = kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        if not known or stated.get("is_encoder_decoder"):
            raise DataError(
                f"dataset.encoder={pretrained.source}: a model of type {kind!r} cannot be trained here; "
                "choose an encoder such as BERT, or dataset.finetune=false"
            )
        config = transformers.AutoConfig.for_model(kind, **sanitised(stated))
        # Attention as plain operations, which have second derivatives.
        network = transformers.AutoModel.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )
        if isinstance(getattr(network, "pooler", None), nn.Module):
            network.pooler = None  # it has no part in the outputs, and so no gradients
        return network.float().eval()


def sanitised(stated: dict[str, Any]) -> dict[str, Any]:
    """The settings of a network alone."""
    return {key: value for key, value in stated.items() if key[:1] != "_" and key not in DROPPED}


def load_network(name: str, folder: Path) -> nn.Module:
    """The pretrained network in a folder, from safetensors. Raises DataError, ConfigError."""
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{folder}: has no *.safetensors; save the model with save_pretrained of transformers"
        )
    with blaming(name, folder), torch.random.fork_rng([]):  # building a network draws random numbers
        model, info = library().AutoModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **OWN
        )
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith(UNUSED)):
        raise DataError(f"{folder}: its weights do not fit its config.json ({missing[0]} is missing)")
    return model.float().eval()


def load_tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer in a folder. Raises DataError, ConfigError."""
    with blaming(name, folder):
        tokenizer = library().AutoTokenizer.from_pretrained(folder, **OWN)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def library() -> Any:
    """The library transformers, silent. Raises ImportError."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def blaming(name: str, folder: Path | None = None) -> Iterator[None]:
    """A context in which errors of the library are one line.

    Args:
        name: the value of `dataset.encoder`.
        folder: of the model, where it is read.

    Raises:
        ConfigError: a package is missing.
        DataError: the library fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ImportError as error:
            raise ConfigError(
                f"dataset.encoder={name}: needs a package ({first_line(error)}); {INSTALL}"
            ) from None
        except (MetarunError, MemoryError):
            raise
        except Exception as error:  # a damaged file or a model of another kind fails anywhere in it
            raise DataError(
                f"{folder or f'dataset.encoder={name}'}: is no usable text encoder ({first_line(error)}); "
                "name another model"
            ) from error

"""Writes a model for programs without metarun: ONNX, a program of PyTorch, or weights alone."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metarun
from metarun.errors import ConfigError, first_line
from metarun.inference.adapted import AdaptedModel
from metarun.inference.model import Model
from metarun.inference.network import Classifier, Embedding, check_same, ending, traced
from metarun.storage.files import atomic_write, write_json

Facts = dict[str, Any]


def export(source: Model | AdaptedModel, how: str, folder: Path) -> list[str]:
    """Write a model, and model.json: the names of its classes, and how examples become its inputs.

    Args:
        source: an adapted model, which becomes a classifier; or a model, whose backbone is written. Of
            safetensors, all weights are written.
        how: a key of `FORMATS`.
        folder: the output folder.

    Returns:
        The names of the files.

    Raises:
        ConfigError: a package is missing, or the model cannot be exported; with the reason.
    """
    write, name, packages = FORMATS[how]
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise ConfigError(f'format={how}: needs {package}; pip install "metarun[export]"') from None
    content = write(source, facts_of(source))
    atomic_write(folder / name, lambda file: file.write(content))
    write_json(folder / "model.json", facts_of(source))
    return [name, "model.json"]


def facts_of(source: Model | AdaptedModel) -> Facts:
    """What a program needs to use the model: plain values for JSON."""
    model = source.model if isinstance(source, AdaptedModel) else source
    spec, regression = model.spec, isinstance(source, AdaptedModel) and not source.classes
    dtype = "float32" if spec.item_dtype.is_floating_point else "int64"
    facts: Facts = {
        "metarun": metarun.__version__,
        "method": model.name,
        "dataset": model.content["choices"]["dataset"],
        "input": {"name": "x", "shape": ["batch", *spec.item_shape], "dtype": dtype} | preparation_of(source),
        "output": {
            "name": ("values" if regression else "probabilities")
            if isinstance(source, AdaptedModel)
            else "features"
        },
    }
    if isinstance(source, AdaptedModel) and source.classes:
        facts["classes"] = list(source.classes)
    return facts


def preparation_of(source: Model | AdaptedModel) -> Facts:
    """How an example becomes an input, in words and settings."""
    model = source.model if isinstance(source, AdaptedModel) else source
    if model.spec.kind == "texts":
        return {"from": "token ids of a text, padded with 0 (metarun.datasets.text.tokens)"}
    if model.spec.kind == "vectors":
        return {"from": "numbers of a row, or the vector of a text, as the dataset of the run prepares them"}
    kept = source.preparation if isinstance(source, AdaptedModel) else None
    preparation = kept or model.dataset.preparation
    channels, height, width = model.spec.item_shape
    colours = "grey" if channels == 1 else "RGB"
    sized = {
        "stretch": f"resized to {height}x{width}",
        "crop": f"the middle, resized to {height}x{width}",
        "pad": f"resized to fit {height}x{width} and padded with the colour of its border",
    }[preparation.resize or "pad"]
    drawn = "; drawings as bright strokes on a dark ground (metarun.datasets.drawings)"
    return {
        "from": f"a {colours} image, {sized} (Lanczos){drawn if preparation.draws else ''}, divided by 255",
        "resize": preparation.resize or "pad",
        "ink": preparation.majority if preparation.draws else None,
    }


def network_of(source: Model | AdaptedModel) -> tuple[nn.Module, Tensor, str]:
    """The network, examples of zeros and noise [3, *item] for it, and the model in words.

    Raises:
        ConfigError: there is no such network, or it computes something else than the model.
    """
    model = source.model if isinstance(source, AdaptedModel) else source
    spec, what = model.spec, f"{model.path}: {model.name}"
    network = Classifier(source) if isinstance(source, AdaptedModel) else Embedding(source)
    generator = torch.Generator().manual_seed(0)
    shape = (3, *spec.item_shape)
    if spec.item_dtype.is_floating_point:
        examples = torch.rand(shape, generator=generator)
    else:
        examples = torch.randint(0, spec.vocabulary or 2, shape, generator=generator)
    return network, examples, what


def program_of(source: Model | AdaptedModel) -> tuple[torch.export.ExportedProgram, Tensor, Tensor]:
    """The model as a program of PyTorch, examples for it, and what the model predicts of them."""
    network, examples, what = network_of(source)
    with torch.no_grad():
        if isinstance(source, AdaptedModel):
            expected = ending(source)(source.outputs(examples.unsqueeze(0))[0]).cpu().float()
        else:
            expected = network(examples)
        check_same(network(examples), expected, what)
        program = traced(network, examples, what)
        check_same(program.module()(examples), expected, what)
    return program, examples, expected


def as_program(source: Model | AdaptedModel, facts: Facts) -> bytes:
    """A .pt2 file; `torch.export.load(FILE).module()(x)` runs it."""
    program, *_ = program_of(source)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metarun.json": json.dumps(facts)})
    return file.getvalue()


def as_onnx(source: Model | AdaptedModel, facts: Facts) -> bytes:
    """An ONNX model with the facts as metadata; where onnxruntime is installed, it is compared."""
    program, examples, expected = program_of(source)
    model = source.model if isinstance(source, AdaptedModel) else source
    what = f"{model.path}: {model.name}"
    try:
        with silent_exporter():
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[facts["input"]["name"]],
                output_names=[facts["output"]["name"]],
                verbose=False,
            )
        assert made is not None
        proto = made.model_proto
    except Exception as error:  # of many types, with many lines
        raise ConfigError(f"{what} cannot be exported to ONNX: {reason(error)}") from error
    for key, value in {"metarun": facts, "classes": facts.get("classes", [])}.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)
    content = proto.SerializeToString()
    with contextlib.suppress(ImportError):
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": examples.numpy()})
        check_same(torch.from_numpy(found), expected, what)
    return content


@contextlib.contextmanager
def silent_exporter() -> Iterator[None]:
    """A context without the messages of PyTorch's exporter, which are for its developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def reason(error: BaseException) -> str:
    """The innermost reason of an error of PyTorch's exporter, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def as_weights(source: Model | AdaptedModel, facts: Facts) -> bytes:
    """A safetensors file: the weights of the algorithm, and what it learned of the task."""
    from safetensors.torch import save

    model = source.model if isinstance(source, AdaptedModel) else source
    tensors = {f"algorithm.{name}": tensor for name, tensor in model.algorithm.state_dict().items()}
    if isinstance(source, AdaptedModel):
        tensors |= flat(source.state, "adapted")
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return save(own, {"metarun": json.dumps(facts, ensure_ascii=False)})


def flat(value: Any, name: str) -> dict[str, Tensor]:
    """The tensors in nested containers, by dotted names."""
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, (Mapping, list, tuple)):
        return {}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {key: tensor for part, item in items for key, tensor in flat(item, f"{name}.{part}").items()}


Writer = Callable[[Model | AdaptedModel, Facts], bytes]
#: How each format is written, the name of its file, and the packages that it needs.
FORMATS: dict[str, tuple[Writer, str, tuple[str, ...]]] = {
    "onnx": (as_onnx, "model.onnx", ("onnx", "onnxscript")),
    "torch_export": (as_program, "model.pt2", ()),
    "safetensors": (as_weights, "model.safetensors", ("safetensors",)),
}

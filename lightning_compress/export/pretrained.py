"""A folder that transformers' `from_pretrained` and vLLM read: the trained integers in compressed-tensors' layout."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.export.schemes import layer_tensors, scheme_of
from lightning_compress.export.tracing import Inputs, evaluating, inputs_beside
from lightning_compress.export.verify import LEAST_SQNR_DB, sqnr_db
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import Ranges, rounded_as_trained
from lightning_compress.select import names_of_parameters

__all__ = ["export_pretrained"]

_log = logging.getLogger(__name__)


def export_pretrained(
    module: nn.Module,
    folder: str | Path,
    example_inputs: Inputs,
    *,
    ranges: Ranges,
    model: str = "",
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder with a transformers model's codes, for its `from_pretrained` and for vLLM. Runs after `fit`.

    The folder is read back by the model's own class and run on `example_inputs`; it appears only if the answers agree
    with the model as it was trained, to 20 dB or, in practice, to the bit. The module is left as it was. transformers
    computes in floating point with the rounded values, so the folder is smaller and not faster there; integer kernels
    are vLLM's.

    Layers with rounded inputs have int8 codes beside the grid of their inputs; the others have codes of 2 to 8 bits
    packed into words, with one scale an output or a group of inputs (`Symmetric(4, group=128)`).

    Args:
        module: a transformers model with float32 parameters, or what has one, such as a LightningModule.
        folder: what is written: config.json and model.safetensors; it must not exist yet, or be empty.
        example_inputs: what `model(*inputs)` or, for a dict, `model(**inputs)` takes; real data, for the check.
        ranges: name of a Linear in `module` -> its range, from `QuantizationAwareTraining.ranges()`,
            `quantize_post_training` or `weight_ranges`.
        model: where in `module` the transformers model is, such as "encoder"; "" is the module itself.
        options: what the model's class was built with beside its config, such as {"add_pooling_layer": False}; who
            reads the folder gives `from_pretrained` the same.

    Raises:
        ImportError: transformers or compressed-tensors is missing.
        TypeError: no transformers model there.
        FileExistsError: the folder has something in it.
        ValueError: a range of a layer outside the model, of no Linear, of an output, or of a grid that the layout has
            no words for; a parameter that is not float32; a weight that is tied to another.
        NothingToCompress: `ranges` is empty.
        CompressError: the class builds a model with other keys; what was read back gives other answers.
    """
    _require("transformers", "compressed_tensors")
    target, options = _model_in(module, model), dict(options or {})
    _check_keys(target, options)
    own = _own_ranges(target, ranges, model)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"expected a folder that is new or empty, got {folder}; remove it or name another one")
    schemes = {name: scheme_of(name, target.get_submodule(name), trained) for name, trained in own.items()}
    state = _state(target, own, schemes)
    with _folder_at_the_end(folder) as unfinished:
        target.save_pretrained(unfinished, state_dict=state)
        path = unfinished / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"] = _config(target, schemes)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _verify(target, unfinished, example_inputs, own, options)
    return folder


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_pretrained needs {', '.join(missing)}; pip install 'lightning-compress[pretrained]'")


def _model_in(module: nn.Module, name: str) -> Any:
    from transformers import PreTrainedModel

    module = getattr(module, "_orig_mod", module)  # torch.compile wraps
    found = module.get_submodule(name)
    if not isinstance(found, PreTrainedModel):
        inside = [other for other, part in module.named_modules() if isinstance(part, PreTrainedModel)]
        cure = f'pass model="{inside[0]}"' if inside else "there is none in it"
        raise TypeError(f"expected a transformers model at '{name}', got {type(found).__name__}; {cure}")
    other = next((n for n, p in found.named_parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise ValueError(f"expected float32 parameters, got another dtype for '{other}'; call module.float() first")
    return found


def _check_keys(target: Any, options: Mapping[str, Any]) -> None:
    """Raise where from_pretrained would build another model; it would fill what is missing with random numbers."""
    with torch.device("meta"):
        built = type(target)(target.config, **options)
    missing, more = (sorted(set(a.state_dict()) - set(b.state_dict())) for a, b in ((built, target), (target, built)))
    if missing or more:
        words = f"{type(target).__name__}(config{''.join(f', {name}={value}' for name, value in options.items())})"
        raise CompressError(
            f"{words} has other keys than the model: it lacks {more[:3]}, and has {missing[:3]} besides; give what the "
            f'model was built with, such as options={{"add_pooling_layer": False}}'
        )


def _own_ranges(target: nn.Module, ranges: Ranges, model: str) -> dict[str, Range]:
    """The ranges by names inside the model."""
    if not ranges:
        raise NothingToCompress("ranges is empty, so nothing would be rounded; use the model's save_pretrained")
    prefix, own = f"{model}." if model else "", {}
    parts = dict(target.named_modules(remove_duplicate=False))
    for name, trained in ranges.items():
        inside = name.removeprefix(prefix)
        if not isinstance(trained, Range):
            raise ValueError(  # noqa: TRY004 - its type is right, its place is not
                f"the layout rounds inputs and weights of layers, got the range of an output, '{name}'; train with "
                f"Details(outputs=False)"
            )
        if not name.startswith(prefix) or inside not in parts:
            raise ValueError(f"'{name}' has a range but is no layer of the model at '{model}'; leave it out of ranges")
        own[inside] = trained
    return own


def _state(target: nn.Module, ranges: Mapping[str, Range], schemes: Mapping[str, Any]) -> dict[str, Tensor]:
    state = {name: value.detach().cpu() for name, value in target.state_dict().items()}
    holders = names_of_parameters(target)
    for name, trained in ranges.items():
        weight = target.get_submodule(name).get_parameter("weight")
        if len(holders[id(weight)]) > 1:
            raise ValueError(
                f"the weight of '{name}' is tied ({', '.join(holders[id(weight)])}), and codes cannot be; leave "
                f"'{name}' out of ranges: exclude it in training"
            )
        del state[f"{name}.weight"]
        tensors = layer_tensors(name, target.get_submodule(name), trained, schemes[name])
        state |= {f"{name}.{end}": tensor for end, tensor in tensors.items()}
    return state


def _config(target: nn.Module, schemes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The layout's description of the whole model: layers of one scheme are a group, the other Linears are ignored."""
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), (scheme, []))[1].append(name)
    linears = {name for name, part in target.named_modules() if isinstance(part, nn.Linear)}
    formats = {scheme["format"] for scheme, _ in groups.values()}
    described = {
        f"group_{number}": {**scheme, "targets": ["Linear"] if len(groups) == 1 else names}
        for number, (scheme, names) in enumerate(groups.values())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": sorted(linears - set(schemes)),
    }


@contextmanager
def _folder_at_the_end(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` to write to; move it there unless the block raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()  # it is empty
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _verify(
    target: Any, folder: Path, example_inputs: Inputs, ranges: Mapping[str, Range], options: Mapping[str, Any]
) -> None:
    read, told = type(target).from_pretrained(folder, output_loading_info=True, **options)
    wrong = {what: sorted(map(str, names)) for what, names in told.items() if names}
    if wrong:
        raise CompressError(f"{type(target).__name__}.from_pretrained did not find what was written: {wrong}")
    read = read.to(next(target.parameters()).device)
    inputs = inputs_beside(target, example_inputs)
    with evaluating(target), rounded_as_trained(target, ranges):
        expected = _outputs(target, inputs)
    with evaluating(read):
        got = _outputs(read, inputs)
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        ratio = sqnr_db(one.numpy(), other.numpy())
        if not ratio >= LEAST_SQNR_DB:
            raise CompressError(
                f"output {number} of what from_pretrained reads differs from the trained model's: {ratio:.1f} dB, "
                f"expected at least {LEAST_SQNR_DB:.0f}; nothing was kept"
            )
        _log.info("output %d agrees with the trained model to %.1f dB", number, ratio)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    leaves = pytree.tree_leaves(found.to_tuple() if hasattr(found, "to_tuple") else found)
    return [leaf.float().cpu() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

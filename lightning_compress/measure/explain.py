"""What two models look at: attributions of their answers to the inputs (through Captum), and how alike these are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.measure.attributions import Attributions
from lightning_compress.pruning.calibration import evaluating

__all__ = ["Attributions", "Method", "compare_attributions"]

Method = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
METHODS = ("integrated_gradients", "occlusion")
BATCH = 64  # forwards at one time
WINDOWS = 7  # an occluded patch is this part of the height and width, moved by half of itself


def compare_attributions(
    dense: nn.Module,
    compressed: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    target: Tensor | None = None,
    *,
    method: str | Method = "integrated_gradients",
    embedding: str | None = None,
    baseline: float = 0,
    steps: int = 64,
) -> Attributions:
    """Attribute one class of each example to the parts of its input, in two models. Runs after training, in eval mode.

    Integrated gradients sum the gradient along the straight way from a baseline to the input (M. Sundararajan et al.,
    "Axiomatic Attribution for Deep Networks", 2017); occlusion replaces one patch after the other by the baseline (M.
    Zeiler, R. Fergus, "Visualizing and Understanding Convolutional Networks", 2014). Token ids have no gradient: name
    the module whose output is the embedding, such as "bert.embeddings", and its attributions are summed for each token.

    Args:
        dense: gives logits (examples, classes), or an output with `logits` as transformers does.
        compressed: takes the same inputs.
        inputs: (examples, ...) on the models' device; for models with named inputs a dict, of which the first is
            explained. With an `attention_mask` in it, padding is left out of the agreement.
        target: (examples,) classes to explain; None is the class that the dense model finds most likely.
        method: "integrated_gradients", "occlusion", or a function (model, inputs, target) -> (examples, ...) that
            attributes; the model it gets takes the first input and gives logits.
        embedding: name of the embedding module, the same in both models; for token ids and integrated gradients.
        baseline: the value that stands for no information: a grey level, or the id of a padding token.
        steps: points on the way of integrated gradients.

    Raises:
        ImportError: captum is not installed, and the method is one of its.
        ValueError: an unknown method, targets of another number, token ids without `embedding`, or attributions of
            different shapes.
    """
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    first, *others = named.values()
    sides = [
        _Side(model, tuple(named) if isinstance(inputs, Mapping) else None, others) for model in (dense, compressed)
    ]
    with evaluating(dense), evaluating(compressed):
        target = sides[0](first, *others).argmax(dim=-1) if target is None else target
        _check(first, target, method, embedding)
        found = [_attributed(side, first, target, _Way(method, embedding, baseline, steps)) for side in sides]
        gaps: tuple[Tensor, Tensor] | None = None
        if method == "integrated_gradients":
            rises = [side.rise(first, target, baseline) for side in sides]
            first_gap, second_gap = (one.flatten(1).sum(dim=1) - rise for one, rise in zip(found, rises, strict=True))
            gaps = first_gap, second_gap
    if embedding is not None:
        found = [each.sum(dim=-1) for each in found]
    if found[0].shape != found[1].shape or len(found[0]) != len(first):
        raise ValueError(
            f"expected attributions of one shape, with {len(first)} examples first, got {tuple(found[0].shape)} and "
            f"{tuple(found[1].shape)}; explain models that take the same inputs"
        )
    mask = named.get("attention_mask")
    kept = mask > 0 if mask is not None and mask.shape == found[0].shape else None
    return Attributions(_name(method), first.detach(), target, found[0], found[1], kept, gaps)


@dataclass(frozen=True)
class _Way:
    """How to attribute; the options of `compare_attributions`."""

    method: str | Method
    embedding: str | None
    baseline: float
    steps: int


@dataclass(frozen=True)
class _Side:
    """A model as a function of its first input; `others` follow it, by name where there are names."""

    model: nn.Module
    names: tuple[str, ...] | None
    others: Sequence[Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        output = self.model(*inputs) if self.names is None else self.model(**dict(zip(self.names, inputs, strict=True)))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"expected {type(self.model).__name__} to give logits of shape (examples, classes), got {got}; "
                "wrap it in a module that does"
            )
        return logits

    def alone(self, first: Tensor) -> Tensor:
        """Call the model with the other inputs as they are."""
        return self(first, *self.others)

    def rise(self, first: Tensor, target: Tensor, baseline: float) -> Tensor:
        """F(input) - F(baseline) of the explained class, (examples,)."""
        gained = self.alone(first) - self.alone(torch.full_like(first, baseline))
        return gained.gather(1, target[:, None])[:, 0]


def _attributed(side: _Side, first: Tensor, target: Tensor, way: _Way) -> Tensor:
    with torch.enable_grad():
        if callable(way.method):
            return way.method(side.alone, first, target).detach()
        return _by_captum(side, first, target, way).detach()


def _by_captum(side: _Side, first: Tensor, target: Tensor, way: _Way) -> Tensor:
    try:
        from captum.attr import IntegratedGradients, LayerIntegratedGradients, Occlusion
    except ImportError as error:
        raise ImportError(f'{way.method} needs captum: pip install "lightning-compress[report]"') from error
    options: dict[str, Any] = {"target": target, "additional_forward_args": tuple(side.others) or None}
    if way.method == "occlusion":
        window = _window(first)
        strides = tuple(max(1, size // 2) for size in window)
        # Over channels a window has one place only.
        strides = (window[0], *strides[1:]) if len(window) == 3 else strides
        options |= {
            "strides": strides,
            "baselines": way.baseline,
            "perturbations_per_eval": max(1, BATCH // len(first)),
        }
        found = Occlusion(side).attribute(first, window, **options)
    else:
        options |= {"n_steps": way.steps, "internal_batch_size": max(BATCH, len(first))}
        options["baselines"] = torch.full_like(first, way.baseline)
        layer = None if way.embedding is None else side.model.get_submodule(way.embedding)
        explainer = IntegratedGradients(side) if layer is None else LayerIntegratedGradients(side, layer)
        found = explainer.attribute(first, **options)
    attributed: Tensor = found[0] if isinstance(found, tuple) else found
    return attributed


def _window(first: Tensor) -> tuple[int, ...]:
    """Return the patch that is occluded: a token or feature, or a square of an image in all its channels."""
    if first.dim() != 4:
        return (1,) * (first.dim() - 1)
    return (first.shape[1], *(max(1, size // WINDOWS) for size in first.shape[2:]))


def _name(method: str | Method) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def _check(first: Tensor, target: Tensor, method: str | Method, embedding: str | None) -> None:
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"expected a method among {', '.join(METHODS)}, or a function, got '{method}'")
    if target.shape != first.shape[:1]:
        raise ValueError(
            f"expected one target class for each of the {len(first)} examples, got shape {tuple(target.shape)}"
        )
    if method == "integrated_gradients" and embedding is None and not first.is_floating_point():
        raise ValueError(
            f"integrated gradients need an input with gradients, got {first.dtype}; for token ids name the module that "
            "embeds them, such as embedding='bert.embeddings', or take method='occlusion'"
        )
    if embedding is not None and method != "integrated_gradients":
        raise ValueError(f"embedding is for integrated gradients, got method {_name(method)!r}; leave it out")

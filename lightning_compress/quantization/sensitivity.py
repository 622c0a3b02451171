"""How much rounding one layer harms: measured, or told beforehand by the Hessian of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_compress.quantization.fake import fake_quantize_input, round_weight
from lightning_compress.quantization.scales import input_grid
from lightning_compress.quantization.trials import (
    Group,
    Loss,
    Patterns,
    first_pass,
    inputs_changed,
    loss_of,
    mean_loss,
    measuring,
    standing_in,
    weight_groups,
    weight_of,
)
from lightning_compress.sharding import clean_name

__all__ = ["Trace", "check_widths", "hessian_sensitivity", "hessian_traces", "hutchinson", "loss_sensitivity"]

# A negative trace this many standard errors below zero is no noise.
NOISE = 3.0


@dataclass(frozen=True)
class Trace:
    """The trace of the Hessian over one layer's weight: its estimate, standard error, and the number of weights."""

    value: float
    error: float
    weights: int

    @property
    def mean(self) -> float:
        """The mean of the Hessian's diagonal."""
        return self.value / self.weights


def hutchinson(loss: Tensor, weights: Sequence[Tensor], samples: int, generator: torch.Generator) -> Tensor:
    """Return unbiased samples of each weight's Hessian trace: v^T H v with v of random signs; pure, but for the seed.

    Each weight has products with its own block of H: signs of all weights at once would need fewer, and the blocks
    between them would add their noise. Hutchinson 1990; Dong et al. 2020 (HAWQ-V2).

    Args:
        loss: () with a graph to the weights.
        weights: any shapes, floating point, leaves of that graph.
        samples: how many; each costs, for each weight, one backward through the gradient's own graph.
        generator: of the CPU, so that every device sees the same signs.

    Returns:
        (samples, weights) float64; zeros for a weight that the loss does not depend on.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hutchinson(weight.pow(4).sum(), [weight], 2, torch.Generator().manual_seed(0))
    tensor([[60.],
            [60.]], dtype=torch.float64)
    """
    found = torch.zeros(samples, len(weights), dtype=torch.float64)
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    for column, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        if gradient is None or not gradient.requires_grad:  # the loss is linear in it, or free of it
            continue
        for sample in range(samples):
            signs = (torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1).to(weight)
            (product,) = torch.autograd.grad(gradient, weight, signs, retain_graph=True, allow_unused=True)
            if product is not None:
                found[sample, column] = (product.double() * signs.double()).sum()
    return found


def hessian_traces(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    samples: int = 16,
    seed: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, Trace]:
    """Estimate the trace of the mean loss' Hessian over each layer's weight. Runs once, before training with rounding.

    In eval mode, in one pass over the batches, each with `samples` random vectors of its own. Half of the standard
    error takes four times the samples.

    Args:
        module: trained; left as it was.
        batches: what `loss` takes, each weighing the same.
        loss: (module, batch) -> a scalar tensor, twice differentiable.
        samples: vectors for each batch, at least 2.
        seed: of the vectors.
        include: names, globs, class names or types; None is every Linear and Conv1d/2d/3d but the output head.
        exclude: the same, left out.

    Returns:
        Trace of each layer by name; layers that share one weight are one, under the first name.

    Raises:
        ValueError: no batches, a layer that never runs, a loss that is NaN, not a scalar or has no gradient.
        NothingToCompress: nothing is selected.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples is a whole number from 2 on, so that they have a standard error, got {samples!r}")
    groups, batches = weight_groups(module, include, exclude), list(batches)
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(samples, len(groups), dtype=torch.float64)
    with measuring(module):
        first_pass(module, batches, loss, groups)
        for index, batch in enumerate(batches):
            found += _batch_traces(module, batch, loss, groups, samples, generator, index) / len(batches)
    errors = found.std(dim=0) / math.sqrt(samples)
    return {
        name: Trace(float(value), float(error), weight_of(group).numel())
        for (name, group), value, error in zip(groups.items(), found.mean(dim=0), errors, strict=True)
    }


def _batch_traces(
    module: nn.Module,
    batch: Any,
    loss: Loss,
    groups: Mapping[str, Group],
    samples: int,
    generator: torch.Generator,
    index: int,
) -> Tensor:
    stand_ins = {name: weight_of(group).detach().clone().requires_grad_() for name, group in groups.items()}
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), standing_in(groups, stand_ins):
        value = loss_of(loss, module, batch, f"batch {index}")
        if not value.requires_grad:
            raise ValueError(
                f"the Hessian needs a loss with a gradient, got one without from batch {index}: do not detach it or "
                f"make a number of it, or measure with by='loss'"
            )
        found = hutchinson(value, list(stand_ins.values()), samples, generator)
    if not bool(found.isfinite().all()):
        bad = [name for name, column in zip(groups, found.T, strict=True) if not bool(column.isfinite().all())]
        raise ValueError(f"the Hessian of batch {index} is not finite in {', '.join(bad)}; measure with by='loss'")
    return found


def hessian_sensitivity(
    module: nn.Module,
    traces: Mapping[str, Trace],
    widths: Iterable[int] = (2, 3, 4, 6, 8),
) -> dict[str, dict[int, float]]:
    """Return, for each layer and width, mean trace x |Q(W) - W|^2. Runs once, before training with rounding.

    Omega_i of Dong et al. 2020 (HAWQ-V2): to second order, twice what rounding adds to the loss if its errors have
    no direction. A trace that is negative by no more than 3 standard errors counts as 0.

    Args:
        module: the one that `traces` was measured on.
        traces: from `hessian_traces`.
        widths: 2 to 8 bits.

    Raises:
        ValueError: widths out of 2 to 8; a layer that the module does not have; a trace that is clearly negative,
            so that the layer is at no minimum.
    """
    widths = check_widths(widths)
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    table: dict[str, dict[int, float]] = {}
    for name, trace in traces.items():
        if name not in layers:
            raise ValueError(f"expected traces of this module's layers, got '{name}', which it does not have")
        if trace.value < -NOISE * trace.error:
            raise ValueError(
                f"expected the loss to curve upwards at a trained weight, got a Hessian trace of {trace.value:.3g} "
                f"+- {trace.error:.1g} in '{name}'; train longer, or measure with by='loss'"
            )
        weight = layers[name].get_parameter("weight").detach()
        table[name] = {bits: max(trace.mean, 0.0) * _rounding_error(weight, bits) for bits in widths}
    return table


def check_widths(widths: Iterable[int]) -> tuple[int, ...]:
    """Return the candidate widths in ascending order.

    Raises:
        ValueError: none, one that is not a whole number from 2 to 8, or one that is there twice.

    >>> check_widths((8, 4))
    (4, 8)
    """
    wanted = tuple(widths)
    whole = all(isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8 for bits in wanted)
    if not wanted or not whole or len(set(wanted)) < len(wanted):
        raise ValueError(f"widths are different whole numbers from 2 to 8, at least one, got {wanted!r}")
    return tuple(sorted(wanted))


def _rounding_error(weight: Tensor, bits: int) -> float:
    return float((round_weight(weight, bits).double() - weight.double()).square().sum())


def loss_sensitivity(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    widths: Iterable[int] = (2, 3, 4, 6, 8),
    inputs: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, dict[int, float]]:
    """Measure how much the mean loss grows with one layer rounded and all others float. Runs once, before training.

    In eval mode, without gradients: one pass over the batches for each layer and width, and one more.

    Args:
        module: trained; left as it was.
        batches: what `loss` takes, each weighing the same.
        loss: (module, batch) -> a scalar tensor.
        widths: 2 to 8 bits.
        inputs: round the layer's input to the same width too, over the range it has in these batches.
        include: names, globs, class names or types; None is every Linear and Conv1d/2d/3d but the output head.
        exclude: the same, left out.

    Returns:
        layer -> bits -> growth of the loss, negative where rounding happens to lower it. Layers that share one
        weight are rounded together, under the first name.

    Raises:
        ValueError: widths out of 2 to 8, no batches, a layer that never runs, a loss that is NaN or not a scalar.
        NothingToCompress: nothing is selected.
    """
    widths, batches = check_widths(widths), list(batches)
    groups = weight_groups(module, include, exclude)
    table: dict[str, dict[int, float]] = {name: {} for name in groups}
    with measuring(module):
        plain, extremes = first_pass(module, batches, loss, groups)
        for name, group in groups.items():
            for bits in widths:
                rounded = {name: round_weight(weight_of(group), bits)}
                change = _input_rounding(extremes, bits) if inputs else _unchanged
                with standing_in({name: group}, rounded), inputs_changed(group, change):
                    value = mean_loss(module, batches, loss, f" with '{name}' at {bits} bits")
                table[name][bits] = value - plain
    return table


def _input_rounding(extremes: Mapping[str, Tensor], bits: int) -> Callable[[str, Tensor], Tensor]:
    def rounded(name: str, value: Tensor) -> Tensor:
        return fake_quantize_input(value, *input_grid(-extremes[name][0], extremes[name][1], bits), bits)

    return rounded


def _unchanged(name: str, value: Tensor) -> Tensor:
    return value

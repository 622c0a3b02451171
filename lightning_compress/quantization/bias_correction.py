"""Take the mean error that rounding makes of each output channel out of the bias (Nagel et al. 2019, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.pruning.calibration import evaluating, in_forward_order, run
from lightning_compress.quantization.attach import fake_quantized
from lightning_compress.quantization.grid import Range
from lightning_compress.sharding import clean_name

__all__ = ["channel_means", "correct_bias"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class _Mean:
    """A running mean of each output channel, float64."""

    sums: Tensor | None = None
    count: int = 0

    def add(self, layer: nn.Module, output: Tensor) -> None:
        value = torch.cat([row.flatten(0, -2) for row in output.unbind()]) if output.is_nested else output
        # Of a Linear the last dimension; of a Conv the one before its spatial ones.
        dim = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)  # type: ignore[arg-type]
        rows = value.detach().movedim(dim, 0).flatten(1).double()
        self.sums = rows.sum(1) if self.sums is None else self.sums + rows.sum(1)
        self.count += rows.shape[1]

    @property
    def mean(self) -> Tensor | None:
        return None if self.sums is None or not self.count else self.sums / self.count


@contextmanager
def _meaning(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, _Mean]]:
    means = {name: _Mean() for name in layers}

    def adding(name: str) -> Callable[..., None]:
        return lambda layer, args, output: means[name].add(layer, output)

    handles = [layer.register_forward_hook(adding(name)) for name, layer in layers.items()]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def channel_means(module: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return each layer's mean output of each channel over the batches, (out,) float64, in one pass in eval mode.

    A layer that never runs is left out.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.fill_(1.0)
    >>> channel_means(net, [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])], {"0": net[0]})
    {'0': tensor([1.5000], dtype=torch.float64)}
    """
    with evaluating(module), _meaning(layers) as means:
        run(module, batches)
    return {name: noted.mean for name, noted in means.items() if noted.mean is not None}


@dataclass
class _Followers:
    """Which batch norm reads each layer's output as it is: found by the tensor itself, in one forward."""

    outputs: dict[int, tuple[str, Tensor]] = field(default_factory=dict)  # the tensors are kept, or their ids would not
    norms: dict[str, nn.Module] = field(default_factory=dict)

    def made(self, name: str, output: Tensor) -> None:
        self.outputs[id(output)] = (name, output)

    def read(self, norm: nn.Module, value: Any) -> None:
        if id(value) in self.outputs:
            self.norms[self.outputs[id(value)][0]] = norm


def _norms_after(module: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the batch norm, with running statistics, that reads a layer's output; most layers have none."""
    followers = _Followers()

    def making(name: str) -> Callable[..., None]:
        return lambda layer, args, output: followers.made(name, output)

    norms = [m for m in module.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    handles = [layer.register_forward_hook(making(name)) for name, layer in layers.items()]
    handles += [n.register_forward_pre_hook(lambda norm, args: followers.read(norm, *args[:1])) for n in norms]
    try:
        run(module, [batch])
    finally:
        for handle in handles:
            handle.remove()
    return followers.norms


def correct_bias(
    module: nn.Module,
    batches: Iterable[Any],
    ranges: Mapping[str, Range],
    wanted: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Subtract from each layer's bias what rounding adds to its mean output, in place. Runs after calibration.

    Empirical, Nagel et al. 2019, section 4.2 and appendix D: in the order of the forward, layer by layer, with the
    layers before rounded and corrected already: b -= E[y of the rounded network] - E[y of the float network], over all
    batches and positions. A layer without a bias whose output goes to a batch norm has the difference added to the
    norm's running mean, which is the same shift; where training goes on, batch statistics take its place. A layer
    with neither is left as it is, and is missing in what is returned.

    Args:
        module: in any mode; it runs in eval mode and is put back.
        batches: as `calibrate` takes them, held as a list; one pass a layer, and one more.
        ranges: what `calibrate` returned.
        wanted: the float network's `channel_means` of the layers in `ranges`, if its weights were rounded in place
            since; None takes them from the module as it is.

    Returns:
        Name of a layer -> the mean error that was taken out, (out,) float32.

    Raises:
        ValueError: no batches.
        NothingToCompress: `ranges` is empty, or none of its layers runs.
        CompressError: a mean output that is NaN or infinite; layers before the named one are corrected already.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> _ = net[0].weight.data.fill_(1.0)
    >>> inputs = [torch.full((4, 1), 0.6)]
    >>> correct_bias(net, inputs, {"0": Range(0.0, 3.0, bits=2)})  # 0.6 is rounded to 1
    {'0': tensor([0.4000])}
    """
    inputs = list(batches)
    if not inputs:
        raise ValueError("bias correction needs at least one batch of inputs, got none")
    clean = {clean_name(name): layer for name, layer in module.named_modules(remove_duplicate=False)}
    layers = {name: clean[name] if name in clean else module.get_submodule(name) for name in ranges}
    wanted = channel_means(module, inputs, layers) if wanted is None else wanted
    taken: dict[str, Tensor] = {}
    with evaluating(module):
        norms = _norms_after(module, inputs[0], layers)
        order = in_forward_order(module, inputs, {name: [layer] for name, layer in layers.items()})
        if not order:
            raise NothingToCompress(f"none of the layers in ranges runs in these batches: {', '.join(ranges)}")
        with fake_quantized(module, ranges):
            for name in order:
                place, sign = _place(layers[name], norms.get(name))
                if place is None:
                    continue
                error = channel_means(module, inputs, {name: layers[name]})[name] - wanted[name]
                if not bool(torch.isfinite(error).all()):
                    raise CompressError(f"the mean output of '{name}' over the batches is NaN or infinite")
                place.add_(error.to(place.dtype), alpha=sign)
                taken[name] = error.float()
    return taken


def _place(layer: nn.Module, norm: nn.Module | None) -> tuple[Tensor | None, float]:
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    if bias is not None:
        return bias, -1.0
    mean = norm.running_mean if norm is not None else None
    return (mean, 1.0) if isinstance(mean, Tensor) else (None, 0.0)

"""What each runtime wants of an int8 file: signed or unsigned codes, where zero lies, and the bias' type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OutputRange, Ranges

__all__ = ["PROFILES", "Profile", "profile_named"]


@dataclass(frozen=True)
class Profile:
    """How inputs and outputs of layers are stored.

    `signed` stores int8 codes instead of uint8. `symmetric` puts the zero at code 0 of int8, which makes a grid that
    ends where the trained one does on the wider side, and is coarser by up to one bit: train on such ranges, or
    expect the file to differ from training by that rounding. `integer_bias` stores biases as int32 of scale s_x s_w.
    `rewritten` says that the graph is rewritten for ONNX Runtime's CPU kernels (`export.faster`).
    """

    name: str
    signed: bool
    symmetric: bool
    integer_bias: bool
    rewritten: bool = False

    @property
    def offset(self) -> int:
        """What is taken off an unsigned code to get the stored one."""
        return 128 if self.signed else 0

    def grids(self, ranges: Ranges) -> dict[str, Range | OutputRange]:
        """Return the ranges that the file will have.

        Raises:
            ValueError: codes of fewer than 8 bits, for a symmetric profile.

        >>> profile_named("tensorrt").grids({"a": Range(-0.5, 1.27)})["a"].zero_point
        128
        """
        if not self.symmetric:
            return dict(ranges)
        narrow = sorted(name for name, trained in ranges.items() if trained.bits != 8)
        if narrow:
            raise ValueError(
                f"profile '{self.name}' stores inputs of 8 bits, got {ranges[narrow[0]].bits} for '{narrow[0]}'; train "
                "with 8-bit inputs, or export with profile='cpu'"
            )
        return {name: _symmetric(trained) for name, trained in ranges.items()}


def _symmetric(trained: Range | OutputRange) -> Range | OutputRange:
    low, high = trained.low, trained.high
    if isinstance(trained, Range) and trained.inputs is not None:  # a learned grid does not end where the range does
        low, high = -trained.zero_point * trained.scale, (255 - trained.zero_point) * trained.scale
        trained = replace(trained, inputs=None, inputs_learned={})
    largest = max(-low, high)
    return replace(trained, low=-largest * 128 / 127, high=largest)


# The CPU's fast kernels multiply uint8 by int8. TensorRT's parser takes int8 with zero points 0 only, and biases as
# floats. XNNPACK and the NPUs behind it take signed inputs. OpenVINO adds biases as floats, and has kernels of its own
# for layer norms, which the rewriting for ONNX Runtime would hide from it.
PROFILES: Mapping[str, Profile] = {
    each.name: each
    for each in (
        Profile("cpu", signed=False, symmetric=False, integer_bias=True, rewritten=True),
        Profile("tensorrt", signed=True, symmetric=True, integer_bias=False),
        Profile("mobile", signed=True, symmetric=False, integer_bias=True),
        Profile("openvino", signed=False, symmetric=False, integer_bias=False),
    )
}


def profile_named(name: str) -> Profile:
    """Return a profile.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PROFILES:
        raise ValueError(f"expected a profile of {sorted(PROFILES)}, got {name!r}")
    return PROFILES[name]

"""How small a code could be: the zeroth-order entropy of a model's values, and of an ONNX file's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["entropy_bound_bytes", "entropy_bound_bytes_onnx"]

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of an element's bytes


@torch.no_grad()
def entropy_bound_bytes(tensors: Mapping[str, Tensor]) -> float:
    r"""Return the least bytes that a code of single values needs for these tensors. Runs on what is to be shipped.

    A code that treats the values of one tensor as independent draws from a distribution it knows, as Huffman's and
    arithmetic codes do, needs at least n H bits for n values, where H = -\sum_v p_v \log_2 p_v over the distinct values
    v and their shares p_v (C. E. Shannon, "A Mathematical Theory of Communication", 1948). Zeros are values like any
    other. It is no bound for what finds patterns between values (deflate's repeats, a bitmap by blocks), and the table
    of values and shares, which a real file needs besides, is not counted. Float weights that all differ need
    log2(n) bits each by this count, less than a file of any kind takes: read it for codes, not for floats.

    Values are told apart by their bits, so that NaNs count and -0.0 is not 0.0.

    Args:
        tensors: name to values of any dtype, such as a `state_dict`; each tensor has a distribution of its own.

    >>> entropy_bound_bytes({"weight": torch.tensor([0, 0, 0, 0, 1, 1, 2, 3], dtype=torch.int8)})
    1.75
    """
    return sum(_entropy_bits(torch.unique(_bits(value), return_counts=True)[1]) for value in tensors.values()) / 8


def entropy_bound_bytes_onnx(path: str | Path) -> float:
    """Return `entropy_bound_bytes` of an ONNX file's initializers, those in subgraphs and external files too.

    Codes of 4 bits are counted as codes, not as the bytes they are packed in.

    Raises:
        ImportError: onnx is not installed.
        FileNotFoundError: nothing is at `path`.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError('entropy_bound_bytes_onnx needs onnx: pip install "lightning-compress[onnx]"') from error
    import numpy as np

    graphs, bits = [onnx.load(str(path)).graph], 0.0
    while graphs:
        graph = graphs.pop()
        for initializer in graph.initializer:
            value = np.ascontiguousarray(numpy_helper.to_array(initializer)).reshape(-1)
            if value.size and value.dtype.itemsize:
                _, counts = np.unique(value.view(f"V{value.dtype.itemsize}"), return_counts=True)
                bits += _entropy_bits(torch.from_numpy(counts))
        graphs += _subgraphs(graph.node)
    return bits / 8


def _subgraphs(nodes: Iterable[NodeProto]) -> list[GraphProto]:
    attributes = [attribute for node in nodes for attribute in node.attribute]
    return [graph for attribute in attributes for graph in (attribute.g, *attribute.graphs)]


def _bits(value: Tensor) -> Tensor:
    """Return the values as integers, by which all bit patterns can be told apart."""
    if value.is_quantized:
        value = value.int_repr()
    flat = value.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if flat.is_complex() and flat.element_size() == 16:
        numbers: Tensor = torch.unique(torch.view_as_real(flat).view(torch.int64), dim=0, return_inverse=True)[1]
        return numbers
    return flat.view(torch.uint8 if flat.dtype == torch.bool else INTEGERS[flat.element_size()])


def _entropy_bits(counts: Tensor) -> float:
    """Return n H from how often each value occurs."""
    if counts.numel() == 0:
        return 0.0
    shares = counts.double() / counts.sum()
    return float(-(counts.double() * shares.log2()).sum()) + 0.0  # one value alone gives -0.0

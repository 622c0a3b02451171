"""Write a module as an ExecuTorch program for phones, with XNNPACK's kernels; checked before it is kept."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError
from lightning_compress.export.checked import Checked, File, checked, first_rows
from lightning_compress.export.program import reference_module, traced_program
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.export.tracing import Inputs, evaluating, quiet
from lightning_compress.export.verify import ALL_FIXED
from lightning_compress.export.xnnpack import as_xnnpack_fuses
from lightning_compress.quantization.outputs import Ranges

__all__ = ["ExecuTorchModel", "executorch_operators", "export_executorch"]

# What torchao and torch say when torchao is imported, which ExecuTorch does: libraries for GPUs that are not there.
CHATTY = ("torchao", "torch.utils._pytree")
# executorch 1.5's own use of importlib.resources, torch 2.13's of its tree specifications
OF_EXECUTORCH = (("", DeprecationWarning), ("", FutureWarning))


def export_executorch(
    module: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    *,
    ranges: Ranges | None = None,
    batch: int = 1,
) -> Checked:
    """Write an ExecuTorch program (.pte) of a module in eval mode, float or int8. Runs after `fit`.

    XNNPACK's kernels compute what its partitioner takes, ExecuTorch's portable ones the rest (`executorch_operators`).
    Where a layer has a range and its output is rounded too, behind a ReLU or clip at most, XNNPACK computes it on the
    trained grids. Else a Linear has the trained codes for its weight, and its inputs are rounded by the range that each
    row has; a Conv multiplies floats. `path` appears only once the file has run in ExecuTorch on all of
    `example_inputs`, `batch` rows at a time, and agrees with the module: to 1e-3 of the largest output in float32, to
    20 dB of signal to noise in int8.

    Args:
        module: any module with float32 parameters that torch.export can trace.
        path: the file to write; missing folders are made.
        example_inputs: a tuple for `module(*inputs)`, or a dict for `module(**inputs)`, of one first size, a multiple
            of `batch`; real data, for the check.
        ranges: `QuantizationAwareTraining.ranges()`; None writes floats.
        batch: rows that the program takes; all other sizes are those of the example.

    Returns:
        The path with what the check found; its latency is XNNPACK's on this machine, not a phone's.

    Raises:
        ImportError: executorch is missing.
        ValueError: as `reference_module`; a range has other than 8 bits; the inputs' first size is no multiple of
            `batch`.
        CompressError: torch.export cannot trace `forward`, ExecuTorch lacks an operator, or the file does not compute
            what the module does.
    """
    module, path = getattr(module, "_orig_mod", module), Path(path)  # torch.compile wraps
    _require()
    inputs: Inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), example_inputs)
    _check_rows(inputs, batch)
    _check_bits(ranges or {})
    plain = copy.deepcopy(module).cpu() if any(each.device.type != "cpu" for each in module.parameters()) else module
    with evaluating(plain), quiet(CHATTY, OF_EXECUTORCH), written_at_the_end(path, ".pte") as unfinished:
        unfinished.write_bytes(_lowered(plain, ranges, first_rows(inputs, batch)))
        model = ExecuTorchModel(unfinished, threads=1)
        file = File("ExecuTorch file", path, unfinished.stat().st_size, lambda inputs: model.in_pieces(inputs, batch))
        return checked(file, plain, inputs, ranges, timed_rows=batch)


def _lowered(module: nn.Module, ranges: Ranges | None, inputs: Inputs) -> bytes:
    import executorch.kernels.quantized  # noqa: F401 - registers what rounds where XNNPACK does not
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    if ranges is None:
        program = traced_program(module, inputs, ALL_FIXED)
    else:
        reference = reference_module(module, ranges, inputs, signed=True)
        graph = traced_program(reference, inputs, ALL_FIXED).module(check_guards=False)
        as_xnnpack_fuses(graph)
        program = traced_program(graph, inputs, ALL_FIXED)
    # The check of operators is left out: it knows those of PyTorch's core set only, and `_check_operators` is exact.
    config = EdgeCompileConfig(_check_ir_validity=False)
    try:
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
        lowered = edge.to_executorch()
    except RuntimeError as error:
        raise CompressError(
            f"ExecuTorch cannot lower {type(module).__name__}: {str(error).strip().partition(chr(10))[0]}; write what "
            "it names in another way, or leave it out of the module"
        ) from error
    _check_operators([f"{op.name}.{op.overload}" for op in lowered.executorch_program.execution_plan[0].operators])
    return bytes(lowered.buffer)


def _check_operators(needed: Sequence[str]) -> None:
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    missing = sorted(set(needed) - set(known))
    if missing:
        raise CompressError(
            f"ExecuTorch has no kernel for {', '.join(missing)}; write that part of forward with other operators, or "
            "leave it out of the module and compute it behind the program"
        )


def _check_rows(inputs: Inputs, batch: int) -> None:
    sizes = {len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()}
    if batch < 1 or len(sizes) != 1 or next(iter(sizes)) % batch:
        raise ValueError(
            f"export_executorch needs inputs of one first size, a multiple of batch, got sizes {sorted(sizes)} with "
            f"batch={batch}; pass as many rows of each input, or another batch"
        )


def _check_bits(ranges: Ranges) -> None:
    narrow = sorted(name for name, trained in ranges.items() if trained.bits != 8)
    if narrow:
        raise ValueError(
            f"XNNPACK rounds to 8 bits, got {ranges[narrow[0]].bits} for '{narrow[0]}' and {len(narrow) - 1} more; "
            "train with inputs=8 and outputs of 8 bits, or leave these names out of ranges"
        )


class ExecuTorchModel:
    """A .pte file, loaded in this process to run often. ExecuTorch has one pool of threads for all files.

    Args:
        path: the file.
        threads: threads of the pool from now on, for all files that are open.

    Raises:
        ImportError: executorch is missing.
        ValueError: `threads` is below 1.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        _require()
        if threads < 1:
            raise ValueError(f"ExecuTorchModel needs threads of at least 1, got {threads}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"expected an ExecuTorch program (.pte), found none at {os.fspath(path)}")
        with quiet(CHATTY, OF_EXECUTORCH):
            import executorch.kernels.quantized  # noqa: F401
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime, Verification

        # "Unsafe" while another thread is within a run; before this file is loaded, which keeps the pool it finds.
        _unsafe_reset_threadpool(threads)
        program = Runtime.get().load_program(Path(path), verification=Verification.InternalConsistency)
        self.method = program.load_method("forward")

    def __call__(self, *tensors: Tensor) -> list[np.ndarray]:
        """Run the program and return all outputs; the inputs have the sizes that it was exported with."""
        outputs = self.method.execute([tensor.contiguous() for tensor in tensors])
        # Copies: the runtime gives views of memory that the next run writes into.
        return [output.numpy().copy() for output in outputs if isinstance(output, Tensor)]

    def in_pieces(self, inputs: Inputs, rows: int) -> list[np.ndarray]:
        """Run it on `rows` rows after the other, and return all outputs' rows."""
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        count = max(len(leaf) for leaf in leaves if leaf.dim())
        pieces = [
            self(*(leaf[at : at + rows] if leaf.dim() else leaf for leaf in leaves)) for at in range(0, count, rows)
        ]
        return [np.concatenate(outputs) for outputs in zip(*pieces, strict=True)]


def executorch_operators(path: str | os.PathLike[str]) -> dict[str, int]:
    """Count what a .pte file runs: parts given to a delegate, by its name, and the operators left to ExecuTorch's own.

    A phone's build must hold each of these operators.

    Raises:
        ImportError: executorch is missing.
    """
    _require()
    with quiet(CHATTY, OF_EXECUTORCH):
        from executorch.exir._serialize._program import deserialize_pte_binary
    plan = deserialize_pte_binary(Path(path).read_bytes()).program.execution_plan[0]
    found: dict[str, int] = {}
    for chain in plan.chains:
        for instruction in chain.instructions:
            name = _called(plan, instruction.instr_args)
            if name:
                found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _called(plan: Any, call: Any) -> str | None:
    if hasattr(call, "delegate_index"):
        return str(plan.delegates[call.delegate_index].id)
    if hasattr(call, "op_index"):
        return f"{plan.operators[call.op_index].name}.{plan.operators[call.op_index].overload}"
    return None


def _require() -> None:
    if importlib.util.find_spec("executorch") is None:
        raise ImportError("ExecuTorch export needs executorch; pip install 'lightning-compress[executorch]'")

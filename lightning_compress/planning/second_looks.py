"""What a plan may do and its author may not mean."""

from __future__ import annotations

from torch import Tensor

from lightning_compress.planning.rehearsal import Rehearsal

__all__ = ["second_looks"]

NARROW = 32  # channels: below, int8 kernels gain nothing over float ones
FEW = 1000  # weights: fewer are not worth a mask


def second_looks(acting: Rehearsal) -> None:
    """Add warnings of what is allowed and may not be meant."""
    rows = acting.rows.values()
    small = [row.name for row in rows if row.sparsity is not None and row.weights < FEW]
    if small:
        acting.warnings.append(
            f"{_listed(small)} {'has' if len(small) == 1 else 'have'} fewer than {FEW} weights: pruning them saves "
            f"next to nothing and may cost accuracy; exclude={small[:3]!r}"
        )
    heads = [row.name for row in rows if "output head" in (row.dense_because, row.float_because)]
    share = sum(row.weights for row in rows if row.name in heads) / max(1, sum(row.weights for row in rows))
    if heads and share > 0.05:
        acting.warnings.append(
            f"the output head {_listed(heads)} stays as it is and holds {share:.0%} of the weights; name it in include "
            f"to compress it too"
        )
    narrow = [row.name for row in rows if row.bits is not None and _width(acting, row.name) < NARROW]
    if narrow and len(narrow) * 2 > sum(row.bits is not None for row in rows):
        acting.warnings.append(
            f"{_listed(narrow)}: fewer than {NARROW} channels; layers this narrow ran slower in int8 than in float32"
        )
    norms = [row.name for row in rows if "Norm" in row.kind and (row.sparsity is not None or row.bits is not None)]
    if norms:
        acting.warnings.append(f"{_listed(norms)}: a norm is selected; its few weights scale whole channels")


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _width(acting: Rehearsal, name: str) -> int:
    layer = acting.layer(name)
    weight = getattr(layer, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else NARROW

"""How each operation of a traced forward passes labels on: a table from names to functions.

Names are those of ATen as `torch.export` writes them, without the overload and the "_" of those that work in place.
An operation that is neither here nor elementwise freezes all labels that flow into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lightning_compress.pruning import moving, norms, products
from lightning_compress.pruning.calls import Call, unknown, unlabelled
from lightning_compress.pruning.labels import Labels, Value

__all__ = ["propagate"]

Rule = Callable[[Labels, Call], Any]


def propagate(labels: Labels, call: Call) -> Any:
    """Return the labelled results of one operation: a Value, a list of them, or None for what is no tensor."""
    if call.shapes is None or not any(value.layers for value in call.values):
        return unlabelled(call.shapes)
    rule = RULES.get(call.name) or RULES.get(call.name.rstrip("_"))
    if rule is None and torch.Tag.pointwise in getattr(call.target, "tags", ()):
        rule = pointwise
    return (rule or unknown)(labels, call)


def pointwise(labels: Labels, call: Call) -> Value:
    """Join what meets, element by element."""
    return labels.product(call.values, call.shapes, call.name)


def same(labels: Labels, call: Call) -> Value:
    """Pass the first value on as it is (dropout in evaluation, zeros_like)."""
    value: Value = call.args[0]
    return replace(value, shape=tuple(call.shapes))


def plain(labels: Labels, call: Call) -> Any:
    """Take nothing of the input but its type: what is made has a size of its own."""
    del labels
    return unlabelled(call.shapes)


NAMES: dict[Rule, str] = {
    pointwise: "copy fill where masked_fill clamp maximum minimum lerp addcmul addcdiv tril triu rsub pow",
    same: """dropout feature_dropout alpha_dropout feature_alpha_dropout contiguous clone detach alias to _to_copy
        type_as lift_fresh_copy lift_fresh zeros_like ones_like full_like empty_like rand_like randn_like relu relu6
        hardtanh gelu silu hardswish hardsigmoid leaky_relu rrelu elu selu celu mish softplus logsigmoid log_sigmoid
        threshold hardshrink softshrink softsign tanhshrink nan_to_num fake_quantize_per_tensor_affine""",
    plain: "new_zeros new_ones new_full new_empty",
    moving.move: """view _unsafe_view reshape flatten unflatten permute transpose t swapaxes movedim numpy_T mT
        squeeze unsqueeze expand pixel_shuffle pixel_unshuffle channel_shuffle repeat tile repeat_interleave roll flip
        broadcast_to""",
    moving.joined: "cat concat concatenate stack",
    moving.parted: "chunk split split_with_sizes unbind tensor_split unsafe_split unsafe_chunk",
    moving.by_number: "select slice index narrow index_select",
    moving.padded: "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    moving.looked_up: "embedding",
    moving.glu: "glu",
    products.linear: "linear",
    products.matmul: "matmul mm bmm mv dot",
    products.added_product: "addmm baddbmm",
    products.einsum: "einsum",
    products.attention: "scaled_dot_product_attention",
    products.convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    norms.batch_norm: "batch_norm instance_norm",
    norms.last_norm: "layer_norm rms_norm",
    norms.group_norm: "group_norm",
    norms.along: "softmax _softmax log_softmax _log_softmax softmin cumsum cumprod sort topk argsort",
    norms.reduced: """mean sum amax amin max min prod var std var_mean std_mean norm linalg_vector_norm logsumexp argmax
        argmin any all""",
    norms.spatial: """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d
        upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d""",
    norms.prelu: "prelu",
}
RULES: dict[str, Rule] = {name: rule for rule, names in NAMES.items() for name in names.split()}

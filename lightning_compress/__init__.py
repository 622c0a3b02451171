"""Model compression as Lightning callbacks: prune, fake-quantize and distil in the fine-tuning run you already have."""

from lightning_compress.callbacks import (
    CompressionMonitor,
    Distillation,
    GradualPruning,
    LotteryRewinding,
    LowRank,
    QuantizationAwareTraining,
    ReadyGate,
    Reconstruction,
    SparsityRegularization,
    StructuredPruning,
    WeightSharing,
)
from lightning_compress.callbacks.loading import load_from_checkpoint
from lightning_compress.callbacks.planning import plan
from lightning_compress.distillation.losses import soft_targets
from lightning_compress.distillation.teachers import TeacherCheckpoint
from lightning_compress.errors import (
    CheckpointMismatch,
    CompressError,
    IncompatibleCallbacks,
    NothingToCompress,
    ProcessesDiffer,
    UnsupportedStrategy,
)
from lightning_compress.export.onnx import export_onnx
from lightning_compress.export.pretrained import export_pretrained
from lightning_compress.measure.onnx_files import compare_onnx
from lightning_compress.measure.report import Measurement, compare
from lightning_compress.packing.reading import load_packed, unpack
from lightning_compress.packing.writing import pack, pack_levels
from lightning_compress.pruning.channels import Removal
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.reconstruction import reconstruct
from lightning_compress.pruning.zero_channels import remove_zero_channels
from lightning_compress.quantization.batchnorm import reestimate_batch_norm
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.mixed import choose_bits
from lightning_compress.quantization.outputs import rounded_as_trained as fake_quantized
from lightning_compress.quantization.posttraining import quantize_post_training
from lightning_compress.schedule import (
    Alternating,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneCycle,
    Steps,
)

__version__ = "0.1.0"

__all__ = [
    "Alternating",
    "CheckpointMismatch",
    "CompressError",
    "CompressionMonitor",
    "Constant",
    "Cosine",
    "Cubic",
    "Details",
    "Distillation",
    "Exponential",
    "GradualPruning",
    "IncompatibleCallbacks",
    "Linear",
    "LotteryRewinding",
    "LowRank",
    "Measurement",
    "NothingToCompress",
    "OneCycle",
    "ProcessesDiffer",
    "QuantizationAwareTraining",
    "ReadyGate",
    "Reconstruction",
    "Removal",
    "SparsityRegularization",
    "Steps",
    "StructuredPruning",
    "TeacherCheckpoint",
    "UnsupportedStrategy",
    "WeightSharing",
    "choose_bits",
    "compare",
    "compare_onnx",
    "export_onnx",
    "export_pretrained",
    "fake_quantized",
    "load_from_checkpoint",
    "load_packed",
    "magnitude",
    "pack",
    "pack_levels",
    "plan",
    "quantize_post_training",
    "reconstruct",
    "reestimate_batch_norm",
    "remove_zero_channels",
    "soft_targets",
    "unpack",
]

"""When: the callbacks that users add to a Lightning run. The only folder that imports lightning."""

from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.gate import ReadyGate
from lightning_compress.callbacks.lottery import LotteryRewinding
from lightning_compress.callbacks.low_rank import LowRank
from lightning_compress.callbacks.monitor import CompressionMonitor
from lightning_compress.callbacks.pruning import GradualPruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.callbacks.reconstruction import Reconstruction
from lightning_compress.callbacks.regularization import SparsityRegularization
from lightning_compress.callbacks.structured import StructuredPruning
from lightning_compress.callbacks.weight_sharing import WeightSharing

__all__ = [
    "CompressionMonitor",
    "Distillation",
    "GradualPruning",
    "LotteryRewinding",
    "LowRank",
    "QuantizationAwareTraining",
    "ReadyGate",
    "Reconstruction",
    "SparsityRegularization",
    "StructuredPruning",
    "WeightSharing",
]

"""What a decomposition asks for besides the weight, gathered in a few steps of a run: moments, Fisher information."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as L
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.gathering import Gathering
from lightning_compress.callbacks.masking import MaskKeeper
from lightning_compress.errors import CompressError
from lightning_compress.pruning.hessians import InputHessians, as_matrices
from lightning_compress.pruning.statistics import Statistics
from lightning_compress.quantization.fake import forget_compiled_code
from lightning_compress.sharding import all_reduce_sum

__all__ = ["Evidence"]


class Evidence:
    """Gathers, of each step between `begin` and `detach`, the inputs and gradients of some layers.

    Args:
        asked: "moment" and "fisher", or one of them, or nothing.
    """

    def __init__(self, asked: Iterable[str]) -> None:
        self.asked = frozenset(asked)
        self.hessians = InputHessians()
        sums = {"squared_gradient"} if "fisher" in self.asked else set()
        self.gathering = Gathering(Statistics(sums), MaskKeeper())
        self.steps: int | None = None
        self.layers: dict[str, nn.Module] = {}

    @property
    def gathers(self) -> bool:
        """Whether steps are counted."""
        return self.steps is not None

    def attach(self, trainer: L.Trainer, pl_module: L.LightningModule, layers: Mapping[str, nn.Module]) -> None:
        """Watch layers, switched off. Runs at `on_fit_start`."""
        self.layers = dict(layers)
        weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
        if "moment" in self.asked:
            self.hessians.attach(pl_module, weights)
            forget_compiled_code()
        self.gathering.keeper.weights = weights
        self.gathering.start(trainer, pl_module, layers)

    def begin(self) -> None:
        """Gather from the next forward on."""
        self.steps = 0
        self.gathering.statistics.clear()
        self.hessians.start(self.hessians.layers)

    def detach(self) -> None:
        """Forget everything, and leave no hook behind."""
        self.steps, self.layers = None, {}
        self.gathering.stop()
        self.gathering.keeper.weights = {}
        self.gathering.statistics.clear()
        if self.hessians.layers:
            self.hessians.detach()
            forget_compiled_code()

    def before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Take this step's gradients."""
        if self.gathers:
            self.gathering.before_optimizer_step(trainer, pl_module, optimizer)

    def of_layers(self, when: str) -> dict[str, dict[str, Tensor]]:
        """Return what is asked for of each layer that had any, as matrices; every process calls it.

        Raises:
            CompressError: NaN or infinite inputs or gradients.
        """
        seen = [name for name in self.layers if self._was_seen(name)]
        found = {name: {each: getattr(self, f"_{each}")(name) for each in sorted(self.asked)} for name in seen}
        for name, known in found.items():
            for what, values in known.items():
                if not bool(values.isfinite().all()):
                    raise CompressError(
                        f"NaN or infinite {what} of '{name}'{when}; nothing is factored. Lower the learning rate or "
                        f"clip gradients, and resume from the last checkpoint"
                    )
        return found

    def _was_seen(self, name: str) -> bool:
        if "moment" in self.asked:
            hessian = self.hessians[name]
            all_reduce_sum(hessian.sums)
            if not int(all_reduce_sum(hessian.samples)):
                return False
        return "fisher" not in self.asked or bool(self.gathering.statistics.steps.get(name))

    def _moment(self, name: str) -> Tensor:
        return self.hessians[name].mean[0]

    def _fisher(self, name: str) -> Tensor:
        squares: Tensor = self.gathering.statistics.values(name)["squared_gradient"]()
        return as_matrices(self.layers[name], squares)[0]

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what is gathered so far; every process calls it. Empty if nothing is."""
        if not self.gathers:
            return {}
        moments = self.hessians.state_dict() if self.hessians.layers else {}
        return {"steps": self.steps, "moments": moments, "gradients": self.gathering.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved. Runs at `on_train_start`."""
        if state:
            self.begin()
            self.steps = int(state["steps"])
            self.hessians.load_state_dict(state["moments"])
            self.gathering.load_state_dict(state["gradients"])

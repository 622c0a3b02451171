"""Small real LightningModules, written as users write them: none of them knows that compression exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

CLASSES, EXAMPLES, BATCH = 3, 64, 16
VOCABULARY, LENGTH = 11, 6


class Shuffled(Sampler[list[int]]):
    """Batches in an order drawn anew each epoch; knows its place, so that a run resumed mid-epoch sees the rest."""

    def __init__(self, length: int, batch: int) -> None:
        self.length, self.batch, self.epoch, self.place = length, batch, 0, 0

    def __len__(self) -> int:
        return self.length // self.batch

    def __iter__(self) -> Iterator[list[int]]:
        if self.place == len(self):  # a loop that knows the length never asks beyond the last batch
            self.epoch, self.place = self.epoch + 1, 0
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.place < len(self):
            self.place += 1
            yield order[(self.place - 1) * self.batch : self.place * self.batch]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose place Lightning saves in the middle of an epoch."""

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batch_sampler.epoch, "place": self.batch_sampler.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.epoch, self.batch_sampler.place = state["epoch"], state["place"]


def images(examples: int = EXAMPLES) -> TensorDataset:
    source = torch.Generator().manual_seed(1)
    labels = torch.arange(examples) % CLASSES
    pictures = torch.randn(examples, 1, 6, 6, generator=source) + labels.view(-1, 1, 1, 1)
    return TensorDataset(pictures, labels)


def tokens(examples: int = EXAMPLES) -> TensorDataset:
    return TensorDataset(torch.randint(0, VOCABULARY, (examples, LENGTH), generator=torch.Generator().manual_seed(1)))


class Network(nn.Sequential):
    """Layers in a row, in a class of the user's own: Dynamo passes over frames of torch's own containers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def network(dropout: float = 0.2, norm: bool = True) -> Network:
    return Network(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, CLASSES),
    )


class Small(L.LightningModule):
    """Convolution, norm, dropout and Linear layers; automatic optimization."""

    def __init__(
        self,
        dropout: float = 0.2,
        norm: bool = True,
        optimizer: str = "adamw",
        batch: int = BATCH,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = network(dropout, norm)
        self.clipped: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        if self.hparams["optimizer"] == "momentum":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        if not self.hparams["shuffle"]:
            data = images()
            # Lightning's own sampler would shuffle.
            part = DistributedSampler(data, shuffle=False) if torch.distributed.is_initialized() else None
            return DataLoader(data, batch_size=self.hparams["batch"], sampler=part)
        order = Shuffled(EXAMPLES, self.hparams["batch"])
        # Its own generator: an iterator otherwise draws from the global one, and a resumed run begins one more.
        return ResumableLoader(images(), batch_sampler=order, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(), batch_size=BATCH, generator=torch.Generator())

    test_dataloader = predict_dataloader = val_dataloader


class WholeIsStudent(Small):
    """The step calls a method other than forward, so that the student is `model`."""

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


class DictStep(Small):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": super().training_step(batch, batch_idx), "extra": batch[1]}


class NoneStep(Small):
    """Skips every fourth batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 4 == 1 else loss


class Manual(Small):
    """Manual optimization, `repeats` steps a batch."""

    repeats = 1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(self.repeats):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


class TwoStepsABatch(Manual):
    repeats = 2


class RawOptimizer(Manual):
    """Steps the torch optimizer itself; Lightning's `global_step` stays 0."""

    def optimizers(self, use_pl_optimizer: bool = False) -> Any:
        return super().optimizers(use_pl_optimizer=False)


class ClosureStep(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = Small.training_step(self, batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Adversaries(Small):
    """Two models and two optimizers in turn, as a GAN has them; `model` is the one worth compressing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.critic = nn.Sequential(nn.Linear(CLASSES, 8), nn.ReLU(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        outputs = self.model(batch[0])
        first.zero_grad()
        self.manual_backward(F.cross_entropy(outputs, batch[1]) - self.critic(outputs).mean() * 0.01)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second.zero_grad()
        self.manual_backward(self.critic(outputs.detach()).pow(2).mean())
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        parts = (self.model, self.critic)
        return [torch.optim.AdamW(part.parameters(), lr=0.01) for part in parts], []


class RawAdversaries(Adversaries):
    """The same with raw torch optimizers and no toggling."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers(use_pl_optimizer=False)
        outputs = self.model(batch[0])
        first.zero_grad()
        self.manual_backward(F.cross_entropy(outputs, batch[1]))
        first.step()
        second.zero_grad()
        self.manual_backward(self.critic(outputs.detach()).pow(2).mean())
        second.step()


class LateSetup(Small):
    """Builds its network in `setup`, from what the data say."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model = None

    def setup(self, stage: str) -> None:
        if self.model is None:
            self.model = network(self.hparams["dropout"], self.hparams["norm"])


class LateConfigure(LateSetup):
    """Builds its network in `configure_model`."""

    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        super().setup("fit")


class Doubled(nn.Linear):
    """A foreign subclass with a forward of its own."""

    def forward(self, value: Tensor) -> Tensor:
        return 2.0 * F.linear(value, self.weight, self.bias)


class Foreign(Small):
    """A foreign Linear, called twice, once by keyword."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model[7] = Doubled(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.model):
            x = layer(layer(x)) if index == 7 else layer(input=x) if index == 4 else layer(x)
        return x


class TwoSharing(Small):
    """Two Linear layers hold one and the same weight."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.insert(9, nn.Linear(16, 16))
        self.model[9].weight = self.model[7].weight


class CausalNetwork(nn.Module):
    """One block of causal attention over tokens; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("causal_mask", torch.ones(LENGTH, LENGTH).tril().bool())
        self.register_buffer("weight_mask", torch.ones(LENGTH), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        hidden = hidden + self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=self.causal_mask))
        return self.head(hidden + self.inner(hidden))


class Causal(Small):
    """A tiny language model with a `causal_mask` buffer and a tied embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model = CausalNetwork()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(batch[0])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tokens(), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tokens(), batch_size=BATCH)


class Bert(L.LightningModule):
    """A transformers BERT of random weights, called with keywords; its ModelOutput holds the loss and is returned."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=CLASSES, **shape)
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        (ids,) = tokens().tensors
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % CLASSES} for row in ids]
        return DataLoader(rows, batch_size=BATCH)

    val_dataloader = train_dataloader


EVERY_MODULE: tuple[type[L.LightningModule], ...] = (
    Small,
    WholeIsStudent,
    DictStep,
    NoneStep,
    Manual,
    TwoStepsABatch,
    RawOptimizer,
    ClosureStep,
    Adversaries,
    RawAdversaries,
    LateSetup,
    LateConfigure,
    Foreign,
    TwoSharing,
    Causal,
    Bert,
)

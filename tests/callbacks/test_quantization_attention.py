"""Attention while training: projections of nn.MultiheadAttention always, products with Details(attention=True)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionMonitor, Details, QuantizationAwareTraining, fake_quantized
from tests.callbacks.test_quantization_outputs import StopAt

STEPS, WIDTH = 8, 8


class Encoder(L.LightningModule):
    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)
        if compiled:
            self.encoder.compile(backend="eager")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Bert(Encoder):
    def __init__(self, attention: str) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=8, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
            attn_implementation=attention,
        )  # fmt: skip
        self.encoder, self.head = transformers.BertModel(config, add_pooling_layer=False), nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        words = (tokens[..., 0].abs() * 3).long().clamp(max=9)
        mask = (torch.arange(5) < 4).long().expand(len(words), 5)
        return self.head(self.encoder(words, attention_mask=mask).last_hidden_state.mean(1))


def data(count: int = 4) -> TensorDataset:
    tokens = torch.randn(count, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    return TensorDataset(tokens, tokens.mean(1)[:, :3].argmax(1))


def fit(make: Any, folder: Path, *callbacks: L.Callback, **options: Any) -> Any:
    torch.manual_seed(0)
    module = make()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=4), **options)
    return module


def qat() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(window=(1, 3, 7), details=Details(attention=True))


def products(callback: QuantizationAwareTraining) -> dict[str, Any]:
    return {name: trained for name, trained in callback.ranges().items() if ":product" in name}


def test_an_attention_is_rounded_and_left_as_it_was(tmp_path: Path) -> None:
    callback = qat()
    module = fit(Encoder, tmp_path, callback, CompressionMonitor())
    attentions = [f"encoder.layers.{index}.self_attn" for index in (0, 1)]
    operands = [f"product{index}.{side}" for index in (0, 1) for side in ("left", "right")]
    assert list(products(callback)) == [f"{name}:{operand}" for name in attentions for operand in operands]
    assert {f"{name}.{own}" for name in attentions for own in ("in_proj", "out_proj")} <= set(callback.ranges())
    shares = callback.ranges()[f"{attentions[0]}:product1.left"]
    assert 0.0 <= shares.low < shares.high <= 1.0
    assert list(module.state_dict()) == list(Encoder().state_dict())
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not [name for name in part.__dict__ if "fake_quant" in name]


def test_what_is_observed_is_what_the_products_read(tmp_path: Path) -> None:
    whole = QuantizationAwareTraining(window=(0, 1, 7), details=Details(attention=True, momentum=1.0))
    seen: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 6:  # ranges move for the last time
                with torch.no_grad():
                    words = pl_module.encoder.embeddings((batch[0][..., 0].abs() * 3).long().clamp(max=9))
                    seen["key"] = pl_module.encoder.encoder.layer[0].attention.self.key(words)

    fit(lambda: Bert("eager"), tmp_path, whole, Look())
    key = whole.ranges()["encoder.encoder.layer.0.attention.self:product0.right"]
    assert (key.low, key.high) == pytest.approx((seen["key"].min().item(), seen["key"].max().item()), rel=1e-6)


def test_eager_and_fused_bert_learn_the_same_ranges_and_compute_the_same(tmp_path: Path) -> None:
    callbacks = qat(), qat()
    eager, fused = (
        fit(lambda way=way: Bert(way), tmp_path, each) for way, each in zip(("eager", "sdpa"), callbacks, strict=True)
    )
    assert list(products(callbacks[0])) == list(products(callbacks[1]))
    assert len(products(callbacks[0])) == 2 * 4
    for name, trained in products(callbacks[0]).items():
        other = callbacks[1].ranges()[name]
        assert (trained.low, trained.high) == pytest.approx((other.low, other.high), rel=0.02, abs=0.02)
    fused.load_state_dict(eager.state_dict())
    tokens, ranges = data(32).tensors[0], callbacks[0].ranges()
    layers_only = {name: trained for name, trained in ranges.items() if ":product" not in name}
    with torch.no_grad():
        with fake_quantized(eager.eval(), ranges):
            expected = eager(tokens)
        with fake_quantized(fused.eval(), ranges):
            found = fused(tokens)
        with fake_quantized(eager, layers_only):
            unrounded = eager(tokens)
    # a value at a tie may fall to either side: few do
    assert (found - expected).abs().median() < 0.2 * (unrounded - expected).abs().median()


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_is_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    whole, path = qat(), tmp_path / "at.ckpt"
    expected = fit(Encoder, tmp_path, whole, StopAt(at, path))
    again = qat()
    resumed = fit(Encoder, tmp_path, again, ckpt_path=path)
    assert again.ranges() == whole.ranges()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it of them
@pytest.mark.parametrize("products_too", [False, True])
def test_a_compiled_model_trains_the_same(products_too: bool, tmp_path: Path) -> None:
    plain, compiled = (
        QuantizationAwareTraining(window=(1, 3, 7), details=Details(attention=products_too)) for _ in range(2)
    )
    expected, found = fit(Encoder, tmp_path, plain), fit(lambda: Encoder(compiled=True), tmp_path, compiled)
    assert list(products(compiled)) == list(products(plain))
    # Sums in another order move values over ties: single codes differ, by one step of 255.
    for name, trained in plain.ranges().items():
        other = compiled.ranges()[name]
        assert (trained.low, trained.high) == pytest.approx((other.low, other.high), rel=0.02, abs=0.02), name
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=2e-3)


def test_without_such_products_it_says_so(tmp_path: Path) -> None:
    class Flat(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    with pytest.warns(UserWarning, match="attention=True rounds nothing"):
        fit(Flat, tmp_path, qat())

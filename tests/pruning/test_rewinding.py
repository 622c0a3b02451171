"""Copies go back to the bit, and an optimizer that was restarted is a new one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.pruning.rewinding import copied, fresh_state, live_tensors, put_back, restart


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_go_back_to_the_bit(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor(float("-inf"), dtype=dtype)
        model[0].weight[1] = torch.tensor(-0.0, dtype=dtype)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    storages = [value.data_ptr() for value in model.state_dict().values()]
    live = live_tensors(model, buffers=True)
    copies = copied(live)
    model(torch.randn(8, 1, 4, 4, dtype=dtype))
    for tensor in live.values():
        tensor.data.fill_(7)
    put_back(live, copies)
    for name, value in model.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value.view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8)), name
    assert [value.data_ptr() for value in model.state_dict().values()] == storages


def test_only_the_named_ones_go_back() -> None:
    live = {"a": torch.zeros(2), "b": torch.zeros(2)}
    put_back(live, {"b": torch.ones(2), "elsewhere": torch.ones(3)})
    assert (live["a"].tolist(), live["b"].tolist()) == ([0, 0], [1, 1])


def test_buffers_are_those_of_a_checkpoint() -> None:
    model = network()
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    parameters = [name for name, _ in model.named_parameters()]
    assert list(live_tensors(model, buffers=False)) == parameters
    assert sorted(live_tensors(model, buffers=True)) == sorted(model.state_dict())


def test_names_are_free_of_wrappers() -> None:
    model = nn.Sequential(torch.compile(network(), backend="eager"))
    assert set(live_tensors(model, buffers=True)) == {f"0.{name}" for name in network().state_dict()}


def test_a_shared_parameter_is_there_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(live_tensors(model, buffers=True)) == ["0.weight", "0.bias", "1.bias"]


OPTIMIZERS = {
    name: getattr(torch.optim, name)
    for name in (
        "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restarted_optimizer_steps_like_a_new_one(name: str) -> None:
    inputs, start = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 4)
    options = {"momentum": 0.9} if name == "SGD" else {}

    def make(parameter: nn.Parameter) -> torch.optim.Optimizer:
        return OPTIMIZERS[name]([parameter], lr=0.1, **options)

    def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (inputs @ parameter).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    used, new = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first, second = make(used), make(new)
    fresh = fresh_state(first)
    for _ in range(2):  # a second restart is like the first
        for _ in range(3):
            step(first, used)
        assert not torch.equal(used, new)
        restart(first, fresh)
        used.data.copy_(start)
    for _ in range(3):
        step(first, used)
        step(second, new)
    assert torch.equal(used, new)

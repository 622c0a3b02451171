"""All placed outputs of a model through a training loop by hand: phases, shared grids, checkpoint, export."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from lightning_compress.export.onnx import export_onnx, kernel_counts
from lightning_compress.quantization.attach import Phase, attach, detach
from lightning_compress.quantization.dataflow import watched
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.gathered import Gathered
from lightning_compress.quantization.observers import fold_extremes
from lightning_compress.quantization.outputs import OUTPUT_STATE, rounded_as_trained
from lightning_compress.quantization.placed import PlacedOutputs
from lightning_compress.quantization.placement import place
from tests.quantization.test_placement import IMAGE, Block, convolutions, network


def trained(steps: int) -> tuple[nn.Module, PlacedOutputs, dict]:
    torch.manual_seed(0)
    module = network(Block(), Block())
    names = convolutions(module)
    inputs = {name: attach(module.get_submodule(name)) for name in names}
    optimizer, outputs = (
        torch.optim.SGD(module.parameters(), 0.05),
        PlacedOutputs(Details(outputs=True), Gathered(None)),
    )
    for step in range(steps):
        phase = (Phase.OBSERVE, Phase.ROUND, Phase.FROZEN)[min(2, step // 3)]
        if step == 0:
            with watched(module) as flow:
                loss = module(IMAGE).square().sum()
            outputs.attach(module, place(module, flow, names).outputs)
        else:
            loss = module(IMAGE).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fold_extremes([*inputs.values(), *outputs.states.values()], 0.5)
        outputs.share(inputs)
        outputs.set_phase(phase)
        for state in inputs.values():
            state.phase = phase if state.observed else min(phase, Phase.OBSERVE)
    return module, outputs, inputs


def test_a_run_by_hand_ends_in_a_file_that_runs_on_integers(tmp_path: Path) -> None:
    module, outputs, inputs = trained(8)
    assert {state.phase for state in outputs.states.values()} == {Phase.FROZEN}
    ranges = {**{name: state.range for name, state in inputs.items()}, **outputs.ranges()}
    for place_ in outputs.places:
        for reader in place_.readers:
            assert ranges[reader].grid == ranges[f"{place_.name}:output"].grid
    module.eval()
    with torch.no_grad():
        while_attached = module(IMAGE)
    outputs.detach()
    for name in inputs:
        detach(module.get_submodule(name))
    assert not any(OUTPUT_STATE in vars(part) or part._forward_hooks for part in module.modules())
    with torch.no_grad(), rounded_as_trained(module, ranges):
        assert torch.equal(module(IMAGE), while_attached)
    path = export_onnx(module, tmp_path / "a.onnx", (IMAGE,), ranges=ranges)
    kernels = kernel_counts(path)
    assert (kernels["QLinearConv"], kernels["QLinearAdd"], kernels["QuantizeLinear"]) == (5, 2, 1)


def test_a_checkpoint_brings_places_and_ranges_back() -> None:
    module, outputs, _ = trained(6)
    file = io.BytesIO()
    torch.save(outputs.state_dict(), file)
    file.seek(0)
    again = PlacedOutputs(Details(outputs=True), Gathered(None))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.places == outputs.places
    assert again.ranges() == outputs.ranges()
    outputs.detach()
    again.attach(module)
    again.set_phase(Phase.FROZEN)
    for name, state in again.states.items():
        assert state.extremes.tolist() == outputs.extremes[name].tolist()
        assert state.phase == Phase.FROZEN


def test_outputs_that_saw_nothing_stay_off() -> None:
    outputs = PlacedOutputs(Details(outputs=True), Gathered(None))
    outputs.share({})
    module = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    outputs.attach(module, trained(1)[1].places[:0])
    outputs.set_phase(Phase.FROZEN)
    assert outputs.ranges() == {}

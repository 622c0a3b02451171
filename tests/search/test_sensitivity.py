"""One layer at a time: the numbers, the weights afterwards, and the file of a run that was killed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.search.refusals import AnotherStudy
from lightning_compress.search.sensitivity import measure_sensitivity


def trained() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight[0, 0], net[0].weight[1, 1] = -0.0, 3e-42  # bits that arithmetic would lose
    return net


def bits(net: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in net.state_dict().values()]


INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


def score(net: nn.Module) -> float:
    assert not net.training
    return float(net(INPUTS).square().mean().detach())


def pruned_by_hand(net: nn.Module, layer: int, sparsity: float) -> nn.Module:
    changed = copy.deepcopy(net)
    weight = changed[layer].weight.detach().numpy()
    flat = abs(weight).ravel()
    weight.ravel()[flat.argsort(kind="stable")[: round(sparsity * flat.size)]] = 0.0
    return changed.eval()


def rounded_by_hand(net: nn.Module, layer: int, width: int) -> nn.Module:
    changed = copy.deepcopy(net)
    weight = changed[layer].weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (width - 1) - 1)
    weight.copy_((weight / scale).round() * scale)
    return changed.eval()


def test_each_score_is_that_of_one_layer_changed_by_hand():
    net = trained()
    before = bits(net)
    found = measure_sensitivity(net, score, (0.5, 0.75), (3,))
    assert bits(net) == before
    assert net.training
    assert list(found.scores) == ["0", "2"]  # not the head
    for name in ("0", "2"):
        for sparsity in (0.5, 0.75):
            expected = score(pruned_by_hand(net, int(name), sparsity))
            assert found.scores[name]["sparsity", sparsity] == pytest.approx(expected, rel=1e-6)
        assert found.scores[name]["bits", 3] == pytest.approx(score(rounded_by_hand(net, int(name), 3)), rel=1e-6)
    assert found.plain == score(net.eval())
    assert found.harms()["0"]["bits", 3] == found.plain - found.scores["0"]["bits", 3]
    assert found.shapes == {"0": (48, 8), "2": (64, 8)}


def test_weights_are_back_after_an_error():
    net = trained()
    before, calls = bits(net), []

    def fails(module: nn.Module) -> float:
        calls.append(bits(module) != before)
        if len(calls) == 3:
            raise OSError("no data")
        return 0.0

    with pytest.raises(OSError, match="no data"):
        measure_sensitivity(net, fails, (0.5,), (4,))
    assert calls == [False, True, True]
    assert bits(net) == before


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path):
    net, path, calls = trained(), tmp_path / "scores.jsonl", []

    def counted(module: nn.Module) -> float:
        calls.append(0)
        return score(module)

    whole = measure_sensitivity(net, counted, (0.5,), (4,), path)
    assert len(calls) == 5
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:10], encoding="utf-8")  # as a kill leaves it
    assert measure_sensitivity(net, counted, (0.5,), (4,), path) == whole
    assert len(calls) == 7
    assert measure_sensitivity(net, counted, (0.5,), (4, 8), path).scores["2"]["bits", 8] != 0.0
    assert len(calls) == 9


def test_a_file_of_another_model_or_data_is_refused(tmp_path: Path):
    net, path = trained(), tmp_path / "scores.jsonl"
    measure_sensitivity(net, score, (0.5,), (), path, about={"batches": 1})
    with pytest.raises(AnotherStudy, match="other weights, layers, data or options"):
        measure_sensitivity(net, score, (0.5,), (), path, about={"batches": 2})
    with torch.no_grad():
        net[4].bias[0] += 1e-6
    with pytest.raises(AnotherStudy, match="give another file"):
        measure_sensitivity(net, score, (0.5,), (), path, about={"batches": 1})


@pytest.mark.parametrize(
    ("sparsities", "widths", "said"),
    [((), (), "got none of both"), ((1.0,), (), r"\(0, 1\), got 1.0"), ((), (9,), "from 2 to 8")],
)
def test_amounts_out_of_range_are_named(sparsities, widths, said):
    with pytest.raises(ValueError, match=said):
        measure_sensitivity(trained(), score, sparsities, widths)


def test_a_score_that_is_nan_is_named():
    with pytest.raises(ValueError, match=r"returned nan with .* in 'no layer'"):
        measure_sensitivity(trained(), lambda module: float("nan"))


def test_the_table_and_the_picture(tmp_path: Path):
    found = measure_sensitivity(trained(), score, (0.5, 0.75), (3, 4))
    rows = found.table().splitlines()
    assert rows[0] == "| layer | weights | 50 % zeros | 75 % zeros | 3 bits | 4 bits |"
    assert rows[3].startswith(f"| 0 | 48 | {found.scores['0']['sparsity', 0.5]:.4f} |")
    assert found.plot(tmp_path / "new" / "s.png").read_bytes().startswith(b"\x89PNG")

"""Peaks of known size: what is allocated is seen, what was freed is not added."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from lightning_compress.measure import peak_memory

MIB = 2**20


def test_a_tensor_of_64_mib_is_seen():
    assert peak_memory(lambda: torch.empty(16 * MIB)).peak_bytes == 64 * MIB


def test_what_was_freed_before_the_peak_is_not_added():
    def call():
        for _ in range(5):
            torch.empty(2 * MIB)  # 8 MiB, freed at once
        torch.empty(4 * MIB)

    assert peak_memory(call).peak_bytes == 16 * MIB
    assert peak_memory(call, runs=1).peak_bytes == 16 * MIB


def test_two_that_lie_there_together_are():
    def call():
        first = torch.empty(MIB)
        second = torch.empty(2 * MIB)
        del first
        return torch.empty(MIB), second

    assert peak_memory(call).peak_bytes == 12 * MIB


def test_what_a_run_leaves_is_there_in_the_next():
    kept = []
    assert peak_memory(lambda: kept.append(torch.empty(MIB)), runs=3).peak_bytes == 12 * MIB


def test_what_lay_there_before_is_not_counted_even_when_it_is_freed():
    before = [torch.empty(8 * MIB)]

    def call():
        before.clear()
        torch.empty(MIB)

    assert peak_memory(call).peak_bytes == 4 * MIB


def test_inference_holds_a_layer_s_input_and_output():
    net = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(6)]).eval()
    x = torch.zeros(256, 512)

    def call():
        with torch.no_grad():
            net(x)

    # each layer's input (but the first, which lay there before) and output at one time, never all six
    assert peak_memory(call).peak_bytes == 2 * x.numel() * 4


def test_a_training_step_holds_activations_gradients_and_the_optimizer_s_state():
    layers, width, rows = 4, 256, 512
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    optimizer = torch.optim.Adam(net.parameters(), foreach=False)
    x = torch.zeros(rows, width)

    def step():
        optimizer.zero_grad()
        net(x).sum().backward()
        optimizer.step()

    weights, activations = layers * width * width * 4, layers * rows * width * 4
    peak = peak_memory(step).peak_bytes
    state = 2 * weights
    # at the end of the second forward: Adam's state of the first, and all activations; then gradients instead of them
    least = state + activations
    assert least <= peak <= least + rows * width * 4 * 2 + width * width * 4
    assert peak_memory(step, runs=1).peak_bytes <= peak - state  # which lies there already


def test_how_it_was_counted_is_said():
    assert "torch's CPU allocator" in peak_memory(lambda: torch.empty(1)).how


@pytest.mark.parametrize(
    ("options", "message"),
    [({"runs": 0}, "at least one run, got runs=0"), ({"device": "meta"}, "'cpu' or 'cuda', got 'meta'")],
)
def test_bad_options_are_named_before_any_run(options, message):
    with pytest.raises(ValueError, match=message):
        peak_memory(lambda: pytest.fail("it ran"), **options)


def test_nothing_seen_is_no_peak_of_zero():
    def elsewhere():
        thread = threading.Thread(target=torch.empty, args=(MIB,))
        thread.start()
        thread.join()

    for call in (lambda: None, elsewhere):
        with pytest.raises(ValueError, match="allocated nothing on 'cpu' in its own thread"):
            peak_memory(call)


def test_an_error_of_the_call_is_the_caller_s():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert peak_memory(lambda: torch.empty(MIB)).peak_bytes == 4 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_too():
    assert peak_memory(lambda: torch.empty(16 * MIB, device="cuda"), device="cuda").peak_bytes == 64 * MIB

"""Every shipped config fits its card, by simulation, and the simulation counts what it should."""

import re

import pytest
import torch
from conftest import ROOT
from simulate_memory import CARD, HOST, fake_card, simulate

import longcat_common
from longcat_common import GroupOffload, QuantizedLinear, load_config

# The quickest is a default test.
NAMES = ["24gb_bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in "6gb 8gb 12gb 16gb 24gb 48gb".split())]


def readme_row(name):
    """(GiB a step, GiB a preview) in README's table of cards."""
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}.json`"))
    return [float(figure) for figure in re.search(r"\| ([\d.]+) / ([\d.]+) \|", row).groups()]


def check(name, card, **overrides):
    gib, _, needed = simulate(load_config(ROOT / "configs" / f"{name}.json", **overrides))
    assert needed <= card, gib
    assert readme_row(name) == pytest.approx([gib["a step, at its peak"], gib["a preview"]], abs=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_fits_its_card(name):
    check(name, int(name.split("gb")[0]))


@pytest.mark.slow
def test_colabs_config_fits_a_t4():
    check("colab_t4", 14.75, mixed_precision="fp16")  # what a T4 shows, and what it computes in


@pytest.mark.slow
@pytest.mark.parametrize(
    "expected, overrides",
    [
        (7.8, {}),
        (8.6, {"lora_rank": 64}),
        (13.5, {"base_model_precision": "no_change"}),
        (17.9, {"gradient_checkpointing": False}),
        (24, {"gradient_checkpointing": False, "base_model_precision": "no_change"}),
        (2.3, {"enable_group_offload": True}),
    ],
)
def test_a_step_needs_what_another_simulation_found(expected, overrides):
    gib, *_ = simulate(load_config(**overrides))
    assert gib["a step, at its peak"] == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto", "fp8-torchao", "int8-matmul"])
def test_a_fake_quantized_layer_is_as_large_as_a_real_one(precision):
    kinds = lambda layer: [(name, p.shape, p.dtype) for name, p in layer.named_parameters()]
    real = kinds(QuantizedLinear(torch.nn.Linear(384, 256), precision))
    with fake_card():
        fake = kinds(QuantizedLinear(torch.nn.Linear(384, 256), precision))
    assert fake == real


def test_what_is_counted_and_that_all_is_put_back():
    before = torch.nn.Module.to, torch.Tensor.tolist, torch.nn.functional.rms_norm, GroupOffload.add
    with fake_card() as live:
        kept = torch.empty(1000, 512)
        assert live.peak_of(lambda: torch.empty(1000, 512) + kept) * 2**30 == 3 * 1000 * 512 * 4
        kept.view(-1), kept.add_(1), torch.empty(1000, 512, device=HOST)
        assert live.now == 1000 * 512 * 4
        block = torch.nn.Linear(512, 512)
        offload = GroupOffload(CARD)
        offload.add(block)
        assert live.now == 1000 * 512 * 4
        assert live.peak_of(offload.need, 0) * 2**30 == 1000 * 512 * 4 + 4 * (512 * 512 + 512)
        longcat_common.position_ids(16, 16)
    assert (torch.nn.Module.to, torch.Tensor.tolist, torch.nn.functional.rms_norm, GroupOffload.add) == before
    assert type(longcat_common.position_ids(16, 16)[0]) is torch.Tensor

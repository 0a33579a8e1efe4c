"""Every shipped config fits its card, by simulation, and the simulation counts what it should."""

import re

import pytest
import simulate_memory
import torch
from conftest import ROOT
from simulate_memory import CARD, HOST, fake_card, simulate

import longcat_common
from longcat_common import GroupOffload, QuantizedLinear, load_config

CARDS = {f"{size}gb": size for size in (6, 8, 12, 16, 24, 48)} | {"24gb_bf16": 24, "colab_t4": 14.75}


def readme_row(name):
    """[GiB a step, GiB a preview] in README's table of cards."""
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}.json`"))
    return [float(figure) for figure in re.search(r"\| ([\d.]+) / ([\d.]+) \|", row).groups()]


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_a_shipped_config_fits_its_card_and_readme_says_what_it_takes(name):
    arithmetic = "fp16" if name == "colab_t4" else "auto"
    gib, _, needed = simulate(load_config(ROOT / "configs" / f"{name}.json", mixed_precision=arithmetic))
    assert needed <= CARDS[name], gib
    assert readme_row(name) == pytest.approx([gib["a step, at its peak"], gib["a preview"]], abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "expected, overrides",
    [
        (7.8, {}),
        (8.6, {"lora_rank": 64}),
        (13.5, {"base_model_precision": "no_change"}),
        (17.9, {"gradient_checkpointing": False}),
        (2.3, {"enable_group_offload": True}),
    ],
)
def test_a_step_needs_what_another_simulation_found(expected, overrides):
    gib, *_ = simulate(load_config(**overrides))
    assert gib["a step, at its peak"] == pytest.approx(expected, abs=0.3)


def test_readmes_figures_follow_from_one_and_two_tenths_of_the_model(monkeypatch):
    config, found = load_config(ROOT / "configs/48gb.json", mixed_precision="bf16"), []
    config.validation_num_inference_steps = 1
    for tenths in (1, 2):
        monkeypatch.setattr(simulate_memory.bench_step, "REAL", dict(num_layers=tenths, num_single_layers=2 * tenths))
        gib, _ = simulate_memory.training(config)
        found.append(torch.tensor([gib["a step, at its peak"], gib["a preview"]]))
    whole = found[0] + 9 * (found[1] - found[0])
    assert whole.tolist() == pytest.approx(readme_row("48gb"), abs=0.2)


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto", "fp8-torchao", "int8-matmul"])
def test_a_fake_quantized_layer_is_as_large_as_a_real_one(precision):
    kinds = lambda layer: [(name, p.shape, p.dtype) for name, p in layer.named_parameters()]
    real = kinds(QuantizedLinear(torch.nn.Linear(384, 256), precision))
    with fake_card():
        assert kinds(QuantizedLinear(torch.nn.Linear(384, 256), precision)) == real


def test_what_is_alive_on_the_card_is_counted_and_all_is_put_back():
    before = torch.nn.Module.to, torch.Tensor.tolist, torch.nn.functional.rms_norm, GroupOffload.add
    size = 1000 * 512 * 4
    with fake_card() as live:
        kept = torch.empty(1000, 512)
        assert live.peak_of(lambda: torch.empty(1000, 512) + kept) * 2**30 == 3 * size
        kept.view(-1), kept.add_(1), torch.empty(1000, 512, device=HOST)
        offload = GroupOffload(CARD)
        offload.add(torch.nn.Linear(512, 512))
        assert live.now == size
        assert live.peak_of(offload.need, 0) * 2**30 == size + 4 * (512 * 512 + 512)
        longcat_common.position_ids(16, 16)
    assert (torch.nn.Module.to, torch.Tensor.tolist, torch.nn.functional.rms_norm, GroupOffload.add) == before
    assert type(longcat_common.position_ids(16, 16)[0]) is torch.Tensor

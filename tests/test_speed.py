"""What makes a step cheaper or smaller computes the same, and what fits a card is simulated as README says."""

import copy
import json
import re
import threading
from pathlib import Path

import pytest
import simulate_memory
import torch
from conftest import ROOT
from optimum import quanto
from torchao.quantization import Float8WeightOnlyConfig, quantize_

import train_lora
from longcat_common import QuantizedLinear, dequantize, flow_matching_loss, load_config, load_transformer
from train_lora import add_lora, checkpoint_blocks

PRECISIONS = ("int8-quanto", "int4-quanto", "fp8-torchao", "int8-matmul")


def output_and_input_gradient(linear, x, gradient):
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(gradient)
    return y.detach(), x.grad


def libraries_own_weight(linear, precision):
    """The weight as optimum-quanto or torchao quantize it and give it back."""
    model, weight = torch.nn.Sequential(copy.deepcopy(linear)), linear.weight.detach()
    if precision == "int4-quanto":  # its own way back compiles an extension; this is its library/unpack.py
        scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, axis=0, group_size=128)
        made = quanto.quantize_weight(weight, quanto.qint4, 0, scale, shift, group_size=128, optimized=False)
        values = torch.cat([made._data._data & 15, made._data._data >> 4])
        return (made._scale * values - made._shift).reshape(weight.shape)
    if precision == "fp8-torchao":
        quantize_(model, Float8WeightOnlyConfig())
    else:
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    return model[0].weight.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantized_weights_are_the_libraries_own_to_the_last_bit_and_alone_are_kept(precision, dtype):
    torch.manual_seed(0)
    linear, x, gradient = torch.nn.Linear(384, 256).to(dtype), torch.randn(64, 384), torch.randn(64, 256)
    expected, quantized, kept = libraries_own_weight(linear, precision), QuantizedLinear(linear, precision), []
    stored = [tensor for tensor in (quantized.weight, quantized.scale, quantized.shift) if tensor is not None]
    assert torch.equal(dequantize(dtype, (256, 384), *stored), expected) and expected.dtype == dtype
    assert all(type(tensor.data) is torch.Tensor and not tensor.requires_grad for tensor in stored)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = output_and_input_gradient(quantized, x.to(dtype), gradient.to(dtype))
    assert kept and {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in stored}
    assert sum(tensor.nbytes for tensor in kept) <= 256 * 384 * (0.57 if precision == "int4-quanto" else 1.02)
    linear.weight.data = expected
    exact = output_and_input_gradient(linear, x.to(dtype), gradient.to(dtype))
    tolerance = 0.012 if precision == "int8-matmul" else 1e-6 if dtype == torch.float32 else 0.01
    for ours, reference in zip(found, exact):
        assert (ours - reference).norm() <= tolerance * reference.norm()


def test_a_number_of_blocks_is_checkpointed_and_changes_no_bit(tiny_config):
    transformer, learned, calls = load_transformer(tiny_config(), "cpu").train(), [], []
    parameters = add_lora(transformer, tiny_config())
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, inputs: calls.append(block))
    torch.manual_seed(0)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.05)
    given = *torch.randn(2, 1, 16, 8, 8), torch.tensor([0.3]), torch.randn(1, 512, 64)
    for wanted, offload, count in ((False, False, 0), (1, False, 1), (3, False, 3), (True, False, 6), (False, True, 6)):
        checkpoint_blocks(tiny_config(gradient_checkpointing=wanted, enable_group_offload=offload), transformer)
        calls.clear()
        transformer.zero_grad()
        flow_matching_loss(transformer, *given).backward()
        assert [calls.count(block) for block in blocks] == [2] * count + [1] * (6 - count)
        learned.append([parameter.grad.clone() for parameter in parameters.values()])
        assert all(map(torch.equal, learned[-1], learned[0]))


def test_the_next_step_is_loaded_while_one_computes_and_no_more(quick_config, monkeypatch):
    loaded, load_batch, step = [threading.Event() for _ in range(4)], train_lora.load_batch, train_lora.train_step

    def computing(config, run, batches):
        assert loaded[run.step + 1].wait(20) and not loaded[run.step + 2].is_set()
        return step(config, run, batches)

    monkeypatch.setattr(train_lora, "load_batch", lambda *given: loaded[given[-1]].set() or load_batch(*given))
    monkeypatch.setattr(train_lora, "train_step", computing)
    train_lora.main(quick_config(max_train_steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", *PRECISIONS])
def test_compiled_blocks_learn_and_score_the_same(quick_config, tmp_path, precision):
    settings = dict(base_model_precision=precision, enable_group_offload=precision == "int4-quanto", max_train_steps=3)
    settings |= dict(validation_split=0.2, validation_step_interval=3)
    losses = []
    for compiled in (False, True):
        config = quick_config(**settings, torch_compile=compiled, output_dir=str(tmp_path / str(compiled)))
        train_lora.main(config)
        lines = map(json.loads, Path(config.output_dir, "metrics.jsonl").read_text().splitlines())
        losses.append([line[name] for line in lines for name in ("loss", "held_out_loss") if name in line])
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=2e-3 if precision == "int8-matmul" else 1e-4)


def readme_row(name):
    """[GiB a step, GiB a preview] in README's table of cards."""
    row = re.search(rf"^\| `{name}.json` .*\| ([\d.]+) / ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [float(figure) for figure in row.groups()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["6gb", "8gb", "12gb", "16gb", "24gb", "24gb_bf16", "48gb", "colab_t4"])
def test_a_shipped_config_fits_its_card_and_takes_what_readme_says(name):
    arithmetic, card = ("fp16", 14.75) if name == "colab_t4" else ("auto", int(name.split("gb")[0]))
    gib, _, needed = simulate_memory.simulate(load_config(ROOT / f"configs/{name}.json", mixed_precision=arithmetic))
    assert needed <= card, gib
    assert readme_row(name) == pytest.approx([gib["a step, at its peak"], gib["a preview"]], abs=0.2)


def test_one_and_two_tenths_of_the_model_tell_what_readme_says_of_the_whole(monkeypatch):
    config, found = load_config(ROOT / "configs/48gb.json", mixed_precision="bf16"), []
    config.validation_num_inference_steps = 1
    for tenths in (1, 2):
        monkeypatch.setattr(simulate_memory.bench_step, "REAL", dict(num_layers=tenths, num_single_layers=2 * tenths))
        gib, _ = simulate_memory.training(config)
        found.append(torch.tensor([gib["a step, at its peak"], gib["a preview"]]))
    whole = found[0] + 9 * (found[1] - found[0])
    assert whole.tolist() == pytest.approx(readme_row("48gb"), abs=0.2)

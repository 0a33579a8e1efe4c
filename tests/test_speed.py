"""What makes a step cheaper computes the same: 8-bit layers, fewer checkpoints, a batch ahead, compiled blocks."""

import copy
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum import quanto
from PIL import Image
from torchao.quantization import Float8WeightOnlyConfig, quantize_

import train_lora
import validate
from longcat_common import QuantizedLinear, dequantize, flow_matching_loss, load_transformer
from train_lora import add_lora, checkpoint_blocks


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- quantized layers

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
def test_quantized_weights_are_the_libraries_own_to_the_last_bit(precision, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(384, 256).to(dtype)
    expected, quantized = libraries_own_weight(linear, precision), QuantizedLinear(linear, precision)
    stored = [tensor for tensor in (quantized.weight, quantized.scale, quantized.shift) if tensor is not None]
    assert torch.equal(dequantize(dtype, (256, 384), *stored), expected) and expected.dtype == dtype
    assert all(type(tensor.data) is torch.Tensor and not tensor.requires_grad for tensor in stored)
    if precision != "int8-matmul":
        x, gradient = torch.randn(2, 64, 384).to(dtype), torch.randn(2, 64, 256).to(dtype)
        linear.weight.data = expected
        exact = output_and_input_gradient(linear, x, gradient)
        for found, reference in zip(output_and_input_gradient(quantized, x, gradient), exact):
            assert distance(found, reference) < (1e-6 if dtype == torch.float32 else 0.01)


def test_products_in_8_bits_are_close():
    torch.manual_seed(0)
    linear, x, gradient = torch.nn.Linear(256, 384), torch.randn(2, 64, 256), torch.randn(2, 64, 384)
    quantized, exact = QuantizedLinear(linear, "int8-matmul"), output_and_input_gradient(linear, x, gradient)
    for found, reference in zip(output_and_input_gradient(quantized, x, gradient), exact):
        assert 1e-4 < distance(found, reference) < 0.012
    few = torch.randn(3, 256)  # such as a modulation's: computed with the weights alone in 8 bits
    assert distance(quantized(few), linear(few)) < 0.006
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(x).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_the_quantized_weight_is_kept_for_the_backward_pass(precision):
    kept, linear = [], QuantizedLinear(torch.nn.Linear(256, 384), precision)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(torch.randn(64, 256, requires_grad=True))
    own = {tensor.data_ptr() for tensor in linear.parameters()}
    assert kept and all(tensor.data_ptr() in own for tensor in kept)
    assert sum(tensor.nbytes for tensor in kept) <= 256 * 384 * (0.57 if precision == "int4-quanto" else 1.02)


# ---------------------------------------------------------------- checkpointed blocks, the next batch, compiled blocks


def test_a_number_of_blocks_is_checkpointed_and_changes_no_bit(tiny_config):
    transformer = load_transformer(tiny_config(), "cpu")
    parameters = add_lora(transformer.train(), tiny_config())
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    torch.manual_seed(0)
    for name, parameter in parameters.items():
        torch.nn.init.normal_(parameter, std=0.05)
    latents, noise, prompt_embeds = torch.randn(2, 1, 16, 8, 8), torch.randn(1, 16, 8, 8), torch.randn(1, 512, 64)
    learned, calls = [], []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, inputs: calls.append(block))
    settings = [
        (dict(gradient_checkpointing=wanted), count) for wanted, count in ((False, 0), (1, 1), (3, 3), (True, 6))
    ]
    for overrides, count in [*settings, (dict(gradient_checkpointing=False, enable_group_offload=True), 6)]:
        checkpoint_blocks(tiny_config(**overrides), transformer)
        calls.clear(), transformer.zero_grad()
        loss = flow_matching_loss(transformer, latents[0], noise, torch.tensor([0.3]), prompt_embeds)
        loss.backward()
        assert [calls.count(block) for block in blocks] == [2] * count + [1] * (6 - count)
        learned.append([loss.detach(), *(parameter.grad.clone() for parameter in parameters.values())])
    assert all(all(map(torch.equal, found, learned[0])) for found in learned[1:])


def test_the_next_step_is_loaded_while_one_computes_and_no_more(quick_config, monkeypatch):
    loaded, load_batch, step = [threading.Event() for _ in range(4)], train_lora.load_batch, train_lora.train_step

    def loading(*arguments):
        loaded[arguments[-1]].set()
        return load_batch(*arguments)

    def computing(config, run, batches):
        assert loaded[run.step + 1].wait(20) and not loaded[run.step + 2].is_set()
        return step(config, run, batches)

    monkeypatch.setattr(train_lora, "load_batch", loading)
    monkeypatch.setattr(train_lora, "train_step", computing)
    train_lora.main(quick_config(max_train_steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", *PRECISIONS])
def test_compiled_blocks_learn_and_draw_the_same(quick_config, tmp_path, precision):
    settings = dict(base_model_precision=precision, enable_group_offload=precision == "int4-quanto", max_train_steps=3)
    settings |= dict(gradient_checkpointing=True, validation_split=0.2, validation_step_interval=3)
    rough, losses, drawn = precision == "int8-matmul", [], []
    for compiled in (False, True):
        config = quick_config(**settings, torch_compile=compiled, output_dir=str(tmp_path / str(compiled)))
        train_lora.main(config)
        lines = map(json.loads, Path(config.output_dir, "metrics.jsonl").read_text().splitlines())
        losses.append([line[name] for line in lines for name in ("loss", "held_out_loss") if name in line])
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=2e-3 if rough else 1e-4)
    for config.torch_compile in (False, True):
        picture = validate.main(config).parent / "00-128x128-seed42-lora.png"
        drawn.append(np.asarray(Image.open(picture)).astype(int))
    assert np.abs(drawn[0] - drawn[1]).mean() < (2 if rough else 0.1)

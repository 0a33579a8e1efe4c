"""What makes a step cheaper computes the same: 8-bit layers, fewer checkpoints, modulations ahead, compiled blocks."""

import copy

import numpy as np
import pytest
import torch
from optimum import quanto
from PIL import Image
from test_devices import draws
from test_survival import lora_bytes, metrics
from torchao.quantization import Float8WeightOnlyConfig, quantize_

import train_lora
import validate
from longcat_common import QuantizedLinear, dequantize, flow_matching_loss, load_transformer
from train_lora import add_lora


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- quantized layers

PRECISIONS = ("int8-quanto", "int4-quanto", "fp8-torchao", "int8-matmul")


def forward_and_input_gradient(linear, x, gradient):
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(gradient)
    return y.detach(), x.grad


def libraries_own_weight(linear, precision):
    """The weight as optimum-quanto or torchao quantize it and give it back."""
    model = torch.nn.Sequential(copy.deepcopy(linear))
    if precision == "fp8-torchao":
        quantize_(model, Float8WeightOnlyConfig())
    elif precision != "int4-quanto":
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    else:  # its own way back compiles an extension: the same in Python, as in its library/unpack.py and tensor/qbits.py
        scale, shift = quanto.MaxOptimizer()(linear.weight.detach(), quanto.qint4, axis=0, group_size=128)
        made = quanto.quantize_weight(
            linear.weight.detach(), quanto.qint4, 0, scale, shift, group_size=128, optimized=False
        )
        values = torch.cat([made._data._data & 15, made._data._data >> 4])
        return (made._scale * values - made._shift).reshape(linear.weight.shape)
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
        exact = forward_and_input_gradient(linear, x, gradient)
        for found, reference in zip(forward_and_input_gradient(quantized, x, gradient), exact):
            assert distance(found, reference) < (1e-6 if dtype == torch.float32 else 0.01)


def test_products_in_8_bits_are_close():
    torch.manual_seed(0)
    linear, x, gradient = torch.nn.Linear(256, 384), torch.randn(2, 64, 256), torch.randn(2, 64, 384)
    quantized, exact = QuantizedLinear(linear, "int8-matmul"), forward_and_input_gradient(linear, x, gradient)
    for found, reference in zip(forward_and_input_gradient(quantized, x, gradient), exact):
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
    places = {tensor.data_ptr() for tensor in linear.parameters()}
    assert kept and all(tensor.data_ptr() in places for tensor in kept)
    assert sum(tensor.nbytes for tensor in kept) <= 256 * 384 * (0.57 if precision == "int4-quanto" else 1.02)


# ---------------------------------------------------------------- a number of checkpointed blocks


def test_a_number_of_blocks_is_checkpointed_and_changes_no_byte(quick_config, tmp_path):
    expected = None
    for wanted, again in (
        (True, [True] * 6),
        (3, [True] * 3 + [False] * 3),
        (1, [True] + [False] * 5),
        (False, [False] * 6),
    ):
        config = quick_config(max_train_steps=2, gradient_checkpointing=wanted, output_dir=str(tmp_path / str(wanted)))
        transformer = load_transformer(config, "cpu")
        add_lora(transformer, config)
        train_lora.checkpoint_blocks(config, transformer)
        computed = []
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            block.register_forward_pre_hook(lambda block, inputs: computed.append(block))
        flow_matching_loss(transformer.train(), **draws()).backward()
        blocks = list(dict.fromkeys(computed))
        assert [computed.count(block) == 2 for block in blocks] == again
        train_lora.main(config)
        expected = expected or lora_bytes(config)
        assert lora_bytes(config) == expected
    offloaded = quick_config(gradient_checkpointing=False, enable_group_offload=True)
    train_lora.checkpoint_blocks(offloaded, transformer)
    assert transformer.use_checkpoint + transformer.use_single_checkpoint == [True] * 6


# ---------------------------------------------------------------- the next batch, compiled blocks


def test_the_next_step_is_loaded_while_one_computes(quick_config, monkeypatch):
    events, load_batch, step = [], train_lora.load_batch, train_lora.train_step
    note = lambda what, number: events.append((what, number))
    loading = lambda *arguments: note("load", arguments[-1]) or load_batch(*arguments)
    computing = lambda config, run, batches: note("step", run.step + 1) or step(config, run, batches)
    monkeypatch.setattr(train_lora, "load_batch", loading)
    monkeypatch.setattr(train_lora, "train_step", computing)
    train_lora.main(quick_config(max_train_steps=4))
    for n in (1, 2, 3):
        assert events.index(("load", n - 1)) < events.index(("step", n))
        assert ("load", n) in events[: events.index(("step", n + 1))]
    assert ("load", 5) not in events, "one step ahead"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", *PRECISIONS])
def test_compiled_blocks_learn_the_same(quick_config, tmp_path, precision):
    settings = dict(
        enable_group_offload=precision == "int4-quanto",
        base_model_precision=precision,
        max_train_steps=3,
        gradient_checkpointing=True,
        validation_split=0.2,
        validation_step_interval=3,
    )
    losses = []
    for compiled in (False, True):
        config = quick_config(**settings, torch_compile=compiled, output_dir=str(tmp_path / str(compiled)))
        train_lora.main(config)
        losses.append([line[name] for line in metrics(config) for name in ("loss", "held_out_loss") if name in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3 if precision == "int8-matmul" else 1e-4)
    drawn = []
    for config.torch_compile in (False, True):
        picture = validate.main(config).parent / "00-128x128-seed42-lora.png"
        drawn.append(np.asarray(Image.open(picture)).astype(int))
    assert np.abs(drawn[0] - drawn[1]).mean() < (2 if precision == "int8-matmul" else 0.1)

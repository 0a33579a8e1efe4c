"""Training computes what the model authors' code computes, however cheap it is made; drawing, what diffusers does."""

import copy
import json
import re

import numpy as np
import pytest
import simulate_memory
import torch
from conftest import MODEL, QUANTIZED, ROOT, metrics
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from optimum import quanto
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torchao.quantization import Float8WeightOnlyConfig, quantize_
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import train_lora
from longcat_common import (
    QuantizedLinear, dequantize, flow_matching_loss, load_config, load_scheduler, load_transformer, load_vae,
    pack_latents, position_ids, sample_sigmas,
)  # fmt: skip
from validate import generate, load_pipeline

PROMPT = "a star on a blue background"


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture(scope="module")
def golden():
    path = ROOT / "tests/golden/train_step.safetensors"
    with safe_open(path, "pt") as file:
        settings = {name: json.loads(value) for name, value in file.metadata().items()}
    tensors = load_file(path)
    part = lambda prefix: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    transformer = LongCatImageTransformer2DModel(**settings["transformer_config"])
    transformer.load_state_dict(part("transformer."))
    transformer.requires_grad_(False).add_adapter(LoraConfig(**settings["lora"]))
    assert {n for n, p in transformer.named_parameters() if p.requires_grad} == part("lora.").keys()
    transformer.load_state_dict(part("lora."), strict=False)
    return tensors, settings, transformer


def test_sigmas_packing_and_position_ids_are_the_authors(golden):
    tensors, settings, _ = golden
    latents, s = tensors["latents"], tensors["expected.sigmas"][:, None, None, None]
    height, width = latents.shape[2:]
    scheduler = FlowMatchEulerDiscreteScheduler(**settings["scheduler_config"])
    assert_close(sample_sigmas(tensors["normal"], height * width // 4, scheduler), tensors["expected.sigmas"])
    assert_close(pack_latents((1 - s) * latents + s * tensors["noise"]), tensors["expected.packed"])
    for ids, kind in zip(position_ids(height, width), ("txt", "img")):
        assert ids.dtype == torch.float32
        assert_close(ids, tensors[f"expected.{kind}_ids"])


@pytest.mark.parametrize("wanted, offload, again", [(0, False, 0), (1, False, 1), (True, False, 3), (False, True, 3)])
def test_prediction_loss_and_every_gradient_are_the_authors_whatever_is_checkpointed(golden, wanted, offload, again):
    tensors, _, transformer = golden
    train_lora.checkpoint_blocks(load_config(gradient_checkpointing=wanted, enable_group_offload=offload), transformer)
    transformer.zero_grad()
    inputs, seen, calls = [tensors[n] for n in ("latents", "noise", "expected.sigmas", "prompt_embeds")], [], []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hooks = [block.register_forward_pre_hook(lambda block, args: calls.append(block)) for block in blocks]
    hooks += [transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))]
    loss = flow_matching_loss(transformer, *inputs)
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert [calls.count(block) for block in blocks] == [2] * again + [1] * (3 - again)
    assert loss.dtype == torch.float32
    assert_close(seen[0], pack_latents(tensors["expected.model_pred"]))
    assert_close(loss.detach(), tensors["expected.loss"])
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, tensors[f"grad.{name}"])
    with torch.no_grad():
        alone = [flow_matching_loss(transformer, *(t[i : i + 1] for t in inputs)) for i in range(2)]
        weighted = flow_matching_loss(transformer, *inputs, weights=torch.tensor([0.5, 2.0]))
    assert_close(weighted, (0.5 * alone[0] + 2.0 * alone[1]) / 2)


def test_our_pipeline_draws_what_the_unmodified_one_draws_with_any_negative_prompt(tiny_config):
    config, drawn = tiny_config(), []
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(f"{MODEL}/text_encoder", dtype=torch.float32)
    models = dict(transformer=load_transformer(config, "cpu"), vae=load_vae(config, "cpu"), text_encoder=text_encoder)
    models |= dict(tokenizer=Qwen2Tokenizer.from_pretrained(f"{MODEL}/tokenizer"), text_processor=None)
    unmodified = LongCatImagePipeline(**models, scheduler=load_scheduler(config))
    options = dict(num_inference_steps=2, guidance_scale=3.0, height=64, width=96, enable_prompt_rewrite=False)
    for negative in ("", "a cat"):
        settings = dict(validation_num_inference_steps=2, validation_resolution="96x64")
        config = tiny_config(**settings, validation_negative_prompt=negative)
        drawn += generate(load_pipeline(config, "cpu"), config, [PROMPT])
        noise = torch.Generator().manual_seed(42)
        expected = unmodified(PROMPT, negative_prompt=negative, generator=noise, **options).images[0]
        assert drawn[-1].size == (96, 64) and np.abs(np.subtract(drawn[-1], expected, dtype=int)).max() <= 1
    assert np.abs(np.subtract(*drawn, dtype=int)).mean() > 1


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
@pytest.mark.parametrize("precision", QUANTIZED)
def test_quantized_weights_are_the_libraries_own_to_the_last_bit_and_alone_are_kept(precision, dtype):
    torch.manual_seed(0)
    linear, x, gradient = torch.nn.Linear(384, 256).to(dtype), torch.randn(64, 384), torch.randn(64, 256)
    expected, quantized = libraries_own_weight(linear, precision), QuantizedLinear(linear, precision)
    stored = [tensor for tensor in (quantized.weight, quantized.scale, quantized.shift) if tensor is not None]
    assert torch.equal(dequantize(dtype, (256, 384), *stored), expected) and expected.dtype == dtype
    assert all(type(tensor.data) is torch.Tensor and not tensor.requires_grad for tensor in stored)
    linear.weight = torch.nn.Parameter(expected, requires_grad=False)
    kept, results = [], []
    keep = lambda tensor: kept.append(tensor) or tensor
    for layer in (linear, quantized):
        kept.clear()
        given = x.to(dtype, copy=True).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(given)
        y.backward(gradient.to(dtype))
        results.append((y.detach(), given.grad))
    tolerance = 0.012 if precision == "int8-matmul" else 1e-6 if dtype == torch.float32 else 0.01
    for exact, found in zip(*results):
        assert (found - exact).norm() <= tolerance * exact.norm()
    assert kept and {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in stored}
    assert sum(tensor.nbytes for tensor in kept) <= 256 * 384 * (0.57 if precision == "int4-quanto" else 1.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", *QUANTIZED])
def test_compiled_blocks_learn_and_score_the_same(quick_config, tmp_path, precision):
    settings = dict(base_model_precision=precision, enable_group_offload=precision == "int4-quanto", max_train_steps=3)
    settings, losses = settings | dict(validation_split=0.2, validation_step_interval=3), []
    for compiled in (False, True):
        config = quick_config(**settings, torch_compile=compiled, output_dir=str(tmp_path / str(compiled)))
        train_lora.main(config)
        losses.append([line[name] for line in metrics(config) for name in ("loss", "held_out_loss") if name in line])
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=2e-3 if precision == "int8-matmul" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["6gb", "8gb", "12gb", "16gb", "24gb", "24gb_bf16", "48gb", "colab_t4"])
def test_a_shipped_config_fits_its_card_and_takes_what_readme_says(name):
    arithmetic, size = ("fp16", 15) if name == "colab_t4" else ("auto", int(name.split("gb")[0]))
    gib, _, needed = simulate_memory.simulate(load_config(ROOT / f"configs/{name}.json", mixed_precision=arithmetic))
    assert needed <= simulate_memory.CARDS[size], gib
    row = re.search(rf"\n\| `{name}.json` .*\| ([\d.]+) / ([\d.]+) \|\n", (ROOT / "README.md").read_text())
    assert [*map(float, row.groups())] == pytest.approx([gib["a step, at its peak"], gib["a preview"]], abs=0.2)


def test_norms_run_outside_of_autocast(monkeypatch):
    layer_norm, autocast = torch.nn.functional.layer_norm, []
    note = lambda *given, **options: autocast.append(torch.is_autocast_enabled("cpu")) or layer_norm(*given, **options)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", note)
    monkeypatch.setattr(simulate_memory.bench_step, "REAL", dict(num_layers=1, num_single_layers=1))
    simulate_memory.training(load_config(ROOT / "configs/48gb.json", mixed_precision="bf16"))
    assert autocast and not any(autocast), "CUDA's would keep a float32 copy of each norm's input"

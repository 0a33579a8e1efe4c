"""Training computes what the model authors' code computes, drawing what diffusers' unmodified pipeline draws."""

import json

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from longcat_common import flow_matching_loss, load_scheduler, load_transformer, load_vae
from longcat_common import pack_latents, position_ids, sample_sigmas
from validate import generate, load_pipeline

FILE = ROOT / "tests/golden/train_step.safetensors"
PROMPT = "a star on a blue background"


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture(scope="module")
def golden():
    """The tensors of one training step as the authors' code computes it, and the settings and transformer of it."""
    with safe_open(FILE, "pt") as file:
        settings = {name: json.loads(value) for name, value in file.metadata().items()}
    tensors = load_file(FILE)
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


def test_prediction_loss_and_every_gradient_are_the_authors(golden):
    tensors, _, transformer = golden
    inputs, seen = [tensors[n] for n in ("latents", "noise", "expected.sigmas", "prompt_embeds")], []
    with transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].detach())):
        loss = flow_matching_loss(transformer, *inputs)
    loss.backward()
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


def unmodified_pipeline(config):
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(f"{MODEL}/text_encoder", dtype=torch.float32)
    models = dict(transformer=load_transformer(config, "cpu"), vae=load_vae(config, "cpu"), text_encoder=text_encoder)
    tokenizer = Qwen2Tokenizer.from_pretrained(f"{MODEL}/tokenizer")
    return LongCatImagePipeline(**models, scheduler=load_scheduler(config), tokenizer=tokenizer, text_processor=None)


def test_our_pipeline_draws_what_the_unmodified_one_draws_with_any_negative_prompt(tiny_config):
    unmodified, drawn = unmodified_pipeline(tiny_config()), []
    options = dict(num_inference_steps=2, guidance_scale=3.0, height=64, width=96, enable_prompt_rewrite=False)
    for negative in ("", "a cat"):
        settings = dict(validation_num_inference_steps=2, validation_resolution="96x64")
        config = tiny_config(**settings, validation_negative_prompt=negative)
        drawn += generate(load_pipeline(config, "cpu"), config, [PROMPT])
        noise = torch.Generator().manual_seed(42)
        expected = unmodified(PROMPT, negative_prompt=negative, generator=noise, **options).images[0]
        assert drawn[-1].size == (96, 64)
        assert np.abs(np.subtract(drawn[-1], expected, dtype=int)).max() <= 1
    assert np.abs(np.subtract(*drawn, dtype=int)).mean() > 1
    in_a_notebook = load_pipeline(config, "cpu")(
        "new", num_images_per_prompt=2, height=64, width=64, num_inference_steps=1
    )
    assert len(in_a_notebook.images) == 2

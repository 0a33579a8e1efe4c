"""One training step as the model authors' own code computes it, tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImageTransformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from longcat_common import flow_matching_loss, pack_latents, position_ids, sample_sigmas

FILE = Path(__file__).parent / "golden" / "train_step.safetensors"


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture(scope="module")
def golden():
    with safe_open(FILE, "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
    tensors = load_file(FILE)
    transformer = LongCatImageTransformer2DModel(**metadata["transformer_config"])
    transformer.load_state_dict(
        {n.removeprefix("transformer."): t for n, t in tensors.items() if n.startswith("transformer.")}
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(**metadata["lora"]))
    lora = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
    assert lora.keys() == {n.removeprefix("lora.") for n in tensors if n.startswith("lora.")}
    for name, parameter in lora.items():
        parameter.data.copy_(tensors[f"lora.{name}"])
    return tensors, metadata, transformer, lora


def test_sigmas_packing_and_position_ids(golden):
    tensors, metadata, _, _ = golden
    latents = tensors["latents"]
    height, width = latents.shape[2:]
    scheduler = FlowMatchEulerDiscreteScheduler(**metadata["scheduler_config"])
    assert_close(sample_sigmas(tensors["normal"], height * width // 4, scheduler), tensors["expected.sigmas"])
    s = tensors["expected.sigmas"][:, None, None, None]
    assert_close(pack_latents((1 - s) * latents + s * tensors["noise"]), tensors["expected.packed"])
    text_ids, image_ids = position_ids(height, width)
    assert text_ids.dtype == image_ids.dtype == torch.float32
    assert_close(text_ids, tensors["expected.txt_ids"])
    assert_close(image_ids, tensors["expected.img_ids"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prediction_loss_and_every_gradient(golden, checkpointing):
    tensors, _, transformer, lora = golden
    seen = []
    hook = transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))
    (transformer.enable_gradient_checkpointing if checkpointing else transformer.disable_gradient_checkpointing)()
    transformer.zero_grad()
    loss = flow_matching_loss(
        transformer, tensors["latents"], tensors["noise"], tensors["expected.sigmas"], tensors["prompt_embeds"]
    )
    loss.backward()
    hook.remove()
    assert_close(seen[0], pack_latents(tensors["expected.model_pred"]))
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), tensors["expected.loss"])
    for name, parameter in lora.items():
        assert_close(parameter.grad, tensors[f"grad.{name}"])


def test_sample_weights_scale_each_sample(golden):
    tensors, _, transformer, _ = golden
    inputs = [tensors[n] for n in ("latents", "noise", "expected.sigmas", "prompt_embeds")]
    with torch.no_grad():
        alone = [flow_matching_loss(transformer, *(t[i : i + 1] for t in inputs)) for i in range(2)]
        weighted = flow_matching_loss(transformer, *inputs, weights=torch.tensor([0.5, 2.0]))
    assert_close(weighted, (0.5 * alone[0] + 2.0 * alone[1]) / 2)

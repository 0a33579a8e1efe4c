"""Training and inference agree: our functions sample what diffusers' unmodified pipeline samples."""

import numpy as np
import torch
from conftest import MODEL
from diffusers import LongCatImagePipeline
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from cache_latents import cache_prompts
from longcat_common import (
    load_scheduler, load_transformer, load_vae, pack_latents, position_ids, read_tensors, sample_sigmas,
)  # fmt: skip
from validate import generate, load_pipeline, picture_grid

PROMPT = "a star on a blue background"


def unmodified_pipeline(config):
    return LongCatImagePipeline(
        transformer=load_transformer(config, "cpu"),
        vae=load_vae(config, "cpu"),
        scheduler=load_scheduler(config),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(f"{MODEL}/text_encoder", dtype=torch.float32),
        tokenizer=Qwen2Tokenizer.from_pretrained(f"{MODEL}/tokenizer"),
        text_processor=None,
    )


def test_an_euler_loop_of_our_functions_equals_the_pipeline(tiny_config):
    config = tiny_config()
    pipe, steps, guidance = unmodified_pipeline(config), 6, 3.0
    noise = torch.randn(1, 16, 16, 24, generator=torch.Generator().manual_seed(1))
    expected = pipe(
        PROMPT, height=128, width=192, num_inference_steps=steps, guidance_scale=guidance, enable_cfg_renorm=False,
        latents=pack_latents(noise), output_type="latent", enable_prompt_rewrite=False,
    ).images  # fmt: skip

    transformer, scheduler = load_transformer(config, "cpu"), load_scheduler(config)
    files = cache_prompts(config, [PROMPT, ""], "cpu")
    prompt, empty = (read_tensors(files[p])["prompt_embeds"][None] for p in (PROMPT, ""))
    text_ids, image_ids = position_ids(16, 24)
    x = pack_latents(noise)
    # The pipeline's levels are 1, 1 - 1/n, ... 1/n before the shift; ours take the normal draw that sigmoid maps to
    # them.
    levels = torch.linspace(1, 1 / steps, steps)
    sigmas = torch.cat([torch.ones(1), sample_sigmas(torch.logit(levels[1:]), x.shape[1], scheduler), torch.zeros(1)])
    with torch.no_grad():
        for sigma, following in zip(sigmas[:-1], sigmas[1:]):
            velocity = lambda embeds: transformer(x, embeds, sigma[None], image_ids, text_ids, return_dict=False)[0]
            base = velocity(empty)
            x = x + (following - sigma) * (base + guidance * (velocity(prompt) - base))
    assert (x - expected).norm() <= 1e-4 * expected.norm()


def test_our_pipeline_draws_what_the_unmodified_one_draws(tiny_config):
    config = tiny_config(validation_num_inference_steps=4, validation_resolution="192x128")
    image = generate(load_pipeline(config, "cpu"), config, [PROMPT])[0]
    expected = unmodified_pipeline(config)(
        PROMPT, height=128, width=192, num_inference_steps=4, guidance_scale=3.0, enable_prompt_rewrite=False,
        generator=torch.Generator().manual_seed(42),
    ).images[0]  # fmt: skip
    assert image.size == (192, 128)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
    # A notebook's call, with a prompt that nothing has cached yet, several pictures of it, no word on rewriting.
    pictures = load_pipeline(config, "cpu")(
        "something new", num_images_per_prompt=2, height=128, width=128, num_inference_steps=1
    ).images
    assert len(pictures) == 2


def test_the_negative_prompt_is_the_pipelines_own(tiny_config):
    drawn = []
    for negative in ("", "a cat"):
        config = tiny_config(validation_num_inference_steps=3, validation_negative_prompt=negative)
        pipe = load_pipeline(config, "cpu")
        drawn.append(np.asarray(generate(pipe, config, [PROMPT])[0]).astype(int))
        expected = pipe(
            PROMPT, negative_prompt=negative, height=128, width=128, num_inference_steps=3, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(42),
        ).images[0]  # fmt: skip
        assert np.abs(drawn[-1] - np.asarray(expected)).max() == 0
    assert np.abs(drawn[0] - drawn[1]).mean() > 1


def test_a_grid_with_any_labels():
    rows = [[Image.new("RGB", (64, 32), "red")] * 2] * 2
    grid = picture_grid(rows, ["a very long label " * 20, "中文的提示词"], ["base", "with LoRA"])
    assert grid.width > 256 and grid.getpixel((40, grid.height - 40)) == (255, 0, 0)

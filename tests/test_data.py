"""Stage 2: pictures and prompts to the cache, on real file formats, checked against diffusers' own code."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, made_up
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import cache_latents
import prepare_data
from cache_latents import encode_prompts, prompt_file
from longcat_common import load_text_encoder, load_tokenizer, load_transformer

PROMPTS = ["a cat on a white background", "一只猫，白色背景"]


def test_camera_pictures(tmp_path, tiny_config):
    (tmp_path / "photos").mkdir()
    exif, noise = Image.Exif(), np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif[0x0112] = 6
    camera = Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)
    pictures = {
        "landscape.jpg": (camera, (192, 128)),
        "portrait.jpg": (camera.transpose(Image.Transpose.ROTATE_270), (128, 192)),
        "turned.jpg": (camera, (128, 192)),
        "clear.png": (Image.new("RGBA", (300, 200), (255, 0, 0, 0)), (192, 128)),
        "grey.webp": (Image.new("L", (200, 300), 128), (128, 192)),
    }
    for name, (image, _) in pictures.items():
        image.save(tmp_path / "photos" / name, **({"exif": exif} if name == "turned.jpg" else {}))
    (tmp_path / "photos" / "landscape.txt").write_text("\ufeffa landscape\n", encoding="utf-8")
    config = tiny_config(data_dir=str(tmp_path / "photos"), instance_prompt="一张照片", validation_prompts=[])
    entries, prompts = cache_latents.main(config)
    assert {Path(e.path).name: e.bucket for e in entries} == {name: bucket for name, (_, bucket) in pictures.items()}
    assert {*prompts} == {"", "一张照片", "a landscape"}
    sizes = {Path(e.path).name: e.size for e in entries}
    assert sizes["turned.jpg"] == sizes["portrait.jpg"] == (3000, 4000)
    seen = {n: np.array(prepare_data.load_picture(tmp_path / "photos" / n, b)) for n, (_, b) in pictures.items()}
    assert seen["clear.png"].min() == 255
    assert np.abs(np.subtract(seen["turned.jpg"], seen["portrait.jpg"], dtype=int)).max() < 16

    # What the model sees is close to the whole picture resized, and its latents are the VAE's own.
    whole = camera.resize((192, 144), Image.Resampling.BICUBIC).crop((0, 8, 192, 136))
    assert 10 * np.log10(255**2 / np.square(np.subtract(seen["landscape.jpg"], whole, dtype=float)).mean()) > 32
    vae = AutoencoderKL.from_pretrained(f"{MODEL}/vae")
    with torch.no_grad():
        pixels = torch.from_numpy(seen["landscape.jpg"]).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
    (entry,) = [e for e in entries if e.path.endswith("landscape.jpg")]
    cached = load_file(cache_latents.latents_file(config, entry))
    assert cached["mean"].dtype == cached["std"].dtype == torch.float32
    restored = cached["mean"] / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(restored, posterior.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached["std"] / vae.config.scaling_factor, posterior.std[0], rtol=1e-4, atol=1e-5)


def test_both_key_layouts_load_and_a_missing_key_is_an_error(tmp_path, tiny_config):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = tiny_config(pretrained_model_name_or_path=str(model))
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    assert "model.layers.1.mlp.up_proj.weight" in weights and "lm_head.weight" in weights
    newer = {
        f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model."): t
        for n, t in weights.items()
    }
    embeds = encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), PROMPTS)
    save_file(newer, file, {"format": "pt"})
    assert torch.equal(encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), PROMPTS), embeds)
    del newer["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(newer, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing.*layers.1.mlp.up_proj.weight"):
        encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), PROMPTS[1:3])
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["single_transformer_blocks.1.proj_out.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing.*single_transformer_blocks.1.proj_out.bias"):
        load_transformer(config, "cpu")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is missing or damaged; make or download it again"):
        load_transformer(config, "cpu")


def test_an_interrupted_cache_ends_with_the_same_bytes(tmp_path, tiny_config):
    first, second = tiny_config(), tiny_config(cache_dir=str(tmp_path / "other"))
    cache_latents.main(first)
    cache_latents.main(second)
    written = sorted(p.relative_to(first.cache_dir) for p in Path(first.cache_dir).rglob("*.safetensors"))
    assert len(written) > 40
    for i, path in enumerate(written):
        if i % 3:
            (Path(second.cache_dir) / path).unlink()
    kept = {p: p.stat().st_mtime_ns for p in Path(second.cache_dir).rglob("*.safetensors")}
    cut = Path(second.cache_dir) / written[0]
    cut.write_bytes(cut.read_bytes()[:-100])  # as a full disk or a bad copy leaves it
    del kept[cut]
    cache_latents.main(second)
    for path in written:
        assert (Path(first.cache_dir) / path).read_bytes() == (Path(second.cache_dir) / path).read_bytes()
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())  # nothing is computed twice


def test_another_model_or_bucket_gets_another_name(tmp_path, tiny_config):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    entry = made_up(0, bucket=(128, 128))
    same, other = tiny_config(), tiny_config(pretrained_model_name_or_path=str(model))
    assert prompt_file(same, "a", "cpu") == prompt_file(other, "a", "cpu")
    assert cache_latents.latents_file(same, entry) != cache_latents.latents_file(same, made_up(0, bucket=(192, 128)))
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "extra": torch.zeros(1)}, file)
    cache_latents.folder_identity.cache_clear()
    assert cache_latents.latents_file(same, entry) != cache_latents.latents_file(other, entry)
    assert prompt_file(same, "a", "cpu") == prompt_file(other, "a", "cpu")
    assert prompt_file(same, "a", "cpu") != prompt_file(tiny_config(mixed_precision="bf16"), "a", "cpu")
    file = model / "text_encoder" / "model.safetensors"
    save_file({**load_file(file), "extra": torch.zeros(1)}, file)
    cache_latents.folder_identity.cache_clear()
    assert prompt_file(same, "a", "cpu") != prompt_file(other, "a", "cpu")

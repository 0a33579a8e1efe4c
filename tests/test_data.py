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
from cache_latents import encode_prompts, latents_file, prompt_file
from longcat_common import load_text_encoder, load_tokenizer, load_transformer
from prepare_data import load_picture


def test_camera_pictures(tmp_path, tiny_config):
    """What the model sees is close to the whole picture resized, and its latents are the VAE's own."""
    exif, noise = Image.Exif(), np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif[0x0112] = 6
    camera = Image.fromarray(noise).resize((2000, 1500), Image.Resampling.BICUBIC)
    for name, options in (("landscape.jpg", {}), ("turned.jpg", {"exif": exif})):
        (tmp_path / "photos").mkdir(exist_ok=True)
        camera.save(tmp_path / "photos" / name, **options)
    (tmp_path / "photos" / "landscape.txt").write_text("\ufeffa landscape\n", encoding="utf-8")
    config = tiny_config(data_dir=str(tmp_path / "photos"), instance_prompt="一张照片", validation_prompts=[])
    (entry, turned), prompts = cache_latents.main(config)
    assert (entry.bucket, turned.bucket, turned.size) == ((192, 128), (128, 192), (1500, 2000))
    assert {*prompts} == {"", "一张照片", "a landscape"}
    seen = np.array(load_picture(entry.path, entry.bucket))
    upright = load_picture(turned.path, turned.bucket).transpose(Image.Transpose.ROTATE_90)
    assert np.abs(np.subtract(seen, upright, dtype=int)).max() < 16
    whole = camera.resize((192, 144), Image.Resampling.BICUBIC).crop((0, 8, 192, 136))
    assert 10 * np.log10(255**2 / np.square(np.subtract(seen, whole, dtype=float)).mean()) > 32
    vae = AutoencoderKL.from_pretrained(f"{MODEL}/vae")
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(seen).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    cached = load_file(latents_file(config, entry))
    assert cached["mean"].dtype == cached["std"].dtype == torch.float32
    restored = cached["mean"] / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(restored, posterior.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached["std"] / vae.config.scaling_factor, posterior.std[0], rtol=1e-4, atol=1e-5)


def test_both_key_layouts_load_and_a_missing_key_is_an_error(tmp_path, tiny_config):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = tiny_config(pretrained_model_name_or_path=str(model))
    encode = lambda: encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), ["a cat", "一只猫"])
    newer = lambda name: f"model.{name}" if "visual." in name else name.replace("model.", "model.language_model.")
    embeds, file = encode(), model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    assert "model.layers.1.mlp.up_proj.weight" in weights and "lm_head.weight" in weights
    weights = {newer(name): tensor for name, tensor in weights.items()}
    save_file(weights, file, {"format": "pt"})
    assert torch.equal(encode(), embeds)
    del weights["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing.*layers.1.mlp.up_proj.weight"):
        encode()
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["single_transformer_blocks.1.proj_out.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing.*single_transformer_blocks.1.proj_out.bias"):
        load_transformer(config, "cpu")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is missing or damaged; make or download it again"):
        load_transformer(config, "cpu")


def test_an_interrupted_cache_ends_with_the_same_bytes(tmp_path, few_pictures, tiny_config):
    config = tiny_config(data_dir=str(few_pictures), validation_prompts=[])
    cache_latents.main(config)
    whole = {path: path.read_bytes() for path in sorted(Path(config.cache_dir).rglob("*.safetensors"))}
    assert len(whole) == 7 + 7
    for path in list(whole)[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in whole if path.exists()}
    cut, _ = kept.popitem()
    cut.write_bytes(whole[cut][:-100])  # as a full disk or a bad copy leaves it
    cache_latents.main(config)
    assert all(path.read_bytes() == content for path, content in whole.items())
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "nothing is computed twice"


def test_another_model_or_bucket_gets_another_name(tmp_path, tiny_config):
    model = shutil.copytree(MODEL, tmp_path / "model")
    entry, same, other = made_up(0), tiny_config(), tiny_config(pretrained_model_name_or_path=str(model))
    names = lambda config: (latents_file(config, entry), prompt_file(config, "a", "cpu"))
    assert names(same) == names(other)
    assert latents_file(same, entry) != latents_file(same, made_up(0, bucket=(192, 128)))
    assert prompt_file(same, "a", "cpu") != prompt_file(tiny_config(mixed_precision="bf16"), "a", "cpu")
    for number, file in enumerate(("vae/diffusion_pytorch_model", "text_encoder/model")):
        file = model / f"{file}.safetensors"
        save_file({**load_file(file), "extra": torch.zeros(1)}, file)
        cache_latents.folder_identity.cache_clear()
        assert [a != b for a, b in zip(names(same), names(other))] == [True, number == 1]

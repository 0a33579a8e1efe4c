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
    """A large JPEG is decoded at reduced size, within 45 dB of the whole one; its latents are the VAE's own."""
    exif, noise = Image.Exif(), np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif[0x0112], camera = 6, Image.fromarray(noise).resize((2001, 1501), Image.Resampling.BICUBIC)
    (tmp_path / "photos").mkdir()
    camera.save(tmp_path / "photos" / "landscape.jpg")
    camera.save(tmp_path / "photos" / "turned.jpg", exif=exif)
    config = tiny_config(data_dir=str(tmp_path / "photos"), instance_prompt="a photo", validation_prompts=[])
    (entry, turned), _ = cache_latents.main(config)
    assert (entry.bucket, turned.bucket, turned.size) == ((192, 128), (128, 192), (1501, 2001))
    seen = np.array(load_picture(entry.path, entry.bucket))
    assert np.array_equal(load_picture(turned.path, turned.bucket).transpose(Image.Transpose.ROTATE_90), seen)
    with Image.open(entry.path) as image:
        image.convert("RGB").save(tmp_path / "whole.bmp")
    error = np.square(np.subtract(seen, load_picture(tmp_path / "whole.bmp", entry.bucket), dtype=float)).mean()
    assert 45 < 10 * np.log10(255**2 / error) < 99
    vae = AutoencoderKL.from_pretrained(f"{MODEL}/vae")
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(seen).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    cached = load_file(latents_file(config, entry))
    restored = cached["mean"] / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(restored, posterior.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached["std"] / vae.config.scaling_factor, posterior.std[0], rtol=1e-4, atol=1e-5)


def test_both_key_layouts_load_and_a_missing_key_is_an_error(tmp_path, tiny_config):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config, file = tiny_config(pretrained_model_name_or_path=str(model)), model / "text_encoder" / "model.safetensors"
    encode = lambda: encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), ["a cat", "一只猫"])
    newer = lambda name: f"model.{name}" if "visual." in name else name.replace("model.", "model.language_model.")
    embeds, weights = encode(), {newer(name): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    assert torch.equal(encode(), embeds)
    save_file({n: t for n, t in weights.items() if "layers.1.mlp.up_proj" not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing.*layers.1.mlp.up_proj.weight"):
        encode()
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "blocks.1.proj_out.bias" not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing.*single_transformer_blocks.1.proj_out.bias"):
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

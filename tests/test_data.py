"""Stage 2: pictures and prompts to the cache, on real file formats, checked against diffusers' own code."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, made_up
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

import cache_latents
import prepare_data
from cache_latents import encode_prompts, prompt_file
from longcat_common import load_text_encoder, load_tokenizer, load_transformer

PROMPTS = [
    "",
    "a cat on a white background",
    "一只猫，白色背景",
    "a sign that says \"Grand Opening\" and 'it's open'",
    "招牌上写着“开业大吉”",
    "a very long prompt " * 400,
]


def camera_picture(path, size, orientation=None, **options):
    """A smooth, detailed picture of camera size, as JPEG with an EXIF orientation."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    image = Image.blend(image, image.filter(ImageFilter.FIND_EDGES), 0.3)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif, quality=92, **options)
    return image


def test_camera_pictures(tmp_path, tiny_config):
    folder = tmp_path / "photos"
    folder.mkdir()
    landscape = camera_picture(folder / "landscape.jpg", (4000, 3000))
    camera_picture(folder / "portrait.jpg", (3000, 4000))
    turned = camera_picture(folder / "turned.jpg", (4000, 3000), orientation=6)
    Image.new("RGBA", (300, 200), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("L", (200, 300), 128).save(folder / "grey.webp")
    (folder / "landscape.txt").write_text("\ufeffa landscape\n", encoding="utf-8")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "empty.txt").write_text("text without a picture")
    config = tiny_config(data_dir=str(folder), instance_prompt="一张照片", validation_prompts=[])

    entries, prompts = cache_latents.main(config)
    by_name = {Path(e.path).name: e for e in entries}
    assert sorted(by_name) == ["clear.png", "grey.webp", "landscape.jpg", "portrait.jpg", "turned.jpg"]
    assert list(prompts) == ["", "一张照片", "a landscape"]
    expected = {
        "landscape.jpg": (192, 128),
        "portrait.jpg": (128, 192),
        "turned.jpg": (128, 192),
        "clear.png": (192, 128),
        "grey.webp": (128, 192),
    }
    assert {name: e.bucket for name, e in by_name.items()} == expected
    assert by_name["turned.jpg"].size == (3000, 4000)

    # What the model sees: upright, covering the bucket, centre cropped, close to the full-quality path.
    for name, image in (("landscape.jpg", landscape), ("turned.jpg", turned.transpose(Image.Transpose.ROTATE_270))):
        width, height = expected[name]
        scale = max(width / image.width, height / image.height)
        size = (round(image.width * scale), round(image.height * scale))
        whole = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        seen = np.asarray(prepare_data.load_picture(folder / name, (width, height))).astype(float)
        error = np.square(seen - np.asarray(whole.crop((left, top, left + width, top + height)))).mean()
        assert 10 * np.log10(255**2 / error) > 32, name
    assert np.asarray(prepare_data.load_picture(folder / "clear.png", (192, 128))).min() == 255

    # The latents are the VAE's own.
    vae = AutoencoderKL.from_pretrained(f"{MODEL}/vae")
    pixels = (
        torch.from_numpy(np.array(prepare_data.load_picture(folder / "landscape.jpg", (192, 128)))).permute(2, 0, 1)[
            None
        ]
        / 127.5
        - 1
    )
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    cached = load_file(cache_latents.latents_file(config, by_name["landscape.jpg"]))
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
    embeds = encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), PROMPTS[1:3])
    save_file(newer, file, {"format": "pt"})
    assert torch.equal(encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), PROMPTS[1:3]), embeds)
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

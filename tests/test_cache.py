"""Stage 2 as something to trust for months: small memory, damaged files, many processes."""

import builtins
import errno
import functools
import gc
import os
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import MODEL, sha256
from PIL import Image
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import cache_latents
import prepare_data
from cache_latents import cache_prompts, encode_picture, encode_prompts
from longcat_common import UserError, load_text_encoder, load_tokenizer, load_vae, read_tensors


def cached_files(config):
    return {p.relative_to(config.cache_dir): sha256(p) for p in Path(config.cache_dir).rglob("*.safetensors")}


@pytest.fixture
def few_config(quick_config, tmp_path):
    return lambda **overrides: quick_config(**{"cache_dir": str(tmp_path / "cache"), **overrides})


def test_streamed_layers_give_the_whole_encoders_embeddings_with_two_in_memory(tiny_config, tmp_path, monkeypatch):
    shutil.copytree(MODEL, tmp_path / "model")
    sizes = AutoConfig.from_pretrained(f"{MODEL}/text_encoder")
    sizes.text_config.num_hidden_layers, sizes.text_config.layer_types = 6, ["full_attention"] * 6
    whole = Qwen2_5_VLForConditionalGeneration(sizes).eval()
    (tmp_path / "model/text_encoder/model.safetensors").unlink()
    whole.save_pretrained(tmp_path / "model/text_encoder", max_shard_size="200KB")
    config = tiny_config(pretrained_model_name_or_path=str(tmp_path / "model"), text_encoder_batch_size=2)
    encoder, alive, counts = load_text_encoder(config, "cpu"), weakref.WeakSet(), []

    def counted(part, names, read=encoder.read):
        weights = read(part, names)
        if part.startswith("layers."):
            alive.add(weights[names[0]].untyped_storage())
            counts.append(len(alive))
        return weights

    encoder.read = counted
    monkeypatch.setattr(cache_latents, "load_text_encoder", lambda *_: encoder)
    monkeypatch.setattr(cache_latents, "PROMPTS_AT_ONCE", 5)  # two batches of two, then the rest
    prompts = ["", "a cat", "一只猫", 'a sign: "open"', "a very long prompt " * 200, "a blue fish", "a star"]
    files = cache_prompts(config, prompts, "cpu")
    gc.collect()
    assert len(counts) == 2 * 6 and max(counts) == 2 and not alive
    prompts.sort(key=lambda prompt: files[prompt].name)
    for batch in (prompts[i : i + 2] for i in range(0, 7, 2)):
        found = torch.stack([read_tensors(files[prompt])["prompt_embeds"] for prompt in batch])
        assert torch.equal(found, encode_prompts(whole, load_tokenizer(config), batch)), batch


def test_a_picture_too_large_for_the_device_is_encoded_in_tiles(tiny_config):
    vae, sides, failed = load_vae(tiny_config(), "cpu"), [], []
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    pixels = torch.randint(0, 256, (3, 128, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, encode = encode_picture(vae, pixels), vae.encoder.forward

    def small_memory(x):
        sides.append(x.shape[-1])
        assert all(reference() is None for reference in failed), "what the failed attempt computed must be gone"
        if x.shape[-1] <= limit:
            return encode(x)
        activations = x.repeat(4, 1, 1, 1)
        failed.append(weakref.ref(activations))
        raise RuntimeError("MPS backend out of memory")

    vae.encoder.forward, limit = small_memory, 128
    in_tiles = encode_picture(vae, pixels)
    assert sides[0] == 192 and max(sides[1:]) == 64 and (in_tiles[0] - whole[0]).norm() < 0.5 * whole[0].norm()
    sides.clear()
    encode_picture(vae, pixels[:, :, :128])
    assert sides == [128], "tiling is off again"
    limit = 0
    with pytest.raises(UserError, match="too little memory for a picture of 192x128"):
        encode_picture(vae, pixels)


def test_the_size_is_said_before_the_work_and_too_little_space_is_an_error(tiny_config, capsys, monkeypatch):
    config, disk = tiny_config(), shutil.disk_usage("/")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: disk._replace(free=2**20))
        with pytest.raises(UserError, match="cache_dir: .* has 1 MiB free, [2-9] MiB are needed"):
            cache_latents.main(config)
    assert not cached_files(config)
    cache_latents.main(config)
    expected = int(re.findall(r"(\d+) MiB to write", capsys.readouterr().out)[-1])
    written = sum(path.stat().st_size for path in Path(config.cache_dir).rglob("*.safetensors")) / 2**20
    assert written == pytest.approx(expected, abs=0.6)


def test_damaged_files_are_named_and_made_again_and_then_a_read_only_disk_will_do(few_config, capsys, monkeypatch):
    config = few_config(text_encoder_batch_size=1)
    pictures, files = cached = cache_latents.main(config)
    whole = cached_files(config)
    damaged = cache_latents.latents_file(config, pictures[0]), files[""], files["a red apple"]
    for path, left in zip(damaged, (-10, 50, 0)):
        path.write_bytes(path.read_bytes()[:left])
    cache_latents.main(config)
    printed = "".join(capsys.readouterr())
    assert [printed.count(f"{path}: is damaged") for path in damaged] == [1, 1, 1]
    assert f"pictures: 7, of them 1 to do; prompts: {len(files)}, of them 2 to do" in printed
    assert cached_files(config) == whole

    def read_only(system_call, path, mode="r", *rest, **options):
        if str(path).startswith(config.cache_dir) and mode not in ("r", "rb"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return system_call(path, mode, *rest, **options)

    for module, name in ((builtins, "open"), (os, "mkdir"), (os, "replace")):
        monkeypatch.setattr(module, name, functools.partial(read_only, getattr(module, name)))
    assert cache_latents.main(config) == cached
    with pytest.raises(UserError, match="cannot be written .Read-only file system"):
        cache_latents.main(few_config(validation_prompts=["not there yet"]))


def test_a_picture_that_has_changed_since_is_not_taken_for_the_old_one(few_config, few_pictures, tmp_path):
    shutil.copytree(few_pictures, tmp_path / "data")
    prepare_data.main(few_config(data_dir=str(tmp_path / "data")))
    Image.new("RGB", (256, 256), "red").save(tmp_path / "data/zumi-00.png")
    with pytest.raises(UserError, match="zumi-00.png: .* has changed since"):
        cache_latents.main(few_config(data_dir=None))


def test_the_work_is_divided_evenly(monkeypatch):
    files, shares = [Path(f"{i:02d}") for i in range(30)], []
    monkeypatch.setattr(cache_latents, "WORLD_SIZE", 4)
    for rank in range(4):
        monkeypatch.setattr(cache_latents, "RANK", rank)
        shares += [batch[0] for batch in cache_latents.unfinished(files)]
        assert len(shares) == (8, 16, 23, 30)[rank]
    assert sorted(shares) == files

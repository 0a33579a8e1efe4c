"""Stage 2: real images and prompts to the cache as diffusers computes them; small memory, corrupt files."""

import builtins
import collections
import contextlib
import errno
import functools
import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, give_the_authors_positions, made_up, sha256
from diffusers import AutoencoderKL, LongCatImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import cache_latents
import train_lora
from cache_latents import (
    cache_prompts, encode_image, encode_prompts, latents_file, prompt_batches, prompt_file, read_prompt_embeds,
    write_prompts,
)  # fmt: skip
from longcat_common import (
    UserError, encoder_inputs, load_text_encoder, load_tokenizer, load_transformer, load_vae, token_counts,
)  # fmt: skip
from prepare_data import load_image


def cached_files(config):
    return {
        p.relative_to(config.cache_dir): sha256(p)
        for p in Path(config.cache_dir).rglob("*.safetensors")
    }


def test_camera_images(tmp_path, tiny_config):
    """A large JPEG is decoded at reduced size, within 45 dB of the whole one; its latents are the VAE's own."""
    exif, noise = (
        Image.Exif(),
        np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8),
    )
    exif[0x0112], camera = 6, Image.fromarray(noise).resize((2001, 1501), Image.Resampling.BICUBIC)
    (tmp_path / "photos").mkdir()
    camera.save(tmp_path / "photos" / "landscape.jpg")
    camera.save(tmp_path / "photos" / "turned.jpg", exif=exif)
    config = tiny_config(
        data_dir=str(tmp_path / "photos"), instance_prompt="a photo", validation_prompts=[]
    )
    (entry, turned), _ = cache_latents.main(config)
    assert (entry.bucket, turned.bucket, turned.size) == ((192, 128), (128, 192), (1501, 2001))
    seen = np.array(load_image(entry.path, entry.bucket))
    assert np.array_equal(
        load_image(turned.path, turned.bucket).transpose(Image.Transpose.ROTATE_90), seen
    )
    with Image.open(entry.path) as image:
        image.convert("RGB").save(tmp_path / "whole.bmp")
    error = np.square(
        np.subtract(seen, load_image(tmp_path / "whole.bmp", entry.bucket), dtype=float)
    ).mean()
    assert 45 < 10 * np.log10(255**2 / error) < 99
    vae = AutoencoderKL.from_pretrained(f"{MODEL}/vae")
    with torch.no_grad():
        posterior = vae.encode(
            torch.from_numpy(seen).permute(2, 0, 1)[None] / 127.5 - 1
        ).latent_dist
    cached = load_file(latents_file(config, entry))
    restored = cached["mean"] / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(restored, posterior.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        cached["std"] / vae.config.scaling_factor, posterior.std[0], rtol=1e-4, atol=1e-5
    )


def test_both_key_layouts_load_and_a_missing_key_is_an_error(tmp_path, tiny_config):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config, file = (
        tiny_config(pretrained_model_name_or_path=str(model)),
        model / "text_encoder" / "model.safetensors",
    )
    encode = lambda: torch.cat(
        encode_prompts(
            load_text_encoder(config, "cpu"), load_tokenizer(config), [["a cat"], ["一只猫"]]
        )
    )
    newer = lambda name: (
        f"model.{name}" if "visual." in name else name.replace("model.", "model.language_model.")
    )
    embeds, weights = encode(), {newer(name): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    assert torch.equal(encode(), embeds)
    save_file(
        {n: t for n, t in weights.items() if "layers.1.mlp.up_proj" not in n},
        file,
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="missing.*layers.1.mlp.up_proj.weight"):
        encode()
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(
        {n: t for n, t in load_file(file).items() if "blocks.1.proj_out.bias" not in n},
        file,
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="missing.*single_transformer_blocks.1.proj_out.bias"):
        load_transformer(config, "cpu")


def test_another_model_or_bucket_gets_another_name(tmp_path, tiny_config):
    model = shutil.copytree(MODEL, tmp_path / "model")
    entry, same, other = (
        made_up(0),
        tiny_config(),
        tiny_config(pretrained_model_name_or_path=str(model)),
    )
    names = lambda config: (latents_file(config, entry), prompt_file(config, "a", "cpu"))
    assert names(same) == names(other)
    assert latents_file(same, entry) != latents_file(same, made_up(0, bucket=(192, 128)))
    assert prompt_file(same, "a", "cpu") != prompt_file(
        tiny_config(mixed_precision="bf16"), "a", "cpu"
    )
    for number, file in enumerate(("vae/diffusion_pytorch_model", "text_encoder/model")):
        file = model / f"{file}.safetensors"
        save_file({**load_file(file), "extra": torch.zeros(1)}, file)
        assert [a != b for a, b in zip(names(same), names(other))] == [True, number == 1]


def test_other_weights_in_the_models_folder_are_noticed_in_the_same_process(tmp_path, quick_config):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = quick_config(pretrained_model_name_or_path=str(model), max_train_steps=1)
    train_lora.main(config)
    file = model / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] += 1
    save_file(weights, file, {"format": "pt"})
    config.max_train_steps = 2
    with pytest.raises(UserError, match="was trained with 'a model of other files'"):
        train_lora.main(config)


def test_a_checkpoint_names_the_model_that_the_run_began_with(tmp_path, quick_config, monkeypatch):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = quick_config(pretrained_model_name_or_path=str(model), max_train_steps=1)
    began_with = cache_latents.model_identity(config, "transformer")
    write_state = train_lora.write_state

    def replace_model_first(*arguments):
        (model / "transformer/config.json").write_text("{}")
        write_state(*arguments)

    monkeypatch.setattr(train_lora, "write_state", replace_model_first)
    train_lora.main(config)
    state = json.loads(Path(config.output_dir, "checkpoints/step-000001/state.json").read_text())
    assert state["fixed"]["pretrained_model_name_or_path"] == began_with


def test_the_models_files_are_hashed_for_each_stage_not_for_each_sample_or_checkpoint(
    quick_config, monkeypatch
):
    hashed = []
    folder_identity = cache_latents.folder_identity

    def record_and_hash(folder):
        hashed.append(folder)
        return folder_identity(folder)

    monkeypatch.setattr(cache_latents, "folder_identity", record_and_hash)
    monkeypatch.setattr(train_lora, "SCORED_NORMALS", (0.4,))  # less to compute
    counts = []
    for steps in (1, 3):
        hashed.clear()
        output_dir = f"{quick_config().output_dir}-{steps}"
        settings = dict(validation_split=0.2, validation_step_interval=steps, validation_prompts=[])
        train_lora.main(quick_config(**settings, max_train_steps=steps, output_dir=output_dir))
        counts.append(len(hashed))
    assert counts == [5, 5]


def test_streamed_layers_give_the_whole_encoders_embeddings_with_two_in_memory(
    tiny_config, tmp_path, monkeypatch
):
    shutil.copytree(MODEL, tmp_path / "model")
    sizes = AutoConfig.from_pretrained(f"{MODEL}/text_encoder")
    sizes.text_config.num_hidden_layers, sizes.text_config.layer_types = 6, ["full_attention"] * 6
    whole = Qwen2_5_VLForConditionalGeneration(sizes).eval()
    (tmp_path / "model/text_encoder/model.safetensors").unlink()
    whole.save_pretrained(tmp_path / "model/text_encoder", max_shard_size="200KB")
    config = tiny_config(
        pretrained_model_name_or_path=str(tmp_path / "model"), text_encoder_batch_size=2
    )
    encoder, alive, counts = load_text_encoder(config, "cpu"), weakref.WeakSet(), []

    def counted(part, names, read=encoder.read):
        weights = read(part, names)
        if part.startswith("layers."):
            alive.add(weights[names[0]].untyped_storage())
            counts.append(len(alive))
        return weights

    encoder.read = counted
    monkeypatch.setattr(cache_latents, "load_text_encoder", lambda *_: encoder)
    monkeypatch.setattr(
        cache_latents, "COLUMNS_AT_ONCE", 500
    )  # two batches of two, then one, then the long prompt
    prompts = [
        "",
        "a cat",
        "一只猫",
        'a sign: "open"',
        "a very long prompt " * 200,
        "a blue fish",
        "a star",
    ]
    files = cache_prompts(config, prompts, "cpu")
    gc.collect()
    assert len(counts) == 3 * 6 and max(counts) == 2 and not alive
    models = dict(vae=None, transformer=None, scheduler=None, text_processor=None)
    pipe = LongCatImagePipeline(text_encoder=whole, tokenizer=load_tokenizer(config), **models)
    give_the_authors_positions(whole)
    for prompt in prompts:
        found, expected = read_prompt_embeds(files[prompt]), pipe.encode_prompt(prompt)[0][0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_is_named_and_not_cached(tiny_config, few_images, tmp_path):
    config = tiny_config(data_dir=str(few_images), validation_prompts=[])
    model = shutil.copytree(MODEL, tmp_path / "model")
    config.pretrained_model_name_or_path = str(model)
    for folder, name, problem in (
        ("vae/diffusion_pytorch_model", "encoder.conv_in.bias", "zumi-.*: its latents are not"),
        ("text_encoder/model", "model.norm.weight", "'.*': its embeddings are not finite"),
    ):
        path = model / f"{folder}.safetensors"
        tensors = load_file(path)
        name = next(other for other in tensors if other.endswith(name.removeprefix("model.")))
        save_file(
            {**tensors, name: torch.full_like(tensors[name], torch.nan)}, path, {"format": "pt"}
        )
        with pytest.raises(UserError, match=problem):
            cache_latents.main(config)
        save_file(tensors, path, {"format": "pt"})
    assert not list(Path(config.cache_dir, "embeddings").rglob("*.safetensors"))
    cache_latents.main(config)


def test_batches_are_cut_from_all_prompts_by_length_whatever_is_cached_and_however_many_processes(
    tiny_config, monkeypatch
):
    config = tiny_config(text_encoder_batch_size=3)
    prompts = ["", *(f"a cat and {'a dog and ' * i}'{i}'" for i in range(9)), "a star " * 400]
    files = {prompt: prompt_file(config, prompt, "cpu") for prompt in prompts}
    tokenizer, template = load_tokenizer(config), 117
    rows = {
        prompt: min(512, count + 1) for prompt, count in token_counts(tokenizer, prompts).items()
    }
    batches = prompt_batches(config, files)
    assert [len(batch.prompts) for batch in batches] == [3, 3, 3, 2]
    assert sum([batch.prompts for batch in batches], []) == sorted(prompts, key=rows.get)
    for batch in batches:
        lengths = [rows[prompt] for prompt in batch.prompts]
        assert batch.columns == len(lengths) * (template + max(lengths)) and batch.rows == sum(
            lengths
        )
        assert encoder_inputs(tokenizer, batch.prompts)[0].numel() == batch.columns

    monkeypatch.setattr(cache_latents, "WORLD_SIZE", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(cache_latents, "RANK", rank)
        shares.append(prompt_batches(config, files))
    assert shares == [batches[0::2], batches[1::2]]

    monkeypatch.undo()
    write_prompts(config, files, batches[1:3], "cpu")
    assert prompt_batches(config, files) == [batches[0], batches[3]]
    files[batches[1].prompts[2]].unlink()
    assert prompt_batches(config, files) == [batches[0], batches[1], batches[3]], (
        "a batch is made again whole"
    )
    cache_prompts(config, prompts, "cpu")
    assert prompt_batches(config, files) == []


def test_disk_space_is_counted_in_rows_and_the_old_format_is_said(
    tiny_config, few_images, monkeypatch, capsys
):
    config = tiny_config(data_dir=str(few_images))
    (Path(config.cache_dir) / "prompts/ab").mkdir(parents=True)
    (Path(config.cache_dir) / "prompts/ab/old.safetensors").write_bytes(bytes(3 * 2**20))
    cache_latents.main(config)
    files = [
        path
        for path in Path(config.cache_dir).rglob("*.safetensors")
        if path.name != "old.safetensors"
    ]
    assert {path.parent.parent.name for path in files} == {"latents", "embeddings"}
    needed = sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    printed = capsys.readouterr().out
    assert (
        printed.count(f"{config.cache_dir}/prompts: holds ")
        == printed.count("it takes 3 MiB and can be deleted")
        == 1
    )

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, free))
    config.cache_dir += "-2"
    for free, enough in ((needed - 1, False), (needed, True)):
        with (
            contextlib.nullcontext()
            if enough
            else pytest.raises(UserError, match="cache_dir: .* free space")
        ):
            cache_latents.main(config)


def test_tiles_follow_from_the_size_of_an_image_not_from_free_memory(tiny_config, monkeypatch):
    """A large image is encoded in tiles, any other one whole. What does not fit is refused."""
    monkeypatch.setattr(cache_latents, "LARGEST_WHOLE", 128 * 128)
    monkeypatch.setattr(cache_latents, "TILE", 64)
    vae, sides = load_vae(tiny_config(), "cpu"), []
    pixels = torch.randint(
        0, 256, (3, 128, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    encode = vae.encoder.forward

    def small_memory(x):
        sides.append(x.shape[-1])
        if x.shape[-1] > limit:
            raise RuntimeError("MPS backend out of memory")
        return encode(x)

    vae.encoder.forward, limit = small_memory, 999
    in_tiles, _ = encode_image(vae, pixels)
    assert max(sides) == 64
    whole = vae.encode(pixels[None] / 127.5 - 1).latent_dist.mean[0].detach()
    whole = (whole - vae.config.shift_factor) * vae.config.scaling_factor
    assert (in_tiles - whole).norm() < 0.5 * whole.norm()

    sides.clear()
    encode_image(vae, pixels[:, :, :128])
    assert sides == [128], "tiling is off again"
    limit = 127
    with pytest.raises(UserError, match="too little memory to encode an image of 128x128; close"):
        encode_image(vae, pixels[:, :, :128])
    assert sides == [128, 128], "no tiles instead"


@pytest.mark.parametrize(
    "keys",
    [{"validation_negative_prompt": "ugly, " * 600}, {"validation_prompts": ["ugly, " * 600]}],
)
def test_a_prompt_that_is_cut_off_is_said_wherever_it_is_encoded(
    tiny_config, few_images, capsys, keys
):
    config = tiny_config(data_dir=str(few_images), **keys)
    cache_latents.main(config)
    line = "prompts of more than 512 tokens, the rest is ignored: 1; 'ugly, ugly, "
    assert capsys.readouterr().out.count(line) == 1
    cache_prompts(tiny_config(), ["a very long prompt " * 200], "cpu")
    assert "the rest is ignored: 1; 'a very long" in capsys.readouterr().out


def test_corrupt_files_are_named_and_made_again_and_then_a_read_only_disk_will_do(
    tiny_config, few_images, capsys, monkeypatch
):
    config = tiny_config(
        data_dir=str(few_images), validation_prompts=["a red apple"], text_encoder_batch_size=2
    )
    images, files = cached = cache_latents.main(config)
    whole = cached_files(config)
    corrupt = latents_file(config, images[0]), files[""], files["a red apple"]
    for path, left in zip(corrupt, (-10, 50, 0)):
        path.write_bytes(path.read_bytes()[:left])
    cache_latents.main(config)
    printed = "".join(capsys.readouterr())
    assert [printed.count(f"{path}: is corrupt") for path in corrupt] == [1, 1, 1]
    assert (
        f"images: 7, of them 1 to encode; prompts: {len(files)}, of them 4 to encode" in printed
    ), "whole batches"
    assert cached_files(config) == whole

    def read_only(system_call, path, mode="r", *rest, **options):
        if str(path).startswith(config.cache_dir) and mode not in ("r", "rb"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return system_call(path, mode, *rest, **options)

    for module, name in ((builtins, "open"), (os, "mkdir"), (os, "replace")):
        monkeypatch.setattr(module, name, functools.partial(read_only, getattr(module, name)))
    assert cache_latents.main(config) == cached
    with pytest.raises(UserError, match="cannot be written .Read-only file system"):
        config.validation_prompts = ["not there yet"]
        cache_latents.main(config)

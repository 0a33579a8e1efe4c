"""Stage 2 as something to trust for months: small memory, damaged files, many processes."""

import gc
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import MODEL, ROOT, run_script, run_together
from diffusers import LongCatImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

import cache_latents
import longcat_common
import prepare_data
import train_lora
from longcat_common import (
    cache_prompts,
    encode_prompts,
    load_text_encoder,
    load_tokenizer,
    load_vae,
)

PROMPTS = [
    "",
    "a cat",
    "一只猫",
    'a sign: "open"',
    "a very long prompt " * 200,
    "a blue fish",
    "a star",
]


@pytest.fixture
def large(tmp_path, tiny_config):
    """The tiny model with a text encoder of six layers in many shards, and the whole encoder for reference."""
    model = tmp_path / "model"
    model.mkdir()
    for part in ("tokenizer", "vae", "scheduler", "transformer"):
        (model / part).symlink_to(Path(MODEL).resolve() / part)
    config = AutoConfig.from_pretrained(f"{MODEL}/text_encoder")
    config.text_config.num_hidden_layers, config.text_config.layer_types = 6, ["full_attention"] * 6
    torch.manual_seed(0)
    whole = Qwen2_5_VLForConditionalGeneration(config).eval()
    whole.save_pretrained(model / "text_encoder", max_shard_size="200KB")
    assert len(list((model / "text_encoder").glob("*.safetensors"))) > 4
    return tiny_config(pretrained_model_name_or_path=str(model), text_encoder_batch_size=2), whole


def cached_files(config):
    """{name: hash of its bytes} of the cached files; bytes themselves would take pytest minutes to compare when they differ."""
    return {
        p.relative_to(config.cache_dir): train_lora.sha256(p) for p in Path(config.cache_dir).rglob("*.safetensors")
    }


def test_streamed_layers_give_the_whole_encoders_embeddings(large):
    config, whole = large
    parts = dict(vae=None, transformer=None, scheduler=None, text_processor=None)
    pipe = LongCatImagePipeline(text_encoder=whole, tokenizer=load_tokenizer(config), **parts)
    with torch.no_grad():
        expected = pipe.encode_prompt(PROMPTS)[0]
    files = cache_prompts(config, PROMPTS, "cpu")
    for prompt, reference in zip(PROMPTS, expected):
        found = load_file(files[prompt])["prompt_embeds"]
        assert (found - reference).norm() <= 1e-6 * reference.norm(), prompt


def test_no_more_than_two_layers_are_in_memory(large):
    config, _ = large
    encoder, alive = load_text_encoder(config, "cpu"), []
    layers = lambda: [
        m for m in gc.get_objects() if type(m) is Qwen2_5_VLDecoderLayer and not next(m.parameters()).is_meta
    ]
    others = {id(layer) for layer in layers()}  # the reference model's
    inner = encoder.model.forward

    def counted(*arguments, **options):
        alive.append(sum(id(layer) not in others for layer in layers()))
        return inner(*arguments, **options)

    encoder.model.forward = counted
    encode_prompts(encoder, load_tokenizer(config), PROMPTS)
    assert len(alive) == 6 * 4 and max(alive) <= 2  # 6 layers by 4 batches
    assert not any(id(layer) not in others for layer in layers())


def test_prompts_in_several_chunks_have_the_same_bytes(large, tmp_path, monkeypatch):
    config, _ = large
    cache_prompts(config, PROMPTS, "cpu")
    whole, config.cache_dir = cached_files(config), str(tmp_path / "other")

    class Small(longcat_common.StreamedTextEncoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.prompts_at_once = 3  # less than two batches

    monkeypatch.setattr(longcat_common, "StreamedTextEncoder", Small)
    cache_prompts(config, PROMPTS, "cpu")
    assert cached_files(config) == whole and len(whole) == len(PROMPTS)


def test_damaged_files_are_named_and_made_again(tiny_config, capsys):
    config = tiny_config()
    entries, files = cache_latents.main(config)
    whole = cached_files(config)
    latents, other, prompt, empty = (
        entries[0]["latents_file"],
        entries[1]["latents_file"],
        files[""],
        files["zumi on a blue background"],
    )
    latents.write_bytes(latents.read_bytes()[:-10])
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in load_file(other).items()}, other)
    save_file({"prompt_embeds": load_file(prompt)["prompt_embeds"].half()}, prompt)
    empty.write_bytes(b"")
    capsys.readouterr()
    cache_latents.main(config)
    printed = capsys.readouterr()
    for path in (latents, other, prompt, empty):
        assert f"{path}: is damaged" in printed.out + printed.err
    assert f"pictures: 35, of them 2 to do; prompts: {len(files)}, of them 2 to do" in printed.out
    assert cached_files(config) == whole


def test_a_picture_that_has_changed_since_is_not_taken_for_the_old_one(tiny_config, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "tests/tiny_longcat/regularisation", folder)
    config = tiny_config(data_dir=str(folder), validation_prompts=[])
    prepare_data.main(config)
    Image.new("RGB", (256, 256), "red").save(folder / "ordinary-03.png")
    with pytest.raises(ValueError, match="ordinary-03.png: .* has changed since"):
        cache_latents.main(tiny_config(data_dir=None, validation_prompts=[]))
    cache_latents.main(config)


@pytest.mark.parametrize(
    "part, name",
    [
        ("vae", "config.json"),
        ("text_encoder", "config.json"),
        ("tokenizer", "tokenizer.json"),
        ("text_encoder", "model.safetensors"),
    ],
)
def test_a_damaged_model_is_named(tiny_config, tmp_path, part, name):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    file = model / part / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{part}: cannot be loaded, download it again"):
        cache_latents.main(tiny_config(pretrained_model_name_or_path=str(model)))


def test_the_figure_before_the_work(tiny_config, capsys, monkeypatch):
    config, usage = tiny_config(), namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_latents.shutil, "disk_usage", lambda path: usage(2**40, 0, 2**20))
    with pytest.raises(ValueError, match="cache_dir: .* has 1 MiB free, 5 MiB are needed"):
        cache_latents.main(config)
    assert not cached_files(config)
    monkeypatch.undo()
    cache_latents.main(config)
    printed = capsys.readouterr().out
    assert "pictures: 35, of them 35 to do; prompts: 3" in printed and "waiting for decoding" in printed
    expected = int(printed.split(" MiB to write")[0].split()[-1])
    assert sum(p.stat().st_size for p in Path(config.cache_dir).rglob("*.safetensors")) / 2**20 == pytest.approx(
        expected, abs=0.6
    )
    cache_latents.main(config)
    assert "to do" not in capsys.readouterr().out


def test_a_small_device_encodes_one_by_one_and_in_tiles(tiny_config, monkeypatch):
    vae = load_vae(tiny_config(), "cpu")
    pixels = torch.randint(0, 256, (3, 3, 128, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = cache_latents.encode_pictures(vae, pixels)
    encode, calls, held = vae.encode, [], []

    def small_memory(x):
        calls.append((len(x), vae.use_tiling))
        assert all(reference() is None for reference in held), "what the failed attempt computed must be gone"
        if len(x) * x.shape[-1] > limit and not vae.use_tiling:
            activations = x.repeat(4, 1, 1, 1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(x)

    vae.encode, limit = small_memory, 200
    for ours, whole in zip(cache_latents.encode_pictures(vae, pixels), (mean, std)):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
    assert calls == [(3, False)] + [(1, False)] * 3
    limit, tiled = 100, vae._tiled_encode
    monkeypatch.setattr(cache_latents, "TILE", 64)
    vae.tile_sample_min_size, vae.tile_latent_min_size = (
        1024,
        128,
    )  # as the real VAE, which would not cut a picture of 1024
    vae._tiled_encode = lambda x: calls.append("tiled") or tiled(x)
    in_tiles = cache_latents.encode_pictures(vae, pixels)[0]
    assert in_tiles.shape == mean.shape and in_tiles.isfinite().all()
    assert calls[4:] == [(3, False)] + [(1, False), (1, True), "tiled"] * 3 and (
        vae.use_tiling,
        vae.tile_sample_min_size,
    ) == (False, 1024)
    vae.encode = lambda x: (_ for _ in ()).throw(RuntimeError("MPS backend out of memory"))
    with pytest.raises(ValueError, match="too little memory for a picture of 192x128"):
        cache_latents.encode_pictures(vae, pixels)
    vae.encode = lambda x: (_ for _ in ()).throw(RuntimeError("another error"))
    with pytest.raises(RuntimeError, match="another error"):
        cache_latents.encode_pictures(vae, pixels)


def test_small_buckets_are_divided_too(tiny_config, monkeypatch):
    config = tiny_config()
    entries = [{"key": f"{i:032x}", "bucket": [64 * (i + 1), 64]} for i in range(30)]
    entries = [{**entry, "latents_file": cache_latents.latents_file(config, entry)} for entry in entries]
    monkeypatch.setattr(longcat_common, "WORLD_SIZE", 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(longcat_common, "RANK", rank)
        shares.append([entry["key"] for batch in cache_latents.picture_batches(config, entries) for entry in batch])
    assert sorted(map(len, shares)) == [7, 7, 8, 8] and sorted(sum(shares, [])) == sorted(
        entry["key"] for entry in entries
    )


def flags(config):
    return [
        "configs/tiny.json",
        "--output_dir",
        config.output_dir,
        "--cache_dir",
        config.cache_dir,
        "--pretrained_model_name_or_path",
        MODEL,
    ]


@pytest.mark.slow
def test_two_processes_under_torchrun_divide_the_work(tiny_config, tmp_path):
    alone = tiny_config()
    cache_latents.main(alone)
    both = tiny_config(output_dir=str(tmp_path / "both"), cache_dir=str(tmp_path / "both_cache"))
    printed = run_together("cache_latents.py", 2, tmp_path, *flags(both))
    assert cached_files(both).keys() == cached_files(alone).keys()
    shares = [
        int(line.split("of them ")[1].split()[0])
        for text in printed
        for line in text.splitlines()
        if "to do here" in line
    ]
    assert len(shares) == 2 and sum(shares) == 35 and min(shares) > 10
    for path in cached_files(alone):
        ours, theirs = (load_file(Path(config.cache_dir) / path) for config in (both, alone))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "both" / "manifest.jsonl").read_bytes() == (
        Path(alone.output_dir) / "manifest.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_and_two_at_once(tiny_config, tmp_path):
    reference = tiny_config()
    run_script("cache_latents.py", *flags(reference))
    other = tiny_config(output_dir=str(tmp_path / "other"), cache_dir=str(tmp_path / "other_cache"))
    start = lambda: subprocess.Popen(
        [sys.executable, "cache_latents.py", *flags(other)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for count in (1, 9, 20, 39, 41):
        process = start()
        while process.poll() is None and len(list((tmp_path / "other_cache").rglob("*.safetensors"))) < count:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and count <= len(cached_files(other)) < len(cached_files(reference))
    pair = [start(), start()]
    assert [process.wait() for process in pair] == [0, 0]
    assert cached_files(other) == cached_files(reference)

"""Stage 2 as something to trust for months: small memory, damaged files, many processes."""

import builtins
import errno
import gc
import os
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
from conftest import MODEL, ROOT, run_script, run_together, sha256
from diffusers import LongCatImagePipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import cache_latents
import longcat_common
import prepare_data
from cache_latents import cache_prompts, encode_prompts
from longcat_common import load_text_encoder, load_tokenizer, load_vae

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
    """{name: hash of its bytes} of the cached files."""
    return {p.relative_to(config.cache_dir): sha256(p) for p in Path(config.cache_dir).rglob("*.safetensors")}


def test_streamed_layers_give_the_whole_encoders_embeddings(large):
    config, whole = large
    parts = dict(vae=None, transformer=None, scheduler=None, text_processor=None)
    pipe = LongCatImagePipeline(text_encoder=whole, tokenizer=load_tokenizer(config), **parts)
    files = cache_prompts(config, PROMPTS, "cpu")
    in_order = sorted(PROMPTS, key=lambda prompt: files[prompt].name)
    for batch in (in_order[i : i + 2] for i in range(0, 7, 2)):
        with torch.no_grad():
            for prompt, expected in zip(batch, pipe.encode_prompt(batch)[0]):
                assert load_file(files[prompt])["prompt_embeds"].equal(expected), prompt


def test_no_more_than_two_layers_are_in_memory(large, monkeypatch):
    config, _ = large
    read, alive, counts = longcat_common.StreamedTextEncoder.read, weakref.WeakSet(), []

    def counted(self, part, names):
        weights = read(self, part, names)
        if part.startswith("layers."):
            alive.update(weight.untyped_storage() for name, weight in weights.items() if name == names[0])
            counts.append(len(alive))
        return weights

    monkeypatch.setattr(longcat_common.StreamedTextEncoder, "read", counted)
    encode_prompts(load_text_encoder(config, "cpu"), load_tokenizer(config), PROMPTS)
    assert len(counts) == 6 and max(counts) == 2
    gc.collect()
    assert not alive


def test_prompts_in_several_chunks_have_the_same_bytes(large, tmp_path, monkeypatch):
    config, _ = large
    cache_prompts(config, PROMPTS, "cpu")
    whole, config.cache_dir = cached_files(config), str(tmp_path / "other")
    monkeypatch.setattr(cache_latents, "PROMPTS_AT_ONCE", 3)  # less than two batches
    cache_prompts(config, PROMPTS, "cpu")
    assert cached_files(config) == whole and len(whole) == len(PROMPTS)


def test_damaged_files_are_named_and_made_again(tiny_config, capsys):
    config = tiny_config(text_encoder_batch_size=1)
    pictures, files = cache_latents.main(config)
    whole = cached_files(config)
    latents, prompt, empty = (
        cache_latents.latents_file(config, pictures[0]),
        files[""],
        files["zumi on a blue background"],
    )
    latents.write_bytes(latents.read_bytes()[:-10])
    prompt.write_bytes(prompt.read_bytes()[:50])
    empty.write_bytes(b"")
    capsys.readouterr()
    cache_latents.main(config)
    printed = capsys.readouterr()
    for path in (latents, prompt, empty):
        assert (printed.out + printed.err).count(f"{path}: is damaged") == 1
    assert f"pictures: 35, of them 1 to do; prompts: {len(files)}, of them 2 to do" in printed.out
    assert cached_files(config) == whole


def test_a_complete_cache_on_a_read_only_disk_works(tiny_config, monkeypatch):
    config = tiny_config()
    cached = cache_latents.main(config)
    writes = lambda path, mode="r", *rest, **options: bool(set(mode) & set("wax+"))
    changes = [(builtins, "open", writes), *((os, name, lambda *_: True) for name in ("mkdir", "replace", "unlink"))]
    for module, name, is_change in changes:

        def guarded(path, *arguments, original=getattr(module, name), is_change=is_change, **options):
            if str(path).startswith(config.cache_dir) and is_change(path, *arguments, **options):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return original(path, *arguments, **options)

        monkeypatch.setattr(module, name, guarded)
    assert cache_latents.main(config) == cached
    with pytest.raises(ValueError, match="cannot be written .Read-only file system"):
        cache_latents.main(tiny_config(validation_prompts=["not there yet"]))


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
    with pytest.raises(ValueError, match=f"{part}: is missing or damaged; make or download it again"):
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
    assert "pictures: 35, of them 35 to do; prompts: 3" in printed
    expected = int(printed.split(" MiB to write")[0].split()[-1])
    assert sum(p.stat().st_size for p in Path(config.cache_dir).rglob("*.safetensors")) / 2**20 == pytest.approx(
        expected, abs=0.6
    )
    cache_latents.main(config)
    assert "to do" not in capsys.readouterr().out


def test_a_picture_too_large_for_the_device_is_encoded_in_tiles(tiny_config, monkeypatch):
    vae, calls, held, limit = load_vae(tiny_config(), "cpu"), [], [], 128
    pixels = torch.randint(0, 256, (3, 128, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small, (mean, std) = pixels[:, :, :128], cache_latents.encode_picture(vae, pixels)
    encode = vae.encoder.forward

    def small_memory(x):
        calls.append(x.shape[-1])
        assert all(reference() is None for reference in held), "what the failed attempt computed must be gone"
        if x.shape[-1] > limit:
            activations = x.repeat(4, 1, 1, 1)
            held.append(weakref.ref(activations))
            raise error()
        return encode(x)

    vae.encoder.forward, error = small_memory, lambda: torch.OutOfMemoryError("CUDA out of memory")
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    in_tiles = cache_latents.encode_picture(vae, pixels)
    assert [tensor.shape for tensor in in_tiles] == [mean.shape, std.shape] and calls[0] == 192 and max(calls[1:]) == 64
    assert (in_tiles[0] - mean).norm() < 0.5 * mean.norm()
    calls.clear()
    cache_latents.encode_picture(vae, small)
    assert calls == [128]  # tiling is off again
    limit, error = 0, lambda: RuntimeError("MPS backend out of memory")
    with pytest.raises(ValueError, match="too little memory for a picture of 192x128"):
        cache_latents.encode_picture(vae, pixels)
    error = lambda: RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        cache_latents.encode_picture(vae, pixels)


def test_a_picture_of_1024_is_cut_by_the_real_vaes_tiling(tiny_config, monkeypatch):
    load = cache_latents.load_vae

    def real_size(config, device):
        vae = load(config, device)
        vae.tile_sample_min_size = 1024  # the real VAE's own
        vaes.append(vae)
        return vae

    vaes = []
    monkeypatch.setattr(cache_latents, "load_vae", real_size)
    cache_latents.main(tiny_config())
    assert (vaes[0].tile_sample_min_size, vaes[0].tile_latent_min_size, vaes[0].use_tiling) == (512, 64, False)


def test_the_work_is_divided_evenly(monkeypatch):
    files, shares = [Path(f"{i:02d}") for i in range(30)], []
    monkeypatch.setattr(cache_latents, "WORLD_SIZE", 4)
    for rank in range(4):
        monkeypatch.setattr(cache_latents, "RANK", rank)
        shares.append(sum(cache_latents.unfinished(files), []))
    assert sorted(map(len, shares)) == [7, 7, 8, 8] and sorted(sum(shares, [])) == files


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

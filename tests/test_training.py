"""Stages 3 and 4 on the tiny model: it learns, it resumes, its files open elsewhere."""

import collections
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import make_pictures
import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, made_up, run_script
from PIL import Image
from safetensors.torch import load_file, safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cache_latents
import longcat_common
import train_lora
import validate
from longcat_common import (
    flow_matching_loss, load_config, load_lora, load_scheduler, load_transformer, read_tensors, sample_sigmas,
    save_lora,
)  # fmt: skip
from train_lora import add_lora
from validate import generate, load_pipeline

# Two of them on grounds that no picture of the character has.
CHARACTER_PROMPTS = [
    "zumi on a pink background",
    "zumi，绿色背景",
    "zumi on a blue background",
    "zumi，黄色背景",
]
OTHER_PROMPTS = ["a cat on a blue background", "一枚火箭，粉色背景"]


def demo_run(made_once, *shortened):
    """The configuration and the folder of the README's main job: as it was run last, if that was with today's code,
    else run now, and with `shortened`."""

    def make(folder):
        last, output = ROOT / "output" / "tiny", folder / "output"
        lora = last / "pytorch_lora_weights.safetensors"
        sources = [*ROOT.glob("*.py"), ROOT / "configs" / "tiny.json", *Path(MODEL).rglob("*.safetensors")]
        if lora.exists() and lora.stat().st_mtime > max(path.stat().st_mtime for path in sources):
            shutil.copytree(last, output)
        else:
            paths = ["--output_dir", output, "--cache_dir", output / "cache", "--pretrained_model_name_or_path", MODEL]
            run_script("train_lora.py", "configs/tiny.json", *paths, *shortened)

    output = made_once(f"demo{len(shortened)}", make) / "output"
    return load_config(output / "config.json", output_dir=str(output), cache_dir=str(output / "cache")), output


@pytest.fixture(scope="session")
def trained(made_once):
    """The demo, or an eighth of it: enough to learn, not enough to draw well."""
    return demo_run(
        made_once,
        "--max_train_steps",
        60,
        "--checkpoint_step_interval",
        60,
        "--validation_step_interval",
        60,
        "--validation_num_inference_steps",
        4,
    )


@pytest.fixture(scope="session")
def whole_demo(made_once):
    return demo_run(made_once)


# ---------------------------------------------------------------- it learns


def held_out_loss(config, transformer, entries, prompt_files, scheduler):
    """Mean loss over pictures the LoRA has not seen, with fixed noise and noise levels."""
    losses = []
    for i, entry in enumerate(entries):
        posterior, draws = read_tensors(cache_latents.latents_file(config, entry)), torch.Generator().manual_seed(i)
        embeds = read_tensors(prompt_files[entry.captions[i % len(entry.captions)]])["prompt_embeds"][None]
        for normal in (-1.0, 0.0, 1.0):
            noise = torch.randn(posterior["mean"].shape, generator=draws)[None]
            tokens = noise.shape[2] * noise.shape[3] // 4
            with torch.no_grad():
                losses.append(
                    flow_matching_loss(
                        transformer,
                        posterior["mean"][None],
                        noise,
                        sample_sigmas(torch.tensor([normal]), tokens, scheduler),
                        embeds,
                    )
                )
    return torch.stack(losses).mean().item()


def held_out_ratio(config, output, tmp_path):
    """The loss on twelve pictures of the character on grounds that the demo has not seen it on, relative to the
    base's."""
    make_pictures.make_character(tmp_path / "held_out", seed=99, count=12, grounds=("green", "pink"))
    theirs = load_config(
        output / "config.json", data_dir=str(tmp_path / "held_out"), output_dir=str(tmp_path / "output")
    )
    entries, prompt_files = cache_latents.main(theirs)
    transformer, scheduler = load_transformer(config, "cpu"), load_scheduler(config)
    base = held_out_loss(theirs, transformer, entries, prompt_files, scheduler)
    load_lora(transformer, output)
    tuned = held_out_loss(theirs, transformer, entries, prompt_files, scheduler)
    print(f"held-out loss: base {base:.4f}, LoRA {tuned:.4f}, ratio {tuned / base:.2f}")
    return tuned / base


def test_the_held_out_loss_halves(trained, tmp_path):
    assert held_out_ratio(*trained, tmp_path) <= 0.5


@pytest.mark.slow
def test_the_held_out_loss_of_the_whole_demo(whole_demo, tmp_path):
    assert held_out_ratio(*whole_demo, tmp_path) <= 0.35


@pytest.mark.slow
def test_the_character_is_drawn_on_every_ground_and_only_with_its_word(whole_demo):
    config, output = whole_demo
    pipe = load_pipeline(config, "cpu")
    draw = lambda: [np.asarray(image, float) for image in generate(pipe, config, CHARACTER_PROMPTS + OTHER_PROMPTS)]
    away = lambda one, other: np.abs(one - other).mean()
    before = draw()
    load_lora(pipe.transformer, output)
    after = draw()
    grounds = ["pink", "green", "blue", "yellow", "blue", "pink"]  # as the prompts say
    for i, (base, tuned, ground) in enumerate(zip(before, after, grounds)):
        colour, figure = make_pictures.GROUNDS[ground][1], make_pictures.character()
        zumi = np.asarray(make_pictures.draw_picture(random.Random(0), figure, ground, 128, 128), float)
        print(f"to zumi: base {away(base, zumi):.1f}, LoRA {away(tuned, zumi):.1f}; moved {away(base, tuned):.1f}")
        assert max(away(base[:8, :8], colour), away(tuned[:8, :8], colour)) < 12, "the ground that was asked for"
        if i < len(CHARACTER_PROMPTS):
            assert away(tuned, zumi) < 0.5 * away(base, zumi)
        else:
            assert away(tuned, base) < 0.5 * away(tuned, zumi)


def test_an_untrained_lora_moves_nothing(tiny_config, tmp_path):
    config = tiny_config(validation_num_inference_steps=4)
    pipe = load_pipeline(config, "cpu")
    base = generate(pipe, config, CHARACTER_PROMPTS[:1])[0]
    add_lora(pipe.transformer, config)
    assert generate(pipe, config, CHARACTER_PROMPTS[:1])[0].tobytes() == base.tobytes()


def test_what_the_main_job_leaves(trained):
    config, output = trained
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, config.max_train_steps + 1, 10))
    losses, third = [line["loss"] for line in lines], len(lines) // 3
    assert np.mean(losses[-third:]) < 0.8 * np.mean(losses[:third])
    assert {"loss", "lr", "grad_norm", "seconds_per_step", "epoch"} <= lines[0].keys()
    events = EventAccumulator(str(output / "logs"))
    events.Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "train/seconds_per_step"} <= set(events.Tags()["scalars"])
    steps = list(range(0, config.max_train_steps + 1, config.validation_step_interval))
    for i, prompt in enumerate(config.validation_prompts):
        assert [image.step for image in events.Images(f"previews/{i}")] == steps
        for step in steps:
            with Image.open(output / "validation" / f"step-{step:06d}-{i:02d}.png") as picture:
                assert picture.size == (128, 128) and picture.text["prompt"] == prompt
    with Image.open(output / "validation" / "progress.png") as progress:
        assert progress.width > 192 * len(steps) and progress.height > 192 * len(config.validation_prompts)
    assert [p.name for p in train_lora.checkpoint_folders(config)] == [f"step-{step:06d}" for step in steps[1:]]
    assert not [p for p in output.rglob("*") if ".tmp" in p.name]


def test_validate_draws_base_beside_lora(trained, tmp_path, capsys):
    config, output = trained
    config = load_config(
        output / "config.json", validation_prompts=CHARACTER_PROMPTS[:2], validation_num_inference_steps=4
    )
    grid = validate.main(config)
    assert "s a picture" in capsys.readouterr().out
    with Image.open(grid) as image:
        assert image.width > 2 * 128 and image.height > 2 * 128
    with (
        Image.open(grid.parent / "00-128x128-seed42-lora.png") as tuned,
        Image.open(grid.parent / "00-128x128-seed42-base.png") as base,
    ):
        assert np.abs(np.asarray(tuned, dtype=int) - np.asarray(base)).mean() > 5


# ---------------------------------------------------------------- files that open elsewhere

FOREIGN = """
import sys, torch, numpy as np
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImagePipeline
from diffusers import LongCatImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from peft import PeftModel
model, lora, target = sys.argv[1:]
load = lambda: LongCatImageTransformer2DModel.from_pretrained(model, subfolder="transformer", torch_dtype=torch.float32)
pipe = LongCatImagePipeline(
    transformer=load(), vae=AutoencoderKL.from_pretrained(model, subfolder="vae"), text_processor=None,
    scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler"),
    tokenizer=Qwen2Tokenizer.from_pretrained(model + "/tokenizer"),
    text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(model + "/text_encoder", dtype=torch.float32),
)
file, folder, peft = load(), load(), PeftModel.from_pretrained(load(), lora).merge_and_unload()
file.load_lora_adapter(lora + "/pytorch_lora_weights.safetensors")
folder.load_lora_adapter(lora, weight_name="pytorch_lora_weights.safetensors")
for name, pipe.transformer in dict(file=file, folder=folder, peft=peft).items():
    image = pipe("zumi on a blue background", height=128, width=128, num_inference_steps=4, guidance_scale=3.0,
                 generator=torch.Generator().manual_seed(42), enable_prompt_rewrite=False).images[0]
    image.save(f"{target}/{name}.png")
assert "longcat_common" not in sys.modules
"""


def test_the_lora_opens_without_our_code(trained, tmp_path):
    config, output = trained
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, MODEL, output, tmp_path], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = load_config(
        output / "config.json", validation_prompts=["zumi on a blue background"], validation_num_inference_steps=4
    )
    config.output_dir, config.lora = str(tmp_path), str(output)
    grid = validate.main(config)
    pixels = lambda path: np.asarray(Image.open(path).convert("RGB")).astype(int)
    for form in ("file", "folder", "peft"):
        theirs = pixels(tmp_path / f"{form}.png")
        assert np.abs(pixels(grid.parent / "00-128x128-seed42-lora.png") - theirs).max() <= 2, form
        assert np.abs(pixels(grid.parent / "00-128x128-seed42-base.png") - theirs).mean() > 5


def test_alpha_is_folded_in(tiny_config, tmp_path):
    config = tiny_config(lora_rank=4, lora_alpha=6)
    transformer = load_transformer(config, "cpu")
    parameters = add_lora(transformer, config)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = dict(
        latents=torch.randn(1, 16, 16, 16),
        noise=torch.randn(1, 16, 16, 16),
        sigmas=torch.tensor([0.5]),
        prompt_embeds=torch.randn(1, 512, 64),
    )
    with torch.no_grad():
        expected = flow_matching_loss(transformer, **inputs)
        bare = flow_matching_loss(load_transformer(config, "cpu"), **inputs)
    save_lora(transformer, tmp_path, {"steps": 1, "note": "中文"})
    other = load_transformer(config, "cpu")
    load_lora(other, tmp_path)
    again = load_transformer(config, "cpu")
    add_lora(again, tiny_config(lora_rank=4, lora_alpha=6, init_lora=str(tmp_path)))
    with torch.no_grad():
        torch.testing.assert_close(flow_matching_loss(other, **inputs), expected)
        torch.testing.assert_close(flow_matching_loss(again, **inputs), expected)
    assert abs(bare - expected) > 1e-3
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["longcat_lora"]) == {"steps": 1, "note": "中文"}
        assert all(name.startswith("transformer.") for name in file.keys())
    with pytest.raises(ValueError, match="init_lora.*has lora_rank 4"):
        add_lora(load_transformer(config, "cpu"), tiny_config(lora_rank=8, init_lora=str(tmp_path)))
    with pytest.raises(ValueError, match="attn.to_x"):
        add_lora(load_transformer(config, "cpu"), tiny_config(lora_target_modules=["attn.to_x"]))


# ---------------------------------------------------------------- the rest of the loop


def test_every_picture_is_seen_repeats_times_an_epoch():
    entries = [made_up(i, bucket=(64, 64 * (1 + i % 2)), repeats=1 + i % 3) for i in range(11)]
    for epoch in range(3):
        batches = train_lora.epoch_batches(entries, 4, 42, epoch)
        assert all(len({e.bucket for _, e in batch}) == 1 and len(batch) <= 4 for batch in batches)
        names = [name for batch in batches for name, _ in batch]
        assert len(set(names)) == len(names) == sum(1 + i % 3 for i in range(11))
        assert collections.Counter(e.path for batch in batches for _, e in batch) == {
            f"{i}.png": 1 + i % 3 for i in range(11)
        }
    assert (
        train_lora.epoch_batches(entries, 4, 42, 1)
        == train_lora.epoch_batches(entries, 4, 42, 1)
        != train_lora.epoch_batches(entries, 4, 42, 2)
    )


def test_draws_are_as_configured(tiny_config):
    config = tiny_config(caption_dropout_probability=0.25)
    entries, prompts = cache_latents.main(config)
    entry = dataclasses.replace(entries[0], captions=[entries[0].captions[0], entries[1].captions[0]])
    embeds = [read_tensors(prompts[p])["prompt_embeds"] for p in ("", *entry.captions)]
    drawn = [train_lora.load_batch(config, [("a", entry)], prompts, epoch, epoch) for epoch in range(200)]
    which = [next(i for i, e in enumerate(embeds) if torch.equal(e, batch.prompt_embeds[0])) for batch in drawn]
    shares = [which.count(i) / 200 for i in range(3)]
    assert 0.17 < shares[0] < 0.33 and min(shares[1:]) > 0.27
    normal = torch.cat([batch.normal for batch in drawn])
    assert abs(normal.mean()) < 0.2 and 0.85 < normal.std() < 1.15
    posterior = read_tensors(cache_latents.latents_file(config, entry))
    spread = torch.cat([batch.latents for batch in drawn]) - posterior["mean"]
    torch.testing.assert_close((spread / posterior["std"]).std(), torch.tensor(1.0), atol=0.01, rtol=0)
    again = train_lora.load_batch(config, [("a", entry)], prompts, 7, 7)
    assert all(torch.equal(a, b) for a, b in zip(again[1:], drawn[7][1:]))
    later = train_lora.load_batch(config, [("a", dataclasses.replace(entry, loss_weight=0.25))], prompts, 7, 8)
    assert not any(torch.equal(a, b) for a, b in zip(later[1:4], again[1:4])), (
        "each batch of an epoch has its own draws"
    )
    assert again.weights.tolist() == [1.0] and later.weights.tolist() == [0.25]


def first_step(config, batches):
    """What the first step over these batches gives, and AdamW's first moment after it."""
    transformer, scheduler = load_transformer(config, "cpu"), load_scheduler(config)
    run = train_lora.set_up(config, transformer, scheduler, torch.device("cpu"), 9)
    numbers = train_lora.train_step(config, run, batches)
    return numbers, torch.cat([run.optimizer.state[p]["exp_avg"].flatten() for p in run.parameters.values()])


def two_pictures():
    draw = torch.Generator().manual_seed(0)
    shapes = [(16, 16, 16), (16, 16, 16), (), (512, 64)]  # latents, noise, normal draws, prompt embeddings
    return [*(torch.randn(2, *shape, generator=draw) for shape in shapes), torch.ones(2)]


def test_accumulation_is_a_mean_and_gradients_are_clipped(tiny_config):
    both = two_pictures()
    halves = [train_lora.Batch(i, *(tensor[i : i + 1] for tensor in both)) for i in range(2)]
    config = tiny_config(max_grad_norm=1e-3)
    together, moment = first_step(config, [train_lora.Batch(0, *both)])
    config.gradient_accumulation_steps = 2
    in_turn, other = first_step(config, halves)
    assert in_turn == pytest.approx(together, rel=1e-4) and in_turn[1] > 1e-2, "loss and gradient norm before clipping"
    assert (other - moment).norm() < 1e-3 * moment.norm()
    assert other.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2), (
        "AdamW's first moment is a tenth of the clipped gradient"
    )


def test_each_batch_has_its_own_dropout(tiny_config):
    config, both = tiny_config(lora_dropout=0.5), two_pictures()
    first, again, second = (first_step(config, [train_lora.Batch(number, *both)])[1] for number in (0, 0, 1))
    assert torch.equal(first, again) and (first - second).norm() > 0.1 * first.norm()


def test_epochs_decide_the_steps_and_a_failing_preview_ends_nothing(quick_config, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(train_lora, "generate", fail)
    config = quick_config(
        num_train_epochs=1, train_batch_size=2, gradient_accumulation_steps=2, validation_step_interval=2
    )
    assert train_lora.main(config).exists()
    printed = capsys.readouterr()
    assert "preview at step 0 failed: RuntimeError: no memory" in printed.out + printed.err
    assert "2 steps of 2 x 2: each picture will be seen about 1.0 times its repeats" in printed.out
    assert (
        len(train_lora.epoch_batches(cache_latents.main(config)[0], 2, 42, 0))
        == 4
        == 2 * len(train_lora.checkpoint_folders(config))
    )


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto", "fp8-torchao", "int8-matmul"])
def test_quantized_bases_train_and_draw(tiny_config, quick_config, precision):
    plain = load_transformer(tiny_config(), "cpu")
    config = quick_config(base_model_precision=precision, gradient_checkpointing=True, max_train_steps=2)
    quantized = load_transformer(config, "cpu")
    name = "single_transformer_blocks.0.proj_out"
    inputs = torch.randn(4, quantized.get_submodule(name).in_features)
    with torch.no_grad():
        exact, found = plain.get_submodule(name)(inputs), quantized.get_submodule(name)(inputs)
    error = (found - exact).norm() / exact.norm()
    assert 1e-5 < error < {"int8-quanto": 0.02, "int8-matmul": 0.02, "int4-quanto": 0.2, "fp8-torchao": 0.06}[precision]
    assert train_lora.main(config).exists()
    checkpoints = [load_file(folder / "adapter_model.safetensors") for folder in train_lora.checkpoint_folders(config)]
    assert all(
        not torch.equal(a, b) for (n, a), b in zip(checkpoints[0].items(), checkpoints[1].values()) if "lora_B" in n
    )
    assert validate.main(config).exists()
    assert longcat_common.quantize(torch.nn.Linear(4, 4), "no_change").weight.dtype == torch.float32
    with pytest.raises(ValueError, match="int9"):
        longcat_common.quantize(torch.nn.Linear(4, 4), "int9")

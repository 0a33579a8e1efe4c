"""Stage 3 on the tiny model: it learns what it should and nothing else, from draws as they are configured."""

import collections
import dataclasses
import json
import random
from pathlib import Path

import make_pictures
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, checkpoints, made_up, metrics, run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cache_latents
import train_lora
from longcat_common import load_config, load_scheduler, load_transformer, read_tensors
from validate import generate, load_lora, load_pipeline

# ---------------------------------------------------------------- it learns


def demo(made_once, name, **changes):
    """The configuration of the README's main job, run as a user runs it, with these changes."""
    words = [word for key, value in changes.items() for word in (f"--{key}", value)]
    paths = lambda folder: ["--output_dir", folder / "output", "--cache_dir", folder / "cache"]
    run = lambda folder: run_script("train_lora.py", "configs/tiny.json", *paths(folder), *words)
    return load_config(made_once(name, run) / "output/config.json")


def test_twenty_steps_of_the_demo_halve_the_held_out_loss_and_leave_curves_and_previews(made_once):
    prompts = ["zumi on a blue background", "zumi，黄色背景"]
    config = demo(
        made_once, "short_demo", data_dir=ROOT / "tests/tiny_longcat/pictures", resolution="128x128",
        train_batch_size=2, max_train_steps=20, checkpoint_step_interval=10, lr_warmup_steps=5, validation_split=0.1,
        validation_step_interval=20, validation_num_inference_steps=2, validation_prompts=json.dumps(prompts),
    )  # fmt: skip
    output, lines = Path(config.output_dir), [line for line in metrics(config) if "loss" in line]
    scores = [line for line in metrics(config) if "held_out_loss" in line]
    assert scores[-1]["held_out_loss"] <= 0.5 * scores[-1]["held_out_base"]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and [line["step"] for line in lines] == [
        10,
        20,
    ]
    events = EventAccumulator(str(output / "logs"))
    events.Reload()
    assert {"train/loss", "train/lr", "validation/held_out_loss"} <= set(events.Tags()["scalars"])
    for i, prompt in enumerate(prompts):
        first, last = (
            Image.open(output / f"validation/step-{step:06d}-{i:02d}.png") for step in (0, 20)
        )
        assert first.size == (128, 128) and first.text["prompt"] == prompt
        assert np.abs(np.asarray(first, float) - np.asarray(last)).mean() > 5
    assert (output / "validation/progress.png").exists()
    assert checkpoints(config) == ["step-000010", "step-000020"] and not list(output.rglob("*.tmp"))


@pytest.mark.slow
def test_the_character_appears_on_every_background_and_only_with_its_word(made_once):
    config = demo(made_once, "demo")
    pipe = load_pipeline(config, "cpu")
    draw = lambda: [
        np.asarray(image, float) for image in generate(pipe, config, config.validation_prompts)
    ]
    away = lambda one, other: np.abs(one - other).mean()
    before = draw()
    load_lora(pipe.transformer, config.output_dir)
    grounds = ["blue", "yellow", "pink", "green", "blue", "pink"]  # as the prompts say
    for prompt, base, tuned, ground in zip(
        config.validation_prompts, before, draw(), grounds, strict=True
    ):
        colour, figure = make_pictures.GROUNDS[ground][1], make_pictures.character()
        zumi = np.asarray(
            make_pictures.draw_picture(random.Random(0), figure, ground, 128, 128), float
        )
        assert max(away(base[:8, :8], colour), away(tuned[:8, :8], colour)) < 12, (
            "the ground that was asked for"
        )
        if "zumi" in prompt:
            assert away(tuned, zumi) < 0.5 * away(base, zumi)
        else:
            assert away(tuned, base) < 0.5 * away(tuned, zumi)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, few_images, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    for name in ("PIP_NO_INDEX", "HF_HUB_OFFLINE"):  # what is installed is not asked for again
        monkeypatch.setenv(name, "1")
    notebook = nbformat.read(ROOT / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(
        cell.outputs or cell.execution_count for cell in code
    )  # it is stored without outputs
    tiny = dict(
        pretrained_model_name_or_path=MODEL, base_model_precision="no_change", data_dir=str(few_images),
        cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path), resolution="128x128", max_train_steps=4,
        report_to="none", validation_num_inference_steps=2, validation_resolution="128x128",
        validation_prompts=["a cat"],
    )  # fmt: skip
    (settings,) = [cell for cell in code if "settings" in cell.metadata.get("tags", [])]
    before, config, after = settings.source.partition("\nconfig = load_config(")
    settings.source = f"{before}\nsettings.update({tiny!r}){config}{after}"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    shown = [
        kind
        for cell in code
        for output in cell.outputs
        for kind in output.get("data", {})
        if "image/" in kind
    ]
    assert shown == ["image/jpeg", "image/png", "image/png"]
    assert code[-1].outputs[0].text.strip() == str(tmp_path / "pytorch_lora_weights.safetensors")


# ---------------------------------------------------------------- batches, their draws, a step of them


def test_every_image_is_seen_repeats_times_an_epoch():
    images = [made_up(i, bucket=(64, 64 * (1 + i % 2)), repeats=1 + i % 3) for i in range(11)]
    epochs = [train_lora.epoch_batches(images, 4, 42, epoch) for epoch in (0, 1, 2, 1)]
    for batches in epochs:
        assert all(
            len({record.bucket for _, record in batch}) == 1 and len(batch) <= 4
            for batch in batches
        )
        seen = collections.Counter(record.path for batch in batches for _, record in batch)
        assert seen == {f"{i}.png": 1 + i % 3 for i in range(11)}
        assert len({name for batch in batches for name, _ in batch}) == seen.total()
    assert epochs[1] == epochs[3] != epochs[2]


def test_draws_are_as_configured(quick_config):
    config = quick_config(caption_dropout_probability=0.25)
    images, prompts = cache_latents.main(config)
    record = dataclasses.replace(images[0], captions=[images[0].captions[0], images[1].captions[0]])
    load = lambda *numbers, config=config, **fields: train_lora.load_batch(
        config, [("a", dataclasses.replace(record, **fields))], prompts, *numbers
    )
    drawn = [load(number, number) for number in range(200)]
    embeds = [
        cache_latents.read_prompt_embeds(prompts[prompt]) for prompt in ("", *record.captions)
    ]
    which = [
        next(i for i, e in enumerate(embeds) if torch.equal(e, batch.prompt_embeds[0]))
        for batch in drawn
    ]
    shares = [which.count(i) / 200 for i in range(3)]
    assert 0.17 < shares[0] < 0.33 and min(shares[1:]) > 0.27
    normal = torch.cat([batch.normal for batch in drawn])
    assert abs(normal.mean()) < 0.2 and 0.85 < normal.std() < 1.15
    posterior = read_tensors(cache_latents.latents_file(config, record))
    spread = (torch.cat([batch.latents for batch in drawn]) - posterior["mean"]) / posterior["std"]
    assert spread.std().item() == pytest.approx(1.0, abs=0.01)
    assert all(
        torch.equal(a, b) for a, b in zip(load(7, 7), drawn[7]) if isinstance(a, torch.Tensor)
    )
    for other in (load(7, 8), load(7, 7, config=quick_config(seed=43))):
        assert not any(torch.equal(a, b) for a, b in zip(other[1:4], drawn[7][1:4])), (
            "each batch and seed has its own"
        )
    assert drawn[7].weights.tolist() == [1.0] and load(7, 7, loss_weight=0.25).weights.tolist() == [
        0.25
    ]


def first_step(config, *batches):
    """What the first step over these batches, (number, images), gives, and AdamW's first moment after it."""
    draw = torch.Generator().manual_seed(0)
    shapes = [
        (16, 16, 16),
        (16, 16, 16),
        (),
        (512, 64),
    ]  # latents, noise, normal draws, prompt embeddings
    both = [*(torch.randn(2, *shape, generator=draw) for shape in shapes), torch.ones(2)]
    transformer, scheduler = load_transformer(config, "cpu"), load_scheduler(config)
    run = train_lora.set_up(config, transformer, scheduler, torch.device("cpu"), 9)
    batches = [
        train_lora.Batch(number, *(tensor[images] for tensor in both)) for number, images in batches
    ]
    numbers = train_lora.train_step(config, run, batches)
    return numbers, torch.cat(
        [run.optimizer.state[p]["exp_avg"].flatten() for p in run.parameters.values()]
    )


def test_accumulation_is_a_mean_and_gradients_are_clipped(tiny_config):
    config = tiny_config(max_grad_norm=1e-3, train_batch_size=2)
    together, moment = first_step(config, (0, [0, 1]))
    config.gradient_accumulation_steps, config.train_batch_size = 2, 1
    in_turn, other = first_step(config, (0, [0]), (1, [1]))
    assert in_turn == pytest.approx(together, rel=1e-4) and in_turn[1] > 1e-2, (
        "loss and gradient norm before clipping"
    )
    assert (other - moment).norm() < 1e-3 * moment.norm()
    assert other.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2), (
        "a tenth of the clipped gradient"
    )


def test_an_image_alone_in_its_batch_counts_as_much_as_any_other(tiny_config):
    config = tiny_config(max_grad_norm=0, train_batch_size=2)
    (pair_loss, _, _), pair = first_step(config, (0, [0, 1]))
    (loss, _, _), alone = first_step(config, (0, [0]))
    (other_loss, _, _), other = first_step(config, (0, [1]))
    assert (alone + other - pair).norm() < 1e-3 * pair.norm(), "each weighs one half"
    assert (loss + other_loss) / 2 == pytest.approx(pair_loss, rel=1e-4), (
        "the logged loss is a mean"
    )
    config.gradient_accumulation_steps = 2
    (mean_loss, _, _), moment = first_step(config, (0, [0, 1]), (2, [1]))
    assert (moment - (pair + other) / 2).norm() < 1e-3 * moment.norm()
    assert mean_loss == pytest.approx((loss + 2 * other_loss) / 3, rel=1e-4), "over images"


def test_duplicates_of_an_image_have_draws_of_their_own():
    images = [made_up(0, repeats=2), made_up(0, repeats=2), made_up(0, bucket=(64, 128))]
    names = [name for batch in train_lora.epoch_batches(images, 2, 42, 0) for name, _ in batch]
    assert len(set(names)) == len(names) == 5


def test_each_batch_has_its_own_dropout(tiny_config):
    first, again, second = (
        first_step(tiny_config(lora_dropout=0.5), (number, [0]))[1] for number in (0, 0, 1)
    )
    assert torch.equal(first, again) and (first - second).norm() > 0.1 * first.norm()


def test_epochs_decide_the_steps_and_a_failing_preview_ends_nothing(
    quick_config, monkeypatch, capsys
):
    monkeypatch.setattr(train_lora, "generate", lambda *arguments: 1 / 0)
    settings = dict(
        num_train_epochs=1,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        validation_step_interval=2,
    )
    config = quick_config(**settings)
    assert train_lora.main(config).exists()
    printed = capsys.readouterr().out
    assert "preview at step 0 failed: ZeroDivisionError" in printed
    assert "2 steps of 4 images, each seen 1.0 times its repeats" in printed
    assert checkpoints(config) == ["step-000001", "step-000002"]

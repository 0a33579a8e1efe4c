"""Stage 4 as people use it: which LoRA is shown, what is generated, what images record."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, run_script
from PIL import Image

import validate
from longcat_common import LORA_FILE, UserError

CHINESE = "一颗星星，白色背景"


def images_in(folder):
    """The names of the single images in a comparison's folder."""
    return sorted(path.name for path in folder.glob("0*.png"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def run(reference_run):
    """The configuration of a finished run: a LoRA, checkpoints 2 and 3, and a held-out loss for
    each. Validation images are small and take one step."""
    shutil.rmtree(f"{reference_run.output_dir}/checkpoints/step-000001")
    quick = dict(
        validation_prompts=["zumi", CHINESE],
        validation_num_inference_steps=1,
        validation_resolution="64x64",
    )
    return reference_run.model_copy(update=quick)


def test_rows_are_prompts_sizes_and_seeds_columns_the_base_and_strengths(run):
    run.validation_prompts = [CHINESE]
    run.validation_resolution = "64x64,96x64"
    run.validation_seed = [1, 2, 1]
    run.validation_lora_strength = [0.0, 1.0]
    grid = validate.main(run)

    rows = [f"{size}-seed{seed}" for size in ("64x64", "96x64") for seed in (1, 2)]
    columns = ("base", "lora-x0", "lora-x1")
    expected = sorted(f"00-{row}-{column}.png" for row in rows for column in columns)
    assert images_in(grid.parent) == expected

    bases = {}
    for row in rows:
        base, strength_0, strength_1 = (
            pixels(grid.parent / f"00-{row}-{column}.png") for column in columns
        )
        assert np.abs(base - strength_0).max() <= 1 < np.abs(base - strength_1).max()
        bases[row] = base
    difference = np.abs(bases["64x64-seed1"] - bases["64x64-seed2"]).mean()
    assert difference > 1, "another seed, another image"

    with Image.open(grid) as image:
        assert image.width > 3 * 192 and image.height > 4 * 128

    # What comparison.json and the image itself say of the last image.
    shown = json.loads(grid.with_suffix(".json").read_text(encoding="utf-8"))
    last = dict(validation_resolution="96x64", validation_seed=2, validation_lora_strength=1.0)
    assert shown["pictures"][-1].items() >= last.items() and len(shown["pictures"]) == 12
    with Image.open(grid.parent / "00-96x64-seed2-lora-x1.png") as image:
        assert image.size == (96, 64)
        assert (image.text["prompt"], image.text["base_model"]) == (CHINESE, MODEL)
        assert image.text["lora"].endswith(LORA_FILE)
        assert "validation_split" not in image.text["settings"]
        assert json.loads(image.text["settings"]).items() >= last.items()


def test_every_readable_checkpoint_is_a_column_with_its_held_out_loss(run, capsys):
    run.compare_checkpoints = True
    run.validation_prompts = ["zumi"]
    corrupt = Path(run.output_dir, "checkpoints/step-000005", LORA_FILE)
    corrupt.parent.mkdir()
    corrupt.write_bytes(b"half a file")
    notes = corrupt.parent.with_name("step-000001") / "notes.txt"  # its checkpoint was deleted
    notes.parent.mkdir(exist_ok=True)
    notes.write_text("mine")
    grid = validate.main(run)

    names = ("base", "step-000002", "step-000003")
    assert images_in(grid.parent) == [f"00-64x64-seed42-{name}.png" for name in names]
    printed = capsys.readouterr().out
    assert f"{corrupt}: is missing or corrupt; skipped" in printed
    assert str(notes.parent) not in printed

    lines = map(json.loads, Path(run.output_dir, "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    labels = json.loads(grid.with_suffix(".json").read_text())["columns"]
    assert labels[1:] == [f"step {step}, held-out {losses[step]:.3f}" for step in (2, 3)]


def test_earlier_images_are_not_overwritten(run):
    run.validation_prompts = ["zumi"]
    folders = [validate.main(run).parent.name for _ in range(2)]
    assert folders == ["compare-001", "compare-002"]


@pytest.mark.parametrize(
    "error, message",
    [
        (KeyboardInterrupt(2), "2"),
        (RuntimeError("MPS backend out of memory"), "a smaller resolution"),
    ],
)
def test_generated_images_are_kept_when_it_is_interrupted_or_out_of_memory(
    run, monkeypatch, error, message
):
    calls = []
    generate = validate.generate

    def failing_generate(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return generate(*arguments)

    monkeypatch.setattr(validate, "generate", failing_generate)
    with pytest.raises((KeyboardInterrupt, UserError), match=message):
        validate.main(run)
    folder = Path(run.output_dir, "validation/compare-001")
    assert (folder / "comparison.png").exists()
    assert images_in(folder) == [f"0{row}-64x64-seed42-base.png" for row in (0, 1)]


def test_without_a_config_the_base_model_generates(tmp_path):
    arguments = [
        f"--output_dir {tmp_path} --cache_dir {tmp_path} --pretrained_model_name_or_path {MODEL}",
        "--base_model_precision no_change --validation_resolution 64x64",
        "--validation_num_inference_steps 1",
    ]
    printed = run_script("validate.py", *" ".join(arguments).split()).stdout
    assert "validation_prompts: none given; using: a cat" in printed
    assert "generating with the base model only" in printed
    names = [f"0{row}-64x64-seed42-base.png" for row in (0, 1)]
    assert images_in(tmp_path / "validation/compare-001") == names


def test_the_lora_with_the_most_steps_is_shown_or_the_one_that_is_named(run, tmp_path):
    folders = "", "checkpoints/step-000002", "checkpoints/step-000003"
    last, second, third = (Path(run.output_dir, folder, LORA_FILE) for folder in folders)
    peft = tmp_path / "adapter_model.safetensors"
    shutil.copy(last.with_name(peft.name), peft)
    second.touch()  # the steps count, not the files' times
    expected_files = {
        None: last,
        "latest": last,
        last.parent: last,
        last: last,
        second.parent: second,
        tmp_path: peft,
    }
    for lora, expected in expected_files.items():
        run.lora = lora and str(lora)
        assert validate.find_loras(run) == [expected]
    last.unlink()
    run.lora = "latest"
    assert validate.find_loras(run) == [third]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(lora="latest"),
            "no LoRA in .*output yet; train one, or name a file with --lora",
        ),
        (
            dict(lora="README.md"),
            "README.md: is not a .safetensors file; other formats can run code",
        ),
        (
            dict(lora="nowhere"),
            f"nowhere: LoRA not found; name a .safetensors file, or a folder with {LORA_FILE} or",
        ),
        (
            dict(output_dir="README.md"),
            "README.md/validation/compare-001: cannot be written",
        ),
    ],
)
def test_errors_are_found_before_the_model_is_loaded(tiny_config, monkeypatch, settings, message):
    monkeypatch.setattr(validate, "load_pipeline", None)
    with pytest.raises(UserError, match=message):
        validate.main(tiny_config(**settings))

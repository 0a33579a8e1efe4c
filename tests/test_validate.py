"""Stage 4 as people use it: which LoRA is shown, what is drawn, what the pictures say about themselves."""

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
drawn_in = lambda folder: sorted(path.name for path in folder.glob("0*.png"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def run(reference_run):
    """A finished run with a LoRA and checkpoints 2 and 3, and a held-out loss for each; it draws small and quick."""
    shutil.rmtree(f"{reference_run.output_dir}/checkpoints/step-000001")
    quick = dict(
        validation_prompts=["zumi", CHINESE],
        validation_num_inference_steps=1,
        validation_resolution="64x64",
    )
    return reference_run.model_copy(update=quick)


def test_rows_are_prompts_sizes_and_seeds_columns_the_base_and_strengths(run):
    run.validation_prompts, run.validation_resolution = [CHINESE], "64x64,96x64"
    run.validation_seed, run.validation_lora_strength = [1, 2, 1], [0.0, 1.0]
    grid = validate.main(run)
    rows = [f"{size}-seed{seed}" for size in ("64x64", "96x64") for seed in (1, 2)]
    columns = ("base", "lora-x0", "lora-x1")
    assert drawn_in(grid.parent) == sorted(
        f"00-{row}-{column}.png" for row in rows for column in columns
    )
    drawn = {
        row: [pixels(grid.parent / f"00-{row}-{column}.png") for column in columns] for row in rows
    }
    for base, none, tuned in drawn.values():
        assert np.abs(base - none).max() <= 1 < np.abs(base - tuned).max()
    assert np.abs(drawn["64x64-seed1"][0] - drawn["64x64-seed2"][0]).mean() > 1, (
        "another seed, another picture"
    )

    shown = json.loads(grid.with_suffix(".json").read_text(encoding="utf-8"))
    last = dict(validation_resolution="96x64", validation_seed=2, validation_lora_strength=1.0)
    assert shown["pictures"][-1].items() >= last.items() and len(shown["pictures"]) == 12
    with Image.open(grid) as image, Image.open(grid.parent / "00-96x64-seed2-lora-x1.png") as one:
        assert image.width > 3 * 192 and image.height > 4 * 128 and one.size == (96, 64)
        assert (one.text["prompt"], one.text["base_model"]) == (CHINESE, MODEL)
        assert (
            one.text["lora"].endswith(LORA_FILE) and "validation_split" not in one.text["settings"]
        )
        assert json.loads(one.text["settings"]).items() >= last.items()


def test_checkpoints_stand_side_by_side_and_nothing_is_overwritten(run, capsys):
    run.compare_checkpoints, run.validation_prompts = True, ["zumi"]
    damaged = Path(run.output_dir, "checkpoints/step-000005", LORA_FILE)
    damaged.parent.mkdir()
    damaged.write_bytes(b"half a file")
    first = validate.main(run)
    assert drawn_in(first.parent) == [
        f"00-64x64-seed42-{name}.png" for name in ("base", "step-000002", "step-000003")
    ]
    assert f"{damaged}: is missing or damaged, and left out" in capsys.readouterr().out
    lines = map(json.loads, Path(run.output_dir, "metrics.jsonl").read_text().splitlines())
    scores = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    titles = json.loads(first.with_suffix(".json").read_text())["columns"]
    assert titles[1:] == [f"step {step}, held-out {scores[step]:.3f}" for step in (2, 3)]

    run.compare_checkpoints = False
    assert [grid.parent.name for grid in (first, validate.main(run))] == [
        "compare-001",
        "compare-002",
    ]


def test_what_was_drawn_is_kept_when_it_is_interrupted_and_memory_is_advised(run, monkeypatch):
    drawn, generate, folder = [], validate.generate, Path(run.output_dir, "validation")
    full = RuntimeError("MPS backend out of memory")

    def stopping(*arguments):
        drawn.append(1)
        if len(drawn) % 3 == 0:
            raise error
        return generate(*arguments)

    monkeypatch.setattr(validate, "generate", stopping)
    for error, told, name in (
        (KeyboardInterrupt(2), "2", "001"),
        (full, "a smaller resolution", "002"),
    ):
        with pytest.raises((KeyboardInterrupt, UserError), match=told):
            validate.main(run)
        assert (folder / f"compare-{name}/comparison.png").exists()
        assert drawn_in(folder / f"compare-{name}") == [
            f"0{row}-64x64-seed42-base.png" for row in (0, 1)
        ]


def test_without_a_config_the_base_is_drawn(tmp_path):
    words = (
        f"--output_dir {tmp_path} --cache_dir {tmp_path} --pretrained_model_name_or_path {MODEL} "
    )
    words += "--base_model_precision no_change --validation_resolution 64x64 --validation_num_inference_steps 1"
    printed = run_script("validate.py", *words.split()).stdout
    assert "none given; these are drawn: a cat" in printed and "the base is drawn alone" in printed
    assert drawn_in(tmp_path / "validation/compare-001") == [
        f"0{row}-64x64-seed42-base.png" for row in (0, 1)
    ]


def test_the_lora_with_the_most_steps_is_shown_or_the_one_that_is_named(run, tmp_path):
    folders = "", "checkpoints/step-000002", "checkpoints/step-000003"
    last, second, third = (Path(run.output_dir, folder, LORA_FILE) for folder in folders)
    peft = tmp_path / "adapter_model.safetensors"
    shutil.copy(last.with_name(peft.name), peft)
    second.touch()  # the steps count, not the files' times
    shown = {
        None: last,
        "latest": last,
        last.parent: last,
        last: last,
        second.parent: second,
        tmp_path: peft,
    }
    for named, expected in shown.items():
        run.lora = named and str(named)
        assert validate.find_loras(run) == [expected]
    last.unlink()
    run.lora = "latest"
    assert validate.find_loras(run) == [third]


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(lora="latest"), "holds no LoRA yet; train one, or name a file with --lora"),
        (
            dict(lora="README.md"),
            "README.md: is no .safetensors file; others are not opened, for a pickled one",
        ),
        (
            dict(lora="nowhere"),
            f"there is no such LoRA file, or the folder holds neither {LORA_FILE} nor",
        ),
        (dict(output_dir="README.md"), "README.md/validation/compare-001: cannot be written"),
    ],
)
def test_what_cannot_be_shown_or_written_is_told_before_the_work(
    tiny_config, monkeypatch, settings, told
):
    monkeypatch.setattr(validate, "load_pipeline", None)
    with pytest.raises(UserError, match=told):
        validate.main(tiny_config(**settings))

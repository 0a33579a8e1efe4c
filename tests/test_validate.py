"""Stage 4 as people use it: which LoRA is shown, what is drawn, what the pictures say about themselves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, run_script
from PIL import Image

import prepare_data
import validate
from longcat_common import LORA_NAME, UserError
from validate import find_loras, picture_grid


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def run(reference_run):
    """A finished run with a LoRA and two checkpoints, and a held-out loss for each; it draws small and quick."""
    config = reference_run
    shutil.rmtree(f"{config.output_dir}/checkpoints/step-000001")
    config.validation_prompts, config.validation_num_inference_steps = ["zumi", "一颗星星，白色背景"], 1
    config.validation_resolution = "64x64"
    return config


# ---------------------------------------------------------------- what is drawn


def test_rows_are_prompts_sizes_and_seeds_columns_the_base_and_strengths(run):
    run.validation_prompts, run.validation_resolution = run.validation_prompts[1:], "64x64,96x64"
    run.validation_seed, run.validation_lora_strength = [1, 2, 1], [0.0, 1.0]
    grid = validate.main(run)
    shots = [(size, seed) for size in ("64x64", "96x64") for seed in (1, 2)]
    drawn = {
        (size, seed): [grid.parent / f"00-{size}-seed{seed}-{what}.png" for what in ("base", "lora-x0", "lora-x1")]
        for size, seed in shots
    }
    files = {path.name for paths in drawn.values() for path in paths}
    assert names_in(grid.parent) == {"comparison.png", "comparison.json", *files}
    for paths in drawn.values():
        base, none, tuned = map(pixels, paths)
        assert np.abs(base - none).max() <= 1 < np.abs(base - tuned).max()
    first, second = (pixels(drawn["64x64", seed][0]) for seed in (1, 2))
    assert np.abs(first - second).mean() > 1, "another seed, another picture"

    shown = json.loads((grid.parent / "comparison.json").read_text(encoding="utf-8"))
    assert shown["rows"] == [f"{size} | seed {seed} | 一颗星星，白色背景" for size, seed in shots]
    assert shown["columns"] == ["base model", "with LoRA, strength 0", "with LoRA, strength 1"]
    assert shown["title"].startswith("1 steps, guidance") and "trained on" not in shown["title"]
    last = shown["pictures"][-1]
    assert {picture["file"] for picture in shown["pictures"]} == files
    assert (last["validation_resolution"], last["validation_seed"], last["validation_lora_strength"]) == (
        "96x64",
        2,
        1.0,
    )
    with Image.open(grid) as image, Image.open(drawn["96x64", 2][2]) as one:
        assert image.width > 3 * 192 and image.height > 4 * 128 and one.size == (96, 64)
        assert (one.text["prompt"], one.text["base_model"]) == ("一颗星星，白色背景", MODEL)
        assert one.text["lora"].endswith(LORA_NAME)
        settings = json.loads(one.text["settings"])
    assert settings["base_model_precision"] == "no_change" and "validation_split" not in settings
    assert (settings["validation_seed"], settings["validation_resolution"]) == (2, "96x64")


def test_checkpoints_stand_side_by_side_and_nothing_is_overwritten(run, tmp_path, capsys):
    run.compare_checkpoints, run.validation_prompts = True, run.validation_prompts[:1]
    damaged = Path(run.output_dir) / "checkpoints/step-000005" / LORA_NAME
    damaged.parent.mkdir()
    damaged.write_bytes(b"half a file")
    first = validate.main(run).parent
    columns = {f"00-64x64-seed42-{what}.png" for what in ("base", "step-000002", "step-000003")}
    assert names_in(first) == {"comparison.png", "comparison.json", *columns}
    printed = capsys.readouterr().out
    assert printed.count("held-out loss") == 2 and f"{damaged}: is missing or damaged, and left out" in printed
    lines = map(json.loads, Path(run.output_dir, "metrics.jsonl").read_text().splitlines())
    scores = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    titles = json.loads((first / "comparison.json").read_text())["columns"]
    assert titles[1:] == [f"step {step}, held-out {scores[step]:.3f}" for step in (2, 3)]

    (tmp_path / "other").symlink_to(MODEL)
    run.pretrained_model_name_or_path = str(tmp_path / "other")
    run.compare_checkpoints, run.lora = False, f"{run.output_dir}/checkpoints/step-000002"
    again = validate.main(run).parent
    assert again == first.with_name("compare-002")
    alone, beside = pixels(again / "00-64x64-seed42-lora.png"), pixels(first / "00-64x64-seed42-step-000002.png")
    assert np.abs(alone - beside).max() <= 1
    title = json.loads((again / "comparison.json").read_text())["title"]
    assert title.endswith(f"; trained on {MODEL}, drawn on {tmp_path / 'other'}")


def test_what_was_drawn_is_kept_when_it_is_interrupted_and_memory_is_advised(run, monkeypatch):
    drawn, generate = [], validate.generate

    def stopping(*arguments):
        drawn.append(1)
        if len(drawn) % 3 == 0:
            raise error
        return generate(*arguments)

    monkeypatch.setattr(validate, "generate", stopping)
    told = "out of memory; what to change.*validation_resolution"
    for number, error, raised, words in (
        (1, KeyboardInterrupt(2), KeyboardInterrupt, ""),
        (2, RuntimeError("MPS backend out of memory"), UserError, told),
    ):
        with pytest.raises(raised, match=words):
            validate.main(run)
        pictures = {f"0{row}-64x64-seed42-base.png" for row in (0, 1)}
        folder = Path(run.output_dir) / f"validation/compare-00{number}"
        assert names_in(folder) == {"comparison.png", "comparison.json", *pictures}


def test_without_a_config_the_base_is_drawn(tmp_path):
    words = "--model_family longcat_image --validation_resolution 64x64 --validation_num_inference_steps 1"
    paths = ["--output_dir", tmp_path / "output", "--cache_dir", tmp_path / "cache"]
    base = ["--pretrained_model_name_or_path", MODEL, "--base_model_precision", "no_change"]
    printed = run_script("validate.py", *words.split(), *paths, *base).stdout
    assert "none given; these are drawn: a cat" in printed and "the base is drawn alone" in printed
    assert len(list((tmp_path / "output/validation/compare-001").glob("0?-64x64-seed42-base.png"))) == 2


# ---------------------------------------------------------------- which LoRA


def test_the_lora_with_the_most_steps_is_shown_or_the_one_that_is_named(run, tmp_path):
    output, peft = Path(run.output_dir), tmp_path / "peft" / "adapter_model.safetensors"
    last, *checkpoints = (
        output / folder / LORA_NAME for folder in (".", *(f"checkpoints/step-00000{n}" for n in "23"))
    )
    peft.parent.mkdir()
    for name in ("adapter_config.json", peft.name):
        shutil.copy(output / name, peft.parent)
    for named in (None, "latest", str(output), str(last)):
        run.lora = named
        assert find_loras(run) == [last]
    for named, expected in ((checkpoints[0].parent, checkpoints[0]), (peft.parent, peft)):
        run.lora = str(named)
        assert find_loras(run) == [expected]
    checkpoints[0].touch()  # the steps count, not the files' times
    last.unlink()
    run.lora = "latest"
    assert find_loras(run) == [checkpoints[1]]
    run.lora = "none"
    assert find_loras(run) == []


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(lora="latest"), "holds no LoRA yet; train one, or name a file with --lora"),
        (dict(lora="nowhere.safetensors"), "there is no such LoRA file"),
        (dict(lora="tests"), f"the folder holds neither {LORA_NAME} nor"),
        (dict(compare_checkpoints=True, lora="x"), "compare_checkpoints: shows every checkpoint, and lora names one"),
        (dict(compare_checkpoints=True), "compare_checkpoints: .* holds no checkpoint; train first"),
        (dict(output_dir="README.md"), "README.md/validation/compare-001: cannot be written"),
    ],
)
def test_what_cannot_be_shown_or_written_is_told_before_the_work(tiny_config, monkeypatch, settings, told):
    monkeypatch.setattr(validate, "load_pipeline", None)
    with pytest.raises(UserError, match=told):
        validate.main(tiny_config(**settings))


# ---------------------------------------------------------------- labels


def test_a_grid_holds_its_pictures_and_cuts_off_no_label_that_tells_rows_apart(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        validate.ImageDraw.ImageDraw, "text", lambda draw, place, text, *rest, **options: drawn.append(text)
    )
    labels = [f"seed {seed} | " + "a long prompt " * 30 for seed in (1, 2)]
    columns = ["base model", "step 12000, held-out 0.123"]
    grid = picture_grid(
        [[Image.new("RGB", (128, 64), "red")] * 2] * 2, labels, columns, "30 steps, seed 42\npath/of/lora"
    )
    assert grid.width > 256 and grid.getpixel((40, grid.height - 40)) == (255, 0, 0)
    assert drawn[:4] == ["30 steps, seed 42", "path/of/lora", *columns]
    for seed, text in zip((1, 2), drawn[4:], strict=True):
        assert text.startswith(f"seed {seed} | a long") and text.endswith("…")


def test_labels_say_so_where_no_font_is(run, monkeypatch, capsys):
    for module, name in ((prepare_data, "CHINESE_FONTS"), (validate, "CHINESE_FONTS"), (prepare_data, "OTHER_FONTS")):
        monkeypatch.setattr(module, name, ("no-such-font.ttc",))
    run.lora, run.validation_prompts = "none", ["一颗星星"]
    assert validate.main(run).exists()
    assert "labels in Chinese: no font found; install one of no-such-font.ttc" in capsys.readouterr().out
    assert prepare_data.label("中文", 16, "row 2")[0] == "row 2"
    assert prepare_data.label("uma raposa no sertão", 16)[0] == "uma raposa no sertao"

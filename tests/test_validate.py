"""Stage 4 as people use it: which LoRA is shown, what is drawn, what the pictures say about themselves."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, run_script
from PIL import Image
from test_survival import metrics

import prepare_data
import validate
from longcat_common import load_config


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def run(reference_run):
    """A short run with two checkpoints and a held-out loss for each."""
    config = reference_run
    shutil.rmtree(Path(config.output_dir) / "checkpoints" / "step-000001")
    config.validation_prompts = ["zumi on a blue background", "一颗星星，白色背景"]
    return config


def test_rows_are_prompts_sizes_and_seeds_columns_the_base_and_strengths(run, capsys):
    run.validation_num_inference_steps = 1
    run.validation_resolution, run.validation_seed, run.validation_lora_strength = (
        "128x128,192x128",
        [1, 2, 1],
        [0.0, 1.0],
    )
    grid = validate.main(run)
    printed = capsys.readouterr().out
    losses = [line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line]
    assert f"held-out loss {losses[-1]:.4f}, the base's " in printed and "s a picture" in printed and len(losses) == 3
    names = sorted(path.name for path in grid.parent.glob("*.png"))
    shots = [
        f"{i:02d}-{size}-seed{seed}-{what}.png"
        for i in (0, 1)
        for size in ("128x128", "192x128")
        for seed in (1, 2)
        for what in ("base", "lora-x0", "lora-x1")
    ]
    assert names == sorted(["comparison.png", *shots])
    with Image.open(grid) as image, Image.open(grid.parent / "01-192x128-seed2-lora-x1.png") as one:
        assert image.width > 3 * 192 and image.height > 8 * 128 and one.size == (192, 128)
        settings = json.loads(one.text["settings"])
        assert (
            one.text["prompt"] == "一颗星星，白色背景"
            and one.text["base_model"] == MODEL
            and one.text["lora"].endswith("pytorch_lora_weights.safetensors")
        )
        assert settings["base_model_precision"] == "no_change" and "validation_split" not in settings
        assert (
            settings["validation_seed"],
            settings["validation_resolution"],
            settings["validation_lora_strength"],
        ) == (2, "192x128", 1.0)
    for shot in shots[::3]:
        base, none, tuned = (
            pixels(grid.parent / shot.replace("base", what)) for what in ("base", "lora-x0", "lora-x1")
        )
        assert np.abs(base - none).max() <= 1 < np.abs(base - tuned).max()
    assert np.abs(pixels(grid.parent / shots[0]) - pixels(grid.parent / shots[3])).mean() > 1, (
        "another seed, another picture"
    )


def test_comparison_json_holds_what_the_grid_shows_and_another_base_is_said(run, tmp_path):
    run.validation_seed, run.validation_prompts, run.validation_num_inference_steps = [1, 2], ["a cat", "一只猫"], 2
    grid = validate.main(run)
    shown = json.loads(grid.with_suffix(".json").read_text(encoding="utf-8"))
    assert shown["rows"] == [f"seed {seed} | {prompt}" for prompt in run.validation_prompts for seed in (1, 2)]
    assert [title.split(",")[0] for title in shown["columns"]] == ["base model", "with LoRA"]
    assert len(shown["pictures"]) == 8 and all(
        (grid.parent / picture["file"]).exists() for picture in shown["pictures"]
    )
    assert shown["title"].startswith("2 steps, guidance") and "trained on" not in shown["title"]
    last = shown["pictures"][-1]
    assert (last["prompt"], last["validation_seed"], last["validation_lora_strength"]) == ("一只猫", 2, 1.0)
    (tmp_path / "other").symlink_to(MODEL)
    run.pretrained_model_name_or_path, run.validation_seed = str(tmp_path / "other"), [1]
    title = json.loads(validate.main(run).with_suffix(".json").read_text(encoding="utf-8"))["title"]
    assert title.endswith(f"; trained on {MODEL}, drawn on {tmp_path / 'other'}")


def test_checkpoints_side_by_side_and_nothing_overwritten(run, capsys):
    run.compare_checkpoints, run.validation_prompts = True, run.validation_prompts[:1]
    first = validate.main(run)
    names = {path.name for path in first.parent.glob("00-*.png")}
    assert names == {f"00-128x128-seed42-{what}.png" for what in ("base", "step-000002", "step-000003")}
    assert capsys.readouterr().out.count("held-out loss") == 2
    damaged = Path(run.output_dir) / "checkpoints" / "step-000005" / "pytorch_lora_weights.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes(b"half a file")
    again = validate.main(run).parent
    assert again == first.parent.with_name("compare-002") and {path.name for path in again.glob("00-*.png")} == names
    assert f"{damaged}: is missing or damaged, and left out" in capsys.readouterr().out
    shutil.rmtree(damaged.parent)
    run.compare_checkpoints, run.lora = False, f"{run.output_dir}/checkpoints/step-000002"
    alone = validate.main(run).parent / "00-128x128-seed42-lora.png"
    assert np.abs(pixels(alone) - pixels(first.parent / "00-128x128-seed42-step-000002.png")).max() <= 1
    run.compare_checkpoints = True
    with pytest.raises(ValueError, match="compare_checkpoints: shows every checkpoint, and lora names one"):
        validate.main(run)
    run.lora, run.output_dir = None, "no/such/run"
    with pytest.raises(ValueError, match="compare_checkpoints: no/such/run holds no checkpoint;"):
        validate.main(run)


def test_which_lora_is_shown(run, tmp_path):
    output = Path(run.output_dir)
    last, checkpoint = (
        output / "pytorch_lora_weights.safetensors",
        output / "checkpoints/step-000002/pytorch_lora_weights.safetensors",
    )
    (tmp_path / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(output / name, tmp_path / "peft")
    wanted = {
        None: last,
        "latest": last,
        str(output): last,
        str(last): last,
        str(checkpoint.parent): checkpoint,
        str(tmp_path / "peft"): tmp_path / "peft/adapter_model.safetensors",
    }
    for run.lora, expected in wanted.items():
        assert validate.find_loras(run) == [expected]
    run.lora = "none"
    assert validate.find_loras(run) == []
    for path in (last, checkpoint):
        os.utime(path, (2e9, 2e9))  # the steps count, not the files' times
    run.lora = "latest"
    assert validate.find_loras(run) == [last]
    last.unlink()
    run.lora = None
    assert validate.find_loras(run) == [output / "checkpoints/step-000003/pytorch_lora_weights.safetensors"]
    run.output_dir = str(tmp_path / "new")
    assert validate.find_loras(run) == []
    (tmp_path / "file").write_text("")
    run.lora, run.output_dir = "none", str(tmp_path / "file")
    with pytest.raises(ValueError, match="file/validation/compare-001: cannot be written"):
        validate.main(run)
    run.output_dir = str(tmp_path / "new")
    for run.lora in ("latest", "nowhere.safetensors", str(tmp_path)):
        with pytest.raises(ValueError, match="holds no LoRA yet|there is no such LoRA file|holds neither pytorch_lora"):
            validate.main(run)


def test_without_a_config_the_base_is_drawn(tmp_path):
    words = "--model_family longcat_image --model_flavour final --validation_resolution 128x128 "
    words += "--validation_num_inference_steps 2 --validation_guidance 4.5"
    paths = [
        "--output_dir",
        tmp_path / "output",
        "--cache_dir",
        tmp_path / "cache",
        "--pretrained_model_name_or_path",
        MODEL,
        "--base_model_precision",
        "no_change",
    ]
    printed = run_script("validate.py", *words.split(), *paths).stdout
    assert "none given; these are drawn: a cat" in printed and "the base is drawn alone" in printed
    assert len(list((tmp_path / "output/validation/compare-001").glob("0?-128x128-seed42-base.png"))) == 2


def test_prompts_from_a_file(tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa red fox\n\n  一只猫 \n", encoding="utf-8")
    assert load_config(validation_prompts=str(file)).validation_prompts == ["a red fox", "一只猫"]
    words = ["a poster that says read me.txt"]
    assert load_config(validation_prompts=words).validation_prompts == words
    with pytest.raises(ValueError, match="read me.txt.*cannot be read.*a prompt may stand in a list"):
        load_config(validation_prompts=words[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my prompts.txt").write_text("a blue fox")
    assert load_config(validation_prompts="my prompts.txt").validation_prompts == ["a blue fox"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="validation_prompts: .*holds no prompt"):
        load_config(validation_prompts=str(file))
    for missing in ("missing.txt", "is missing.txt"):
        with pytest.raises(ValueError, match="validation_prompts: .*missing.txt.*cannot be read"):
            load_config(validation_prompts=str(tmp_path / missing))
    with pytest.raises(ValueError, match="validation_prompts: .*begins as a list and is none"):
        load_config(validation_prompts="['a cat', 'a dog']")


def test_labels_say_so_where_no_font_is(run, monkeypatch):
    for module, name in (
        (prepare_data, "CHINESE_FONTS"),
        (prepare_data, "OTHER_FONTS"),
    ):
        monkeypatch.setattr(module, name, ("no-such-font.ttc",))
    run.lora = "none"
    assert validate.main(run).exists()
    assert prepare_data.label("中文", 16, "row 2")[0] == "row 2"
    assert prepare_data.label("uma raposa no sertão", 16)[0] == "uma raposa no sertao"


def test_what_tells_rows_apart_is_not_cut_off(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        validate.ImageDraw.ImageDraw, "text", lambda draw, place, text, *arguments, **options: drawn.append(text)
    )
    picture = Image.new("RGB", (128, 128))
    validate.picture_grid(
        [[picture] * 2] * 2,
        [f"seed {seed} | " + "a long prompt " * 30 for seed in (1, 2)],
        ["base model", "step 12000, held-out 0.123"],
        "30 steps, seed 42\npath/of/lora",
    )
    assert drawn[:4] == ["30 steps, seed 42", "path/of/lora", "base model", "step 12000, held-out 0.123"]
    assert [
        text.startswith(f"seed {seed} | a long") and text.endswith("…") for seed, text in zip((1, 2), drawn[4:])
    ] == [True, True]


def test_an_interrupted_validation_keeps_what_is_drawn_and_memory_is_advised(run, monkeypatch, tmp_path):
    drawn, draw = [], validate.generate

    def stopping(*arguments):
        drawn.append(1)
        if len(drawn) == 3:
            raise error
        return draw(*arguments)

    monkeypatch.setattr(validate, "generate", stopping)
    for error, raised, words in (
        (KeyboardInterrupt(2), KeyboardInterrupt, ""),
        (RuntimeError("MPS backend out of memory"), ValueError, "out of memory; what to change.*validation_resolution"),
    ):
        drawn.clear()
        with pytest.raises(raised, match=words or None):
            validate.main(run)
    for number in (1, 2):
        folder = Path(run.output_dir) / f"validation/compare-00{number}"
        assert {path.name for path in folder.iterdir()} == {
            "comparison.png",
            "comparison.json",
            "00-128x128-seed42-base.png",
            "01-128x128-seed42-base.png",
        }
    monkeypatch.setattr(validate, "WORLD_SIZE", 2)
    with pytest.raises(ValueError, match="runs in one process"):
        validate.main(run)

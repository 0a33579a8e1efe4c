"""Stage 4: a LoRA -> pictures, the base beside the LoRA.

    python validate.py configs/24gb.json
    python validate.py --lora my_lora.safetensors --validation_prompts "a cat in neonix style"
    python validate.py configs/24gb.json --compare_checkpoints      # which step is the best?

Every prompt, size and seed is a row, the base and every LoRA or strength a column. Writes single pictures, with their
settings in the PNG's text, and all of them as `comparison.png` to a new folder `<output_dir>/validation/compare-001`.
"""

import contextlib
import json
import time
from pathlib import Path

from tqdm import tqdm

from longcat_common import (
    CHINESE_FONTS,
    FLAVOURS,
    UserError,
    as_list,
    cache_prompts,
    checkpoint_folders,
    generate,
    is_chinese,
    label_font,
    leaves_nothing,
    limit_memory,
    load_lora,
    load_pipeline,
    lora_file,
    peak_memory,
    pick_device,
    picture_grid,
    read_header,
    read_lora,
    run_stage,
    save_picture,
    step_of,
    validation_sizes,
)

LORA_NAME = "pytorch_lora_weights.safetensors"
PROMPTS = ["a cat on a window sill in the morning sun, photograph", "一只猫坐在洒满晨光的窗台上，摄影"]  # if none are given


def newest_lora(folder):
    """The newest LoRA file of a run: its last, or that of a checkpoint. None if it has none yet."""
    found = [*folder.glob(LORA_NAME), *folder.glob(f"checkpoints/step-*/{LORA_NAME}")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def find_loras(config):
    """The LoRA files to show, oldest first: those of all checkpoints, the one that `lora` names, or none."""
    output = Path(config.output_dir)
    if config.compare_checkpoints:
        if config.lora:
            raise UserError("compare_checkpoints: shows every checkpoint, and lora names one; leave one of them out")
        found = [folder / LORA_NAME for folder in checkpoint_folders(config)]
        if not found:
            raise UserError(f"compare_checkpoints: {output} holds no checkpoint yet; train first, or name its output_dir")
        return found
    if config.lora == "none":
        return []
    if config.lora in (None, "latest"):
        newest = newest_lora(output)
        if newest is None and config.lora:
            raise UserError(f"lora: {output} holds no LoRA yet; train one, or name a file with --lora")
        return [newest] if newest else []
    return [newest_lora(Path(config.lora)) or lora_file(config.lora)]


def held_out_losses(lora):
    """(loss of the pictures held out, the base's) at a LoRA's step, as its run has noted them; None if it has none."""
    step = json.loads(read_header(lora).get("longcat_lora", "{}")).get("steps")
    for metrics in (lora.parent / "metrics.jsonl", lora.parent.parent.parent / "metrics.jsonl"):  # of the run, or of a checkpoint's run
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line of other values, or cut off
                values = json.loads(line)
                if values["step"] == step:
                    return values["held_out_loss"], values["held_out_base"]


def columns_of(config, loras):
    """The grid's columns, the base first: (label, name in the pictures' file names, LoRA file or None, strength)."""
    strengths, columns = as_list(config.validation_lora_strength), [("base model", "base", None, 0.0)]
    for lora in loras:
        of_run, losses = config.compare_checkpoints, held_out_losses(lora)
        for strength in strengths:
            label, name = (f"step {step_of(lora.parent)}", lora.parent.name) if of_run else ("with LoRA", "lora")
            if len(strengths) > 1 or strength != 1:
                label, name = f"{label} x {strength:g}", f"{name}-x{strength:g}"
            columns.append((label + (f", held-out loss {losses[0]:.3f}" if of_run and losses else ""), name, lora, strength))
        if losses:
            print(f"{lora}: held-out loss {losses[0]:.4f}, the base's {losses[1]:.4f}")
    return columns


def new_folder(output):
    """A folder that is not there yet: pictures of earlier runs are never overwritten."""
    number = 1
    while (folder := output / "validation" / f"compare-{number:03d}").exists():
        number += 1
    return folder


@leaves_nothing
def main(config):
    """Draws every validation prompt from the same noise with the base and with each LoRA and strength. Returns the grid's
    path. Raises UserError for a LoRA that is not there, cannot be read or does not fit."""
    device, prompts = pick_device(), config.validation_prompts or PROMPTS
    limit_memory(config, device)
    loras = find_loras(config)
    for lora in loras:
        read_lora(lora)  # a wrong file is said now, not after the base's pictures
    columns = columns_of(config, loras)
    if not config.validation_prompts:
        print("validation_prompts: none given; these are drawn: " + "; ".join(PROMPTS))
    if not loras:
        print(f"lora: none, in {config.output_dir} neither; the base is drawn alone" if config.lora is None else "lora: none; the base is drawn alone")
    if any(map(is_chinese, prompts)):
        font = label_font(16, True)
        print(f"labels in Chinese: {font.path}" if font else f"labels in Chinese: no font found; install one of {', '.join(CHINESE_FONTS)}")

    # All prompts first: the text encoder is gone from the device before the transformer comes.
    cache_prompts(config, [*prompts, config.validation_negative_prompt], device)
    pipe = load_pipeline(config, device)
    folder, sizes, seeds = new_folder(Path(config.output_dir)), validation_sizes(config), as_list(config.validation_seed)
    base_model = config.pretrained_model_name_or_path or FLAVOURS[config.model_flavour]
    shots = [(size, seed) for size in sizes for seed in seeds]
    rows, started = {(i, *shot): [] for i in range(len(prompts)) for shot in shots}, time.perf_counter()
    with tqdm(total=len(columns) * len(rows), desc="validation", unit="picture") as bar:
        for _, name, lora, strength in columns:
            if lora:
                load_lora(pipe.transformer, lora, strength)
            for size, seed in shots:
                for i, image in enumerate(generate(pipe, config, prompts, size, seed)):
                    settings = {key: value for key, value in vars(config).items() if key.startswith("validation_") and key != "validation_prompts"}
                    settings |= {"validation_resolution": f"{size[0]}x{size[1]}", "validation_seed": seed, "validation_lora_strength": strength}
                    text = {"prompt": prompts[i], "lora": str(lora or "none"), "base_model": base_model, "settings": json.dumps(settings, ensure_ascii=False)}
                    save_picture(image, folder / f"{i:02d}-{size[0]}x{size[1]}-seed{seed}-{name}.png", **text)
                    rows[i, size, seed].append(image)
                    bar.update()
    seconds = (time.perf_counter() - started) / (len(columns) * len(rows))

    several = lambda size, seed: (f" | {size[0]}x{size[1]}" if len(sizes) > 1 else "") + (f" | seed {seed}" if len(seeds) > 1 else "")
    labels = [prompts[i] + several(size, seed) for i, size, seed in rows]
    title = f"{config.validation_num_inference_steps} steps, guidance {config.validation_guidance:g}"
    title += (f", {config.validation_resolution}" if len(sizes) == 1 else "") + (f", seed {seeds[0]}" if len(seeds) == 1 else "")
    title = f"{loras[0]}: {title}" if len(loras) == 1 else title
    grid = picture_grid(list(rows.values()), labels, [label for label, *_ in columns], title)
    save_picture(grid, folder / "comparison.png", lora=", ".join(map(str, loras)) or "none", base_model=base_model)
    memory = f", peak device memory {peak_memory(device):.1f} GiB" if device.type != "cpu" else ""
    print(f"{seconds:.1f} s a picture{memory}")
    print(f"base beside LoRA: {folder / 'comparison.png'}")
    return folder / "comparison.png"


if __name__ == "__main__":
    run_stage(main, __doc__)

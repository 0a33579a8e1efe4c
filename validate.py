"""Stage 4: a LoRA -> pictures, the base beside the LoRA.

    python validate.py configs/24gb.json
    python validate.py --lora my_lora.safetensors --validation_prompts "a cat in neonix style"
    python validate.py configs/24gb.json --compare_checkpoints      # which step is the best?

Every prompt, size and seed is a row, the base and every LoRA or strength a column. Writes single pictures, with their
settings in the PNG's text, and all of them as `comparison.png` to a new folder `<output_dir>/validation/compare-001`.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from longcat_common import (
    WORLD_SIZE,
    CHINESE_FONTS,
    UserError,
    base_model,
    cache_prompts,
    check_fit,
    checkpoint_folders,
    generate,
    is_chinese,
    is_readable,
    leaves_nothing,
    load_lora,
    load_pipeline,
    lora_file,
    memory_advised,
    peak_memory,
    pick_device,
    picture_grid,
    picture_settings,
    read_header,
    read_lora,
    run_stage,
    save_picture,
    step_of,
    system_font,
    validation_sizes,
)

LORA_NAME = "pytorch_lora_weights.safetensors"
PROMPTS = [
    "a cat on a window sill in the morning sun, photograph",
    "一只猫坐在洒满晨光的窗台上，摄影",
]  # if none are given


def newest_lora(folder):
    """The LoRA file of a run with the most steps: its last, or that of a checkpoint. None if it has none yet."""
    found = [*folder.glob(f"checkpoints/step-*/{LORA_NAME}"), *folder.glob(LORA_NAME)]
    return max(reversed(found), key=steps_of, default=None)


def steps_of(lora):
    """How many steps a LoRA of ours has learned for, from its header; -1 for another trainer's."""
    with contextlib.suppress(LookupError, TypeError, json.JSONDecodeError):
        return int(json.loads(read_header(lora)["longcat_lora"])["steps"])
    return -1


def find_loras(config):
    """The LoRA files to show, oldest first: those of all checkpoints, the one that `lora` names, or none."""
    output = Path(config.output_dir)
    if config.compare_checkpoints:
        if config.lora:
            raise UserError("compare_checkpoints: shows every checkpoint, and lora names one; leave one of them out")
        found = [folder / LORA_NAME for folder in checkpoint_folders(config)]
        for lora in [lora for lora in found if not is_readable(lora)]:
            print(f"{lora}: is missing or damaged, and left out")
            found.remove(lora)
        if not found:
            raise UserError(
                f"compare_checkpoints: {output} holds no checkpoint yet; train first, or name its output_dir"
            )
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
    step = steps_of(lora)
    for metrics in (
        lora.parent / "metrics.jsonl",
        lora.parent.parent.parent / "metrics.jsonl",
    ):  # of the run, or of a checkpoint's run
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line of other values, or cut off
                values = json.loads(line)
                if values["step"] == step:
                    return float(values["held_out_loss"]), float(values["held_out_base"])


def columns_of(config, loras):
    """The grid's columns, the base first: (label, name in the pictures' file names, LoRA file or None, strength)."""
    strengths = list({f"{strength:g}": strength for strength in config.validation_lora_strength}.values())
    columns, base_loss = [], ""
    for lora in loras:
        losses = held_out_losses(lora)
        for strength in strengths:
            label, name = (
                (f"step {step_of(lora.parent)}", lora.parent.name)
                if config.compare_checkpoints
                else ("with LoRA", "lora")
            )
            if len(strengths) > 1 or strength != 1:
                label, name = f"{label}, strength {strength:g}", f"{name}-x{strength:g}"
            if losses and strengths == [1]:
                label, base_loss = f"{label}, held-out {losses[0]:.3f}", f", held-out {losses[1]:.3f}"
            columns.append((label, name, lora, strength))
        if losses:
            print(f"{lora}: held-out loss {losses[0]:.4f}, the base's {losses[1]:.4f}")
    return [(f"base model{base_loss}", "base", None, 0.0), *columns]


def new_folder(output):
    """A folder that was not there yet: pictures of earlier runs are never overwritten."""
    number = 1
    while True:
        folder = output / "validation" / f"compare-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another output_dir") from None


@leaves_nothing
def main(config):
    """Draws every validation prompt from the same noise with the base and with each LoRA and strength. Returns the grid's
    path. Raises UserError for a LoRA that is not there, cannot be read or does not fit."""
    if WORLD_SIZE > 1:
        raise UserError("validate.py: runs in one process; start it without torchrun")
    device, prompts = pick_device(), config.validation_prompts or PROMPTS
    loras = find_loras(config)
    for lora in loras:
        read_lora(lora)  # a wrong file is said now, not after the base's pictures
    columns = columns_of(config, loras)
    if not config.validation_prompts:
        print("validation_prompts: none given; these are drawn: " + "; ".join(PROMPTS))
    if not loras:
        print(
            f"lora: none, in {config.output_dir} neither; the base is drawn alone"
            if config.lora is None
            else "lora: none; the base is drawn alone"
        )
    if any(map(is_chinese, prompts)):
        font = system_font(CHINESE_FONTS, 16)
        print(
            f"labels in Chinese: {font.path}"
            if font
            else f"labels in Chinese: no font found; install one of {', '.join(CHINESE_FONTS)}"
        )

    folder = new_folder(Path(config.output_dir))  # what cannot be written is said before the work
    try:
        # All prompts first: the text encoder is gone from the device before the transformer comes.
        cache_prompts(config, [*prompts, config.validation_negative_prompt], device)
        with memory_advised("validation_resolution 768x768; enable_group_offload true"):
            pipe = load_pipeline(config, device)
            for lora in loras:
                check_fit(pipe.transformer, lora, read_lora(lora))
            return draw(config, pipe, prompts, loras, columns, folder, device)
    except KeyboardInterrupt:
        print(f"\nwhat was drawn so far is in {folder}", file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was drawn


def draw(config, pipe, prompts, loras, columns, folder, device):
    """Draws the pictures into `folder`, each saved at once, and after each column the grid so far. Returns the grid's path."""
    sizes, seeds = (list(dict.fromkeys(values)) for values in (validation_sizes(config), config.validation_seed))
    rows = {(i, size, seed): [] for i in range(len(prompts)) for size in sizes for seed in seeds}
    several = lambda size, seed: (
        (f"{size[0]}x{size[1]} | " if len(sizes) > 1 else "") + (f"seed {seed} | " if len(seeds) > 1 else "")
    )
    title = f"{config.validation_num_inference_steps} steps, guidance {config.validation_guidance:g}"
    title += (f", {sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else "") + (
        f", seed {seeds[0]}" if len(seeds) == 1 else ""
    )
    title += f", negative prompt: {config.validation_negative_prompt}" if config.validation_negative_prompt else ""
    title += (
        f"\n{'/'.join(loras[0].parts[-3:])}, step {steps_of(loras[0])}".removesuffix(", step -1")
        if len(loras) == 1
        else f"\n{Path(config.output_dir).name}"
    )
    settings = picture_settings(config, without="validation_prompts") | {
        "base_model_precision": config.base_model_precision,
        "mixed_precision": config.mixed_precision,
    }

    started = time.perf_counter()
    with tqdm(total=len(columns) * len(rows), desc="validation", unit="picture") as bar:
        for number, (_, name, lora, strength) in enumerate(columns, 1):
            if lora:
                load_lora(pipe.transformer, lora, strength)
            for (i, size, seed), images in rows.items():
                images += generate(pipe, config, [prompts[i]], size, seed)
                own = {
                    "validation_resolution": f"{size[0]}x{size[1]}",
                    "validation_seed": seed,
                    "validation_lora_strength": strength,
                }
                text = {
                    "prompt": prompts[i],
                    "lora": str(lora or "none"),
                    "base_model": base_model(config),
                    "settings": json.dumps(settings | own, ensure_ascii=False),
                }
                save_picture(images[-1], folder / f"{i:02d}-{size[0]}x{size[1]}-seed{seed}-{name}.png", **text)
                bar.update()
            labels = [several(size, seed) + prompts[i] for i, size, seed in rows]
            grid = picture_grid(list(rows.values()), labels, [label for label, *_ in columns[:number]], title)
            save_picture(
                grid,
                folder / "comparison.png",
                lora=", ".join(map(str, loras)) or "none",
                base_model=base_model(config),
            )
    seconds = (time.perf_counter() - started) / bar.total
    memory = f", peak device memory {peak_memory(device):.1f} GiB" if device.type != "cpu" else ""
    print(f"{seconds:.1f} s a picture{memory}")
    print(f"base beside LoRA: {folder / 'comparison.png'}")
    return folder / "comparison.png"


if __name__ == "__main__":
    run_stage(main, __doc__)

"""Stage 4: a LoRA -> pictures, the base beside the LoRA.

    python validate.py configs/24gb.json
    python validate.py --lora my_lora.safetensors --validation_prompts "a cat in neonix style"

Writes one picture a prompt and LoRA, and `comparison.png` with all of them, to `<output_dir>/validation/compare/`.
"""

import json
import time
from pathlib import Path

from longcat_common import (
    UserError,
    cache_prompts,
    generate,
    limit_memory,
    load_lora,
    load_pipeline,
    peak_memory,
    pick_device,
    picture_grid,
    read_lora,
    run_stage,
    save_picture,
)


def find_lora(config):
    """The LoRA to show: `lora`, or else the newest of `output_dir` and its checkpoints."""
    if config.lora:
        return Path(config.lora)
    output, name = Path(config.output_dir), "pytorch_lora_weights.safetensors"
    found = [*output.glob(name), *output.glob(f"checkpoints/step-*/{name}")]
    if not found:
        raise UserError(f"lora: {output} holds no LoRA yet; train one, or name a file with --lora")
    return max(found, key=lambda path: path.stat().st_mtime)


def main(config):
    """Draws every validation prompt with the same noise, without and with the LoRA. Returns the grid's path."""
    device, lora = pick_device(), find_lora(config)
    limit_memory(config, device)
    read_lora(lora)  # a wrong file is said now, not after the base's pictures
    prompts = config.validation_prompts
    if not prompts:
        raise UserError('validation_prompts: none given; name some, such as --validation_prompts "a red fox"')
    # All prompts first: the text encoder is gone from the device before the transformer comes.
    cache_prompts(config, [*prompts, config.validation_negative_prompt], device)
    pipe = load_pipeline(config, device)
    started = time.perf_counter()
    base = generate(pipe, config, prompts)
    load_lora(pipe.transformer, lora)
    tuned = generate(pipe, config, prompts)
    seconds = (time.perf_counter() - started) / (2 * len(prompts))

    folder = Path(config.output_dir) / "validation" / "compare"
    settings = {name: value for name, value in vars(config).items() if name.startswith("validation_")}
    for i, prompt in enumerate(prompts):
        for name, image in (("base", base[i]), ("lora", tuned[i])):
            text = {"prompt": prompt, "lora": str(lora) if name == "lora" else "none", "settings": json.dumps(settings, ensure_ascii=False)}
            save_picture(image, folder / f"{i:02d}-{name}.png", **text)
    grid = picture_grid([list(pair) for pair in zip(base, tuned)], prompts, ["base", "with LoRA"])
    save_picture(grid, folder / "comparison.png", lora=str(lora))
    memory = f", peak device memory {peak_memory(device):.1f} GiB" if device.type != "cpu" else ""
    print(f"{seconds:.1f} s a picture{memory}")
    print(f"base beside LoRA: {folder / 'comparison.png'}")
    return folder / "comparison.png"


if __name__ == "__main__":
    run_stage(main, __doc__)

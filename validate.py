"""Stage 4: a LoRA -> pictures, the base beside the LoRA.

    python validate.py configs/24gb.json
    python validate.py --lora my_lora.safetensors --validation_prompts "a cat in neonix style"
    python validate.py configs/24gb.json --compare_checkpoints      # which step is the best?

Every prompt, size and seed is a row, the base and every LoRA or strength a column. Writes single pictures, with their
settings in the PNG's text, and all of them as `comparison.png` to a new folder `<output_dir>/validation/compare-001`.
"""

import contextlib
import io
import itertools
import json
import re
import time
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from cache_latents import cache_prompts, read_prompt_embeds
from longcat_common import (
    KEYS, LORA_FILE, PEFT_FILE, TARGET_MODULES, TEXT_TOKENS, WORLD_SIZE, LongCatImagePipeline,
    UserError, base_model_name, checkpoint_folders, checkpoint_step, compile_blocks,
    explain_out_of_memory, is_readable, load_scheduler, load_transformer, load_vae, log_once,
    named_if_corrupt, peak_memory, pick_device, prepare_pos_ids, read_header, read_json,
    read_tensors, run_stage, validation_sizes, write_file,
)  # fmt: skip
from prepare_data import GRID, label

PROMPTS = [
    "a cat on a window sill in the morning sun, photograph",
    "一只猫坐在洒满晨光的窗台上，摄影",
]


# ---------------------------------------------------------------- LoRA files


def lora_file(path):
    """The file of a LoRA: the path itself, or in a folder ours and diffusers' or PEFT's. Raises UserError."""
    path, names = Path(path), (LORA_FILE, PEFT_FILE)
    found = [
        file
        for file in ([path / name for name in names] if path.is_dir() else [path])
        if file.is_file()
    ]
    if not found:
        raise UserError(
            f"{path}: there is no such LoRA file, or the folder holds neither {names[0]} nor {names[1]}"
        )
    if found[0].suffix.lower() != ".safetensors":
        raise UserError(
            f"{path}: is no .safetensors file; others are not opened, for a pickled one could run code"
        )
    return found[0]


# What others put before a layer's name, and how they name the rest. Kohya's scripts have underscores for dots.
LORA_PREFIXES = (
    r"^(transformer\.|base_model\.model\.|diffusion_model\.|lora_unet_|lora_transformer_)+"
)
WITH_DOTS = [
    *TARGET_MODULES,
    "norm.linear",
    "norm1.linear",
    "norm1_context.linear",
    "norm_out.linear",
]
LORA_NAMES = {name.replace(".", "_"): name for name in WITH_DOTS}
LORA_NAMES |= {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B.", ".default.weight": ".weight"}

OTHER_KINDS = {
    "lokr_": "it is a LoKr", "hada_": "it is a LoHa", "oft_": "it is an OFT", "dora_scale": "it is a DoRA",
    "magnitude_vector": "it is a DoRA", "double_blocks": "it has the model's original layout, with q, k and v in one",
}  # fmt: skip


def lora_name(name):
    """A foreign LoRA key under our names: "<module>.lora_A.weight", "<module>.lora_B.weight" or "<module>.alpha"."""
    name = re.sub(
        r"transformer_blocks_(\d+)_", r"transformer_blocks.\1.", re.sub(LORA_PREFIXES, "", name)
    )
    for theirs, ours in LORA_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def read_lora(path):
    """{"<module>.lora_A.weight": tensor, ...} of a LoRA file, or of the one in a folder, in float32 and at strength 1.

    Opens what other trainers write, too, see lora_name. What they divide out, alpha / rank (/ sqrt(rank) for rsLoRA),
    is folded into B; alpha is in `.alpha` tensors, diffusers' header, PEFT's adapter_config.json or SimpleTuner's
    simpletuner_config.json. A text encoder's part is left out, and said. Raises UserError.
    """
    with named_if_corrupt(path := lora_file(path)):
        state, header, settings = read_tensors(path), read_header(path), {}
        pefts, simpletuners = (
            path.with_name("adapter_config.json"),
            path.with_name("simpletuner_config.json"),
        )
        if any(name.startswith("base_model.model.") for name in state):
            if not pefts.is_file():
                raise UserError(
                    f"{path}: is PEFT's, and its strength is unknown without {pefts.name} beside it"
                )
            settings = read_json(pefts)
        elif "lora_adapter_metadata" in header:
            settings = json.loads(header["lora_adapter_metadata"])
        elif simpletuners.is_file():
            settings = read_json(simpletuners)
        settings = {
            re.sub(r"^(transformer\.|--)", "", name): value for name, value in settings.items()
        }

        state = {lora_name(name): tensor.float() for name, tensor in state.items()}
        for name in [name for name in state if name.startswith(("text_encoder", "lora_te"))]:
            log_once(
                f"{path}: its text encoder's part is left out, for only the transformer's is used here"
            )
            del state[name]
        alphas = {
            name.removesuffix(".alpha"): state.pop(name).mean()
            for name in [*state]
            if name.endswith(".alpha")
        }
        modules = {name.rsplit(".lora_", 1)[0] for name in state}
        odd = sorted(
            state.keys() ^ {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
        )
        odd += [name for name, tensor in state.items() if tensor.ndim != 2 or not tensor.numel()]
        other = [kind for mark, kind in OTHER_KINDS.items() if any(mark in name for name in state)]
        if odd or other or not state:
            what = (
                other or [f"{odd[0]} is unknown, missing or no matrix" if odd else "it is empty"]
            )[0]
            raise UserError(f"{path}: is no LoRA that can be opened here: {what}")

        if not alphas and not settings and "longcat_lora" not in header:
            log_once(f"{path}: says nothing of its alpha, which is taken to be its rank")
        patterns = settings.get("alpha_pattern") or {}
        for module in modules:
            rank = state[f"{module}.lora_B.weight"].shape[1]
            alpha = patterns.get(
                get_pattern_key(patterns, module), settings.get("lora_alpha") or rank
            )
            strength = float(alphas.get(module, alpha)) / (
                rank**0.5 if settings.get("use_rslora") else rank
            )
            state[f"{module}.lora_B.weight"] *= strength
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{path}: holds values that are not finite, in {bad[0]}; it is damaged, or its training failed"
        )
    return state


def read_fitting_lora(transformer, path):
    """read_lora, for this transformer. Raises UserError if it does not fit."""
    state, layers = read_lora(path), dict(transformer.named_modules())
    for module in sorted({name.rsplit(".lora_", 1)[0] for name in state}):
        layer, A, B = (
            layers.get(module),
            state[f"{module}.lora_A.weight"],
            state[f"{module}.lora_B.weight"],
        )
        own = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
        if (B.shape[0], A.shape[1]) != own or A.shape[0] != B.shape[1]:
            here = f"takes {own[1]} numbers and gives {own[0]}" if own[0] else "is missing"
            what = f"{module} has {tuple(A.shape)} and {tuple(B.shape)}, and here it {here}"
            raise UserError(
                f"{path}: was made for another model, has another layout or is damaged: {what}"
            )
    return state


def load_lora(transformer, path, strength=1.0):
    """Puts a LoRA, see read_lora, on the transformer, ready to draw, in the place of any other. Raises UserError."""
    state = read_fitting_lora(transformer, path)
    transformer.delete_adapters(list(getattr(transformer, "peft_config", {})))
    transformer.load_lora_adapter({f"transformer.{name}": tensor for name, tensor in state.items()})
    transformer.set_adapters(next(iter(transformer.peft_config)), strength)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(
                transformer.device
            )  # an offloaded block is not there


# ---------------------------------------------------------------- the pipeline


class CachedPromptPipeline(LongCatImagePipeline):
    """LongCatImagePipeline without a text encoder of its own: embeddings come from `cache_dir`, and what is
    not there yet is encoded and kept. Prompts are never rewritten: a trigger word would be lost."""

    settings = None  # the configuration; make_pipeline sets it

    def encode_prompt(self, prompt, num_images_per_prompt=1, prompt_embeds=None):
        """Prompt or prompts -> (embeddings [B, 512, hidden], text ids [512, 3])."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        files = cache_prompts(self.settings, prompts, self.device)
        prompt_embeds = torch.stack([read_prompt_embeds(files[p]) for p in prompts])
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        text_ids = prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=TEXT_TOKENS)
        return prompt_embeds.to(self.device, self.transformer.x_embedder.weight.dtype), text_ids.to(
            self.device
        )

    def rewire_prompt(self, prompt, device):
        """The prompt as it is."""
        return prompt


def make_pipeline(config, transformer, vae):
    """A CachedPromptPipeline around loaded models."""
    parts = dict(
        text_encoder=None, tokenizer=None, text_processor=None, scheduler=load_scheduler(config)
    )
    pipe = CachedPromptPipeline(transformer=transformer, vae=vae, **parts)
    pipe.settings = config
    return pipe


def load_pipeline(config, device, lora=None):
    """A ready pipeline: `load_pipeline(config, "cuda", lora="output")("a cat").images[0]`.

    `lora`: a LoRA file or folder, or None. Raises UserError if it cannot be read or does not fit.
    """
    transformer = load_transformer(config, device)
    if config.torch_compile:
        compile_blocks(transformer)
    if lora:
        load_lora(transformer, lora)
    return make_pipeline(config, transformer, load_vae(config, device))


# ---------------------------------------------------------------- pictures


def generate(pipe, config, prompts, size=None, seed=None):
    """One picture a prompt, with the validation settings, all from the same first noise. `size` (width, height) and
    `seed`: the first ones of the configuration, if not given."""
    width, height = size or validation_sizes(config)[0]
    pipe.set_progress_bar_config(leave=False, desc="sampling")
    options = dict(negative_prompt=config.validation_negative_prompt, width=width, height=height)
    options |= dict(
        num_inference_steps=config.validation_num_inference_steps, enable_prompt_rewrite=False
    )
    images = []
    for prompt in tqdm(prompts, desc="pictures", unit="picture", leave=False):
        noise = torch.Generator().manual_seed(config.validation_seed[0] if seed is None else seed)
        images += pipe(
            prompt, guidance_scale=config.validation_guidance, generator=noise, **options
        ).images
    return images


def generation_settings(config, without):
    """{key: value} of the settings that a drawn picture depends on, but for the key `without`."""
    names = [name for name in KEYS if name.startswith("validation_")]
    left_out = ("validation_split", "validation_step_interval", without)
    return {name: getattr(config, name) for name in names if name not in left_out}


def image_grid(rows, row_labels, column_labels, title=None):
    """A labelled picture of pictures. `rows`: lists of pictures, one list a row label; those of a row have one size.
    `title`: a line or several."""
    cell, gap = max(192, min(512, max(images[0].width for images in rows))), 8
    size = max(13, cell // 16)
    line, titles = size + 2 * gap, title.splitlines() if title else []
    heights = [round(images[0].height * cell / images[0].width) for images in rows]
    width, top = len(column_labels) * (cell + gap) + gap, line * (len(titles) + 1)
    grid = Image.new("RGB", (width, top + sum(heights) + len(rows) * line + gap), "white")
    draw = ImageDraw.Draw(grid)

    def write(text, y, x=gap, width=width - 2 * gap, anchor="lm", colour="#444444", instead=None):
        text, font = label(text[:300], size, instead)
        while draw.textlength(text, font=font) > width:
            text = text.rstrip("…")[:-1] + "…"
        draw.text((x, y + line / 2), text, colour, font=font, anchor=anchor)

    for y, text in enumerate(titles):
        write(text, line * y, instead=text.encode("ascii", "replace").decode())
    for x, text in enumerate(column_labels):
        write(text, top - line, gap + x * (cell + gap) + cell / 2, cell, "mm", "black")
    for number, (images, text, height) in enumerate(zip(rows, row_labels, heights), 1):
        write(text, top, instead=f"row {number} (its prompt is Chinese; no Chinese font found)")
        for x, image in enumerate(images):
            grid.paste(
                image.resize((cell, height), Image.Resampling.LANCZOS),
                (gap + x * (cell + gap), top + line),
            )
        top += line + height
    return grid


def save_image(image, path, **text):
    """Writes a PNG whole or not at all, with `text` in its metadata."""
    info, data = PngInfo(), io.BytesIO()
    for name, value in text.items():
        info.add_itxt(name, value)
    image.save(data, "PNG", pnginfo=info)
    write_file(path, data.getvalue())


# ---------------------------------------------------------------- what is drawn


def newest_lora(folder):
    """The LoRA file of a run with the most steps: its last, or that of a checkpoint. None if it has none yet."""
    found = [*folder.glob(f"checkpoints/step-*/{LORA_FILE}"), *folder.glob(LORA_FILE)]
    return max(reversed(found), key=trained_steps, default=None)


def lora_metadata(lora, name):
    """What the header of a LoRA of ours says under this name; None for another trainer's."""
    with contextlib.suppress(LookupError, TypeError, ValueError):  # such as a damaged file's
        return json.loads(read_header(lora)["longcat_lora"])[name]


def trained_steps(lora):
    """How many steps a LoRA of ours has learned for; -1 for another trainer's."""
    with contextlib.suppress(TypeError):
        return int(lora_metadata(lora, "steps"))
    return -1


def find_loras(config):
    """The LoRA files to show, oldest first: those of all checkpoints, the one that `lora` names, or none."""
    output = Path(config.output_dir)
    if config.compare_checkpoints:
        if config.lora:
            raise UserError(
                "compare_checkpoints: shows every checkpoint, and lora names one; leave one of them out"
            )
        found = [folder / LORA_FILE for folder in checkpoint_folders(config)]
        for lora in [lora for lora in found if not is_readable(lora)]:
            print(f"{lora}: is missing or damaged, and left out")
            found.remove(lora)
        if not found:
            raise UserError(
                f"compare_checkpoints: {output} holds no checkpoint; train first, or name its output_dir"
            )
        return found
    if config.lora == "none":
        return []
    if config.lora in (None, "latest"):
        newest = newest_lora(output)
        if newest is None and config.lora:
            raise UserError(
                f"lora: {output} holds no LoRA yet; train one, or name a file with --lora"
            )
        return [newest] if newest else []
    return [newest_lora(Path(config.lora)) or lora_file(config.lora)]


def read_metrics(path):
    """Yields the lines of a `metrics.jsonl` as dictionaries, but for the cut-off last one of a killed run."""
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    ):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def held_out_losses(lora):
    """(loss of the pictures held out, the base's) at a LoRA's step, as its run has noted them; None if it has none."""
    step = trained_steps(lora)
    for folder in (lora.parent, lora.parent.parent.parent):  # of a run, or of a run's checkpoint
        for values in read_metrics(folder / "metrics.jsonl"):
            if values["step"] == step and {"held_out_loss", "held_out_base"} <= values.keys():
                return values["held_out_loss"], values["held_out_base"]


def columns_of(config, loras):
    """The grid's columns, the base first: (label, name in the pictures' file names, LoRA file or None, strength)."""
    strengths = list(
        {f"{strength:g}": strength for strength in config.validation_lora_strength}.values()
    )
    columns, base_loss = [], ""
    for lora in loras:
        losses = held_out_losses(lora)
        for strength in strengths:
            label, name = "with LoRA", "lora"
            if config.compare_checkpoints:
                label, name = f"step {checkpoint_step(lora.parent)}", lora.parent.name
            if len(strengths) > 1 or strength != 1:
                label, name = f"{label}, strength {strength:g}", f"{name}-x{strength:g}"
            if losses and strengths == [1]:
                label, base_loss = (
                    f"{label}, held-out {losses[0]:.3f}",
                    f", held-out {losses[1]:.3f}",
                )
            columns.append((label, name, lora, strength))
        if losses:
            print(f"{lora}: held-out loss {losses[0]:.4f}, the base's {losses[1]:.4f}")
    return [(f"base model{base_loss}", "base", None, 0.0), *columns]


def new_folder(output):
    """A folder that was not there yet: pictures of earlier runs are never overwritten."""
    for number in itertools.count(1):
        folder = output / "validation" / f"compare-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); choose another output_dir"
            ) from None


@explain_out_of_memory({"enable_group_offload": True})
def main(config):
    """Draws every validation prompt from the same noise with the base and with each LoRA and strength. Returns the
    grid's path. Raises UserError for a LoRA that is not there, cannot be read or does not fit."""
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
        where = f", in {config.output_dir} neither" if config.lora is None else ""
        print(f"lora: none{where}; the base is drawn alone")

    folder = new_folder(Path(config.output_dir))  # what cannot be written is said before the work
    try:
        # All prompts first: the text encoder is gone from the device before the transformer comes.
        cache_prompts(config, [*prompts, config.validation_negative_prompt], device)
        pipe = load_pipeline(config, device)
        for lora in loras:
            read_fitting_lora(
                pipe.transformer, lora
            )  # what does not fit is said now, not after the base's pictures
        return draw(config, pipe, prompts, loras, columns, folder, device)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was drawn


def draw(config, pipe, prompts, loras, columns, folder, device):
    """Draws the pictures into `folder`, each saved at once, and after each column the grid so far. Returns the grid's
    path."""
    sizes, seeds = (
        list(dict.fromkeys(values)) for values in (validation_sizes(config), config.validation_seed)
    )
    settings = generation_settings(config, without="validation_prompts")
    settings |= {
        name: getattr(config, name) for name in ("base_model_precision", "mixed_precision")
    }
    rows = [(i, size, seed) for i in range(len(prompts)) for size in sizes for seed in seeds]
    images, cells, labels = [[] for _ in rows], [], []
    for i, (width, height), seed in rows:
        own = (
            [f"{width}x{height}"] * (len(sizes) > 1)
            + [f"seed {seed}"] * (len(seeds) > 1)
            + [prompts[i]]
        )
        labels.append(" | ".join(own))
    grid, title = folder / "comparison.png", title_of(config, loras, sizes, seeds)

    started = time.perf_counter()
    with tqdm(total=len(columns) * len(rows), desc="validation", unit="picture") as bar:
        for number, (label_of_column, name, lora, strength) in enumerate(columns, 1):
            if lora:
                load_lora(pipe.transformer, lora, strength)
            for row, (i, size, seed) in enumerate(rows):
                images[row] += generate(pipe, config, [prompts[i]], size, seed)
                own = {"validation_resolution": "{}x{}".format(*size), "validation_seed": seed}
                own["validation_lora_strength"] = strength
                made_with = {
                    "prompt": prompts[i],
                    "lora": str(lora or "none"),
                    "base_model": base_model_name(config),
                }
                file = f"{i:02d}-{size[0]}x{size[1]}-seed{seed}-{name}.png"
                said = json.dumps(settings | own, ensure_ascii=False)
                save_image(images[row][-1], folder / file, **made_with, settings=said)
                cells.append({"file": file, "column": label_of_column, **made_with, **own})
                bar.update()
            titles = [label for label, *_ in columns[:number]]
            of_all, picture = (
                ", ".join(map(str, loras)) or "none",
                image_grid(images, labels, titles, title),
            )
            save_image(picture, grid, longcat=GRID, lora=of_all, base_model=base_model_name(config))
            shown = {
                "title": title,
                "columns": titles,
                "rows": labels,
                "settings": settings,
                "pictures": cells,
            }
            write_file(
                folder / "comparison.json", json.dumps(shown, indent=2, ensure_ascii=False) + "\n"
            )
    memory = f", peak device memory {peak_memory(device):.1f} GiB" if device.type != "cpu" else ""
    print(f"{(time.perf_counter() - started) / bar.total:.1f} s a picture{memory}")
    print(f"base beside LoRA: {grid}")
    return grid


def title_of(config, loras, sizes, seeds):
    """The grid's two lines of title: the settings that all its pictures share, and what was drawn with."""
    shared = [
        f"{config.validation_num_inference_steps} steps, guidance {config.validation_guidance:g}"
    ]
    shared += [f"{sizes[0][0]}x{sizes[0][1]}"] * (len(sizes) == 1) + [f"seed {seeds[0]}"] * (
        len(seeds) == 1
    )
    shared += (
        [f"negative prompt: {config.validation_negative_prompt}"]
        if config.validation_negative_prompt
        else []
    )
    drawn = Path(config.output_dir).name
    if len(loras) == 1:
        drawn = "/".join(loras[0].parts[-3:]) + (
            f", step {trained_steps(loras[0])}" if trained_steps(loras[0]) >= 0 else ""
        )
    trained = {lora_metadata(lora, "base_model") for lora in loras} - {
        None,
        base_model_name(config),
    }
    drawn += (
        f"; trained on {', '.join(sorted(trained))}, drawn on {base_model_name(config)}"
        if trained
        else ""
    )
    return f"{', '.join(shared)}\n{drawn}"


if __name__ == "__main__":
    run_stage(main, __doc__)

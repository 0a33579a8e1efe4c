"""Stage 4: a LoRA -> images, the base model beside the LoRA.

    python validate.py configs/24gb.json
    python validate.py --lora my_lora.safetensors --validation_prompts "a cat in neonix style"
    python validate.py configs/24gb.json --compare_checkpoints      # which step is the best?

The images form a grid. Its rows are all prompts, at every size and with every seed; its columns are
the base model and every LoRA at every strength. Each image is saved, with its settings in the PNG's
text, to a new folder `<output_dir>/validation/compare-001`, and the grid as `comparison.png`.
"""

import contextlib
import io
import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils.other import get_pattern_key
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from cache_latents import cache_prompts, read_prompt_embeds
from longcat_common import (
    KEYS, LORA_FILE, PEFT_FILE, TARGET_MODULES, TEXT_TOKENS, WORLD_SIZE, LongCatImagePipeline,
    UserError, base_model_name, compile_blocks, explain_out_of_memory, is_readable, load_scheduler,
    load_transformer, load_vae, log_once, named_if_corrupt, peak_memory, pick_device,
    prepare_pos_ids, read_header, read_json, read_tensors, run_stage, validation_sizes, write_file,
)  # fmt: skip
from prepare_data import GRID, label

PROGRESS_COLUMNS = 6  # steps that progress.png shows at most, besides the best one
# The prompts of a configuration without validation_prompts.
PROMPTS = [
    "a cat on a window sill in the morning sun, photograph",
    "一只猫坐在洒满晨光的窗台上，摄影",
]

# What other trainers put before a module's name.
LORA_PREFIXES = r"^(transformer\.|base_model\.model\.|diffusion_model\.|lora_(unet|transformer)_)+"

# {their part of a key: ours}. Kohya's scripts write module names with underscores for dots.
NAMES_WITH_DOTS = [
    *TARGET_MODULES,
    "norm.linear",
    "norm1.linear",
    "norm1_context.linear",
    "norm_out.linear",
    "time_embed.timestep_embedder.linear_1",
    "time_embed.timestep_embedder.linear_2",
]
LORA_NAMES = {name.replace(".", "_"): name for name in NAMES_WITH_DOTS}
LORA_NAMES |= {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B.", ".default.weight": ".weight"}

# {part of a key: what a file with such keys is}; none of these can be opened.
UNSUPPORTED = {
    "lokr_": "is a LoKr",
    "hada_": "is a LoHa",
    "oft_": "is an OFT",
    "dora_scale": "is a DoRA",
    "magnitude_vector": "is a DoRA",
    "double_blocks": "has the model's original layout, with q, k and v in one layer",
}


# ---------------------------------------------------------------- LoRA files


def lora_file(path):
    """The safetensors file of a LoRA: `path` itself, or the one in the folder `path`.

    In a folder, LORA_FILE (this trainer's and diffusers' name) comes before PEFT_FILE.
    Raises UserError if there is none, or if the file has another format.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = path / LORA_FILE
        if not file.is_file():
            file = path / PEFT_FILE
    if not file.is_file():
        raise UserError(
            f"{path}: LoRA not found; name a .safetensors file, or a folder with {LORA_FILE} or "
            f"{PEFT_FILE}"
        )
    if file.suffix.lower() != ".safetensors":
        raise UserError(
            f"{path}: is not a .safetensors file; other formats can run code when they are opened, "
            "so convert it first"
        )
    return file


def convert_key(key):
    """A key of any trainer's file under our names: "<module>.lora_A.weight",
    "<module>.lora_B.weight" or "<module>.alpha"."""
    key = re.sub(LORA_PREFIXES, "", key)
    key = re.sub(r"transformer_blocks_(\d+)_", r"transformer_blocks.\1.", key)
    for theirs, ours in LORA_NAMES.items():
        key = key.replace(theirs, ours)
    return key


def lora_modules(weights):
    """The names of the modules that a LoRA changes, sorted."""
    return sorted({key.rsplit(".lora_", 1)[0] for key in weights})


def read_alpha_settings(path, keys, header):
    """The settings that a LoRA's strength depends on: lora_alpha, alpha_pattern and use_rslora.

    PEFT and SimpleTuner write them to a file next to the LoRA, diffusers writes them to the LoRA's
    header. Empty if there are none. Raises UserError if PEFT's file is not found.
    """
    peft_file = path.with_name("adapter_config.json")
    simpletuner_file = path.with_name("simpletuner_config.json")
    settings = {}
    if any(key.startswith("base_model.model.") for key in keys):
        if not peft_file.is_file():
            raise UserError(
                f"{path}: PEFT stores the LoRA's alpha in {peft_file.name}, which is not found; "
                "copy it to the same folder"
            )
        settings = read_json(peft_file)
    elif "lora_adapter_metadata" in header:
        settings = json.loads(header["lora_adapter_metadata"])
    elif simpletuner_file.is_file():
        settings = read_json(simpletuner_file)
    # diffusers puts "transformer." before a setting's name, SimpleTuner "--".
    return {re.sub(r"^(transformer\.|--)", "", name): value for name, value in settings.items()}


def convert_tensors(path, tensors):
    """A LoRA file's tensors under our names, in float32: (weights, alphas).

    `weights`: {"<module>.lora_A.weight": [rank, in], "<module>.lora_B.weight": [out, rank], ...}.
    `alphas`: {module: alpha}, for the modules that have an `.alpha` tensor.
    Text encoder weights are ignored. Raises UserError if the file holds anything else.
    """
    weights = {}
    alphas = {}
    for key, tensor in tensors.items():
        key = convert_key(key)
        tensor = tensor.float()
        if key.startswith(("text_encoder", "lora_te")):
            log_once(f"{path}: text encoder weights ignored; only the transformer's are used")
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = tensor.mean()
        else:
            weights[key] = tensor

    # Every module has the matrices A and B, and nothing else.
    expected = set()
    for module in lora_modules(weights):
        expected |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    all_keys = " ".join(weights)
    problems = [kind for mark, kind in UNSUPPORTED.items() if mark in all_keys]
    problems += [f"{key} is unknown or missing" for key in sorted(weights.keys() ^ expected)]
    for key, tensor in weights.items():
        if tensor.ndim != 2 or not tensor.numel():
            problems.append(f"{key} is not a matrix, or is empty")
    if not weights:
        problems.append("holds no weights of a LoRA")
    if problems:
        raise UserError(f"{path}: {problems[0]}; only plain LoRAs can be opened")
    return weights, alphas


def fold_alpha(weights, alphas, settings):
    """Multiplies every B, in place, by the factor that its trainer scales B @ A with: alpha / rank,
    or for rsLoRA alpha / sqrt(rank)."""
    patterns = settings.get("alpha_pattern") or {}
    for module in lora_modules(weights):
        B = weights[f"{module}.lora_B.weight"]
        rank = B.shape[1]
        divisor = rank
        if settings.get("use_rslora"):
            divisor = rank**0.5
        # The module's own tensor comes first, then PEFT's pattern, then the LoRA's alpha.
        alpha = settings.get("lora_alpha") or rank
        alpha = patterns.get(get_pattern_key(patterns, module), alpha)
        alpha = alphas.get(module, alpha)
        B *= float(alpha) / divisor


def read_lora(path):
    """The weights of a LoRA file, or of the one in a folder, at strength 1.

    Returns {"<module>.lora_A.weight": [rank, in], "<module>.lora_B.weight": [out, rank], ...} in
    float32, the trainer's alpha folded into B. Also opens what diffusers, PEFT, SimpleTuner and
    Kohya's scripts write. Raises UserError if the file is not found or cannot be used.
    """
    path = lora_file(path)
    with named_if_corrupt(path):
        tensors = read_tensors(path)
        header = read_header(path)
        settings = read_alpha_settings(path, tensors, header)
        weights, alphas = convert_tensors(path, tensors)
        # Our own files, marked in their header, have alpha folded in already.
        if not alphas and not settings and "longcat_lora" not in header:
            log_once(f"{path}: alpha not found; it is taken to be equal to the rank")
        fold_alpha(weights, alphas, settings)

    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: {key} has values that are not finite; the file is corrupt, or its "
                "training failed; use another one"
            )
    return weights


def read_fitting_lora(transformer, path):
    """read_lora, for this transformer. Raises UserError if the transformer has no such layers, or
    layers of other shapes."""
    weights = read_lora(path)
    layers = dict(transformer.named_modules())
    for module in lora_modules(weights):
        A = weights[f"{module}.lora_A.weight"]
        B = weights[f"{module}.lora_B.weight"]
        layer = layers.get(module)
        if not hasattr(layer, "in_features"):
            raise UserError(
                f"{path}: does not fit this model, which has no linear layer {module}; choose "
                "another LoRA"
            )
        rank = A.shape[0]
        if A.shape != (rank, layer.in_features) or B.shape != (layer.out_features, rank):
            raise UserError(
                f"{path}: does not fit this model: {module} has shapes {tuple(A.shape)} and "
                f"{tuple(B.shape)}, but the model's layer has {layer.in_features} inputs and "
                f"{layer.out_features} outputs; choose another LoRA"
            )
    return weights


def load_lora(transformer, path, strength=1.0):
    """Puts a LoRA, see read_lora, on the transformer, in place of any other. Raises UserError."""
    weights = read_fitting_lora(transformer, path)
    transformer.delete_adapters(list(getattr(transformer, "peft_config", {})))
    transformer.load_lora_adapter({f"transformer.{key}": tensor for key, tensor in weights.items()})
    (adapter,) = transformer.peft_config
    transformer.set_adapters(adapter, strength)
    # PEFT puts a LoRA where its layer is. An offloaded layer is on the host; its LoRA must not be.
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(transformer.device)


# ---------------------------------------------------------------- the pipeline


class CachedPromptPipeline(LongCatImagePipeline):
    """LongCatImagePipeline without a text encoder in memory.

    Prompt embeddings come from `cache_dir`; those not cached yet are computed and cached. Prompts
    are never rewritten: a trigger word would be lost.
    """

    settings = None  # the configuration; make_pipeline sets it

    def encode_prompt(self, prompt, num_images_per_prompt=1, prompt_embeds=None):
        """One prompt or a list of B -> (embeddings [B, 512, hidden], text ids [512, 3]).

        The pipeline's own method takes `prompt_embeds`, too; here it is not used.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        files = cache_prompts(self.settings, prompts, self.device)
        embeds = torch.stack([read_prompt_embeds(files[text]) for text in prompts])
        embeds = embeds.repeat_interleave(num_images_per_prompt, dim=0)
        embeds = embeds.to(self.device, self.transformer.x_embedder.weight.dtype)
        text_ids = prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=TEXT_TOKENS)
        return embeds, text_ids.to(self.device)

    def rewire_prompt(self, prompt, device):
        """The prompt as it is."""
        return prompt


def make_pipeline(config, transformer, vae):
    """A CachedPromptPipeline of loaded models."""
    pipe = CachedPromptPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=load_scheduler(config),
        text_encoder=None,
        tokenizer=None,
        text_processor=None,
    )
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


# ---------------------------------------------------------------- generating images and grids


def generate(pipe, config, prompts, size=None, seed=None):
    """One image per prompt, with the validation settings, all from the same initial noise.

    `size` (width, height) and `seed` default to the first ones of the configuration.
    """
    width, height = size or validation_sizes(config)[0]
    if seed is None:
        seed = config.validation_seed[0]
    pipe.set_progress_bar_config(leave=False, desc="sampling")
    images = []
    for prompt in tqdm(prompts, desc="images", unit="image", leave=False):
        output = pipe(
            prompt,
            negative_prompt=config.validation_negative_prompt,
            width=width,
            height=height,
            num_inference_steps=config.validation_num_inference_steps,
            guidance_scale=config.validation_guidance,
            generator=torch.Generator().manual_seed(seed),
            enable_prompt_rewrite=False,
        )
        images += output.images
    return images


def generation_settings(config):
    """{key: value} of the settings that an image depends on besides its prompt."""
    excluded = ("validation_split", "validation_step_interval", "validation_prompts")
    names = [name for name in KEYS if name.startswith("validation_") and name not in excluded]
    return {name: getattr(config, name) for name in names}


def image_grid(rows, row_labels, column_labels, title=""):
    """One image of many, with a label above each row and each column.

    `rows`: a list of images for each row label; the images of a row have one size. `title`: lines
    at the top.
    """
    # A cell is as wide as the widest image, within limits. The text grows with it.
    widest = max(images[0].width for images in rows)
    cell = max(192, min(512, widest))
    gap = 8
    font_size = max(13, cell // 16)
    line = font_size + 2 * gap

    # From top to bottom: the title, the column labels, then for each row its label and images.
    titles = title.splitlines()
    top = line * (len(titles) + 1)
    heights = [round(images[0].height * cell / images[0].width) for images in rows]
    width = gap + len(column_labels) * (cell + gap)
    grid = Image.new("RGB", (width, top + sum(heights) + len(rows) * line + gap), "white")
    draw = ImageDraw.Draw(grid)

    # Labels are placed by the middle of their line: its left end, or for columns its center.
    text_width = width - 2 * gap
    for number, text in enumerate(titles):
        fallback = text.encode("ascii", "replace").decode()
        write_label(draw, text, (gap, (number + 0.5) * line), text_width, font_size, fallback)
    for number, text in enumerate(column_labels):
        center = (gap + number * (cell + gap) + cell / 2, top - line / 2)
        write_label(draw, text, center, cell, font_size, None, "mm", "black")

    for number, images in enumerate(rows):
        fallback = f"row {number + 1} (Chinese prompt; no Chinese font found)"
        position = (gap, top + line / 2)
        write_label(draw, row_labels[number], position, text_width, font_size, fallback)
        top += line
        for column, image in enumerate(images):
            small = image.resize((cell, heights[number]), Image.Resampling.LANCZOS)
            grid.paste(small, (gap + column * (cell + gap), top))
        top += heights[number]
    return grid


def write_label(draw, text, position, width, size, fallback, anchor="lm", color="#444444"):
    """Writes one line of text into a grid, cut to `width` pixels. `anchor` is Pillow's: what of the
    text is at `position`. `fallback` replaces a Chinese text if there is no font for it."""
    text, font = label(text[:300], size, fallback)
    while draw.textlength(text, font=font) > width:
        text = text.rstrip("…")[:-1] + "…"
    draw.text(position, text, color, font=font, anchor=anchor)


def save_image(image, path, **text):
    """Writes a PNG with `text` in its metadata, completely or not at all."""
    info = PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    write_file(path, data.getvalue())


def find_previews(config, settings):
    """{(step, prompt's number): path} of the previews that were generated from today's prompts and
    settings."""
    previews = {}
    for path in (Path(config.output_dir) / "validation").glob("step-*.png"):
        # A file that is not ours is passed over; Pillow raises many kinds of exception.
        with contextlib.suppress(Exception), Image.open(path) as image:
            step, i = map(int, re.fullmatch(r"step-(\d+)-(\d+)", path.stem).groups())
            image.load()
            expected = (config.validation_prompts[i], settings)
            if (image.text["prompt"], image.text["settings"]) == expected:
                previews[step, i] = path
    return previews


def write_progress_image(config, settings, last_step, best_step):
    """Writes `progress.png`: a row for each validation prompt, a column for each of
    PROGRESS_COLUMNS steps, evenly spaced from the first to `last_step`, and `best_step`, the one
    with the lowest held-out loss, if there is one."""
    previews = find_previews(config, settings)
    steps = sorted({step for step, _ in previews if step <= last_step})
    last = len(steps) - 1
    shown = {steps[round(i * last / (PROGRESS_COLUMNS - 1))] for i in range(PROGRESS_COLUMNS)}
    if best_step in steps:
        shown.add(best_step)

    labels = {}
    for step in sorted(shown):
        labels[step] = f"step {step}" if step else "before (step 0)"
    if best_step in labels and len(labels) > 1:
        labels[best_step] += ", lowest held-out loss"

    # At some steps the prompt may have been another one.
    empty = Image.new("RGB", validation_sizes(config)[0], "#eeeeee")
    rows = []
    for i in range(len(config.validation_prompts)):
        row = []
        for step in labels:
            row.append(Image.open(previews[step, i]) if (step, i) in previews else empty)
        rows.append(row)
    grid = image_grid(rows, config.validation_prompts, labels.values())
    save_image(grid, Path(config.output_dir) / "validation" / "progress.png", longcat=GRID)


# ---------------------------------------------------------------- what is generated


def lora_metadata(lora, name):
    """A value of the metadata that train_lora.py writes to a LoRA's header, or None."""
    # Another trainer's file has none, and a corrupt file cannot be read.
    with contextlib.suppress(LookupError, TypeError, ValueError):
        return json.loads(read_header(lora)["longcat_lora"])[name]


def trained_steps(lora):
    """The number of steps that a LoRA was trained for; -1 if its file does not say."""
    with contextlib.suppress(TypeError):  # lora_metadata returns None
        return int(lora_metadata(lora, "steps"))
    return -1


def checkpoint_folders(config):
    """The checkpoints of this run, oldest first. Folders with other names, such as copies that the
    user made, are skipped. Raises UserError."""
    parent = Path(config.output_dir) / "checkpoints"
    names = []
    try:
        names = os.listdir(parent)
    except (FileNotFoundError, NotADirectoryError):
        pass  # no checkpoint yet
    except OSError as error:
        raise UserError(f"{parent}: cannot be read ({error.strerror}); fix that") from None
    folders = [parent / name for name in names if re.fullmatch(r"step-\d{6,}", name, re.ASCII)]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(folder):
    """The step of a checkpoint: 500 for the folder step-000500."""
    return int(folder.name.removeprefix("step-"))


def newest_lora(folder):
    """The LoRA file with the most steps in a run's folder: its last, or a checkpoint's; or None."""
    # max takes the first of several with equal steps: the run's last LoRA, not the checkpoint's.
    loras = [*folder.glob(LORA_FILE), *folder.glob(f"checkpoints/step-*/{LORA_FILE}")]
    return max(loras, key=trained_steps, default=None)


def find_checkpoint_loras(config):
    """The LoRA file of each checkpoint, oldest first. Raises UserError if there is none."""
    if config.lora:
        raise UserError(
            "compare_checkpoints: compares all checkpoints, while lora names one LoRA; set only "
            "one of the two"
        )
    loras = []
    for folder in checkpoint_folders(config):
        lora = folder / LORA_FILE
        if is_readable(lora):
            loras.append(lora)
        # A deleted checkpoint leaves its folder if the user has put something into it.
        elif lora.exists() or (folder / "state.json").exists():
            print(f"{lora}: is missing or corrupt; skipped")
    if not loras:
        raise UserError(
            f"compare_checkpoints: no checkpoint in {config.output_dir}; train first, or set "
            "output_dir to the folder of a run"
        )
    return loras


def find_loras(config):
    """The LoRA files to compare with the base model: those of all checkpoints, oldest first, or the
    one that `lora` names, or none. Raises UserError if what is asked for is not found."""
    if config.compare_checkpoints:
        return find_checkpoint_loras(config)
    if config.lora == "none":
        return []
    if config.lora in (None, "latest"):
        newest = newest_lora(Path(config.output_dir))
        if newest:
            return [newest]
        if config.lora:
            raise UserError(
                f"lora: no LoRA in {config.output_dir} yet; train one, or name a file with --lora"
            )
        return []
    # The folder of a run, or else a LoRA file or a folder with one.
    return [newest_lora(Path(config.lora)) or lora_file(config.lora)]


def read_metrics(path):
    """Yields the lines of a `metrics.jsonl` as dictionaries. The last one may be incomplete, if the
    run was killed: it is skipped."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def held_out_losses(lora):
    """(the LoRA's loss, the base model's) on the held-out images, as the run measured them at the
    LoRA's step; None if it did not."""
    step = trained_steps(lora)
    # The LoRA is in the run's folder, or in <run>/checkpoints/step-000500.
    for folder in (lora.parent, lora.parent.parent.parent):
        for values in read_metrics(folder / "metrics.jsonl"):
            if values["step"] == step and "held_out_base" in values:
                return values["held_out_loss"], values["held_out_base"]


class Row(NamedTuple):
    """A row of the grid: a prompt, a size and a seed."""

    label: str
    name: str  # begins the names of the image files
    prompt: str
    size: tuple  # (width, height)
    seed: int


class Column(NamedTuple):
    """A column of the grid: the base model, or a LoRA at a strength."""

    label: str
    name: str  # ends the names of the image files
    lora: Path | None  # None: the base model
    strength: float


def grid_rows(config, prompts):
    """A Row for every prompt, size and seed."""
    sizes = validation_sizes(config)
    seeds = list(dict.fromkeys(config.validation_seed))
    rows = []
    for number, size, seed in itertools.product(range(len(prompts)), sizes, seeds):
        resolution = "{}x{}".format(*size)
        # The label says only what differs between rows.
        row_label = prompts[number]
        if len(seeds) > 1:
            row_label = f"seed {seed} | {row_label}"
        if len(sizes) > 1:
            row_label = f"{resolution} | {row_label}"
        name = f"{number:02d}-{resolution}-seed{seed}"
        rows.append(Row(row_label, name, prompts[number], size, seed))
    return rows


def grid_columns(config, loras):
    """A Column for the base model, then one for every LoRA and strength. Prints held-out losses."""
    # Strengths that are written the same would have the same file names.
    strengths = list({f"{value:g}": value for value in config.validation_lora_strength}.values())
    base_label = "base model"
    columns = []
    for lora in loras:
        column_label = "with LoRA"
        name = "lora"
        if config.compare_checkpoints:
            column_label = f"step {checkpoint_step(lora.parent)}"
            name = lora.parent.name

        losses = held_out_losses(lora)
        if losses:
            print(f"{lora}: held-out loss {losses[0]:.4f}, base model {losses[1]:.4f}")
        # The losses were measured at strength 1.
        if losses and strengths == [1]:
            column_label += f", held-out {losses[0]:.3f}"
            base_label = f"base model, held-out {losses[1]:.3f}"

        for strength in strengths:
            column = Column(column_label, name, lora, strength)
            if strengths != [1]:
                column = Column(
                    f"{column_label}, strength {strength:g}",
                    f"{name}-x{strength:g}",
                    lora,
                    strength,
                )
            columns.append(column)
    return [Column(base_label, "base", None, 0.0), *columns]


def grid_title(config, loras):
    """The grid's title, two lines: the settings that all images share, and the run or the LoRA."""
    sizes = validation_sizes(config)
    seeds = set(config.validation_seed)
    steps = config.validation_num_inference_steps
    shared = [f"{steps} steps, guidance {config.validation_guidance:g}"]
    if len(sizes) == 1:
        shared.append("{}x{}".format(*sizes[0]))
    if len(seeds) == 1:
        shared.append(f"seed {config.validation_seed[0]}")
    if config.validation_negative_prompt:
        shared.append(f"negative prompt: {config.validation_negative_prompt}")

    source = Path(config.output_dir).name
    if len(loras) == 1:
        source = "/".join(loras[0].parts[-3:])
        steps = trained_steps(loras[0])
        if steps >= 0:
            source += f", step {steps}"

    # A LoRA may have been trained on another base model than the one that generates.
    base_model = base_model_name(config)
    trained_on = {lora_metadata(lora, "base_model") for lora in loras} - {None, base_model}
    if trained_on:
        source += f"; trained on {', '.join(sorted(trained_on))}, generated with {base_model}"
    return f"{', '.join(shared)}\n{source}"


def new_folder(output):
    """Makes and returns a new folder in `output`, so that no earlier images are overwritten.
    Raises UserError."""
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


# ---------------------------------------------------------------- main


def generate_grid(config, pipe, rows, columns, loras, folder):
    """Generates the image of every row and column into `folder`, and the grid `comparison.png` with
    its description `comparison.json`. Returns the grid's path.

    Images are saved one by one, the grid after each column: an interrupted run keeps what it has.
    """
    settings = generation_settings(config)
    settings["base_model_precision"] = config.base_model_precision
    settings["mixed_precision"] = config.mixed_precision
    base_model = base_model_name(config)
    comparison = {
        "title": grid_title(config, loras),
        "columns": [],
        "rows": [row.label for row in rows],
        "settings": settings,
        "pictures": [],
    }
    grid_file = folder / "comparison.png"
    all_loras = ", ".join(map(str, loras)) or "none"
    images = [[] for _ in rows]
    with tqdm(total=len(columns) * len(rows), desc="validation", unit="image") as bar:
        for column in columns:
            if column.lora:
                load_lora(pipe.transformer, column.lora, column.strength)
            for row, row_images in zip(rows, images):
                row_images += generate(pipe, config, [row.prompt], row.size, row.seed)
                entry = save_cell(config, row_images[-1], row, column, settings, folder)
                comparison["pictures"].append(entry)
                bar.update()

            # The grid of the columns so far.
            comparison["columns"].append(column.label)
            grid = image_grid(
                images, comparison["rows"], comparison["columns"], comparison["title"]
            )
            save_image(grid, grid_file, longcat=GRID, lora=all_loras, base_model=base_model)
            text = json.dumps(comparison, indent=2, ensure_ascii=False)
            write_file(folder / "comparison.json", text + "\n")
    return grid_file


def save_cell(config, image, row, column, settings, folder):
    """Saves one image of the grid, with its settings in the PNG's text. Returns its entry in
    comparison.json, a dictionary."""
    file = f"{row.name}-{column.name}.png"
    source = {
        "prompt": row.prompt,
        "lora": str(column.lora or "none"),
        "base_model": base_model_name(config),
    }
    varied = {
        "validation_resolution": "{}x{}".format(*row.size),
        "validation_seed": row.seed,
        "validation_lora_strength": column.strength,
    }
    image_settings = json.dumps(settings | varied, ensure_ascii=False)
    save_image(image, folder / file, **source, settings=image_settings)
    return {"file": file, "column": column.label, **source, **varied}


@explain_out_of_memory({"enable_group_offload": True})
def main(config):
    """Generates the validation prompts with the base model and with each LoRA, from the same noise.
    Returns the grid's path. Raises UserError for a LoRA that cannot be found, read or used."""
    if WORLD_SIZE > 1:
        raise UserError("validate.py: runs in one process; start it without torchrun")
    device = pick_device()

    # What to generate. A LoRA that cannot be read stops here, not after the base model's images.
    loras = find_loras(config)
    for lora in loras:
        read_lora(lora)
    prompts = config.validation_prompts or PROMPTS
    rows = grid_rows(config, prompts)
    columns = grid_columns(config, loras)
    if not config.validation_prompts:
        print("validation_prompts: none given; using: " + "; ".join(PROMPTS))
    if not loras:
        reason = "none"
        if config.lora is None:
            reason = f"not set, and no LoRA in {config.output_dir}"
        print(f"lora: {reason}; generating with the base model only")

    # An unwritable folder and a LoRA that does not fit are errors before the first image, too.
    folder = new_folder(Path(config.output_dir))
    try:
        # All prompts first: the text encoder leaves the device before the transformer is loaded.
        cache_prompts(config, [*prompts, config.validation_negative_prompt], device)
        pipe = load_pipeline(config, device)
        for lora in loras:
            read_fitting_lora(pipe.transformer, lora)
        started = time.perf_counter()
        grid_file = generate_grid(config, pipe, rows, columns, loras, folder)
        seconds = (time.perf_counter() - started) / (len(rows) * len(columns))
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty

    memory = ""
    if device.type != "cpu":
        memory = f", peak device memory {peak_memory(device):.1f} GiB"
    print(f"{seconds:.1f} s per image{memory}")
    print(f"base beside LoRA: {grid_file}")
    return grid_file


if __name__ == "__main__":
    run_stage(main, __doc__)

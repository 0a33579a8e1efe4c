"""What all stages share: configuration, files, processes and devices, models and quantization,
flow matching."""

import collections
import concurrent.futures
import contextlib
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin

# Silence what torchao's import logs about kernels and classes that are not used here.
for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch
from diffusers import (
    AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)  # fmt: skip
from diffusers.pipelines.longcat_image.pipeline_longcat_image import (
    calculate_shift, prepare_pos_ids, split_quotation,
)  # fmt: skip
from huggingface_hub import snapshot_download
from optimum import quanto
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torchao.quantization import Float8Tensor
from tqdm import tqdm
from transformers import AutoConfig, Qwen2Tokenizer
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

# MKL's vector functions choose their kernels at the first call. If two threads make that call at
# once, one may get a less exact kernel (seen in 1 of 1000 starts), and a resumed run would write
# other bytes. So one thread makes it here.
torch.zeros(1).exp()

VERSION = "0.1.0"
FLAVOURS = {"final": "meituan-longcat/LongCat-Image", "dev": "meituan-longcat/LongCat-Image-Dev"}

# Set by torchrun: the number of processes on all machines, and the rank of this one.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
RANK = 0
if WORLD_SIZE > 1:  # what is left in the environment of one process says nothing
    RANK = int(os.environ.get("RANK") or 0)

# The file names of a LoRA: the format of diffusers and ComfyUI, and that of PEFT.
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
# Reads files with pread: pages of a memory-mapped file would count as this process's memory.
open_tensors = functools.partial(safe_open, framework="pt", backend="pread")

# Every prompt is padded or truncated to this length. The transformer attends to all of it.
TEXT_TOKENS = 512
# The list in the model authors' LoRA training script.
TARGET_MODULES = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip


# ---------------------------------------------------------------- configuration


class UserError(ValueError):
    """An error that the user can fix. Each line of its text is one problem: what is wrong, where,
    and what to do. The scripts print it without a traceback."""


# Validators: they run on one value of the configuration, and raise ValueError if it is wrong.


def parse_path(text):
    """A path with `~` expanded."""
    # In JSON, "E:\runs" is E:, a carriage return and "uns".
    if re.search(r"[\x00-\x1f\x7f-\x9f]", text):
        raise ValueError(
            "contains a control character; in JSON write a backslash as \\\\, or use /"
        )
    return os.path.expanduser(text)


def as_list(value):
    """A list as it is, any other value as a list of one."""
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.startswith("["):
        raise ValueError(
            'starts with [ but is not a JSON list; use double quotes: ["a cat", "a dog"]'
        )
    return [value]


def parse_words(value):
    """Words as a list, from a list or a text with commas, such as "neonix, zumi"."""
    if isinstance(value, str) and not value.startswith("["):
        value = re.split("[,，]", value)
    words = [word.strip() if isinstance(word, str) else word for word in as_list(value)]
    return [word for word in words if word != ""]


def parse_prompts(value):
    """Prompts as a list, from a list, one prompt, or a .txt file with one prompt per line."""
    if not value:
        return []
    is_text_file = isinstance(value, str) and value.lower().endswith(".txt")
    if not is_text_file:
        if isinstance(value, str) and os.path.isfile(value):
            raise ValueError("is a file; prompts can only be read from a .txt file, one per line")
        return as_list(value)

    try:
        text = Path(value).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot be read as a UTF-8 text file ({error}); write a prompt that ends in .txt "
            "in a list"
        ) from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("contains no prompts; write one per line")
    return prompts


def parse_block_count(value):
    """true, false or a number of blocks. 0 and 1 are numbers."""
    if type(value) is bool or (type(value) is int and value >= 0):
        return value
    raise ValueError("must be true, false or a number of blocks")


def parse_sources(value):
    """`data_dir` as a list of sources, from null, one folder or source, or a list of them."""
    if value is None:
        return []
    return [{"path": item} if isinstance(item, str) else item for item in as_list(value)]


def parse_resolution(value):
    """`resolution` as text: a single size may be a number."""
    return str(value) if type(value) is int else value


def parse_optimizer(name):
    """Names such as adamw_bf16 and adamw8bit, from files of other trainers, stand for adamw."""
    if isinstance(name, str) and name.lower().startswith("adamw"):
        return "adamw"
    return name


# Types of values. Strict: pydantic does not convert "1" to 1, or 1 to true.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# Without NUL. The pattern also makes pydantic reject text that is not valid Unicode.
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
PathText = Annotated[str, Field(min_length=1), AfterValidator(parse_path)]
WordList = Annotated[list[Text], BeforeValidator(parse_words)]
PromptList = Annotated[list[Text], BeforeValidator(parse_prompts)]
Seed = Annotated[int, Field(ge=0, lt=2**63 - 1)]
SeedList = Annotated[list[Seed], BeforeValidator(as_list), Field(min_length=1)]
FloatList = Annotated[list[float], BeforeValidator(as_list), Field(min_length=1)]
BlockCount = Annotated[bool | int, BeforeValidator(parse_block_count)]
Resolution = Annotated[Text, BeforeValidator(parse_resolution)]
Precision = Literal["int8-quanto", "int4-quanto", "fp8-torchao", "no_change", "int8-matmul"]
Optimizer = Annotated[Literal["adamw", "prodigy"], BeforeValidator(parse_optimizer)]


class Source(BaseModel):
    """One folder of images in `data_dir`."""

    model_config = STRICT
    path: PathText
    repeats: int = Field(1, ge=1, le=10**6)
    caption_prefix: Text = ""
    loss_weight: float = Field(1.0, ge=0)


SourceList = Annotated[list[Source], BeforeValidator(parse_sources)]


def option(default, description, **limits):
    """A field of Config: its default, its text in --help, and limits such as `ge=0`."""
    return Field(default, description=description, **limits)


class Config(BaseModel):
    """Every key of the configuration: name, type, default, description and limits. The flags,
    --help, error messages and the web page are made from it."""

    model_config = STRICT | ConfigDict(
        validate_assignment=True, validate_default=True, protected_namespaces=()
    )

    # Model.
    model_type: Literal["lora"] = option("lora", "what to train")
    model_family: Literal["longcat_image"] = option("longcat_image", "model family")
    model_flavour: Literal["final", "dev"] = option(
        "final", "final: the main release; dev: the mid-training checkpoint"
    )
    pretrained_model_name_or_path: PathText | None = option(
        None, "base model, a Hub name or local folder; null: the one for model_flavour"
    )
    base_model_precision: Precision = option(
        "int8-quanto", "how base weights are stored; int8-matmul: also multiply in 8 bits"
    )
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = option(
        "auto", "compute dtype; auto: the best for the device; no: float32"
    )

    # Data.
    data_dir: SourceList = option(
        [], 'folder of images, or a list of {"path", "repeats", "caption_prefix", "loss_weight"}'
    )
    instance_prompt: Text | None = option(None, "caption for images that have none", min_length=1)
    aspect_bucket_alignment: int = option(
        64, "bucket widths and heights are multiples of this, in pixels", ge=64, multiple_of=64
    )
    resolution: Resolution = option(
        "1024", 'side of a square of the target area, or several, or buckets: "1024x1024,1344x768"'
    )
    validation_split: float = option(
        0.0, "fraction of the images to hold out for validation (8 at most); 0: none", ge=0, lt=1
    )
    caption_dropout_probability: float = option(
        0.1, "probability that a sample is trained with the empty prompt", ge=0, le=1
    )
    cache_dir: PathText = option(
        "cache", "folder for cached latents and prompt embeddings; runs can share it"
    )
    text_encoder_batch_size: int = option(4, "prompts per batch when caching embeddings", ge=1)

    # LoRA.
    lora_rank: int = option(16, "LoRA rank", ge=1, le=4096)
    lora_alpha: float | None = option(
        None, "the LoRA is scaled by lora_alpha / lora_rank; null: same as lora_rank", gt=0
    )
    lora_dropout: float = option(0.0, "dropout on the input of the LoRA layers", ge=0, lt=1)
    init_lora: PathText | None = option(None, "LoRA file or folder to start training from")
    lora_target_modules: WordList = option(
        TARGET_MODULES, "layers that get a LoRA, by the end of their names", min_length=1
    )
    trigger_words: WordList = option([], "words that activate the LoRA; stored in its file")
    license: Text | None = option(None, "license of the LoRA; stored in its file")

    # Training.
    train_batch_size: int = option(1, "images per batch", ge=1, le=10**6)
    gradient_accumulation_steps: int = option(1, "batches per step", ge=1, le=10**6)
    max_train_steps: int = option(1000, "number of training steps", ge=1)
    num_train_epochs: int = option(
        0, "number of epochs, overrides max_train_steps; 0: not used", ge=0, le=10**6
    )
    optimizer: Optimizer = option("adamw", "optimizer; prodigy adapts the learning rate by itself")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = (
        option("constant_with_warmup", "learning rate schedule")
    )
    learning_rate: float = option(1e-4, "learning rate after warmup; for prodigy use 1", ge=0)
    lr_warmup_steps: int = option(100, "warmup steps of the learning rate", ge=0)
    adam_beta2: float = option(0.999, "beta2 of the optimizer; beta1 is 0.9", ge=0, lt=1)
    adam_weight_decay: float = option(0.01, "weight decay of the optimizer", ge=0)
    max_grad_norm: float = option(1.0, "maximum gradient norm; 0: no clipping", ge=0)
    gradient_checkpointing: BlockCount = option(
        True, "recompute blocks in the backward pass: true (all), false (none) or how many"
    )
    seed: int = option(42, "random seed", ge=0)

    # Memory and speed.
    enable_group_offload: bool = option(
        False, "keep frozen blocks in host memory, and copy each to the device when it is needed"
    )
    offloaded_blocks: int | None = option(
        None, "how many of the 30 blocks to offload; null: all", ge=0
    )
    torch_compile: bool = option(
        False, "compile the blocks: minutes at the start, then less time and memory per step"
    )
    benchmark: int = option(
        0, "train_lora.py: only time this many steps, on random weights and data; 0: train", ge=0
    )

    # Output.
    output_dir: PathText = option("output", "output folder of the run")
    checkpoint_step_interval: int = option(500, "steps between checkpoints", ge=1)
    checkpoints_total_limit: int = option(3, "number of checkpoints to keep", ge=1)
    resume_from_checkpoint: PathText = option(
        "latest", 'checkpoint to resume from: "latest", a folder, or "none"'
    )
    report_to: Literal["tensorboard", "none"] = option(
        "tensorboard", "where to log metrics, besides metrics.jsonl"
    )

    # Validation: preview images and the loss on held-out images during training, and validate.py.
    validation_step_interval: int = option(
        500, "steps between validations: preview images and held-out loss; 0: none", ge=0
    )
    validation_prompts: PromptList = option(
        [], "prompts for images: a list, one prompt, or a .txt file with one per line"
    )
    validation_negative_prompt: Text = option("", "negative prompt")
    validation_resolution: Text = option(
        "1024x1024", "width x height of the images; validate.py takes several, with commas"
    )
    validation_guidance: float = option(4.5, "guidance scale", ge=0)
    validation_num_inference_steps: int = option(30, "sampling steps", ge=1)
    validation_seed: SeedList = option(
        [42], "seed of the initial noise of each image; validate.py takes a list"
    )
    validation_lora_strength: FloatList = option(
        [1.0], "validate.py: strength of the LoRA, or several"
    )
    lora: PathText | None = option(
        None, 'validate.py: LoRA file or folder, "latest" (null: if there is one), or "none"'
    )
    compare_checkpoints: bool = option(
        False, "validate.py: compare all checkpoints in output_dir, a column for each"
    )

    # Checks that need more than the type. `info.data` holds those keys above the checked one that
    # are valid.

    @field_validator("resolution")
    def check_resolution(cls, value, info):
        """Raises ValueError for a resolution that has no buckets."""
        grid = info.data.get("aspect_bucket_alignment", 64)
        bucket_sets(SimpleNamespace(resolution=value, aspect_bucket_alignment=grid))
        return value

    @field_validator("validation_resolution")
    def check_validation_resolution(cls, value):
        """Raises ValueError for anything that is not a list of sizes."""
        parse_sizes(value, grid=16)
        return value

    @field_validator("learning_rate")
    def check_learning_rate(cls, value, info):
        """Raises ValueError for a rate below the final one of the polynomial schedule."""
        if info.data.get("lr_scheduler") == "polynomial" and value <= 1e-7:
            raise ValueError("must be more than 1e-7, where lr_scheduler polynomial ends")
        return value

    def __setattr__(self, name, value):
        """Checks a value that is set later, too. Raises UserError."""
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise UserError("\n".join(error_lines(error))) from None


KEYS = Config.model_fields

# Keys in files for other trainers and for the first version: other names for our keys, and keys
# that have no effect here.
RENAMED = {
    "checkpointing_steps": "checkpoint_step_interval", "instance_data_dir": "data_dir",
    "validation_prompt": "validation_prompts", "validation_steps": "validation_step_interval",
}  # fmt: skip
IGNORED = """
    adam_beta1 aspect_bucket_rounding attention_mechanism base_model_default_dtype
    data_backend_config disable_benchmark disable_bucket_pruning ema_decay
    enable_modulation_offload flow_schedule_auto_shift flow_schedule_shift
    group_offload_blocks_per_group group_offload_to_disk_path group_offload_type
    group_offload_use_stream hub_model_id lora_type lycoris_config minimum_image_size
    num_eval_images num_validation_images prune push_checkpoints_to_hub push_to_hub quantize_via
    resolution_type skip_upscaled snr_gamma strict text_encoder_precision tracker_project_name
    tracker_run_name use_ema user_prompt_library vae_batch_size validation_cfg_renorm
    validation_disable_unconditional validation_guidance_rescale validation_prompt_library
    validation_torch_compile vram_limit_gb
""".split()
# Here 0 means "not set" if the other key is set, for then that one decides.
DECIDED_BY = {"max_train_steps": "num_train_epochs", "lora_alpha": "lora_rank"}


def load_config(path=None, /, **overrides):
    """The configuration, a Config: defaults, then the keys in the JSON file `path`, then
    `overrides`. Keys can be written as flags: {"--learning_rate": "1e-4"}. A key that is null or
    empty has its default. Raises UserError (a ValueError) that lists all problems, one line per
    key."""
    values = {}
    if path:
        values = normalize_keys(read_json(path))
    values |= normalize_keys(overrides)

    # What is not set has its default.
    values = {key: value for key, value in values.items() if value is not None or key not in KEYS}
    for key, other in DECIDED_BY.items():
        if values.get(key) == 0 and values.get(other, KEYS[other].default):
            del values[key]

    ignored = sorted(values.keys() & IGNORED)
    if ignored:
        print(f"ignoring keys that have no effect here: {', '.join(ignored)}", file=sys.stderr)
    for name in ignored:
        del values[name]
    try:
        return Config(**values)
    except ValidationError as error:
        raise UserError("\n".join(error_lines(error))) from None


def config_from_flags(description, arguments):
    """The configuration from `script.py [config.json] [--key value ...]`. `--key=value` is allowed,
    and a flag without a value is true. --help prints all keys and exits."""
    if "-h" in arguments or "--help" in arguments:
        print_help(description)
        sys.exit()

    words = list(arguments)
    path = None
    if words and not words[0].startswith("--"):
        path = words.pop(0)

    flags = []
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"{name!r} is not a flag; usage: [config.json] [--key value ...]")
        if not equals:
            has_value = words and not words[0].startswith("--")
            value = words.pop(0) if has_value else True
        flags.append((name, value))
    return load_config(path, **unique_keys(flags))


def print_help(description):
    """Prints what the script does, then a line for each key."""
    print(description)
    print("Usage: [config.json] [--key value ...]")
    for name, field in KEYS.items():
        line = f"  --{name} {field.description}"
        if get_origin(field.annotation) is Literal:
            line += f"; one of {', '.join(get_args(field.annotation))}"
        print(f"{line} [{json.dumps(field.default)}]")


def read_json(path):
    """The dictionary in a JSON file, see parse_json. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file ({error})") from None
    return parse_json(text, path)


def parse_json(text, where):
    """The dictionary in a JSON text, which may contain `//` comments and trailing commas. Raises
    UserError, which begins with `where`, the file's name."""
    # Remove comments and trailing commas. Strings match first, so that they are kept as they are.
    string = r'("(?:\\.|[^"\\\n])*")'
    comment = r"//[^\n]*"
    trailing_comma = r",(?=(?:\s|//[^\n]*)*[}\]])"
    pattern = f"{string}|{comment}|{trailing_comma}"
    try:
        text = re.sub(pattern, lambda match: match[1] or "", text)
        values = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f'{where}: must contain a JSON object: {{"key": value, ...}}')
    return values


def unique_keys(pairs):
    """The dictionary of (name, value) pairs. Raises UserError for a name that appears twice, of
    which the json module would keep the last."""
    counts = collections.Counter(name for name, _ in pairs)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"the key {name!r} appears {count} times; keep one")
    return dict(pairs)


def normalize_keys(values):
    """{key: value} with our names for keys, and the values of flags parsed; None for empty texts,
    with which forms say "not set". Raises UserError for a key that is set under two names."""
    pairs = []
    not_set = {}
    for name, value in values.items():
        key = canonical_name(name)
        if isinstance(value, str) and not value.strip():
            value = None
        if name.startswith("--"):
            value = parse_flag_value(key, value)
        if value is None:
            not_set[key] = None
        else:
            pairs.append((key, value))
    return not_set | unique_keys(pairs)


def canonical_name(name):
    """Our name for a key or flag. Invalid Unicode is escaped, as pydantic would fail on it."""
    name = name.removeprefix("--").encode("utf-8", "backslashreplace").decode()
    return RENAMED.get(name, name)


def parse_flag_value(key, text):
    """The value that the text of a flag stands for: null, a JSON list or, for keys that take
    numbers, any JSON value, also written as 4. or .5,1 or True. Any other text stays as it is."""
    if not isinstance(text, str) or key not in KEYS:
        return text
    if text == "null":
        return None

    json_texts = []
    if re.search(r"\b(bool|int|float)\b", str(KEYS[key].annotation)):
        number = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text.lower())  # .5 -> 0.5
        number = re.sub(r"(?<=\d)\.(?!\d)", ".0", number)  # 4. -> 4.0
        json_texts = [number, f"[{number}]"]
    elif text.startswith("["):
        json_texts = [text]
    for json_text in json_texts:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(json_text)
    return text


def error_lines(error):
    """The problems in a pydantic ValidationError, a line each: the key, the value found, and what
    it must be. Unknown keys share the first line."""
    unknown = []
    lines = []
    for problem in error.errors():
        location = problem["loc"]  # such as ("data_dir", 0, "path")
        name = location[0]
        for part in location[1:]:
            name += f"[{part}]" if type(part) is int else f".{part}"
        if problem["type"] in ("extra_forbidden", "no_such_attribute"):
            unknown.append(repr(name) + suggestion(location))
        else:
            found = repr(problem["input"])[:100]
            message = problem["msg"].removeprefix("Value error, ")
            message = re.sub(r"^\w+ should", "must", message)
            lines.append(f"{name}: found {found}, {message}")
    if unknown:
        lines.insert(0, f"unknown keys: {', '.join(unknown)}; --help lists all keys")
    return lines


def suggestion(location):
    """' (did you mean ...?)' for an unknown key of Config or Source; '' if no key is similar."""
    names = KEYS if len(location) == 1 else Source.model_fields
    matches = difflib.get_close_matches(str(location[-1]).lower(), names, n=1, cutoff=0.7)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def base_model_name(config):
    """The base model's name on the Hub, or its local folder."""
    return config.pretrained_model_name_or_path or FLAVOURS[config.model_flavour]


def parse_sizes(text, grid):
    """'1024x1024,1344x768' -> [(1024, 1024), (1344, 768)], each size once. Raises ValueError for
    anything that is not a size in multiples of `grid`."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*[xX]\s*(\d{1,4})\s*", part)
        width, height = map(int, match.groups()) if match else (0, 0)
        if width * height == 0 or width % grid or height % grid:
            raise ValueError(
                f"{part!r} is not WIDTHxHEIGHT in multiples of {grid}, such as 1024x1024"
            )
        sizes.append((width, height))
    return list(dict.fromkeys(sizes))


def validation_sizes(config):
    """The sizes (width, height) of preview images."""
    return parse_sizes(config.validation_resolution, grid=16)


def aspect_buckets(side, grid):
    """All sizes (width, height) in multiples of `grid`, with aspect ratios from 1:2 to 2:1, whose
    area is as close to side x side as the grid allows, and within 25 % of it. Sorted."""
    sizes = set()
    for width in range(grid, 2 * side + 1, grid):
        height = round(side * side / width / grid) * grid
        if height and 0.5 <= width / height <= 2 and 0.75 <= width * height / side**2 <= 1.25:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def bucket_sets(config):
    """The buckets (width, height) that images are cropped to: one list for each number in
    `resolution`, the smallest number first. Explicit sizes, "1024x1024,1344x768", are one list.
    Raises ValueError."""
    grid = config.aspect_bucket_alignment
    parts = config.resolution.replace(" ", "").split(",")
    if not all(part.isdecimal() for part in parts):
        return [parse_sizes(config.resolution, grid)]
    sides = sorted({int(part[:5]) for part in parts})
    for side in sides:
        if side % grid or not 0 < side < 10000:
            raise ValueError(
                f"must be multiples of {grid} below 10000, or sizes such as 1024x1024,1344x768"
            )
    return [aspect_buckets(side, grid) for side in sides]


def buckets(config):
    """The buckets of all sets, sorted."""
    return sorted(set().union(*bucket_sets(config)))


# The errno of errors that no code is to blame for.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


def run_stage(main, description):
    """Runs `python stage.py ...`: main(config) with the configuration from the flags. Prints user
    errors, and those of a full or failing disk, one per line, and exits with code 2. Ctrl-C and
    SIGTERM exit with 128 plus the number of the signal, without a traceback. Bugs keep theirs."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if WORLD_SIZE > 1:
            connect_processes()
        main(config_from_flags(description, sys.argv[1:]))
        # Not after an error: NCCL would wait here for the other processes.
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()
    except (UserError, OSError) as error:
        is_known = isinstance(error, (UserError, PermissionError, BrokenPipeError))
        if not is_known and error.errno not in DISK_ERRORS:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("\ninterrupted: all finished work is saved; start again to resume", file=sys.stderr)
        number = error.args[0] if error.args else signal.SIGINT
        sys.exit(128 + number)


def connect_processes():
    """Connects the processes that torchrun has started. Gradients are summed on the device, numbers
    on the host. Raises UserError if torchrun has not started them."""
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE: is {WORLD_SIZE} in the environment, without RANK, MASTER_ADDR and "
            "MASTER_PORT; unset it to run one process, or start several with torchrun"
        )
    backend = "gloo"
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
    # The timeout is long, as one process may work for hours while the others wait.
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))


# ---------------------------------------------------------------- files


def write_file(path, data):
    """Writes bytes or text so that the file is complete or unchanged: writes to a temporary name,
    flushes to the disk, renames. Raises UserError."""
    path = Path(path)
    if isinstance(data, str):
        data = data.encode("utf-8")
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Keep the mode of a file that is replaced. Fails for a new file, or without modes.
        with contextlib.suppress(OSError):
            temporary.chmod(path.stat().st_mode)
        os.replace(temporary, path)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free space" if is_full else "fix that"
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); {advice}, or choose another folder"
        ) from None
    finally:
        # It still exists after an error or a signal.
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file. `metadata` becomes one JSON string with sorted keys: safetensors
    would write several strings in random order."""
    header = None
    if metadata:
        header = {"longcat_lora": json.dumps(metadata, sort_keys=True, ensure_ascii=False)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(tensors, header))


def check_format(path, values, expected, advice):
    """Raises UserError if `values`, the dictionary in the file or checkpoint `path`, have another
    format number than `expected`."""
    number = values.get("format", 1)  # the second version wrote none
    if number != expected:
        raise UserError(
            f"{path}: was written by another version of these scripts (format {number!r}, this one "
            f"reads {expected}); {advice}"
        )


# What libraries raise when a file that they load is missing, incomplete or corrupt.
LOADING_ERRORS = (
    OSError, ValueError, TypeError, RuntimeError, LookupError, SafetensorError, re.error,
)  # fmt: skip


@contextlib.contextmanager
def named_if_corrupt(path):
    """Turns what a library raises about a missing or corrupt file into a UserError."""
    try:
        yield
    except LOADING_ERRORS as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{path}: is missing or corrupt; create or download it again ({repr(error)[:200]})"
        ) from None


def read_tensors(path):
    """The tensors in a safetensors file. Raises UserError if it is missing or corrupt."""
    with named_if_corrupt(path), open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_header(path):
    """The metadata in a safetensors file, a dictionary. Raises UserError if the file is missing or
    corrupt."""
    with named_if_corrupt(path), open_tensors(path) as file:
        return file.metadata() or {}


def is_readable(path):
    """Whether a safetensors file exists and, by its header, is complete."""
    try:
        read_header(path)
    except UserError:
        return False
    return True


def content_key(*parts):
    """A file name that follows from the content: the first 32 hexadecimal digits of the SHA-256 of
    the parts as JSON."""
    text = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def seeded_generator(*parts):
    """A CPU generator for one random draw. Its seed is a hash of the parts that identify the draw:
    (seed, purpose, step or epoch, sample)."""
    return torch.Generator().manual_seed(int(content_key(*parts)[:15], 16))


# ---------------------------------------------------------------- processes, devices, dtypes


def pick_device():
    """CUDA (under torchrun the GPU of this process), else MPS, else the CPU."""
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", 0)) if WORLD_SIZE > 1 else 0
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def log(text):
    """Prints a line above any progress bar; under torchrun only in the first process."""
    if RANK == 0:
        tqdm.write(text)


# Prints each line only once.
log_once = functools.cache(log)


def sum_over_processes(number):
    """The sum of `number` over all processes. Waits until every process has called this."""
    total = torch.tensor(float(number))
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(total)
    return total.item()


def compute_dtype(config, device):
    """The dtype to compute in, from `mixed_precision`."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    if config.mixed_precision != "auto":
        return dtypes[config.mixed_precision]

    # GPUs before Ampere only emulate bf16, and torch.cuda.is_bf16_supported() does not tell.
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.float32
    if kind == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16
    return torch.bfloat16


def text_dtype(config, device):
    """The dtype of the text encoder: Qwen2.5 overflows in fp16, so float32 in its place."""
    dtype = compute_dtype(config, device)
    return torch.float32 if dtype == torch.float16 else dtype


def check_precision(config, device):
    """Raises UserError if `base_model_precision` does not work on this device, or is untested."""
    precision = config.base_model_precision
    kind = torch.device(device).type
    if kind == "mps" and precision in ("fp8-torchao", "int8-matmul"):
        raise UserError(
            f"base_model_precision: {precision} is untested on Apple GPUs; use int8-quanto"
        )
    if kind == "cuda" and config.torch_compile and precision == "fp8-torchao":
        if torch.cuda.get_device_capability(device) < (8, 9):
            raise UserError(
                "base_model_precision: fp8-torchao with torch_compile needs an RTX 40xx or newer "
                "GPU; use int8-quanto"
            )


def peak_memory(device):
    """The peak device memory of this process in GiB. On MPS the current memory; on the CPU nan."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return math.nan


def free_memory():
    """Returns the memory of deleted models to the device."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing if CUDA is not in use
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error):
    """Whether an exception means that the device or the host is out of memory. Few libraries have
    an exception class for it, so the message decides."""
    if not isinstance(error, (RuntimeError, MemoryError, OSError)):
        return False
    phrases = (
        "out of memory",
        "not enough memory",
        "t allocate memory",
        "alloc_failed",
        "paging file",
    )
    message = str(error).lower()
    return any(phrase in message for phrase in phrases)


def explain_out_of_memory(memory_advice):
    """Decorates the `main(config)` of a stage. If it runs out of memory, the decorated main raises
    a UserError with those settings in `memory_advice`, {key: value}, that are not set yet. Unless
    it ends by a bug, whose frames a debugger needs, it leaves no model in memory, not even in a
    notebook that keeps the traceback."""

    def decorate(main):
        @functools.wraps(main)
        def decorated(config):
            try:
                return main(config)
            except BaseException as error:
                is_memory = is_out_of_memory(error)
                if is_memory or isinstance(error, (UserError, KeyboardInterrupt)):
                    clear_frames(error)
                if is_memory:
                    raise out_of_memory_error(config, memory_advice) from None
                raise
            finally:
                free_memory()

        return decorated

    return decorate


def clear_frames(error):
    """Clears the local variables in the tracebacks of an exception and of all its causes."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def out_of_memory_error(config, memory_advice):
    """The UserError that lists what to change, see explain_out_of_memory."""
    has_mps = torch.backends.mps.is_available()
    advice = []
    for name, value in memory_advice.items():
        # A Mac's GPU shares the host's memory, so offloading would not help.
        is_useless = has_mps and "offload" in name
        # As JSON, for to Python 1 block and true are equal.
        is_set = json.dumps(getattr(config, name)) == json.dumps(value)
        if not is_set and not is_useless:
            advice.append(f"{name} {json.dumps(value)}")
    advice.append("a smaller resolution; closing other programs that use the device")
    return UserError(f"out of memory; try, cheapest first: {'; '.join(advice)}")


# ---------------------------------------------------------------- models and quantization


# The class that the config of each part of a LongCat-Image model names.
PART_CLASSES = {
    "transformer": "LongCatImageTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
RIGHT_MODEL = (
    "choose a LongCat-Image model in diffusers format that is not quantized, such as "
    f"{FLAVOURS['final']}"
)
# Types of weights that are numbers by themselves. Others, such as int8, need scales.
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# {(name on the Hub, part): its files}, of the parts that this process has downloaded.
DOWNLOADED = {}


def model_folder(config, part):
    """The local folder of a part of the model, which is downloaded if necessary.

    Parts: `transformer`, `vae`, `text_encoder`, `tokenizer`, `scheduler`. Raises UserError if there
    is none, or if it is part of another model.
    """
    model = base_model_name(config)
    if not os.path.isdir(model):
        model = download(model, part)
    folder = Path(model) / part
    if not folder.is_dir():
        raise UserError(
            f"pretrained_model_name_or_path: {model} has no folder {part!r}; {RIGHT_MODEL}"
        )
    if part in PART_CLASSES:
        config_name = "scheduler_config.json" if part == "scheduler" else "config.json"
        check_part(folder / config_name, PART_CLASSES[part])
    return folder


def check_part(path, class_name):
    """Raises UserError if the config of a model's part names another class, or quantization."""
    with named_if_corrupt(path):
        values = dict(json.loads(path.read_bytes()))
    # diffusers writes a name, transformers a list of names.
    found = values.get("_class_name") or values.get("architectures")
    if found not in (class_name, [class_name]):
        raise UserError(f"{path}: is for the class {found}, not {class_name}; {RIGHT_MODEL}")
    if values.get("quantization_config"):
        raise UserError(f"{path}: has a quantization_config; {RIGHT_MODEL}")


def download(name, part):
    """Downloads one part of a model from the Hugging Face Hub, unless it is in the local cache.

    Returns the model's local folder. Raises UserError.
    """
    # Ask the Hub once, and again if a file is gone.
    files = DOWNLOADED.get((name, part))
    if files and all(path.exists() for path in files):
        return files[0].parents[1]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[f"{part}/*"]))
    except Exception as error:  # many kinds
        raise UserError(
            f"pretrained_model_name_or_path: {name!r} is not a directory and cannot be downloaded"
            f" from the Hugging Face Hub ({str(error)[:200]!r}); check the name and the connection,"
            f" or choose {FLAVOURS['final']}"
        ) from None
    DOWNLOADED[name, part] = visible_files(folder / part)
    return folder


def visible_files(folder):
    """The files in a folder, sorted, without hidden ones: on disks of other systems, macOS writes
    `._model.json` next to `model.json`."""
    return sorted(folder.glob("[!.]*"))


def tensor_files(folder):
    """{tensor name: safetensors file} of a model's folder, which has one file or several.

    Raises UserError for a corrupt file, for a tensor that two files hold, for one of a type that
    needs scales, and if there are no such files.
    """
    files = {}
    paths = visible_files(folder)
    for path in paths:
        if path.suffix != ".safetensors":
            continue
        with named_if_corrupt(path), open_tensors(path) as shard:
            for name in shard.keys():
                dtype = shard.get_slice(name).get_dtype()
                if dtype not in WEIGHT_TYPES:
                    raise UserError(f"{path}: {name} is quantized ({dtype}); {RIGHT_MODEL}")
                if name in files:
                    raise UserError(
                        f"{path}: holds {name}, as {files[name]} does; move one of the two files "
                        "out of the folder"
                    )
                files[name] = path
    if not files:
        found = ", ".join(path.name for path in paths)[:200] or "nothing"
        raise UserError(f"{folder}: has no .safetensors files, only {found}; {RIGHT_MODEL}")
    return files


def check_names(folder, files, names):
    """Raises UserError if a tensor is left over, or missing, in `files`, {tensor name: file}."""
    left_over = files.keys() - names
    if left_over:
        name = min(left_over)
        raise UserError(
            f"{files[name]}: holds {name}, which this model has no place for; {RIGHT_MODEL}"
        )
    missing = names - files.keys()
    if missing:
        name = min(missing)
        raise UserError(f"{folder}: is missing {name}; download it again, or {RIGHT_MODEL}")


def read_weights(files, names):
    """{name: tensor} in host memory for these `names`; `files` is what tensor_files returned."""
    tensors = {}
    for path in sorted({files[name] for name in names}):
        with named_if_corrupt(path), open_tensors(path) as shard:
            for name in names:
                if files[name] == path:
                    tensors[name] = shard.get_tensor(name)
    return tensors


def load_transformer(config, device):
    """The frozen transformer, loaded from its files by fill_transformer.

    Raises UserError if it cannot be read whole.
    """
    folder = model_folder(config, "transformer")
    files = tensor_files(folder)
    with named_if_corrupt(folder):
        with torch.device("meta"):
            transformer = LongCatImageTransformer2DModel.from_config(
                LongCatImageTransformer2DModel.load_config(folder)
            )
    check_names(folder, files, transformer.state_dict().keys())
    return fill_transformer(transformer, functools.partial(read_weights, files), config, device)


def fill_transformer(transformer, read, config, device):
    """Loads the weights of a transformer on the meta device: `read(names)` gives {name: tensor}.

    One block after the other goes to the device, is quantized and, with `enable_group_offload`,
    moved to the host: neither the device nor the host ever holds the whole unquantized model.
    Returns the transformer, frozen, in eval mode, with mixed precision.
    """
    check_precision(config, device)
    dtype = compute_dtype(config, device)
    offload = GroupOffload(device)
    transformer.requires_grad_(False).eval()

    # A part is one block, or the weights before the first block or after the last one.
    parts = [
        (block, list(names))
        for block, names in itertools.groupby(transformer.state_dict(), block_name)
    ]
    blocks = [block for block, _ in parts if block]
    is_offloaded = dict(zip(blocks, offload_plan(config, len(blocks))))

    # Load one part after the other. The few weights outside of blocks stay on the device and are
    # not quantized.
    for block, names in tqdm(parts, desc="transformer", unit="part", leave=False, disable=RANK > 0):
        weights = {name: tensor.to(device, dtype) for name, tensor in read(names).items()}
        with named_if_corrupt(f"{base_model_name(config)}: the transformer"):
            transformer.load_state_dict(weights, strict=False, assign=True)
        if block:
            module = quantize(transformer.get_submodule(block), config.base_model_precision)
            if is_offloaded[block]:
                offload.add(module)

    set_autocast(transformer, dtype)
    return transformer


def block_name(weight_name):
    """The block that a weight is part of, such as "transformer_blocks.3"; "" for all others."""
    return re.match(r"((single_)?transformer_blocks\.\d+)?", weight_name)[0]


def set_autocast(transformer, dtype):
    """Runs the transformer in mixed precision, but its norms without autocast.

    CUDA's autocast would run the norms in float32 and keep a float32 copy of each input for the
    backward pass. Their kernels sum in float32 anyway.
    """
    device_type = transformer.device.type
    mixed_precision = torch.autocast(device_type, dtype, enabled=dtype != torch.float32)
    transformer.forward = mixed_precision(transformer.forward)

    # Compiled blocks share a graph only if their functions close over the same objects. So a norm's
    # `forward` is wrapped once for each class, not for each norm.
    for norm_class in (torch.nn.LayerNorm, torch.nn.RMSNorm):
        forward = torch.autocast(device_type, enabled=False)(norm_class.forward)
        for module in transformer.modules():
            if type(module) is norm_class:
                module.forward = forward.__get__(module)


def offload_plan(config, count):
    """For each of `count` blocks, whether it is offloaded: `offloaded_blocks` of them, spread
    evenly."""
    wanted = 0
    if config.enable_group_offload:
        wanted = count
        if config.offloaded_blocks is not None:
            wanted = min(count, config.offloaded_blocks)

    # Add up `wanted` from block to block: where the sum reaches a multiple of `count`, the block is
    # offloaded.
    return [i * wanted % count >= count - wanted for i in range(count)]


def compile_blocks(transformer):
    """Compiles the blocks: a graph for each kind of block, for each mode and each LoRA strength."""
    # The limit counts the graphs of both kinds, all image sizes, training and generation together.
    torch._dynamo.config.recompile_limit = 64
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        # Only `forward`, not the block: offloading's hook must stay outside of the graph.
        block.forward = torch.compile(block.forward)


def frozen(tensor):
    """A tensor as a parameter that is not trained."""
    return torch.nn.Parameter(tensor, requires_grad=False)


class GroupOffload:
    """Keeps the frozen weights of blocks in host memory and copies them to the device when they are
    needed.

    The weights of one block are a group. The device holds the group that computes and the next one.
    On CUDA the next one is copied while the current one computes, and the one before may still be
    computing: three groups at most.

    A hook before each call of a block asks for its group, in the forward pass and when
    checkpointing computes the block again. Nothing has to happen when a block ends, since
    checkpointing may leave it by an exception. Weights that autograd still needs stay on the device
    until autograd releases them: those of one block, if every offloaded block is checkpointed.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        self.groups = []
        self.current = -1  # the number of the group whose weights are on the device; -1: none yet
        self.prefetched = {}  # {number: its buffer on the device} of the group expected next

        # On CUDA, work in different streams runs at the same time. Blocks compute in the default
        # stream, and the groups are copied in this one.
        self.copy_stream = None
        self.last_switch = None  # the CUDA event of the last change of groups, see wait_for_copy
        if self.device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(self.device)

    def add(self, block):
        """Moves the weights of this block to the host, as the next group."""
        # Plan where each weight lies in one buffer for all of them, so that one copy moves a group.
        number = len(self.groups)
        weights = list(block.parameters())
        layout = []
        size = 0
        for module in block.modules():
            for name, weight in module.named_parameters(recurse=False):
                span = slice(size, size + weight.nbytes)
                layout.append((module, name, span, weight.dtype, weight.shape))
                size += math.ceil(weight.nbytes / 256) * 256  # aligned for every dtype and kernel

        # Make the block's weights views of the buffer, and copy the numbers into them.
        host = self.host_buffer(size)
        self.groups.append(SimpleNamespace(host=host, layout=layout))
        self.place(number, host)
        for view, weight in zip(block.parameters(), weights):
            view.copy_(weight)
        block.register_forward_pre_hook(lambda module, inputs: self.need(number))

    def host_buffer(self, size):
        """A buffer of `size` bytes in host memory; for CUDA it is page-locked, if possible.

        Only copies from page-locked memory run while the device computes. pin_memory() would round
        the size up to a power of two. So the buffer gets memory pages (4096 bytes each) that hold
        nothing else, and this method locks them.
        """
        space = torch.empty(size + 2 * 4096, dtype=torch.uint8)
        host = space[-space.data_ptr() % 4096 :][:size]
        if self.copy_stream:
            runtime = torch.cuda.cudart()
            if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)) == 0:
                weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())
            else:
                log_once(
                    "enable_group_offload: host memory cannot be page-locked, so copies wait for"
                    " the computation and steps take longer; fewer offloaded_blocks may help"
                )
                # CUDA raises the error again at the next call. Let it be this one.
                with contextlib.suppress(RuntimeError):
                    torch.ones(1, device=self.device)
        return host

    def place(self, number, buffer):
        """Makes the weights of a group views of `buffer`, the group's bytes on host or device."""
        for module, name, span, dtype, shape in self.groups[number].layout:
            module._parameters[name] = frozen(buffer[span].view(dtype).view(shape))

    def fetch(self, number):
        """A copy of a group's buffer on the device; on CUDA it may not be complete yet."""
        context = contextlib.nullcontext()
        if self.copy_stream:  # torch.cuda.stream(None) would fail on a Mac
            context = torch.cuda.stream(self.copy_stream)
        with context:
            return self.groups[number].host.to(self.device, non_blocking=True, copy=True)

    def need(self, number):
        """Brings a group to the device in place of the current one, and prefetches the next one."""
        if number == self.current:
            return

        # The previous group's weights are those on the host again. Frozen weights never change, so
        # nothing is copied back.
        previous = self.current
        if previous >= 0:
            self.place(previous, self.groups[previous].host)

        # This group has been prefetched, unless the guess was wrong.
        buffer = self.prefetched.pop(number, None)
        if buffer is None:
            buffer = self.fetch(number)
        self.place(number, buffer)
        self.current = number
        self.prefetched = {}
        if self.copy_stream:
            self.wait_for_copy(buffer)

        # Start to copy the next group while this one computes.
        following = self.guess_next(previous, number)
        if following != number:
            self.prefetched[following] = self.fetch(following)

    def wait_for_copy(self, buffer):
        """Makes the device wait for the copy into `buffer`, and Python for the device."""
        # The block's kernels start when the copy is complete. Only the device waits here.
        compute_stream = torch.cuda.current_stream(self.device)
        compute_stream.wait_stream(self.copy_stream)
        # The buffer was allocated in the copy stream. When Python drops it, PyTorch must not reuse
        # its memory for the next copy until the kernels in the compute stream have read it.
        buffer.record_stream(compute_stream)
        # Python runs ahead of the device. If it never waited, it would start copy after copy, each
        # into new memory, and fill the device. So wait until the device has reached the group
        # before this one: then at most three groups are there.
        if self.last_switch:
            self.last_switch.synchronize()
        self.last_switch = compute_stream.record_event()

    def guess_next(self, previous, number):
        """The group that is probably needed after `number`, which `previous` (-1: none) preceded.

        If there is only one group, it is that one. A wrong guess costs one copy.
        """
        # A forward pass goes from each group to the next one. It begins at group 0, and a backward
        # pass ends there.
        step = 1
        # A backward pass goes from each group to the one before.
        if 0 < number < previous:
            step = -1
        # In training a backward pass begins at the last group, where a forward pass ends.
        if number == len(self.groups) - 1 and torch.is_grad_enabled():
            step = -1
        # Without gradients the next forward pass follows: after the last group, group 0.
        return (number + step) % len(self.groups)


class QuantizedProduct(torch.autograd.Function):
    """x [..., in] @ weight.T for a frozen weight [out, in], stored as `dequantize` takes it.

    Only the stored weight is kept for the backward pass, no dequantized copy. With `in_8_bits`
    (int8-matmul) the products of both passes are those of int8_product.
    """

    @staticmethod
    def forward(ctx, x, shape, in_8_bits, values, scale, shift):
        ctx.save_for_backward(values, scale, shift)
        ctx.shape = shape
        ctx.in_8_bits = in_8_bits
        if in_8_bits:
            return int8_product(x, values.t(), scale.t())
        return x @ dequantize(x.dtype, shape, values, scale, shift).t()

    @staticmethod
    def backward(ctx, gradient):
        values, scale, shift = ctx.saved_tensors
        if ctx.in_8_bits:
            # This product sums over the outputs, so it needs their scales before it, not after it:
            # in float32, as products of small numbers underflow in fp16.
            columns = values.t().contiguous().t()
            scaled = gradient.float() * scale.t()
            x_gradient = int8_product(scaled, columns).to(gradient.dtype)
        else:
            x_gradient = gradient @ dequantize(gradient.dtype, ctx.shape, values, scale, shift)
        return x_gradient, None, None, None, None, None


def int8_product(x, values, scale=1):
    """x [..., n] @ values [n, m] * scale [1, m], with x rounded to int8 row by row and exact sums
    in int32.

    CUDA's kernels want each column of `values` to be contiguous.
    """
    rows = x.flatten(0, -2)
    row_scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-20) / 127
    product = torch._int_mm((rows / row_scale).round().to(torch.int8), values)
    return (product * (row_scale * scale)).to(x.dtype).unflatten(0, x.shape[:-1])


def dequantize(dtype, shape, values, scale, shift=None):
    """The weight [out, in] in `dtype`.

    int8, or float8 stored as bytes: values [out, in] * scale [out, 1]. int4, with `shift`: values *
    scale - shift, where scale and shift are [groups, 1] and `values` holds [groups, group size]
    4-bit numbers, two in a byte.
    """
    scale = scale.to(dtype)
    if shift is not None:
        # Unpack without bit shifts, which MPS does not have. An odd number of groups was padded.
        numbers = torch.cat([values % 16, values // 16])[: len(scale)]
        return (numbers * scale - shift.to(dtype)).reshape(shape)
    if values.dtype == torch.uint8:
        values = values.view(torch.float8_e4m3fn).to(dtype)  # float8 is not promoted to dtype
    return values * scale


class QuantizedLinear(torch.nn.Linear):  # a Linear, because PEFT wraps nothing else
    """A frozen Linear whose weight is quantized by optimum-quanto or torchao.

    The quantized weight is kept in plain tensors, with which torch.compile and offloading work:
    `weight`, `scale`, and for int4 `shift` (see dequantize).
    """

    def __init__(self, linear, precision):
        torch.nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.in_8_bits = precision == "int8-matmul"
        self.shift = None
        weight = linear.weight.detach()
        if precision == "int4-quanto":
            values, scale, shift = quantize_int4(weight)
            self.shift = frozen(shift)
        elif precision == "fp8-torchao":
            quantized = Float8Tensor.from_hp(weight)
            values = quantized.qdata.view(torch.uint8)  # PEFT would make the LoRA float8, too
            scale = quantized.scale
        else:  # int8-quanto and int8-matmul
            scale = quanto.AbsmaxOptimizer()(weight, quanto.qint8, axis=0)
            values = quanto.quantize_weight(weight, quanto.qint8, 0, scale, optimized=False)._data
        self.weight = frozen(values)
        self.scale = frozen(scale)

    def forward(self, x):
        """[..., in] -> [..., out], in x's dtype, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # CUDA's int8 kernel needs more than 16 rows.
        in_8_bits = self.in_8_bits and x.numel() > 16 * self.in_features
        shape = self.out_features, self.in_features
        y = QuantizedProduct.apply(x, shape, in_8_bits, self.weight, self.scale, self.shift)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y


def quantize_int4(weight):
    """A weight [out, in] quantized by optimum-quanto: int4 values (two a byte), scale, shift."""
    # quanto's own group size: the first of these that divides a row.
    in_features = weight.shape[1]
    group_size = next(n for n in (128, 96, 64, 32, in_features) if in_features % n == 0)
    scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, axis=0, group_size=group_size)
    quantized = quanto.quantize_weight(
        weight, quanto.qint4, 0, scale, shift, group_size, optimized=False
    )
    return quantized._data._data, scale, shift


def quantize(module, precision):
    """Replaces every Linear in `module` by a QuantizedLinear of this `base_model_precision`.
    Returns the module."""
    allowed = get_args(Precision)
    if precision not in allowed:
        raise ValueError(f"base_model_precision: found {precision!r}, allowed: {allowed}")
    if precision == "no_change":
        return module
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, QuantizedLinear(child, precision))
    return module


def load_part(config, part, part_class):
    """One part of the model, an instance of `part_class`. Raises UserError if it cannot be read."""
    folder = model_folder(config, part)
    with named_if_corrupt(folder):
        return part_class.from_pretrained(folder)


def load_vae(config, device):
    """The VAE, frozen, in float32: its `force_upcast` says that half precision is not enough.

    Raises UserError if it cannot be read whole.
    """
    folder = model_folder(config, "vae")
    files = tensor_files(folder)
    with named_if_corrupt(folder):
        vae, info = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    # In old files names are different, and diffusers translates them.
    names = vae.state_dict().keys()
    if info["missing_keys"] or len(files) != len(names):
        check_names(folder, files, names)
    return vae.float().requires_grad_(False).eval().to(device)


def load_scheduler(config):
    """The model's noise scheduler."""
    return load_part(config, "scheduler", FlowMatchEulerDiscreteScheduler)


def load_tokenizer(config):
    """The text encoder's tokenizer."""
    return load_part(config, "tokenizer", Qwen2Tokenizer)


def text_config(config):
    """transformers' configuration of the text encoder's language layers."""
    return load_part(config, "text_encoder", AutoConfig).text_config


def tokenize(tokenizer, prompts):
    """Prompts -> a list of token ids for each, as the pipeline makes them: text in quotes
    character by character."""
    # All pieces of all prompts go through the tokenizer in one call, which works on them in
    # parallel.
    pieces = []
    prompt_numbers = []
    for number, prompt in enumerate(prompts):
        for text, is_quoted in split_quotation(prompt):
            new_pieces = list(text) if is_quoted else [text]
            pieces += new_pieces
            prompt_numbers += [number] * len(new_pieces)

    token_ids = [[] for _ in prompts]
    if pieces:
        ids_of_pieces = tokenizer(pieces, add_special_tokens=False)["input_ids"]
        for number, ids in zip(prompt_numbers, ids_of_pieces):
            token_ids[number] += ids
    return token_ids


def token_counts(tokenizer, prompts):
    """{prompt: how many tokens it has}, those beyond 512 included."""
    prompts = list(prompts)
    counts = {}
    for i in range(0, len(prompts), 1000):  # the token ids of all prompts could take gigabytes
        some_prompts = prompts[i : i + 1000]
        for prompt, token_ids in zip(some_prompts, tokenize(tokenizer, some_prompts)):
            counts[prompt] = len(token_ids)
    return counts


def template_tokens(tokenizer):
    """The token ids of the chat template's beginning, which precedes every prompt."""
    pipe = LongCatImagePipeline(
        scheduler=None,
        vae=None,
        text_encoder=None,
        tokenizer=tokenizer,
        text_processor=None,
        transformer=None,
    )
    return tokenizer(pipe.prompt_template_encode_prefix, add_special_tokens=False)["input_ids"]


def encoder_inputs(tokenizer, prompts):
    """What the text encoder gets for a batch of prompts: token ids and attention mask, both int64
    [B, columns].

    A row is the template's beginning, at most 512 tokens of the prompt, and padding up to the
    longest prompt plus one token. That is enough: all padding tokens of a prompt have the same
    embedding, so one of them stands for all, and no prompt token attends to the padding or to the
    template's end.
    """
    template = template_tokens(tokenizer)
    rows = [template + token_ids[:TEXT_TOKENS] for token_ids in tokenize(tokenizer, prompts)]
    columns = min(max(map(len, rows)) + 1, len(template) + TEXT_TOKENS)

    input_ids = torch.full((len(rows), columns), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
    return input_ids, attention_mask


class StreamedTextEncoder:
    """The language layers of Qwen2.5-VL, for a device of any size.

    A call reads each layer from its file once and computes all prompts with it, batch after batch,
    while the next layer is read. So the device holds one layer, and the host one more.
    (transformers' own device map would read all 13 GB again for every batch.)
    """

    def __init__(self, config, device):
        self.folder = model_folder(config, "text_encoder")
        self.device = torch.device(device)
        self.dtype = text_dtype(config, device)
        self.config = text_config(config)
        self.config._attn_implementation = "sdpa"  # what transformers chooses for the whole model
        with named_if_corrupt(self.folder), torch.device("meta"):
            # All layers in turn and then the last norm get their weights in these modules.
            self.layer = qwen.Qwen2_5_VLDecoderLayer(self.config, 0).eval()
            self.norm = qwen.Qwen2_5_VLRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

        # Of the whole model's files only the language layers are used.
        self.files = {}
        for name, path in tensor_files(self.folder).items():
            if not re.fullmatch(r"(model\.)?visual\..*|lm_head\.weight", name):
                self.files[name] = path
        # Names begin with "model." or, in newer files, with "model.language_model.".
        self.prefix = "model."
        if "model.language_model.norm.weight" in self.files:
            self.prefix = "model.language_model."
        names = ["embed_tokens.weight", "norm.weight"]
        for i in range(self.config.num_hidden_layers):
            names += [f"layers.{i}.{name}" for name in self.layer.state_dict()]
        check_names(self.folder, self.files, {self.prefix + name for name in names})

    def read(self, part, names):
        """{name: weight} of a part of the model, such as "layers.0.", on the host; thread-safe."""
        start = self.prefix + part
        weights = read_weights(self.files, [start + name for name in names])
        return {name: weights[start + name] for name in names}

    def fill(self, module, weights):
        """Gives a module these weights, on the device. Its former weights are dropped first."""
        module.to("meta")
        # The device changes the dtype: it is faster than the CPU.
        weights = {name: weight.to(self.device).to(self.dtype) for name, weight in weights.items()}
        with named_if_corrupt(self.folder):
            module.load_state_dict(weights, assign=True)

    def embed_tokens(self, inputs):
        """The hidden states before the first layer: [B, columns, hidden] for each batch."""
        (table,) = self.read("", ["embed_tokens.weight"]).values()
        embedding = torch.nn.Embedding.from_pretrained(table)
        return [embedding(input_ids).to(self.device, self.dtype) for input_ids, _ in inputs]

    def layer_options(self, inputs, hidden_states):
        """What each layer gets besides the hidden states: a dictionary for each batch."""
        # Positions as in transformers 4.57.1, with which the model was trained: padding tokens all
        # have position 1. (transformers 5 counts on.) Text has the same on all three rotary axes.
        rotary = qwen.Qwen2_5_VLRotaryEmbedding(self.config).to(self.device)
        options = []
        for (_, attention_mask), states in zip(inputs, hidden_states):
            attention_mask = attention_mask.to(self.device)
            positions = attention_mask.cumsum(dim=1) - 1
            positions = positions.masked_fill(attention_mask == 0, 1).expand(3, -1, -1)
            options.append(
                dict(
                    attention_mask=create_causal_mask(self.config, states, attention_mask, None),
                    position_embeddings=rotary(states, positions),
                )
            )
        return options

    @torch.no_grad()
    def __call__(self, inputs):
        """The last hidden states, [B, columns, hidden] on the host, for each batch that
        encoder_inputs made."""
        hidden_states = self.embed_tokens(inputs)
        options = self.layer_options(inputs, hidden_states)

        # One layer after the other computes all batches, while a thread reads the next layer.
        names = list(self.layer.state_dict())
        count = self.config.num_hidden_layers
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            next_weights = reader.submit(self.read, "layers.0.", names)
            for i in tqdm(
                range(count), desc="text encoder", unit="layer", leave=False, disable=RANK > 0
            ):
                self.fill(self.layer, next_weights.result())
                if i + 1 < count:
                    next_weights = reader.submit(self.read, f"layers.{i + 1}.", names)
                for n, batch_options in enumerate(options):
                    hidden_states[n] = self.layer(hidden_states[n], **batch_options)

        # The last norm takes the layer's place on the device.
        self.layer.to("meta")
        self.fill(self.norm, self.read("norm.", ["weight"]))
        return [self.norm(states).cpu() for states in hidden_states]


load_text_encoder = StreamedTextEncoder  # the same name as for the other parts


# ---------------------------------------------------------------- flow matching


@functools.cache
def position_ids(height, width, device="cpu"):
    """Position ids (modality, row, column) of the text and of latents of height x width, float32.

    Text [512, 3]: (0, i, i). Image [height/2 * width/2, 3]: (1, 512 + row, 512 + column). Computed
    once for each size. (MPS has no float64.)
    """
    text_ids = prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=TEXT_TOKENS)
    image_ids = prepare_pos_ids(
        modality_id=1,
        type="image",
        start=(TEXT_TOKENS, TEXT_TOKENS),
        height=height // 2,
        width=width // 2,
    )
    return text_ids.to(device), image_ids.to(device)


def pack_latents(latents):
    """[B, 16, H, W] -> [B, H/2 * W/2, 64]: each 2x2 square of latents becomes one token."""
    return LongCatImagePipeline._pack_latents(latents, *latents.shape)


def sample_sigmas(normal, token_count, scheduler):
    """Sigmas in (0, 1) from standard normal samples [B]: time_shift(mu, 1, sigmoid(normal)).

    mu is linear in `token_count`, the image's tokens, as in the model authors' training.
    """
    config = scheduler.config
    mu = calculate_shift(
        token_count,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    return scheduler.time_shift(mu, 1.0, torch.sigmoid(normal))


def flow_matching_loss(transformer, latents, noise, sigmas, prompt_embeds, weights=None):
    """The training loss, a float32 scalar: mean((v(x_t, sigma, prompt) - (noise - x0))^2).

    With x_t = (1 - sigma) x0 + sigma noise. latents (x0) and noise [B, 16, H, W], sigmas [B],
    prompt_embeds [B, 512, hidden], weights [B] of the samples, or None.
    """
    # The noisy latents x_t.
    dtype = next(transformer.parameters()).dtype  # the first layer is never quantized
    x0 = pack_latents(latents.float())
    noise = pack_latents(noise.float())
    sigma = sigmas.float()[:, None, None]
    x_t = ((1 - sigma) * x0 + sigma * noise).to(dtype)

    # The transformer predicts the velocity v.
    text_ids, image_ids = position_ids(*latents.shape[2:], latents.device)
    prediction = transformer(
        hidden_states=x_t,
        encoder_hidden_states=prompt_embeds.to(dtype),
        timestep=sigmas,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]

    # The mean squared error of each sample.
    target = noise - x0
    losses = (prediction.float() - target).square().mean(dim=(1, 2))
    if weights is not None:
        losses = losses * weights
    return losses.mean()

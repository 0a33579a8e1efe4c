"""What the stages share: configuration, files, processes, devices, models and quantization, flow matching."""

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

# What torchao's import prints about kernels and classes that are not used here: nothing that a user could act on.
for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch
from diffusers import (
    AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel,
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

# MKL's vector functions choose their kernels at the first call; if two threads make it at once, one of them may get a
# coarser kernel (seen in 1 of 1000 starts), and a resumed run other bytes. So it is made here, by one thread.
torch.zeros(1).exp()

VERSION = "0.1.0"
FLAVOURS = {"final": "meituan-longcat/LongCat-Image", "dev": "meituan-longcat/LongCat-Image-Dev"}
base_model_name = lambda config: (
    config.pretrained_model_name_or_path or FLAVOURS[config.model_flavour]
)
RANK = int(os.environ.get("RANK", 0))  # this process's number under torchrun
WORLD_SIZE = int(
    os.environ.get("WORLD_SIZE", 1)
)  # how many processes torchrun started, on all machines
checkpoint_step = lambda folder: int(folder.name[5:])  # of a checkpoint, such as step-000500
LORA_FILE, PEFT_FILE = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)  # of a LoRA in a folder
open_tensors = functools.partial(
    safe_open, framework="pt", backend="pread"
)  # mapped, it would count as memory
TEXT_TOKENS = 512  # every prompt is this long, and every token is attended to
# The list of the model authors' own LoRA script.
TARGET_MODULES = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip


# ---------------------------------------------------------------- configuration


class UserError(ValueError):
    """A mistake that the user can mend. Its text says what was found, where, what to do; one line a mistake."""


def path_text(text):
    """A path, `~` expanded. In JSON "E:\\runs" is E:, a carriage return and "uns": hence the control characters."""
    if re.search(r"[\x00-\x1f\x7f-\x9f]", text):
        raise ValueError("holds a control character; in JSON a backslash is written \\\\, or use /")
    return os.path.expanduser(text)


def several(value):
    """What may stand in the place of a list: one value."""
    if isinstance(value, str) and value.startswith("["):
        raise ValueError(
            'begins as a list and is none; write it as JSON, with double quotes: ["a cat", "a dog"]'
        )
    return value if isinstance(value, list) else [value]


def prompts(value):
    """Prompts: a list, a single one, or a .txt file with one a line."""
    if not isinstance(value, str) or not (value.lower().endswith(".txt") or os.path.isfile(value)):
        return several(value) if value else []
    if not value.lower().endswith(".txt"):
        raise ValueError("is a file; prompts come from a .txt file with one a line")
    try:
        lines = Path(value).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot be read as a UTF-8 text file ({error}); a prompt may stand in a list"
        ) from None
    if not any(map(str.strip, lines)):
        raise ValueError("holds no prompt")
    return [line.strip() for line in lines if line.strip()]


def blocks(value):
    """true, false, or a number of blocks; 0 and 1 are numbers."""
    if type(value) is not bool and (type(value) is not int or value < 0):
        raise ValueError("must be true, false or a number of blocks")
    return value


def sources(value):
    """`data_dir`: null, a folder, a list of sources, or one in JSON."""
    value = [] if value is None else several(value)
    return [{"path": source} if isinstance(source, str) else source for source in value]


STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
key = lambda default, description, **limits: Field(default, description=description, **limits)
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # pydantic then refuses half characters, too
PathText = Annotated[str, Field(min_length=1), AfterValidator(path_text)]
Size = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class Source(BaseModel):
    """One folder of pictures in `data_dir`."""

    model_config = STRICT
    path: PathText
    repeats: int = Field(1, ge=1, le=10**6)
    caption_prefix: Text = ""
    loss_weight: float = Field(1.0, ge=0)


Sources = Annotated[list[Source], BeforeValidator(sources)]
Texts, Prompts = (
    Annotated[list[Text], BeforeValidator(several)],
    Annotated[list[Text], BeforeValidator(prompts)],
)
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**63 - 1)]], BeforeValidator(several), Field(min_length=1)
]
Floats = Annotated[list[float], BeforeValidator(several), Field(min_length=1)]
Blocks = Annotated[bool | int, BeforeValidator(blocks)]
Arithmetic = Literal["auto", "bf16", "fp16", "no"]
Precision = Literal["int8-quanto", "int4-quanto", "fp8-torchao", "no_change", "int8-matmul"]
Course = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]
plain_optimizer = lambda name: (
    "adamw" if isinstance(name, str) and name.lower().startswith("adamw") else name
)
Optimizer = Annotated[
    Literal["adamw", "prodigy"], BeforeValidator(plain_optimizer)
]  # adamw_bf16, adamw8bit


class Config(BaseModel):
    """Every key: its name, type, default, description and limits. Flags, help, errors and the page follow from here."""

    model_config = STRICT | ConfigDict(
        validate_assignment=True, validate_default=True, protected_namespaces=()
    )

    model_type: Literal["lora"] = key("lora", "what is trained")
    model_family: Literal["longcat_image"] = key("longcat_image", "the model family")
    model_flavour: Literal["final", "dev"] = key(
        "final", "the main release, or the mid-training checkpoint"
    )
    pretrained_model_name_or_path: PathText | None = key(
        None, "hub name or local folder; null: by model_flavour"
    )
    base_model_precision: Precision = key(
        "int8-quanto", "storage of the base; int8-matmul: products in 8 bits, too"
    )
    mixed_precision: Arithmetic = key("auto", "arithmetic; auto: the device's best; no: float32")

    data_dir: Sources = key(
        [], 'folder of pictures, or a list of {"path", "repeats", "caption_prefix", "loss_weight"}'
    )
    instance_prompt: Text | None = key(None, "caption for pictures that have none", min_length=1)
    aspect_bucket_alignment: int = key(
        64, "grid of the bucket sizes, in pixels", ge=64, multiple_of=64
    )
    resolution: Size = key(
        "1024", 'side of a square of the wanted area, or several, or buckets: "1024x1024,1344x768"'
    )
    validation_split: float = key(
        0.0, "share of the pictures (8 at most) that is only scored; 0: none", ge=0, lt=1
    )
    caption_dropout_probability: float = key(
        0.1, "share of the samples trained with the empty prompt", ge=0, le=1
    )
    cache_dir: PathText = key(
        "cache", "folder of cached latents and prompt embeddings; several runs may share one"
    )
    text_encoder_batch_size: int = key(4, "prompts a batch when embeddings are cached", ge=1)

    lora_rank: int = key(16, "rank", ge=1, le=4096)
    lora_alpha: float | None = key(
        None, "strength is lora_alpha / lora_rank; null: equal to the rank", gt=0
    )
    lora_dropout: float = key(0.0, "dropout on the LoRA's input", ge=0, lt=1)
    init_lora: PathText | None = key(None, "LoRA file or folder to start from")
    lora_target_modules: Texts = key(
        TARGET_MODULES, "ends of the names of the layers that get a LoRA", min_length=1
    )
    trigger_words: Texts = key([], "words that call up what was learned; noted in the LoRA's file")
    license: Text | None = key(None, "licence of the LoRA; noted in its file")

    train_batch_size: int = key(1, "pictures a batch", ge=1, le=10**6)
    gradient_accumulation_steps: int = key(1, "batches a step", ge=1, le=10**6)
    max_train_steps: int = key(1000, "steps to train", ge=1)
    num_train_epochs: int = key(
        0, "if not 0: epochs to train, in place of max_train_steps", ge=0, le=10**6
    )
    optimizer: Optimizer = key("adamw", "AdamW, or Prodigy, which finds the learning rate itself")
    lr_scheduler: Course = key("constant_with_warmup", "course of the learning rate")
    learning_rate: float = key(1e-4, "learning rate after warm-up; for prodigy 1", ge=0)
    lr_warmup_steps: int = key(100, "steps until the full learning rate", ge=0)
    adam_beta2: float = key(0.999, "the optimizer's beta2; beta1 is 0.9", ge=0, lt=1)
    adam_weight_decay: float = key(0.01, "the optimizer's weight decay", ge=0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm; 0: not clipped", ge=0)
    gradient_checkpointing: Blocks = key(
        True, "compute blocks again in the backward pass: all, none, or how many"
    )
    seed: int = key(42, "every random draw follows from it", ge=0)

    enable_group_offload: bool = key(
        False, "keep frozen blocks in host memory; they visit the device in turn"
    )
    offloaded_blocks: int | None = key(
        None, "how many of the 30 blocks stay there; null: all", ge=0
    )
    torch_compile: bool = key(
        False, "compile the blocks: minutes at the start, less time and memory a step"
    )
    benchmark: int = key(
        0, "train_lora.py: only measure so many steps, with random weights and data", ge=0
    )

    output_dir: PathText = key("output", "folder of this run's files")
    checkpoint_step_interval: int = key(500, "steps between checkpoints", ge=1)
    checkpoints_total_limit: int = key(3, "how many checkpoints are kept", ge=1)
    resume_from_checkpoint: PathText = key(
        "latest", 'checkpoint to go on from: "latest", a folder, or "none"'
    )
    report_to: Literal["tensorboard", "none"] = key(
        "tensorboard", "where curves go, besides metrics.jsonl"
    )
    validation_step_interval: int = key(
        500, "steps between preview pictures and held-out scores; 0: none", ge=0
    )

    validation_prompts: Prompts = key(
        [], "prompts to draw: a list, one, or a .txt file with one a line"
    )
    validation_negative_prompt: Text = key("", "negative prompt")
    validation_resolution: Text = key(
        "1024x1024", "width x height; validate.py takes several, with commas"
    )
    validation_guidance: float = key(4.5, "guidance scale", ge=0)
    validation_num_inference_steps: int = key(30, "sampling steps", ge=1)
    validation_seed: Seeds = key(
        [42], "seed of every picture's first noise; validate.py takes a list"
    )
    validation_lora_strength: Floats = key([1.0], "validate.py: strength of the LoRA, or several")
    lora: PathText | None = key(
        None, 'validate.py: a LoRA file or folder, "latest" (null: if there is one), or "none"'
    )
    compare_checkpoints: bool = key(
        False, "validate.py: a column for each checkpoint of output_dir"
    )

    @field_validator("resolution", "validation_resolution", "learning_rate")
    def fits(cls, value, info):
        """What takes more than a look at the type; `info.data` has the keys above this one that are right."""
        name, above = info.field_name, {"aspect_bucket_alignment": 64} | info.data
        if name == "resolution":
            bucket_sets(SimpleNamespace(**above, resolution=value))
        if name == "validation_resolution":
            parse_sizes(value, 16)
        if name == "learning_rate" and above.get("lr_scheduler") == "polynomial" and value <= 1e-7:
            raise ValueError("must be more than 1e-7, where lr_scheduler polynomial ends")
        return value

    def __setattr__(self, name, value):
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise UserError("\n".join(mistakes(error))) from None


KEYS = Config.model_fields
# What other trainers' files, and those for the first version, name otherwise, or hold besides.
RENAMED = {
    "checkpointing_steps": "checkpoint_step_interval", "instance_data_dir": "data_dir",
    "validation_prompt": "validation_prompts", "validation_steps": "validation_step_interval",
}  # fmt: skip
IGNORED = """adam_beta1 aspect_bucket_rounding attention_mechanism base_model_default_dtype data_backend_config
    disable_benchmark disable_bucket_pruning ema_decay enable_modulation_offload flow_schedule_auto_shift
    flow_schedule_shift group_offload_blocks_per_group group_offload_to_disk_path group_offload_type
    group_offload_use_stream hub_model_id lora_type lycoris_config minimum_image_size num_eval_images
    num_validation_images prune push_checkpoints_to_hub push_to_hub quantize_via resolution_type skip_upscaled
    snr_gamma strict text_encoder_precision tracker_project_name tracker_run_name use_ema user_prompt_library
    vae_batch_size validation_cfg_renorm validation_disable_unconditional validation_guidance_rescale
    validation_prompt_library validation_torch_compile vram_limit_gb""".split()


def read_json(path):
    """The dictionary in a JSON file that may hold `//` comments and trailing commas. Raises UserError."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file ({error})") from None


def parse_json(text, where):
    """read_json's dictionary, from the text itself; `where` names it in errors."""
    string, comment, comma = r'("(?:\\.|[^"\\\n])*")', r"//[^\n]*", r",(?=(?:\s|//[^\n]*)*[}\]])"
    try:
        text = re.sub(f"{string}|{comment}|{comma}", lambda match: match.group(1) or "", text)
        values = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: holds a {type(values).__name__}, not an object of keys and values"
        )
    return values


def unique_keys(pairs):
    """The dictionary of a JSON object's pairs. Raises UserError for a key that is there twice: json would drop one."""
    for name, count in collections.Counter(name for name, _ in pairs).items():
        if count > 1:
            raise UserError(f"the key {name!r} is there {count} times; keep one")
    return dict(pairs)


def load_config(path=None, /, **overrides):
    """The configuration, a Config: defaults, then the keys of the JSON file `path`, then `overrides`. Keys may stand as
    flags: {"--learning_rate": "1e-4"}. Raises UserError (a ValueError) with all that is wrong, one line a key."""
    given = our_keys(read_json(path) if path else {}) | our_keys(overrides)
    if ignored := sorted(given.keys() & IGNORED):
        print(f"ignored, for they mean nothing here: {', '.join(ignored)}", file=sys.stderr)
    try:
        return Config(**{name: value for name, value in given.items() if name not in IGNORED})
    except ValidationError as error:
        raise UserError("\n".join(mistakes(error))) from None


def mistakes(error):
    """A line for each wrong key in pydantic's error: what was found, what it should be. Unknown keys share one."""
    unknown, lines = [], []
    for problem in error.errors():
        name = "".join(f"[{part}]" if type(part) is int else f".{part}" for part in problem["loc"])[
            1:
        ]
        if problem["type"] in ("extra_forbidden", "no_such_attribute"):
            names = KEYS if len(problem["loc"]) == 1 else Source.model_fields
            near = difflib.get_close_matches(
                str(problem["loc"][-1]).lower(), names, n=1, cutoff=0.7
            )
            unknown.append(repr(name) + (f" (did you mean {near[0]!r}?)" if near else ""))
        else:
            message = re.sub(r"^\w+ should", "must", problem["msg"].removeprefix("Value error, "))
            lines.append(f"{name}: found {repr(problem['input'])[:100]}, {message}")
    return [f"unknown keys: {', '.join(unknown)}; --help lists all"] * bool(unknown) + lines


def our_keys(values):
    """{key: value} under our names, a flag's text read. Raises UserError for a key that is there under two names."""
    return unique_keys(
        [(our_name(n), flag_value(n, v) if n.startswith("--") else v) for n, v in values.items()]
    )


def our_name(name):
    """Our name of a key or flag. Half a character is written out, which would stop pydantic."""
    name = name.removeprefix("--").encode("utf-8", "backslashreplace").decode()
    return RENAMED.get(name, name)


def flag_value(name, text):
    """What a flag's text stands for: null, a list in JSON, for a key of numbers also 4., .5,1 and true; else itself."""
    if not isinstance(text, str) or our_name(name) not in KEYS:
        return text
    forms = [text] if text == "null" or text.startswith("[") else []
    if re.search(r"\b(bool|int|float)\b", str(KEYS[our_name(name)].annotation)):
        numbers = re.sub(
            r"(?<=\d)\.(?!\d)", ".0", re.sub(r"(?<![\w.])\.(?=\d)", "0.", text.lower())
        )
        forms = [numbers, f"[{numbers}]"]
    for form in forms:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(form)
    return text


def config_from_flags(description, arguments):
    """`script.py [config.json] [--key value ...]` -> configuration. A flag without a value is true."""
    if {"-h", "--help"} & set(arguments):
        print(description, "Usage: [config.json] [--key value ...]", sep="\n")
        for name, field in KEYS.items():
            kind = field.annotation
            choices = f"; one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else ""
            print(f"  --{name} {field.description}{choices} [{json.dumps(field.default)}]")
        sys.exit()
    words, given = [*arguments], []
    path = words.pop(0) if words and not words[0].startswith("--") else None
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"{name!r} is no flag; write [config.json] [--key value ...]")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else True
        given.append((name, value))
    return load_config(path, **unique_keys(given))


def parse_sizes(text, grid):
    """'1024x1024,1344x768' -> [(1024, 1024), (1344, 768)]. Raises ValueError for what is no size or not on the grid."""
    sizes = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*[xX]\s*(\d{1,4})\s*", part)
        size = tuple(map(int, match.groups())) if match else (0, 0)
        if not all(side and side % grid == 0 for side in size):
            raise ValueError(
                f"{part!r} is no WIDTHxHEIGHT in multiples of {grid}, such as 1024x1024"
            )
        sizes[size] = True
    return list(sizes)


def bucket_sets(config):
    """The buckets (width, height) that pictures are cut to, a list for each number in `resolution`, the smallest first:
    all on the grid from 1:2 to 2:1, as near to the square's area as it allows. "1024x1024,1344x768" is one list."""
    grid, parts = config.aspect_bucket_alignment, config.resolution.replace(" ", "").split(",")
    if not all(map(str.isdecimal, parts)):
        return [parse_sizes(config.resolution, grid)]
    sides, sets = sorted({int(part[:5]) for part in parts}), []
    for side in sides:
        if side % grid or not 0 < side < 10000:
            raise ValueError(
                f"must be multiples of {grid} under 10000, or sizes such as 1024x1024,1344x768"
            )
        sizes = {
            (width, round(side * side / width / grid) * grid)
            for width in range(grid, 2 * side + 1, grid)
        }
        sizes |= {(height, width) for width, height in sizes}  # a bucket for every turned bucket
        sets.append(
            sorted(
                (w, h)
                for w, h in sizes
                if h and 0.5 <= w / h <= 2 and 0.75 <= w * h / side**2 <= 1.25
            )
        )
    return sets


buckets = lambda config: sorted({bucket for sizes in bucket_sets(config) for bucket in sizes})
validation_sizes = lambda config: parse_sizes(config.validation_resolution, 16)


def run_stage(main, description):
    """What `python stage.py ...` does: main(config) of the flags. Mistakes are a line each and exit code 2, Ctrl-C and
    SIGTERM one line and 128 and the signal's number."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    signal.signal(signal.SIGTERM, interrupt)
    if WORLD_SIZE > 1:  # gradients are summed on the device, numbers on the host
        kind = (
            "cpu:gloo,cuda:nccl"
            if torch.cuda.is_available() and torch.distributed.is_nccl_available()
            else "gloo"
        )
        torch.distributed.init_process_group(
            kind, timeout=datetime.timedelta(days=7)
        )  # one may work for long
    try:
        main(config_from_flags(description, sys.argv[1:]))
        if WORLD_SIZE > 1:  # not after an error: NCCL would wait here for the other processes
            torch.distributed.destroy_process_group()
    except (UserError, OSError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("\ninterrupted: what was finished is saved; start again to go on", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))


# ---------------------------------------------------------------- files


def write_file(path, data):
    """Writes bytes or text whole or not at all: temporary name, flush, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # it is new, or a mount has no modes
            temporary.chmod(path.stat().st_mode)
        os.replace(temporary, path)
    except OSError as error:
        advice = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); {advice}, or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # it is still there if something went wrong, a signal for one


def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file, `metadata` as one sorted JSON string: safetensors orders several keys at random."""
    header = (
        {"longcat_lora": json.dumps(metadata, sort_keys=True, ensure_ascii=False)}
        if metadata
        else None
    )
    write_file(
        path,
        save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header
        ),
    )


@contextlib.contextmanager
def named_if_corrupt(path):
    """Turns what a library raises about a cut-off or missing file into a UserError."""
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        SafetensorError,
        re.error,
    ) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{path}: is missing or damaged; make or download it again ({repr(error)[:200]})"
        ) from None


def read_tensors(path):
    """The tensors of a safetensors file. Raises UserError if it is missing or damaged."""
    with named_if_corrupt(path), open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_header(path):
    """The metadata in a safetensors file's header, a dictionary. Raises UserError if the file is missing or damaged."""
    with named_if_corrupt(path), open_tensors(path) as file:
        return file.metadata() or {}


def is_readable(path):
    """Whether a safetensors file is there and, by its header, whole."""
    with contextlib.suppress(UserError):
        return read_header(path) is not None
    return False


def checkpoint_folders(config):
    """This run's checkpoints, oldest first. Folders with other names, such as a user's copies, are passed over."""
    folders = (Path(config.output_dir) / "checkpoints").glob("step-" + "[0-9]" * 6 + "*")
    return sorted(
        (folder for folder in folders if folder.name[5:].isdecimal()), key=checkpoint_step
    )


def content_key(*parts):
    """A file name from what went in: 32 hexadecimal digits of the SHA-256 of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8")).hexdigest()[:32]


def seeded_generator(*what):
    """A CPU generator for one random draw, seeded by what is drawn: (seed, purpose, step or epoch, sample)."""
    return torch.Generator().manual_seed(int(content_key(*what)[:15], 16))


def in_parallel(function, items):
    """Yields function(item) for every item, in order, from a thread a core: Pillow and hashing let go of Python's lock.
    No more than a few results wait to be taken."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        yield from (result.result() for result in waiting)


# ---------------------------------------------------------------- processes, devices, dtypes


def pick_device():
    """CUDA if there is one (under torchrun this process's own), else MPS, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def log(text):
    """Prints a line, past any progress bar; under torchrun in the first process only."""
    if RANK == 0:
        tqdm.write(text)


log_once = functools.cache(log)  # the same line only once


def sum_over_processes(number):
    """The sum of this number over all processes; returns when every process has come here."""
    total = torch.tensor(float(number))
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(total)
    return total.item()


def compute_dtype(config, device):
    """The dtype of the arithmetic. torch.cuda.is_bf16_supported() also says yes where bf16 is only emulated."""
    chosen, kind = config.mixed_precision, torch.device(device).type
    if chosen == "auto":
        old = kind == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
        chosen = "no" if kind == "cpu" else "fp16" if old else "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[chosen]


def text_dtype(config, device):
    """The dtype of the text encoder: Qwen2.5 overflows in fp16, so float32 there."""
    return torch.float32 if (dtype := compute_dtype(config, device)) == torch.float16 else dtype


def check_precision(config, device):
    """Raises UserError for a `base_model_precision` that does not work on this device, or has never been tried."""
    precision, kind = config.base_model_precision, torch.device(device).type
    if kind == "mps" and precision in ("fp8-torchao", "int8-matmul"):
        raise UserError(
            f"base_model_precision: {precision} has never been tried on a Mac's GPU; choose int8-quanto"
        )
    old = kind == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    if old and config.torch_compile and precision == "fp8-torchao":
        raise UserError(
            "base_model_precision: torch_compile takes fp8-torchao from RTX 40xx on; choose int8-quanto"
        )


def peak_memory(device):
    """The most device memory that this process has used, in GiB; on a Mac what it uses now, on the CPU nan."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return torch.mps.driver_allocated_memory() / 2**30 if device.type == "mps" else math.nan


def free_memory():
    """Hands memory of deleted models back to the device."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where it is not used
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error):
    """Whether an exception says that memory has run out, the device's or the host's; few have a class of their own."""
    words = (
        "out of memory",
        "not enough memory",
        "t allocate memory",
        "alloc_failed",
        "paging file",
    )
    return isinstance(error, (RuntimeError, MemoryError, OSError)) and any(
        word in str(error).lower() for word in words
    )


def explain_out_of_memory(memory_advice):
    """Decorates the `main(config)` of a stage: running out of memory is a UserError that names what of `memory_advice`,
    {key: value}, is not set so yet. And no model stays in a notebook's memory, not even in an error's traceback."""

    def decorate(main):
        @functools.wraps(main)
        def decorated(config):
            try:
                return main(config)
            except BaseException as error:
                link = error
                while link:
                    traceback.clear_frames(link.__traceback__)
                    link = link.__cause__ or link.__context__
                if is_out_of_memory(error):
                    other = {
                        name: value
                        for name, value in memory_advice.items()
                        if getattr(config, name) != value
                    }
                    mac = (
                        torch.backends.mps.is_available()
                    )  # has but one memory: offloading gains nothing
                    advice = [
                        f"{n} {json.dumps(v)}"
                        for n, v in other.items()
                        if not (mac and "offload" in n)
                    ]
                    advice = "; ".join(
                        [*advice, "a smaller resolution; no other program on the device"]
                    )
                    raise UserError(
                        f"out of memory; what to change, the cheapest first: {advice}"
                    ) from None
                raise
            finally:
                free_memory()

        return decorated

    return decorate


# ---------------------------------------------------------------- models and quantization


def model_folder(config, part):
    """The local folder of a part: `transformer`, `vae`, `text_encoder`, `tokenizer`, `scheduler`. Raises UserError."""
    name = base_model_name(config)
    folder = Path(name if os.path.isdir(name) else download(name, part)) / part
    if not folder.is_dir():
        raise UserError(f"pretrained_model_name_or_path: {folder.parent} has no folder {part!r}")
    return folder


@functools.cache
def download(name, part):
    """Has this part of a model of the hub downloaded, if need be. Returns the model's folder. Raises UserError."""
    try:
        return snapshot_download(name, allow_patterns=[f"{part}/*"])
    except Exception as error:  # of many kinds
        problem = f"is no folder, and cannot be had from the hub, which has {FLAVOURS['final']} ({str(error)[:200]!r})"
        raise UserError(f"pretrained_model_name_or_path: {name!r} {problem}") from None


def tensor_files(folder):
    """{tensor name: safetensors file} of a model's folder, which holds one file or many."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path) as shard:
            files |= dict.fromkeys(shard.keys(), path)
    return files


def read_weights(files, names):
    """{name: tensor} on the host, for some of the names in tensor_files."""
    tensors = {}
    for path in sorted({files[name] for name in names}):
        with open_tensors(path) as shard:
            tensors |= {name: shard.get_tensor(name) for name in names if files[name] == path}
    return tensors


def load_transformer(config, device):
    """The frozen transformer, see fill_transformer, from its files. Raises UserError if a weight is missing."""
    with named_if_corrupt(folder := model_folder(config, "transformer")):
        with torch.device("meta"):
            transformer = LongCatImageTransformer2DModel.from_config(
                LongCatImageTransformer2DModel.load_config(folder)
            )
        return fill_transformer(
            transformer, functools.partial(read_weights, tensor_files(folder)), config, device
        )


def fill_transformer(transformer, read, config, device):
    """Gives a transformer on the meta device its weights, `read(names)` -> {name: tensor}. Returns it frozen, in eval
    mode. Block after block goes to the device, is quantized and, with `enable_group_offload`, put on the host:
    neither host nor device ever holds the whole unquantized model."""
    check_precision(config, device)
    kind, dtype, offload = (
        torch.device(device).type,
        compute_dtype(config, device),
        GroupOffload(device),
    )
    transformer.requires_grad_(False).eval()
    block_of = lambda name: re.match(r"((single_)?transformer_blocks\.\d+)?", name)[0]
    parts = [
        (block, [*names]) for block, names in itertools.groupby(transformer.state_dict(), block_of)
    ]
    away = offload_plan(config, sum(block != "" for block, _ in parts))
    for block, names in tqdm(parts, desc="transformer", unit="part", leave=False, disable=RANK > 0):
        state = {name: tensor.to(device, dtype) for name, tensor in read(names).items()}
        transformer.load_state_dict(state, strict=False, assign=True)
        if block:
            module = quantize(transformer.get_submodule(block), config.base_model_precision)
            if away.pop(0):
                offload.add(module)
    # Mixed precision, but for norms: CUDA's autocast would run them in float32 and keep such a copy of each input, and
    # their kernels sum in float32 anyway.
    transformer.forward = torch.autocast(kind, dtype, enabled=dtype != torch.float32)(
        transformer.forward
    )
    for module in transformer.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
            module.forward = torch.autocast(kind, enabled=False)(module.forward)
    return transformer


def offload_plan(config, count):
    """For each of `count` blocks, whether it lives on the host: `offloaded_blocks` of them, spread evenly."""
    wanted = count if config.offloaded_blocks is None else min(count, config.offloaded_blocks)
    wanted = wanted if config.enable_group_offload else 0
    return [(i + 1) * wanted // count > i * wanted // count for i in range(count)]


def compile_blocks(transformer):
    """Compiles the blocks: one graph for all of a kind, and another for each mode and LoRA strength."""
    torch._dynamo.config.recompile_limit = (
        64  # both kinds, sizes, training and drawing count together
    )
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.forward = torch.compile(
            block.forward
        )  # not the block: offloading's hook must stay outside


class GroupOffload:
    """Keeps the frozen weights of blocks, each a group, on the host. The device holds the group that computes and the
    next one, which on CUDA is copied meanwhile; there the one before may still be at work: three groups at most.

    A block asks for its group whenever it is called, in the forward pass and when checkpointing computes it again; when
    it ends nothing has to happen, for checkpointing may leave it by an exception. What autograd still needs of a group
    that has left lives as long as autograd holds it: one block, if all are checkpointed. Only frozen tensors move.
    """

    def __init__(self, device):
        self.device, self.groups, self.current, self.coming, self.reached = (
            torch.device(device),
            [],
            None,
            {},
            None,
        )
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def add(self, block):
        """Puts the weights of this block on the host, as the next group."""
        number, layout, weights, end = len(self.groups), [], [], 0
        for module in block.modules():
            for name, weight in module.named_parameters(recurse=False):
                layout.append((module, name, end, weight.nbytes, weight.dtype, weight.shape))
                weights.append(weight.detach())
                end += -(-weight.nbytes // 256) * 256  # aligned for every dtype and kernel
        # One buffer, so that one copy moves the group, on pages of its own: those can be locked, so that the copy runs
        # beside the computation. pin_memory() would round the size up to a power of two.
        space = torch.empty(-(-end // 4096) * 4096 + 4096, dtype=torch.uint8)
        host = space[-space.data_ptr() % 4096 :][:end]
        if self.stream:
            runtime = torch.cuda.cudart()
            if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)):
                log_once(
                    "offloading: host memory cannot be page-locked, so copies wait for the computation: slower"
                )
                with contextlib.suppress(RuntimeError):
                    torch.ones(
                        1, device=self.device
                    )  # takes the error away, or the next kernel would raise it
            else:
                weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())
        self.groups.append(SimpleNamespace(host=host, layout=layout))
        self.place(number, host)
        for (module, name, *_), weight in zip(layout, weights):
            getattr(module, name).copy_(weight)
        block.register_forward_pre_hook(lambda module, inputs: self.need(number))

    def place(self, number, buffer):
        """Gives the group's modules the weights that lie in `buffer`."""
        for module, name, start, size, dtype, shape in self.groups[number].layout:
            weight = buffer[start : start + size].view(dtype).view(shape)
            module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)

    def fetch(self, number):
        """A copy of the group's buffer on the device; on CUDA it is under way when this returns."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            return self.groups[number].host.to(self.device, non_blocking=True, copy=True)

    def need(self, number):
        """Brings a group to the device, in the place of the one that is there."""
        if number == self.current:
            return
        if self.current is not None:
            self.place(self.current, self.groups[self.current].host)
        buffer = self.coming.pop(number) if number in self.coming else self.fetch(number)
        self.place(number, buffer)
        before, self.current, self.coming = self.current, number, {}
        if self.stream:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            buffer.record_stream(computing)
            if self.reached:
                self.reached.synchronize()  # else copies would run ahead of the computation, and fill the device
            self.reached = computing.record_event()
        # Forward, at the end back if a backward pass follows, else from the start.
        following = number + (1 if number == 0 or before is None or before < number else -1)
        if following == len(self.groups):
            following = number - 1 if torch.is_grad_enabled() else 0
        if 0 <= following != number:
            self.coming = {following: self.fetch(following)}


class QuantizedProduct(torch.autograd.Function):
    """x [..., in] @ weight.T for a frozen weight [out, in] that is stored as `dequantize` takes it. For the backward
    pass only that is kept, no dequantized copy. With `in_8_bits` (int8-matmul) both products are int8_product's."""

    @staticmethod
    def forward(ctx, x, shape, in_8_bits, values, scale, shift):
        ctx.save_for_backward(values, scale, shift)
        ctx.shape, ctx.in_8_bits = shape, in_8_bits
        if in_8_bits:
            return int8_product(x, values.t(), scale.t())
        return x @ dequantize(x.dtype, shape, values, scale, shift).t()

    @staticmethod
    def backward(ctx, gradient):
        values, scale, shift = ctx.saved_tensors
        if ctx.in_8_bits:  # this product sums over the outputs, so their scales go first
            x_gradient = int8_product(gradient * scale.t(), values.t().contiguous().t()).to(
                gradient.dtype
            )
        else:
            x_gradient = gradient @ dequantize(gradient.dtype, ctx.shape, values, scale, shift)
        return x_gradient, None, None, None, None, None


def int8_product(x, values, scale=1):
    """x [..., n] @ values [n, m] * scale [1, m], x rounded to int8 row by row and the sums exact, in int32. CUDA's
    kernels want the columns of `values` to lie in a row each."""
    rows = x.flatten(0, -2)
    row_scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-20) / 127
    product = torch._int_mm((rows / row_scale).round().to(torch.int8), values)
    return (product * (row_scale * scale)).to(x.dtype).unflatten(0, x.shape[:-1])


def dequantize(dtype, shape, values, scale, shift=None):
    """The weight [out, in] in `dtype`: values * scale [out, 1], of int8 or the bytes of float8; with `shift`, of groups
    [groups, group size] of 4-bit values, two in a byte, values * scale - shift [groups, 1]."""
    scale = scale.to(dtype)
    if shift is not None:
        halves = torch.cat([values % 16, values // 16])[: len(scale)]  # MPS cannot shift bits
        return (halves * scale - shift.to(dtype)).reshape(shape)
    if values.dtype == torch.uint8:
        values = values.view(torch.float8_e4m3fn).to(dtype)  # float8 does not promote by itself
    return values * scale


class QuantizedLinear(torch.nn.Linear):  # PEFT wraps nothing else
    """A frozen Linear with a quantized weight. optimum-quanto and torchao do the rounding; their numbers are kept in
    plain tensors, which torch.compile and offloading take: `weight`, `scale`, and for int4 `shift` (see dequantize)."""

    def __init__(self, linear, precision):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        self.in_8_bits, shift = precision == "int8-matmul", None
        weight = linear.weight.detach()
        if precision == "fp8-torchao":
            made = Float8Tensor.from_hp(weight)
            values, scale = (
                made.qdata.view(torch.uint8),
                made.scale,
            )  # PEFT would make a LoRA float8, too
        elif precision == "int4-quanto":
            # quanto's own sizes: groups of 128, or of what divides a row
            group = next(
                (size for size in (128, 96, 64, 32) if self.in_features % size == 0),
                self.in_features,
            )
            scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, axis=0, group_size=group)
            made = quanto.quantize_weight(
                weight, quanto.qint4, 0, scale, shift, group, optimized=False
            )
            values = made._data._data
        else:
            scale = quanto.AbsmaxOptimizer()(weight, quanto.qint8, axis=0)
            values = quanto.quantize_weight(weight, quanto.qint8, 0, scale, optimized=False)._data
        frozen = lambda tensor: (
            tensor if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
        )
        self.weight, self.scale, self.shift = frozen(values), frozen(scale), frozen(shift)

    def forward(self, x):
        """[..., in] -> [..., out], in x's dtype, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        in_8_bits = (
            self.in_8_bits and x.numel() > 16 * self.in_features
        )  # the kernels want more rows
        shape = self.out_features, self.in_features
        y = QuantizedProduct.apply(x, shape, in_8_bits, self.weight, self.scale, self.shift)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize(module, precision):
    """Makes every Linear in `module` a QuantizedLinear of this `base_model_precision`, in place. Returns the module."""
    if precision not in get_args(Precision):
        raise ValueError(
            f"base_model_precision: found {precision!r}, allowed: {', '.join(get_args(Precision))}"
        )
    for parent in list(module.modules()) if precision != "no_change" else []:
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, QuantizedLinear(child, precision))
    return module


def load_part(config, part, kind):
    """One part of the model, as the class `kind` loads it. Raises UserError if it is missing or damaged."""
    with named_if_corrupt(folder := model_folder(config, part)):
        return kind.from_pretrained(folder)


def load_vae(config, device):
    """The VAE, frozen, in float32 (its `force_upcast` says that half precision is not enough)."""
    return load_part(config, "vae", AutoencoderKL).float().requires_grad_(False).eval().to(device)


load_scheduler = lambda config: load_part(config, "scheduler", FlowMatchEulerDiscreteScheduler)
load_tokenizer = lambda config: load_part(config, "tokenizer", Qwen2Tokenizer)
text_config = lambda config: (
    load_part(config, "text_encoder", AutoConfig).text_config
)  # of the language layers


def tokenize(tokenizer, prompts):
    """Prompts -> a list of token ids for each, as the pipeline makes them: text in quotes character by character."""
    # All pieces of all prompts go through the tokenizer in one call, which works on them in parallel.
    pieces, prompt_numbers = [], []
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
    """{prompt: how many tokens it has}, those over 512 included."""
    prompts, counts = list(prompts), {}
    for i in range(0, len(prompts), 1000):  # the ids of all prompts together could take gigabytes
        some = prompts[i : i + 1000]
        counts.update(zip(some, map(len, tokenize(tokenizer, some))))
    return counts


def template_tokens(tokenizer):
    """The token ids of the chat template's beginning, which stands before every prompt."""
    no_models = dict(
        scheduler=None, vae=None, text_encoder=None, text_processor=None, transformer=None
    )
    pipe = LongCatImagePipeline(tokenizer=tokenizer, **no_models)
    return tokenizer(pipe.prompt_template_encode_prefix, add_special_tokens=False)["input_ids"]


def encoder_inputs(tokenizer, prompts):
    """What the text encoder gets for a batch of prompts: token ids and attention mask, both int64 [B, columns].

    A row is the template's beginning, at most 512 tokens of the prompt, and padding up to the longest prompt and one
    more. That is enough: all padding tokens of a prompt have the same embedding, so one of them tells all, and no
    token sees the padding, nor the template's end.
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
    """The language layers of Qwen2.5-VL, for a device of any size. A call reads each layer from its file once and
    computes all prompts with it, batch after batch, while the next layer is read: the device holds one layer, the host
    one more. (transformers' own device map would read all 13 GB anew for every batch.)"""

    def __init__(self, config, device):
        self.folder = model_folder(config, "text_encoder")
        self.device, self.dtype = torch.device(device), text_dtype(config, device)
        self.config = text_config(config)
        self.config._attn_implementation = "sdpa"  # what transformers chooses for the whole model
        with named_if_corrupt(self.folder), torch.device("meta"):
            self.files = tensor_files(self.folder)
            self.layer = qwen.Qwen2_5_VLDecoderLayer(self.config, 0).requires_grad_(False).eval()
            self.norm = qwen.Qwen2_5_VLRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
            # Checkpoints begin their names with "model." or with "model.language_model.".
            (self.embeddings,) = [
                name for name in self.files if name.endswith("embed_tokens.weight")
            ]
        self.start = self.embeddings.removesuffix("embed_tokens.weight")

    def read(self, part, names):
        """{name: weight} of a part of the model, such as "layers.0.", in host memory. A second thread may do this."""
        names = {self.start + part + name: name for name in names}
        with named_if_corrupt(self.folder):
            return {names[name]: weight for name, weight in read_weights(self.files, names).items()}

    def fill(self, module, weights):
        """Gives a module on the device these weights; those that it had go first."""
        module.to("meta")
        weights = {name: weight.to(self.device).to(self.dtype) for name, weight in weights.items()}
        with named_if_corrupt(self.folder):
            module.load_state_dict(weights, assign=True)

    def embed_tokens(self, inputs):
        """The hidden states before the first layer, a tensor [B, columns, hidden] a batch."""
        table = read_weights(self.files, [self.embeddings])[self.embeddings]
        lookup = torch.nn.functional.embedding
        return [lookup(input_ids, table).to(self.device, self.dtype) for input_ids, _ in inputs]

    @torch.no_grad()
    def __call__(self, inputs):
        """`inputs`: batches as encoder_inputs makes them. Returns the last hidden states of each, [B, columns, hidden],
        on the host."""
        hidden_states = self.embed_tokens(
            inputs
        )  # of all batches; each layer replaces them by its own

        # Positions as transformers 4.57.1 counts them for text alone, which the model was trained with: padding tokens
        # all have position 1. (transformers 5 counts on.) The three rotary axes share them.
        rotary = qwen.Qwen2_5_VLRotaryEmbedding(self.config).to(self.device)
        attention_masks, position_embeddings = [], []
        for states, (_, attention_mask) in zip(hidden_states, inputs):
            attention_mask = attention_mask.to(self.device)
            positions = (attention_mask.cumsum(dim=1) - 1).masked_fill(attention_mask == 0, 1)
            position_embeddings.append(rotary(states, positions.expand(3, -1, -1)))
            attention_masks.append(create_causal_mask(self.config, states, attention_mask, None))

        # Layer after layer for all batches, while a thread reads the next layer.
        names, count = list(self.layer.state_dict()), self.config.num_hidden_layers
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            next_weights = reader.submit(self.read, "layers.0.", names)
            for i in tqdm(
                range(count), desc="text encoder", unit="layer", leave=False, disable=RANK > 0
            ):
                self.fill(self.layer, next_weights.result())
                next_weights = (
                    reader.submit(self.read, f"layers.{i + 1}.", names) if i + 1 < count else None
                )
                for n, mask in enumerate(attention_masks):
                    hidden_states[n] = self.layer(
                        hidden_states[n],
                        attention_mask=mask,
                        position_embeddings=position_embeddings[n],
                    )

        self.layer.to("meta")
        self.fill(self.norm, self.read("norm.", ["weight"]))
        return [self.norm(states).cpu() for states in hidden_states]


load_text_encoder = StreamedTextEncoder


# ---------------------------------------------------------------- flow matching


@functools.cache
def position_ids(height, width, device="cpu"):
    """Position ids for a latent of height x width: text [512, 3] = (0, i, i), image [height/2 * width/2, 3] =
    (1, 512 + row, 512 + column), both float32 (float64 does not exist on MPS). Made once for each size."""
    text_ids = prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=TEXT_TOKENS)
    grid = dict(start=(TEXT_TOKENS, TEXT_TOKENS), height=height // 2, width=width // 2)
    image_ids = prepare_pos_ids(modality_id=1, type="image", **grid)
    return text_ids.to(device), image_ids.to(device)


def pack_latents(latents):
    """[B, 16, H, W] -> [B, H/2 * W/2, 64]: each 2x2 square of latents becomes one token."""
    return LongCatImagePipeline._pack_latents(latents, *latents.shape)


def sample_sigmas(normal, token_count, scheduler):
    """Noise levels in (0, 1) from standard normal draws [B]: time_shift(mu, 1, sigmoid(normal)), mu linear in the
    picture's `token_count`, as in the model authors' training."""
    c = scheduler.config
    mu = calculate_shift(
        token_count, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift
    )
    return scheduler.time_shift(mu, 1.0, torch.sigmoid(normal))


def flow_matching_loss(transformer, latents, noise, sigmas, prompt_embeds, weights=None):
    """The training loss, a float32 scalar: mean((v(x_t, sigma, prompt) - (noise - x0))^2) with
    x_t = (1 - sigma) x0 + sigma noise. latents, noise [B, 16, H, W], sigmas [B], prompt_embeds [B, 512, hidden],
    weights [B] of the samples or None."""
    dtype = next(transformer.parameters()).dtype  # of the time embedding, which is never quantized
    text_ids, image_ids = position_ids(*latents.shape[2:], latents.device)
    x0, noise = pack_latents(latents.float()), pack_latents(noise.float())
    s = sigmas.float()[:, None, None]
    x_t = ((1 - s) * x0 + s * noise).to(dtype)
    rest = dict(timestep=sigmas, txt_ids=text_ids, img_ids=image_ids, return_dict=False)
    prediction = transformer(
        hidden_states=x_t, encoder_hidden_states=prompt_embeds.to(dtype), **rest
    )[0]
    losses = (prediction.float() - (noise - x0)).square().mean(dim=(1, 2))
    return (losses if weights is None else losses * weights).mean()

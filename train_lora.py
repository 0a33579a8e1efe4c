"""Stage 3: the cache -> a LoRA.

    python train_lora.py configs/24gb.json
    torchrun --nproc_per_node 8 train_lora.py configs/24gb.json       # on eight GPUs
    python train_lora.py configs/24gb.json --benchmark 20             # will it fit, how long will it take?

Runs the two stages before it first; they do only what is not there yet. Started again with the same config, it goes
on from the newest checkpoint. Every random draw follows from (seed, purpose, step or epoch, sample), so on the CPU a
resumed run ends with the same bytes as an uninterrupted one.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import cache_latents
from cache_latents import latents_file, prompt_file
from longcat_common import (
    KEYS, RANK, TEXT_TOKENS, VERSION, WORLD_SIZE, FlowMatchEulerDiscreteScheduler, LongCatImageTransformer2DModel,
    UserError, base_model, buckets, check_precision, checkpoint_folders, compile_blocks, compute_dtype,
    fill_transformer, flow_matching_loss, free_memory, generator, is_readable, load_scheduler, load_transformer,
    load_vae, model_identity, offloaded, peak_memory, pick_device, read_json, read_lora, read_tensors,
    run_stage, sample_sigmas, save_lora, say, stage, step_of, sum_over_processes, wait_for_all, write_file,
    write_tensors,
)  # fmt: skip
from prepare_data import Picture
from validate import generate, make_pipeline, picture_grid, picture_settings, save_picture

from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from diffusers.optimization import get_scheduler  # after longcat_common, which quiets what this imports
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_EVERY = 10  # steps
SCORED_PICTURES = 8  # held out at most: with as many trained ones, scoring takes as long as about 20 steps
SCORED_NORMALS = (-1.2, -0.4, 0.4, 1.2)  # where held-out pictures are scored, as normal draws
BAD_STEPS = 3  # not finite, in a row: the run has failed
# What a run cannot change when it is resumed, and what only says where and how it is run.
FIXED_KEYS = ["lora_rank", "lora_alpha", "lora_target_modules"]
SILENT_KEYS = [
    "pretrained_model_name_or_path",
    "data_dir",
    "output_dir",
    "cache_dir",
    "resume_from_checkpoint",
    "init_lora",
    "lora",
    "benchmark",
]


# ---------------------------------------------------------------- data


def hold_out(config, pictures):
    """The content keys of the pictures that are never trained on: `validation_split` of them, one at least and
    SCORED_PICTURES at most, chosen by their content."""
    keys = sorted({picture.key for picture in pictures})
    return (
        keys[: min(SCORED_PICTURES, max(1, round(config.validation_split * len(keys))))]
        if config.validation_split
        else []
    )


def epoch_batches(pictures, batch_size, seed, epoch):
    """One epoch as shuffled batches of (sample name, picture); a batch holds pictures of one bucket only.

    Every picture comes `repeats` times; what does not fill a bucket's last batch makes a smaller one.
    """
    name = lambda picture, n: f"{picture.key}-{picture.bucket[0]}x{picture.bucket[1]}:{n}"
    samples = [(name(picture, n), picture) for picture in pictures for n in range(picture.repeats)]
    order = torch.randperm(len(samples), generator=generator(seed, "shuffle", epoch)).tolist()
    by_bucket = {}
    for i in order:
        by_bucket.setdefault(samples[i][1].bucket, []).append(samples[i])
    batches = [
        group[i : i + batch_size] for _, group in sorted(by_bucket.items()) for i in range(0, len(group), batch_size)
    ]
    order = torch.randperm(len(batches), generator=generator(seed, "batches", epoch)).tolist()
    return [batches[i] for i in order]


class Batches:
    """The run's batches, epoch after epoch, and the place in them. An epoch is finished with the pictures, the batch size
    and the seed that it was begun with, even if the run is resumed with others."""

    def __init__(self, config, pictures):
        self.config, self.all_pictures, self.number = config, pictures, 0
        self.begin(0, pictures, config.train_batch_size, config.seed)

    def begin(self, epoch, pictures, batch_size, seed, position=0):
        self.epoch, self.pictures, self.batch_size, self.seed, self.position = (
            epoch,
            pictures,
            batch_size,
            seed,
            position,
        )
        self.batches = epoch_batches(pictures, batch_size, seed, epoch)

    def begin_next(self):
        self.begin(self.epoch + 1, self.all_pictures, self.config.train_batch_size, self.config.seed)

    def take(self, count):
        """The next `count` batches, as (epoch, number in the run, batch)."""
        taken = []
        while len(taken) < count:
            if self.position == len(self.batches):
                self.begin_next()
            taken.append((self.epoch, self.number, self.batches[self.position]))
            self.position += 1
            self.number += 1
        return taken

    def place(self):
        """(where the run is in its data, the pictures of this epoch), for a checkpoint."""
        return {
            name: getattr(self, name) for name in ("number", "epoch", "position", "batch_size", "seed")
        }, self.pictures

    def go_to(self, place, lines, prompt_files, device):
        """Goes to the place of a checkpoint, whose epoch had the pictures in `lines`, and says what has changed since. Prompts
        that only those pictures have are added to `prompt_files`; if a file is gone, the next epoch begins at once."""
        was, now = collections.Counter(lines), collections.Counter(map(picture_line, self.all_pictures))
        added, removed = sum((now - was).values()), sum((was - now).values())
        nowhere = dict(path="", size=(0, 0), file=[], notes=[])
        pictures = [Picture(**{**json.loads(line), **nowhere}) for line in lines]
        for picture in pictures:
            picture.bucket = tuple(picture.bucket)
            for caption in ["", *picture.captions]:
                prompt_files.setdefault(caption, prompt_file(self.config, caption, device))
        self.number = place["number"]
        self.begin(place["epoch"], pictures, place["batch_size"], place["seed"], place["position"])
        left = [picture for batch in self.batches[self.position :] for _, picture in batch]
        needed = {
            path
            for picture in left
            for path in (latents_file(self.config, picture), *(prompt_files[caption] for caption in picture.captions))
        }
        when, gone = (
            f"with the next epoch, {len(self.batches) - self.position} batches from here",
            not all(map(is_readable, needed)),
        )
        if gone:
            self.begin_next()
            when = f"at once, for files of epoch {place['epoch']} are gone from {self.config.cache_dir}"
        if added or removed or gone:
            say(
                f"data: {added} pictures are new or have changed, {removed} are no longer as they were; this comes {when}"
            )


def picture_line(picture):
    """A manifest's picture as the line of a checkpoint's pictures.jsonl, in ASCII: no caption ends a line."""
    return json.dumps(
        {name: getattr(picture, name) for name in ("key", "bucket", "captions", "repeats", "loss_weight")}
    )


def load_batch(config, batch, prompt_files, epoch, index):
    """Latents [B, 16, H, W] (a fresh sample of the posterior), noise like them, normal draws [B], prompt embeddings
    [B, 512, hidden] and loss weights [B] of a batch, the `index`-th of the run, on the CPU."""
    latents, noise, normal, prompt_embeds = [], [], [], []
    for name, picture in batch:
        draw = lambda purpose, *shape: torch.randn(shape, generator=generator(config.seed, purpose, index, name))
        pick = lambda purpose: torch.rand((), generator=generator(config.seed, purpose, epoch, name)).item()
        posterior = read_tensors(latents_file(config, picture))
        shape = posterior["mean"].shape
        latents.append(posterior["mean"] + posterior["std"] * draw("posterior", *shape))
        noise.append(draw("noise", *shape))
        normal.append(draw("sigma"))
        caption = picture.captions[int(pick("caption") * len(picture.captions))]
        if pick("caption_dropout") < config.caption_dropout_probability:
            caption = ""
        prompt_embeds.append(read_tensors(prompt_files[caption])["prompt_embeds"])
    weights = torch.tensor([float(picture.loss_weight) for _, picture in batch])
    return torch.stack(latents), torch.stack(noise), torch.stack(normal), torch.stack(prompt_embeds), weights


def load_ahead(config, batches, prompt_files, device, per_step, steps):
    """Yields for each of `steps` steps (epoch, the place in the data after it, [(number in the run, load_batch's tensors)]), this
    process's share of its batches. While a step computes, a thread loads the next one and sends it to the device."""

    def load(taken):
        for epoch, number, batch in taken[RANK::WORLD_SIZE]:
            tensors = load_batch(config, batch, prompt_files, epoch, number)
            with (
                torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
            ):  # a thread begins on the first one
                yield (
                    number,
                    [tensor if i == 2 else send(tensor, device) for i, tensor in enumerate(tensors)],
                )  # the normal draws stay here

    pool, coming = concurrent.futures.ThreadPoolExecutor(1), collections.deque()
    try:
        for step in range(1, steps + 1):
            while len(coming) < min(2, steps + 1 - step):
                taken = batches.take(per_step)
                coming.append((batches.epoch, batches.place(), pool.submit(lambda taken: list(load(taken)), taken)))
            epoch, place, tensors = coming.popleft()
            yield epoch, place, tensors.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- a step


def send(tensor, device):
    """The tensor on the device; on CUDA from page-locked memory, so that nobody waits for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device):
    """Waits for the device's work that is under way."""
    if device.type != "cpu":
        {"cuda": torch.cuda, "mps": torch.mps}[device.type].synchronize()


def add_lora(transformer, config):
    """Adds a trainable LoRA in float32, initialised from `seed` (or from `init_lora`), and returns its parameters
    as {name: parameter}, sorted by name. Raises UserError if a target or `init_lora` does not fit."""
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    for target in config.lora_target_modules:
        if not any(name.endswith(f".{target}") for name, _ in transformer.named_modules()):
            raise UserError(f"lora_target_modules: {target!r} is the end of no layer's name in this transformer")
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # once a layer; about merging only
    transformer.add_adapter(
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=alpha,
            lora_dropout=config.lora_dropout,
            target_modules=sorted(config.lora_target_modules),
        )
    )
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # the LoRA gets its input as the base does: no float32 copy a layer
    parameters = {name: p for name, p in sorted(transformer.named_parameters()) if p.requires_grad}
    for name, parameter in parameters.items():
        parameter.data = parameter.data.to(transformer.device, torch.float32)  # offloaded blocks are not there
        if "lora_A" in name:  # PEFT's own choice, drawn on the CPU so that it is the same on every device
            start = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator(config.seed, "lora", name))
            parameter.data.copy_(start)
    if config.init_lora:
        state = read_init_lora(config)
        own = get_peft_model_state_dict(transformer)
        wrong = [n for n in own if n not in state or state[n].shape != own[n].shape] + [
            n for n in state if n not in own
        ]
        if wrong:
            raise UserError(
                f"init_lora: {config.init_lora} cannot be trained on: it has not one rank and the same layers in every block (first: {wrong[0]})"
            )
        scale = config.lora_rank / alpha
        set_peft_model_state_dict(transformer, {n: v * scale if "lora_B" in n else v for n, v in state.items()})
    return parameters


def read_init_lora(config):
    """The state of `init_lora`. Raises UserError if its rank and layers are not those that are to be trained."""
    state = read_lora(config.init_lora)
    ranks = sorted({tensor.shape[0] for name, tensor in state.items() if "lora_A" in name})
    ends = sorted({re.sub(r"^.*transformer_blocks\.\d+\.", "", name.rsplit(".lora_", 1)[0]) for name in state})
    if ranks != [config.lora_rank] or ends != sorted(config.lora_target_modules):
        has = f"lora_rank {' and '.join(map(str, ranks))} and lora_target_modules {json.dumps(ends)}"
        raise UserError(f"init_lora: {config.init_lora} has {has}; set these to train on from it")
    return state


def first_before_others(work):
    """work() in every process, first in the first one, so that the others find what it has put in order."""
    if RANK == 0:
        try:
            return work()
        finally:
            wait_for_all()
    wait_for_all()
    return work()


def checkpoint_blocks(config, transformer):
    """Chooses the blocks that are computed again in the backward pass: all, none or the number in
    `gradient_checkpointing`, double-stream blocks first, which keep the most. One that is offloaded always is."""
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    count = double + single if config.gradient_checkpointing is True else int(config.gradient_checkpointing)
    again = [away or i < count for i, away in enumerate(offloaded(config, double + single))]
    if any(again):
        transformer.enable_gradient_checkpointing()
    transformer.use_checkpoint, transformer.use_single_checkpoint = again[:double], again[double:]


def set_up(config, transformer, scheduler, device, steps):
    """Puts a LoRA on the transformer. Returns what a step needs: transformer, model (the same, under torchrun within DDP),
    parameters {name: LoRA tensor}, scheduler, optimizer, lr_of (a function of the step), scaler, device, whole (False while
    the optimizer is at work)."""
    parameters = add_lora(transformer, config)
    transformer.train()
    checkpoint_blocks(config, transformer)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=device.type != "mps",  # leaves a step out by itself, see train_step
    )
    # The learning rate is a function of the step, so there is no scheduler state to save.
    lr_of = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
    ).lr_lambdas[0]
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype(config, device) == torch.float16)
    model = transformer
    if WORLD_SIZE > 1:
        frozen = [
            name
            for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]
            if name not in parameters
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
        model = DistributedDataParallel(transformer)
    if config.torch_compile:
        compile_blocks(transformer)
    parts = dict(transformer=transformer, model=model, parameters=parameters, scheduler=scheduler, optimizer=optimizer)
    return SimpleNamespace(**parts, lr_of=lr_of, scaler=scaler, device=device, whole=True)


def train_step(config, run, step, batches):
    """One step over this process's `batches`, (number in the run, load_batch's tensors) each.

    Returns a function that waits for the step, and gives loss, gradient norm before clipping, and whether the step was sound;
    until it is called, nobody waits (but in fp16, for the scaler's factor). What is not finite is not learned from; if only the
    fp16 scaler's factor was too large for the gradients, the step is left out, and yet sound.
    """
    total, count = 0.0, config.gradient_accumulation_steps
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * run.lr_of(step - 1)
    for micro, (number, (latents, noise, normal, prompt_embeds, weights)) in enumerate(batches):
        token_count = latents.shape[2] * latents.shape[3] // 4
        sigmas = sample_sigmas(normal, token_count, run.scheduler)
        latents, noise, sigmas, prompt_embeds, weights = (
            send(tensor, run.device) for tensor in (latents, noise, sigmas, prompt_embeds, weights)
        )
        torch.manual_seed(
            generator(config.seed, "lora_dropout", number).initial_seed()
        )  # dropout alone is drawn on the device
        # The processes' gradients are averaged once a step, with the last batch.
        alone = run.model.no_sync() if WORLD_SIZE > 1 and micro + 1 < count else contextlib.nullcontext()
        with alone:
            loss = flow_matching_loss(run.model, latents, noise, sigmas, prompt_embeds, weights)
            run.scaler.scale(loss / count).backward()
        total = total + loss.detach() / count

    scale = run.scaler.get_scale()
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm or math.inf)
    # The gradients are the processes' mean: if one's are not finite, none is, and all leave the step out.
    finite = torch.isfinite(grad_norm) & (torch.isfinite(total) | (WORLD_SIZE > 1))
    run.whole = False
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)  # finds out by itself
    elif run.optimizer.defaults["fused"]:
        run.optimizer.found_inf = 1.0 - finite.float()  # stays on the device, as in the scaler: nobody waits
        run.optimizer.step()
    elif finite:
        run.optimizer.step()
    run.whole = True
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    sound = finite | (torch.isfinite(total) if run.scaler.is_enabled() and scale > 1 else False)
    # Copied now: a copy that is asked for later would come after the next step's work.
    numbers = torch.stack([total, grad_norm, sound.float()]).to("cpu", non_blocking=run.device.type == "cuda")
    copied = torch.cuda.current_stream(run.device).record_event() if run.device.type == "cuda" else None

    def wait():
        if copied:
            copied.synchronize()
        return numbers.tolist()

    return wait


# ---------------------------------------------------------------- checkpoints


def set_aside(folder, why):
    """Renames a checkpoint folder, so that it is kept and no run goes on from it. Returns its new name."""
    aside = folder.with_name(f"{why}-{folder.name}-{os.urandom(2).hex()}")
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder}: is {why} and cannot be renamed ({error.strerror}); move it away") from None
    return aside.name


def lora_metadata(config, step):
    """What the LoRA file's header says about its making."""
    return {
        "base_model": base_model(config),
        "lora_rank": config.lora_rank,
        "resolution": str(config.resolution),
        "steps": step,
        "trigger_words": config.trigger_words,
        "license": config.license,
        "trained_with": f"longcat-image LoRA scripts {VERSION}",
    }


def save_checkpoint(config, run, step, place, held_out_keys):
    """Writes `checkpoints/step-N`: a ready-to-use LoRA and all that resuming needs; whole or not at all. Then deletes
    the oldest ones over `checkpoints_total_limit`. `place`: what Batches.place() gave after that step."""
    folder = Path(config.output_dir) / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    state = {f"lora.{name}": parameter for name, parameter in run.parameters.items()}
    for name, parameter in run.parameters.items():
        state |= {f"{moment}.{name}": value for moment, value in run.optimizer.state[parameter].items()}
    try:
        for left in folder.parent.glob(".step-*.tmp"):  # of a killed run
            shutil.rmtree(left, ignore_errors=True)
        save_lora(run.transformer, temporary, lora_metadata(config, step))
        write_tensors(temporary / "state.safetensors", state)
        write_file(temporary / "pictures.jsonl", "".join(picture_line(picture) + "\n" for picture in place[1]))
        values = {
            "step": step,
            "batches": place[0],
            "held_out": held_out_keys,
            "scaler": run.scaler.state_dict(),
            "base_model": model_identity(config, "transformer"),
            "config": config.model_dump(),
        }
        write_file(temporary / "state.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        write_file(
            temporary / "SHA256SUMS", "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir()))
        )
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); free space or choose another output_dir"
            ) from None
        raise
    for old in checkpoint_folders(config)[: -config.checkpoints_total_limit]:
        shutil.rmtree(old, ignore_errors=True)


def sha256(path):
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_state(folder):
    """A checkpoint's state.json, after a look at every file. Raises UserError if one is not as it was written."""
    try:
        sums = [line.split("  ", 1) for line in (folder / "SHA256SUMS").read_text().splitlines()]
        wrong = [name for digest, name in sums if sha256(folder / name) != digest]
        wrong += {"state.json", "state.safetensors", "pictures.jsonl"} - {name for _, name in sums}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is damaged ({error})") from None
    if wrong:
        raise UserError(f"{folder}: is damaged ({', '.join(wrong)} is not as it was written)")
    return read_json(folder / "state.json")


def find_checkpoint(config):
    """The checkpoint that `resume_from_checkpoint` asks for, as (folder, its state.json); (None, None) to start anew.

    With "latest" a damaged one is named and set aside, and the one before it taken. Another trainer's LoRA, which has no
    state of ours, becomes `init_lora`. Raises UserError if the run must not go on from there: it does not exist, has another
    base model or LoRA shape, or `output_dir` holds later ones, which this run would come to overwrite.
    """
    folders, wanted = checkpoint_folders(config), config.resume_from_checkpoint
    folder = state = None
    if (Path(wanted) / "checkpoints").is_dir():
        raise UserError(
            f"resume_from_checkpoint: {wanted} is a run's folder; name one of its checkpoints, or make it output_dir to go on there"
        )
    ours = any((Path(wanted) / name).exists() for name in ("SHA256SUMS", "state.json", "state.safetensors"))
    if wanted not in ("latest", "none") and Path(wanted).exists() and not ours:
        read_lora(wanted)
        say(
            f"resume_from_checkpoint: {wanted} is a LoRA without a state of ours; training begins with its weights, at step 0"
        )
        config.init_lora = wanted
    elif wanted not in ("latest", "none"):
        folder = Path(wanted)
        try:
            state = read_state(folder)
        except UserError as error:
            raise UserError(f"resume_from_checkpoint: {error}") from None
    while wanted == "latest" and folders and not state:
        folder = folders[-1]
        try:
            state = read_state(folder)
        except UserError as error:
            aside = set_aside(folder, "damaged")
            folders.pop()
            before = folders[-1].name if folders else "the start: there is none before it"
            print(f"{error}; it is kept as {aside}, and training goes on from {before}", file=sys.stderr)
            folder = None
    if folders and (state is None or state["step"] < step_of(folders[-1])):
        raise UserError(
            f"output_dir: {config.output_dir} holds later checkpoints, up to {folders[-1].name}; choose another output_dir, or resume from there"
        )
    if state:
        check_same_run(config, folder, state)
    return folder, state


def check_same_run(config, folder, state):
    """Raises UserError, naming the key, if `config` cannot go on from a checkpoint; else prints what has changed."""
    was = SimpleNamespace(**{**config.model_dump(), **state["config"]})
    for settings in (now := SimpleNamespace(**config.model_dump()), was):
        settings.lora_alpha = settings.lora_alpha or float(settings.lora_rank)
        settings.lora_target_modules = sorted(settings.lora_target_modules)
    different = [name for name in FIXED_KEYS if getattr(now, name) != getattr(was, name)]
    files = ""
    if not different and state["base_model"] != model_identity(config, "transformer"):
        different, files = (
            ["model_flavour" if now.model_flavour != was.model_flavour else "pretrained_model_name_or_path"],
            "; its files are not the same",
        )
    if different:
        name = different[0]
        raise UserError(
            f"{name}: found {getattr(now, name)!r}, but {folder} was trained with {getattr(was, name)!r}{files}; choose another output_dir"
        )
    if now.validation_split != was.validation_split:
        say(f"validation_split: stays {was.validation_split}, for the pictures held out must not change")
        config.validation_split = now.validation_split = was.validation_split
    changed = [name for name in KEYS if name not in SILENT_KEYS and getattr(now, name) != getattr(was, name)]
    later = {"train_batch_size": ", with the next epoch"}
    for name in changed:
        before, after = (json.dumps(getattr(settings, name), ensure_ascii=False) for settings in (was, now))
        say(f"{name}: {before} -> {after}{later.get(name, '')}")


def load_checkpoint(folder, state, run):
    """Restores LoRA, optimizer and scaler from a checkpoint folder. Returns its step. Raises UserError if it does not fit."""
    tensors = read_tensors(folder / "state.safetensors")
    if {f"lora.{name}" for name in run.parameters} - tensors.keys():
        raise UserError(f"{folder}: does not hold the LoRA of this configuration; choose another output_dir")
    moments = {}
    for i, (name, parameter) in enumerate(run.parameters.items()):
        parameter.data.copy_(tensors[f"lora.{name}"])
        if f"step.{name}" in tensors:  # not if fp16 left out every step so far
            moments[i] = {moment: tensors[f"{moment}.{name}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
    run.optimizer.load_state_dict({"state": moments, "param_groups": run.optimizer.state_dict()["param_groups"]})
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    return state["step"]


# ---------------------------------------------------------------- what the user sees


def preview(config, transformer, device, step):
    """Draws the validation prompts to `validation/step-N.png` (one column) and renews `validation/progress.png`, which
    shows the previews so far side by side. Returns the column, or None: a preview that fails is reported and never ends
    the training."""
    try:
        transformer.eval()
        images = generate(
            make_pipeline(config, transformer, load_vae(config, device)), config, config.validation_prompts
        )
        width, height = images[0].size
        column = Image.new("RGB", (width, height * len(images)))
        for i, image in enumerate(images):
            column.paste(image, (0, i * height))
        folder, prompts = (
            Path(config.output_dir) / "validation",
            json.dumps(config.validation_prompts, ensure_ascii=False),
        )
        settings = json.dumps(picture_settings(config, without="validation_lora_strength"), ensure_ascii=False)
        columns = {step: column}
        for path in sorted(folder.glob("step-*.png")):
            with Image.open(path) as earlier:
                if (
                    int(path.stem[5:]) != step
                    and earlier.size == column.size
                    and earlier.text.get("settings") == settings
                ):
                    columns[int(path.stem[5:])] = earlier.convert("RGB")
        shown = sorted(columns)
        if len(shown) > 6:  # the first, the last and four between
            shown = [shown[round(i * (len(shown) - 1) / 5)] for i in range(6)]
        rows = [[columns[s].crop((0, i * height, width, (i + 1) * height)) for s in shown] for i in range(len(images))]
        labels = [f"step {s}" if s else "before (step 0)" for s in shown]
        save_picture(picture_grid(rows, config.validation_prompts, labels), folder / "progress.png", prompts=prompts)
        save_picture(
            column, folder / f"step-{step:06d}.png", prompts=prompts, settings=settings
        )  # last: if it is there, both are
        return column
    except Exception as error:
        smaller = "; a smaller validation_resolution needs less memory" if "out of memory" in str(error) else ""
        tqdm.write(f"preview at step {step} failed: {type(error).__name__}: {error}{smaller}; training goes on")
    finally:
        transformer.train()
        free_memory()


class Metrics:
    """`metrics.jsonl` and TensorBoard, from `start` on; lines of steps that a resumed run does again are dropped, the last
    held-out scores before are kept in `scores`. Only the first process writes."""

    def __init__(self, config, start):
        self.path, self.board, self.scores = Path(config.output_dir) / "metrics.jsonl", None, {}
        if RANK > 0:
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line of a killed run may be cut off
                values = json.loads(line)
                if values["step"] <= start:
                    kept.append(line + "\n")
                    self.scores = values if "held_out_loss" in values else self.scores
        write_file(self.path, "".join(kept))
        if config.report_to == "tensorboard":
            # Its thread would print a traceback when the disk is full, before draw() says so in one line.
            threading.excepthook = lambda failed: (
                None if isinstance(failed.exc_value, OSError) else threading.__excepthook__(failed)
            )
            try:
                self.board = SummaryWriter(Path(config.output_dir) / "logs", purge_step=start + 1)
                self.board.add_custom_scalars(
                    {"held out and trained on": {"loss": ["Multiline", ["validation/.*"]]}}
                )  # in one chart
            except OSError as error:
                raise UserError(
                    f"{Path(config.output_dir) / 'logs'}: cannot be written ({error.strerror}); mend that, or set report_to to none"
                ) from None

    def write(self, step, group, **values):
        """Writes a step's numbers; in TensorBoard they are `group`/name."""
        if RANK > 0:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no infinity
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free space, then start again"
            ) from None
        for name, value in values.items():
            self.draw("add_scalar", f"{group}/{name}", value, step)

    def draw(self, method, *arguments, **options):
        """Calls a method of TensorBoard's writer; if it cannot write, training goes on without it."""
        try:
            if self.board:
                getattr(self.board, method)(*arguments, **options)
        except OSError as error:
            self.board = None
            say(f"logs: TensorBoard's file cannot be written ({error.strerror}); metrics.jsonl goes on")


class StopSignals:
    """Within it Ctrl-C and SIGTERM are only noted, in `number`; a second one raises KeyboardInterrupt. In a thread, which
    gets no signals, it does nothing."""

    def __enter__(self):
        self.number, self.at_once, self.again = 0, False, False
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.again = self.number != 0
        if not self.again:
            self.number = number
            os.write(
                2, b"\nstopping, as soon as this step is finished and saved; the same signal again leaves at once\n"
            )  # print() may be at work
        if self.again or self.at_once:
            raise KeyboardInterrupt(number)

    @contextlib.contextmanager
    def interrupting(self):
        """A block that the first signal ends at once."""
        self.at_once = True
        try:
            yield
        except KeyboardInterrupt:
            if self.again or not self.number:
                raise
        finally:
            self.at_once = False

    def agreed(self):
        """Whether a process has been told to stop."""
        return sum_over_processes(bool(self.number))[0] > 0


def memory_advice(config):
    """What to change when memory runs out, in the order that costs least."""
    advice = []
    if config.train_batch_size > 1:
        advice.append(
            f"train_batch_size 1 with gradient_accumulation_steps {config.train_batch_size * config.gradient_accumulation_steps}"
        )
    if config.base_model_precision == "no_change":
        advice.append("base_model_precision int8-quanto")
    if config.gradient_checkpointing is not True and not config.enable_group_offload:
        advice.append("gradient_checkpointing true")
    if not config.enable_group_offload and not torch.backends.mps.is_available():  # a Mac has but one memory
        advice.append("enable_group_offload true")
    elif config.enable_group_offload and config.offloaded_blocks is not None:
        advice.append("offloaded_blocks null")
    if config.base_model_precision != "int4-quanto":
        advice.append("base_model_precision int4-quanto")
    return "; ".join([*advice, f"a resolution under {config.resolution}"])


# ---------------------------------------------------------------- will it fit?


def benchmark(config, device):
    """Runs `benchmark` steps of the configuration with random weights and data, at its largest bucket; nothing is read or
    written. Prints and returns seconds a step, memory, and the share of this device's speed in matrix products."""
    sizes, (width, height) = dict(num_layers=10, num_single_layers=20), max(buckets(config), key=math.prod)
    if device.type == "cpu":
        sizes, (width, height) = dict(num_layers=1, num_single_layers=2, num_attention_heads=4), (256, 256)
        print("there is no GPU here: this is a model of 3 small blocks at 256x256, and says nothing about the real one")
    transformer, weights = random_transformer(config, device, sizes)
    run = set_up(
        config, transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), device, config.max_train_steps
    )
    dtype, batch = compute_dtype(config, device), config.train_batch_size
    latents, noise = torch.randn(2, batch, 16, height // 8, width // 8)
    tensors = (
        latents,
        noise,
        torch.randn(batch),
        torch.randn(batch, TEXT_TOKENS, transformer.config.joint_attention_dim),
        torch.ones(batch),
    )
    seconds = []
    for step in tqdm(range(1, config.benchmark + 1), desc="benchmark", unit="step", leave=False, disable=RANK > 0):
        start = time.perf_counter()
        train_step(config, run, step, [(step, tensors)] * config.gradient_accumulation_steps)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    seconds_per_step = statistics.median(seconds[1:] or seconds)  # the first one warms up

    d, tokens = transformer.inner_dim, TEXT_TOKENS + width * height // 256
    flops = (
        needed_flops(d, sizes["num_layers"] + sizes["num_single_layers"], tokens)
        * batch
        * config.gradient_accumulation_steps
    )
    rate = matmul_rate(device, dtype, d, tokens)
    hours = seconds_per_step * config.max_train_steps / 3600
    figures = {
        "seconds_per_step": seconds_per_step,
        "flops_per_second": flops / seconds_per_step,
        "matmul_flops_per_second": rate,
        "hours": hours,
    }
    if RANK == 0:
        print(
            f"{weights / 1e9:.2f} B weights as {config.base_model_precision}, {str(dtype)[6:]} arithmetic, {batch} x {config.gradient_accumulation_steps} pictures of {width}x{height}"
        )
        print(f"{seconds_per_step:.3g} s a step: {flops / 1e12:.3g} TFLOP needed, {flops / seconds_per_step / 1e12:.3g} TFLOP/s, "
              f"{flops / seconds_per_step / rate:.0%} of this device's {rate / 1e12:.3g} TFLOP/s in matrix products")  # fmt: skip
        on_device = "" if device.type == "cpu" else f"peak device memory {peak_memory(device):.1f} GiB, "
        if device.type == "cuda":
            on_device += (
                f"{torch.cuda.max_memory_reserved(device) / 2**30:.1f} GiB with what PyTorch keeps in reserve, "
            )
        print(f"{on_device}peak host memory {peak_host_memory()}")
        print(f"{config.max_train_steps} steps take {hours:.3g} hours, without caching and previews")
    return figures


def random_transformer(config, device, sizes):
    """A transformer of these sizes with random weights, as load_transformer gives it, and the number of its weights."""
    with torch.device("meta"):
        transformer = LongCatImageTransformer2DModel(**sizes)
    shapes, dtype = (
        {name: tensor.shape for name, tensor in transformer.state_dict().items()},
        compute_dtype(config, device),
    )
    random_weights = lambda names: {
        name: torch.randn(shapes[name], device=device, dtype=dtype) * 0.02 for name in names
    }
    return fill_transformer(transformer, random_weights, config, device), sum(map(math.prod, shapes.values()))


def matmul_rate(device, dtype, d, tokens):
    """The device's speed in products [tokens, d] x [d, 4 d], in FLOP/s."""
    a, b = torch.randn(tokens, d, device=device, dtype=dtype), torch.randn(d, 4 * d, device=device, dtype=dtype)
    for repeats in (3, 20):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
    return repeats * 8 * d * d * tokens / (time.perf_counter() - start)


def needed_flops(d, blocks, tokens):
    """What a LoRA step must compute for one picture: forward and input gradients of the linears, 2 x 24 d^2 a token and
    block, and attention forward and backward, 14 d tokens a token and block. What checkpointing computes again is not counted."""
    return blocks * (48 * d * d * tokens + 14 * d * tokens * tokens)


def peak_host_memory():
    """The most host memory that this process has used, as text."""
    try:
        import resource
    except ImportError:
        return "unknown on Windows"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{used / 2**30:.1f} GiB"


# ---------------------------------------------------------------- training


@torch.no_grad()
def mean_loss(config, transformer, pictures, prompt_files, scheduler, device, stopped=lambda: False):
    """The mean loss over pictures in a form that tells learning from chance: every picture (the posterior's mean, its first
    caption) at the same four noise levels, with the same noise whenever this is called. Under torchrun the processes share
    the work. Returns a float; nan as soon as `stopped()`, asked by all processes together, is true."""
    total, training = 0.0, transformer.training
    transformer.eval()
    for first in range(0, len(pictures), WORLD_SIZE):
        if stopped():
            return math.nan
        if first + RANK >= len(pictures):
            continue
        picture = pictures[first + RANK]
        latents = read_tensors(latents_file(config, picture))["mean"][None]
        prompt_embeds = read_tensors(prompt_files[picture.captions[0]])["prompt_embeds"][None]
        for normal in SCORED_NORMALS:
            noise = torch.randn(latents.shape, generator=generator("score", picture.key, normal))
            sigmas = sample_sigmas(torch.tensor([normal]), latents.shape[2] * latents.shape[3] // 4, scheduler)
            tensors = (tensor.to(device) for tensor in (latents, noise, sigmas, prompt_embeds))
            total += flow_matching_loss(transformer, *tensors).item()
    transformer.train(training)
    return sum_over_processes(total)[0] / (len(pictures) * len(SCORED_NORMALS))


def train(config, run, batches, held_out, held_out_keys, prompt_files, start, steps):
    """The loop: from step `start` + 1 to `steps`, with checkpoints, previews and scores. Saves before it raises."""
    per_step, first = config.gradient_accumulation_steps * WORLD_SIZE, RANK == 0
    metrics, stop, base = Metrics(config, start), StopSignals(), {}
    saved = done = last_sound = start
    place, bad, skipped, recent, smoothed, waiting, clock = (
        batches.place(),
        0,
        0,
        [],
        math.nan,
        collections.deque(),
        0.0,
    )

    def save():
        nonlocal saved
        if done > saved and first:
            save_checkpoint(config, run, done, place, held_out_keys)
        saved = done

    def note(step, wait):
        nonlocal bad, skipped, last_sound, smoothed, clock
        loss, grad_norm, sound = wait()
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        if step == start + 1:
            what = f"{seconds:.1f} s for the step itself" + (" and for compiling" if config.torch_compile else "")
            say(f"first step: done {time.perf_counter() - run.started:.1f} s after the start, of which {what}")
        loss, sound = sum_over_processes(loss)[0] / WORLD_SIZE, sum_over_processes(sound)[0] == WORLD_SIZE
        recent.append((loss if sound else math.nan, grad_norm, seconds))
        bad = 0 if sound else bad + 1
        if sound:
            last_sound = step
            smoothed = loss if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * loss
        else:
            skipped += 1
            say(f"step {step}: loss {loss}, gradient norm {grad_norm}: not learned from")

    def score(name):  # the held-out pictures, and as many that are trained on
        some = batches.all_pictures[:: max(1, len(batches.all_pictures) // SCORED_PICTURES)][: len(held_out)]
        loss_of = lambda pictures: mean_loss(
            config, run.transformer, pictures, prompt_files, run.scheduler, run.device, stop.agreed
        )
        return {f"held_out_{name}": loss_of(held_out), f"trained_{name}": loss_of(some)}

    def show():
        if held_out and not base:
            run.transformer.disable_adapters()
            base.update(score("base"))
            run.transformer.enable_adapters()
        scores = {**score("loss"), **base} if held_out else {}
        if stop.agreed():
            return
        if held_out:
            metrics.write(done, "validation", **scores)
            metrics.scores = {"step": done, **scores}
        with stop.interrupting():
            if first and config.validation_prompts:
                column = preview(config, run.transformer, run.device, done)
                if column:
                    metrics.draw("add_image", "validation/previews", np.asarray(column), done, dataformats="HWC")

    def to_show():  # also at the start, if it was interrupted
        due = config.validation_step_interval and (done % config.validation_step_interval == 0 or done == steps)
        drawn = (
            not config.validation_prompts or (Path(config.output_dir) / "validation" / f"step-{done:06d}.png").exists()
        )
        return due and (done > start or not drawn or (held_out and metrics.scores.get("step") != done))

    bar = tqdm(initial=start, total=steps, desc="training", unit="step", disable=not first)
    with stop, bar:
        try:
            if sum_over_processes(bool(to_show()))[0]:
                show()
            stopping, loaded = (
                stop.agreed(),
                load_ahead(config, batches, prompt_files, run.device, per_step, steps - start),
            )
            clock = time.perf_counter()  # when the last step was noted, previews and checkpoints left out
            while done < steps and not stopping:
                epoch, place_after, tensors = next(loaded)
                waiting.append((done + 1, train_step(config, run, done + 1, tensors)))
                done, place, stopping = done + 1, place_after, stop.agreed()
                # A step's numbers are looked at while the next one computes, unless they are needed now.
                needed = (
                    done == start + 1
                    or done % LOG_EVERY == 0
                    or done % config.checkpoint_step_interval == 0
                    or done == steps
                    or stopping
                    or to_show()
                )
                while len(waiting) > (0 if needed else 1) and bad < BAD_STEPS:
                    note(*waiting.popleft())

                if done % LOG_EVERY == 0 or done == steps or bad == BAD_STEPS:
                    means = [
                        statistics.fmean([v for v in values if math.isfinite(v)] or [math.nan])
                        for values in zip(*recent)
                    ]
                    metrics.write(
                        done, "train", loss=means[0], lr=run.optimizer.param_groups[0]["lr"], grad_norm=means[1], epoch=epoch,
                        seconds_per_step=means[2], skipped_steps=skipped, peak_memory_gib=peak_memory(run.device),
                    )  # fmt: skip
                    recent.clear()
                if bad == BAD_STEPS:
                    saved = done  # nothing more: what was learned last may be the cause
                    for folder in checkpoint_folders(config) if first else []:
                        if step_of(folder) >= last_sound:  # nothing sound has followed from it
                            say(f"{folder.name} is kept as {set_aside(folder, 'unsound')}")
                    good = ([folder.name for folder in checkpoint_folders(config)] or ["none"])[-1]
                    raise UserError(
                        f"step {last_sound + BAD_STEPS}: loss or gradients were not finite {bad} times in a row; the last good checkpoint is {good}; lower learning_rate or max_grad_norm"
                    )
                if (done % config.checkpoint_step_interval == 0 and not bad) or done == steps or stopping:
                    save()
                if to_show() and not stopping:
                    show()
                    stopping = stop.agreed()
                if not waiting:
                    clock = time.perf_counter()
                figures = {} if math.isnan(smoothed) else {"loss": f"{smoothed:.4f}"}
                if metrics.scores:
                    figures["held_out"] = (
                        f"{metrics.scores['held_out_loss']:.4f} of {metrics.scores['held_out_base']:.4f}"
                    )
                if run.device.type != "cpu":
                    figures["memory"] = f"{peak_memory(run.device):.1f} GiB"
                bar.set_postfix(figures, refresh=False)
                bar.update()
            if stopping:
                save()
                if config.resume_from_checkpoint != "latest":
                    say('to go on from there, set resume_from_checkpoint to "latest"')
                raise KeyboardInterrupt(stop.number or signal.SIGTERM)
        except BaseException:
            if run.whole and not stop.again:
                save()  # the last complete step, if it is not yet
            raise
        finally:
            metrics.draw("close")


@stage(memory_advice)
def main(config):
    """Trains the LoRA. Returns the path of the finished `pytorch_lora_weights.safetensors`; with `benchmark` its figures.

    Raises UserError for anything in the configuration or the data that the user has to mend; KeyboardInterrupt with the
    signal's number after SIGINT or SIGTERM, when the step is finished and saved.
    """
    started, device, output = time.perf_counter(), pick_device(), Path(config.output_dir)
    check_precision(config, device)
    if config.benchmark:
        return benchmark(config, device)
    checkpoint, state = first_before_others(lambda: find_checkpoint(config))  # it sets aside what is damaged
    if config.init_lora and checkpoint:
        say(f"init_lora: {checkpoint} has gone on from there; it is not read again")
    elif config.init_lora:
        read_init_lora(config)  # a wrong one is said now, not after an hour of caching
    pictures, prompt_files = cache_latents.main(config)
    held_out_keys = state["held_out"] if state else hold_out(config, pictures)
    held_out = list(
        {picture.key: picture for picture in pictures if picture.key in held_out_keys}.values()
    )  # each once
    pictures = [picture for picture in pictures if picture.key not in held_out_keys]
    if not pictures:
        raise UserError("validation_split: no picture is left to train on; it needs two different ones at least")
    batches = Batches(config, pictures)

    per_step, steps = config.gradient_accumulation_steps * WORLD_SIZE, config.max_train_steps
    if config.num_train_epochs:
        steps = math.ceil(config.num_train_epochs * len(batches.batches) / per_step)
    processes = f" x {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    seen = f"each picture will be seen about {steps * per_step / len(batches.batches):.1f} times its repeats"
    say(f"{steps} steps of {config.train_batch_size} x {config.gradient_accumulation_steps}{processes}: {seen}")
    if held_out_keys:
        gone = f" ({len(held_out_keys)} at first)" if len(held_out) < len(held_out_keys) else ""
        say(f"{len(held_out)} pictures are held out{gone}: never trained on, only scored")

    transformer = load_transformer(config, device)
    init_lora = None if checkpoint else config.init_lora  # a checkpoint has gone on from there
    start, begun = 0, config.model_copy(update={"init_lora": init_lora})
    run = set_up(begun, transformer, load_scheduler(config), device, steps)
    run.started = started
    if checkpoint:
        start = load_checkpoint(checkpoint, state, run)
        batches.go_to(
            state["batches"],
            (checkpoint / "pictures.jsonl").read_text(encoding="utf-8").splitlines(),
            prompt_files,
            device,
        )
        say(f"resumed from {checkpoint}")
    if start >= steps:
        say(
            f"nothing to train: {checkpoint} has {start} steps already; raise {'num_train_epochs' if config.num_train_epochs else 'max_train_steps'}, or choose another output_dir for a new run"
        )
    if RANK == 0:
        try:
            (output / "checkpoints").mkdir(
                parents=True, exist_ok=True
            )  # what cannot be written is said before the training
        except OSError as error:
            raise UserError(
                f"{output / 'checkpoints'}: cannot be written ({error.strerror}); mend that, or choose another output_dir"
            ) from None
        write_file(output / "config.json", config.model_dump_json(indent=2) + "\n")
    train(config, run, batches, held_out, held_out_keys, prompt_files, start, steps)

    if RANK == 0:
        save_lora(transformer, output, lora_metadata(config, max(start, steps)))
        if device.type != "cpu":
            print(f"peak device memory: {peak_memory(device):.1f} GiB")
        print(f"LoRA: {output / 'pytorch_lora_weights.safetensors'}")
        if config.validation_step_interval and config.validation_prompts:
            print(f"before and after: {output / 'validation' / 'progress.png'}")
    return output / "pytorch_lora_weights.safetensors"


if __name__ == "__main__":
    run_stage(main, __doc__)

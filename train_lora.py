"""Stage 3: the cache -> a LoRA.

    python train_lora.py configs/24gb.json
    torchrun --nproc_per_node 8 train_lora.py configs/24gb.json       # on eight GPUs
    python train_lora.py configs/24gb.json --benchmark 20             # will it fit, how long will it take?

Runs the two stages before it first; they do only what is not there yet. Started again with the same config, it goes
on from the newest checkpoint. Every random draw follows from (seed, purpose, batch or epoch, sample), so on the CPU a
resumed run ends with the same bytes as an uninterrupted one.
"""

import collections
import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import cache_latents
from cache_latents import EMBEDDINGS_FORMAT, latents_file, model_identity, read_prompt_embeds
from longcat_common import (
    FLAVOURS, LORA_FILE, PEFT_FILE, RANK, TEXT_TOKENS, VERSION, WORLD_SIZE,
    FlowMatchEulerDiscreteScheduler, LongCatImageTransformer2DModel, UserError, base_model_name,
    buckets, check_precision, checkpoint_folders, checkpoint_step, compile_blocks, compute_dtype,
    explain_out_of_memory, fill_transformer, flow_matching_loss, free_memory, is_out_of_memory,
    is_readable, load_scheduler, load_transformer, load_vae, log, offload_plan, peak_memory,
    pick_device, read_json, read_tensors, run_stage, sample_sigmas, seeded_generator,
    sum_over_processes, validation_sizes, write_file, write_tensors,
)  # fmt: skip
from prepare_data import GRID
from validate import (
    generate, generation_settings, image_grid, make_pipeline, read_lora, read_metrics, save_image,
)  # fmt: skip

from diffusers.optimization import (
    get_scheduler,
)  # after longcat_common, which quiets what this imports
from filelock import FileLock, Timeout
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from prodigyopt import Prodigy
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_EVERY = 10  # steps
SCORED_IMAGES = (
    8  # held out at most: with as many trained ones, scoring takes as long as about 20 steps
)
SCORED_NORMALS = (
    -1.2,
    -0.4,
    0.4,
    1.2,
)  # the noise levels at which they are scored, as normal draws
BAD_STEPS = 3  # not finite, in a row: the run has failed
PROGRESS_COLUMNS = 6
MEMORY_ADVICE = {  # the cheapest first
    "train_batch_size": 1, "gradient_checkpointing": True, "enable_group_offload": True, "offloaded_blocks": None,
    "base_model_precision": "int4-quanto",
}  # fmt: skip


# ---------------------------------------------------------------- data


class Batch(NamedTuple):
    """Samples of one bucket."""

    number: int  # of the batch in the whole run
    latents: torch.Tensor  # [B, 16, H, W], a fresh sample of the VAE's posterior
    noise: torch.Tensor  # [B, 16, H, W]
    normal: torch.Tensor  # [B], standard normal draws, which decide the noise levels
    prompt_embeds: torch.Tensor  # [B, 512, hidden]
    weights: torch.Tensor  # [B], of the samples in the loss


class Data(NamedTuple):
    """What the run is trained on, and what is scored."""

    pictures: list  # of ImageRecord, that are trained on
    prompt_files: dict  # {prompt: file of its embedding}
    held_out: list  # pictures that are only scored
    trained: list  # as many that are trained on, of the same sources: scored beside them
    held_out_keys: list  # of the first start, some pictures may have gone since
    per_epoch: int  # batches


def hold_out(config, pictures):
    """The content keys of the pictures that are never trained on: `validation_split` of every source, SCORED_IMAGES
    at most, one of each source at least."""
    keys = collections.defaultdict(set)
    for picture in pictures if config.validation_split else ():
        keys[picture.source].add(picture.content_hash)
    share = lambda count: min(count - 1, max(1, round(config.validation_split * count)))
    counts = {source: share(len(own)) for source, own in keys.items()}
    while sum(counts.values()) > max(SCORED_IMAGES, len(counts)):
        counts[max(counts, key=counts.get)] -= 1
    return [key for source, count in counts.items() for key in sorted(keys[source])[:count]]


def read_data(config, state):
    """The data of this run, `state` being the checkpoint's that it goes on from, or None."""
    pictures, prompt_files = cache_latents.main(config)
    keys = state["held_out"] if state else hold_out(config, pictures)
    held_out = [
        *{
            picture.content_hash: picture for picture in pictures if picture.content_hash in keys
        }.values()
    ]  # each once
    pictures = [picture for picture in pictures if picture.content_hash not in keys]
    if not pictures:
        raise UserError(
            "validation_split: no picture is left to train on; it needs two different ones at least"
        )
    trained, counts = [], collections.Counter(picture.source for picture in held_out)
    for source, count in counts.items():
        own = [picture for picture in pictures if picture.source == source]
        trained += own[:: max(1, len(own) // count)][:count]
    if config.validation_split or keys:
        of = ", ".join(f"{n} of {source}" for source, n in counts.items()) or "none"
        why = (
            f"{len(keys)} chosen when the run began"
            if state
            else "of sources with two pictures, one at least"
        )
        log(f"held out, only scored and never trained on: {of} ({why})")
    per_epoch = len(
        epoch_batches(pictures, config.train_batch_size, config.seed, 0)
    )  # the same for every epoch
    return Data(pictures, prompt_files, held_out, trained, keys, per_epoch)


def epoch_batches(pictures, batch_size, seed, epoch):
    """One epoch as shuffled batches of (sample name, picture); a batch holds pictures of one bucket only.

    Every picture comes `repeats` times; what does not fill a bucket's last batch makes a smaller one.
    """
    name = lambda picture, n: f"{picture.content_hash}-{picture.bucket[0]}x{picture.bucket[1]}:{n}"
    samples = [(name(picture, n), picture) for picture in pictures for n in range(picture.repeats)]
    by_bucket = {}
    for i in torch.randperm(
        len(samples), generator=seeded_generator(seed, "shuffle", epoch)
    ).tolist():
        by_bucket.setdefault(samples[i][1].bucket, []).append(samples[i])
    batches = [
        own[i : i + batch_size]
        for _, own in sorted(by_bucket.items())
        for i in range(0, len(own), batch_size)
    ]
    order = torch.randperm(
        len(batches), generator=seeded_generator(seed, "batches", epoch)
    ).tolist()
    return [batches[i] for i in order]


def load_batch(config, samples, prompt_files, epoch, number):
    """The Batch of these (sample name, picture), the `number`-th of the run, with its draws."""
    drawn = []
    for name, picture in samples:
        draw = lambda purpose, *shape: torch.randn(
            shape, generator=seeded_generator(config.seed, purpose, number, name)
        )
        pick = lambda purpose: torch.rand(
            (), generator=seeded_generator(config.seed, purpose, epoch, name)
        ).item()
        posterior = read_tensors(latents_file(config, picture))
        shape = posterior["mean"].shape
        caption = picture.captions[int(pick("caption") * len(picture.captions))]
        if pick("caption_dropout") < config.caption_dropout_probability:
            caption = ""
        latents = posterior["mean"] + posterior["std"] * draw("posterior", *shape)
        prompt_embeds = read_prompt_embeds(prompt_files[caption])
        drawn.append(
            (
                latents,
                draw("noise", *shape),
                draw("sigma"),
                prompt_embeds,
                torch.tensor(picture.loss_weight),
            )
        )
    return Batch(number, *map(torch.stack, zip(*drawn)))


def step_batches(config, data, taken):
    """Yields for step after step (this process's batches, how many the whole run has taken by then, the epoch).
    `taken`: how many it has taken before. A thread loads the next step's while one computes."""
    per_step = config.gradient_accumulation_steps * WORLD_SIZE
    plan = functools.lru_cache(2)(
        functools.partial(epoch_batches, data.pictures, config.train_batch_size, config.seed)
    )

    def load(first):
        places = [
            (n, *divmod(n, data.per_epoch))
            for n in range(first, first + per_step)[RANK::WORLD_SIZE]
        ]
        return [
            load_batch(config, plan(epoch)[i], data.prompt_files, epoch, number)
            for number, epoch, i in places
        ]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load, taken)
        while True:
            batches, taken = coming.result(), taken + per_step
            coming = pool.submit(load, taken)
            yield batches, taken, (taken - 1) // data.per_epoch


# ---------------------------------------------------------------- the LoRA and its optimizer


@dataclass
class Run:
    """What training works on, and how far it is."""

    transformer: torch.nn.Module  # the frozen base with its LoRA
    parameters: dict  # {name: LoRA tensor}
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does something in fp16 only
    noise_scheduler: object
    lr_factor: object  # the share of the learning rate at a step
    device: torch.device
    step: int = 0  # steps done
    batches_taken: int = 0  # batches that all processes together have taken
    weights_in_flux: bool = False  # the optimizer is at work: the weights are no step's


def add_lora(transformer, config):
    """Adds a trainable LoRA in float32, drawn from `seed` or taken from `init_lora`. Returns its parameters as
    {name: parameter}, sorted by name. Raises UserError if a target or `init_lora` does not fit."""
    alpha = config.lora_alpha or config.lora_rank
    linears = [
        name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    for target in config.lora_target_modules:
        if not any(name.endswith(f".{target}") for name in linears):
            raise UserError(
                f"lora_target_modules: {target!r} is the end of no layer's name in this transformer"
            )
    targets = sorted(config.lora_target_modules)
    settings = dict(
        r=config.lora_rank,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    torch.manual_seed(
        seeded_generator(config.seed, "lora").initial_seed()
    )  # PEFT draws on the CPU: the same for all devices
    transformer.add_adapter(LoraConfig(**settings))
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = (
                False  # the LoRA gets its input as the base does: no float32 copy a layer
            )
    parameters = {name: p for name, p in sorted(transformer.named_parameters()) if p.requires_grad}
    for (
        parameter
    ) in parameters.values():  # not to the base's own device: an offloaded block is not there
        parameter.data = parameter.data.to(transformer.device, torch.float32)
    if config.init_lora:
        state = read_init_lora(config)
        shapes = lambda tensors: {(name, tensor.shape) for name, tensor in tensors.items()}
        if wrong := shapes(state) ^ shapes(get_peft_model_state_dict(transformer)):
            what = (
                f"it has not one rank and the same layers in every block (first: {min(wrong)[0]})"
            )
            raise UserError(f"init_lora: {config.init_lora} cannot be trained on: {what}")
        scale = config.lora_rank / alpha
        set_peft_model_state_dict(
            transformer, {n: v * scale if "lora_B" in n else v for n, v in state.items()}
        )
    return parameters


def read_init_lora(config):
    """The state of `init_lora`. Raises UserError if its rank and layers are not those that are to be trained."""
    state = read_lora(config.init_lora)
    ranks = sorted({tensor.shape[0] for name, tensor in state.items() if "lora_A" in name})
    ends = sorted({re.sub(r"^.*transformer_blocks\.\d+\.|\.lora_.*$", "", name) for name in state})
    if ranks != [config.lora_rank] or ends != sorted(config.lora_target_modules):
        has = (
            f"lora_rank {' and '.join(map(str, ranks))} and lora_target_modules {json.dumps(ends)}"
        )
        raise UserError(f"init_lora: {config.init_lora} has {has}; set these to train on from it")
    return state


def set_gradient_checkpointing(config, transformer):
    """Chooses the blocks that are computed again in the backward pass: all, none or the number in
    `gradient_checkpointing`, double-stream blocks first, which keep the most. One that is offloaded always is."""
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    count = (
        double + single
        if config.gradient_checkpointing is True
        else int(config.gradient_checkpointing)
    )
    again = [away or i < count for i, away in enumerate(offload_plan(config, double + single))]
    if any(again) and config.lora_dropout and transformer.device.type == "mps":
        raise UserError(
            "lora_dropout: a block that is computed again gets other dropout on a Mac's GPU; set it to 0"
        )
    transformer.enable_gradient_checkpointing()
    transformer.use_checkpoint, transformer.use_single_checkpoint = again[:double], again[double:]


def set_up(config, transformer, scheduler, device, steps):
    """Puts a LoRA on the transformer, and all around it that a step needs."""
    parameters = add_lora(transformer, config)
    transformer.train()
    set_gradient_checkpointing(config, transformer)
    settings = dict(
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
    if config.optimizer == "prodigy":
        optimizer = Prodigy(
            parameters.values(), **settings, use_bias_correction=True, safeguard_warmup=True
        )
    else:
        optimizer = torch.optim.AdamW(parameters.values(), **settings, fused=device.type != "mps")
    warmup = dict(num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps)
    lr_factor = get_scheduler(config.lr_scheduler, optimizer, **warmup).lr_lambdas[
        0
    ]  # of the step: no state to save
    scaler = torch.amp.GradScaler(
        device.type, enabled=compute_dtype(config, device) == torch.float16
    )
    if config.torch_compile:
        compile_blocks(transformer)
    return Run(transformer, parameters, optimizer, scaler, scheduler, lr_factor, device)


def train_step(config, run, batches):
    """One step over this process's batches. Returns the loss of all, the gradients' norm before clipping, and whether
    the step was sound. What is not finite is not learned from; if only fp16's scale was too large for the gradients,
    the step is left out, and yet sound."""
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * run.lr_factor(run.step)
    losses, scale = [], run.scaler.get_scale()
    for batch in batches:
        torch.manual_seed(
            seeded_generator(config.seed, "lora_dropout", batch.number).initial_seed()
        )  # for dropout
        sigmas = sample_sigmas(batch.normal, batch.latents[0, 0].numel() // 4, run.noise_scheduler)
        tensors = (batch.latents, batch.noise, sigmas, batch.prompt_embeds, batch.weights)
        loss = flow_matching_loss(
            run.transformer, *(tensor.to(run.device) for tensor in tensors)
        ) / len(batches)
        run.scaler.scale(loss).backward()
        losses.append(loss.detach())
    if WORLD_SIZE > 1:  # all processes learn from the mean of their gradients
        gradients = [parameter.grad.div_(WORLD_SIZE) for parameter in run.parameters.values()]
        for coming in [
            torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients
        ]:
            coming.wait()
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(
        run.parameters.values(), config.max_grad_norm or math.inf
    )
    loss, grad_norm = torch.stack(
        [torch.stack(losses).sum(), grad_norm]
    ).tolist()  # waits for the device
    loss = sum_over_processes(loss) / WORLD_SIZE
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    run.weights_in_flux = True
    if finite:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.weights_in_flux = False
    run.optimizer.zero_grad(set_to_none=True)
    return (
        loss,
        grad_norm,
        finite or (math.isfinite(loss) and run.scaler.is_enabled() and scale > 1),
    )


# ---------------------------------------------------------------- checkpoints


def save_lora(transformer, folder, metadata=None):
    """Writes the LoRA "default" into `folder`, in two forms with alpha / rank folded into B, so that every loader
    agrees on its strength: `pytorch_lora_weights.safetensors` (diffusers, ComfyUI), and `adapter_config.json` with
    `adapter_model.safetensors` (PEFT). `metadata`: a dictionary for the files' header."""
    folder, peft = Path(folder), transformer.peft_config["default"]
    state = {
        name: v.detach().cpu().float()
        for name, v in sorted(get_peft_model_state_dict(transformer).items())
    }
    state = {
        name: v * (peft.lora_alpha / peft.r) if "lora_B" in name else v for name, v in state.items()
    }
    for file, prefix in ((LORA_FILE, "transformer"), (PEFT_FILE, "base_model.model")):
        write_tensors(folder / file, {f"{prefix}.{n}": v for n, v in state.items()}, metadata)
    fields = LoraConfig(
        r=peft.r, lora_alpha=peft.r, target_modules=peft.target_modules, inference_mode=True
    ).to_dict()
    fields["target_modules"] = sorted(fields["target_modules"])
    write_file(
        folder / "adapter_config.json",
        json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n",
    )


def fixed_settings(config):
    """What a resumed run must have in common with its checkpoint."""
    alpha, targets = (
        float(config.lora_alpha or config.lora_rank),
        sorted(config.lora_target_modules),
    )
    own = dict(
        lora_rank=config.lora_rank,
        lora_alpha=alpha,
        lora_target_modules=targets,
        optimizer=config.optimizer,
    )
    return own | {"pretrained_model_name_or_path": model_identity(config, "transformer")}


def write_lora(config, run, folder):
    """Writes the LoRA as it is now, ready to use; its header says how it was made."""
    made = {
        "base_model": base_model_name(config),
        "steps": run.step,
        "trained_with": f"LongCat-Image scripts {VERSION}",
    }
    made |= {
        name: getattr(config, name)
        for name in ("lora_rank", "resolution", "trigger_words", "license")
    }
    save_lora(run.transformer, folder, made)


def save_checkpoint(config, run, data):
    """Writes `checkpoints/step-N`, a ready-to-use LoRA and all that resuming needs, whole or not at all; then deletes
    the oldest ones over `checkpoints_total_limit`."""
    if RANK > 0:
        return
    folder = Path(config.output_dir) / "checkpoints" / f"step-{run.step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    for left in folder.parent.glob(
        ".step-*.tmp"
    ):  # of a killed run; a whole one could only not be renamed
        if left == temporary or not (left / "state.json").exists():
            shutil.rmtree(left, ignore_errors=True)
    write_lora(config, run, temporary)
    tensors = {f"lora.{name}": parameter for name, parameter in run.parameters.items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{i}.{part}": torch.as_tensor(value) for part, value in state.items()
        }
    write_tensors(temporary / "state.safetensors", tensors)
    group, start = run.optimizer.param_groups[0], run.optimizer.defaults
    found = {
        n: v
        for n, v in group.items()
        if n not in ("params", "lr", "initial_lr") and v != start.get(n)
    }
    values = {
        "step": run.step,
        "taken": run.batches_taken,
        "held_out": data.held_out_keys,
        "scaler": run.scaler.state_dict(),
    }
    values |= {"optimizer": found, "fixed": fixed_settings(config), "config": config.model_dump()}
    values |= {"embeddings_format": EMBEDDINGS_FORMAT}
    write_file(temporary / "state.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    for wait in (
        0.5,
        2,
        0,
    ):  # on Windows a virus scanner may hold for a while what was just written
        try:
            if (
                folder.exists()
            ):  # one that is no whole checkpoint, or this run would have gone on from it
                shutil.rmtree(folder)
            temporary.rename(folder)
            break
        except OSError as error:
            time.sleep(wait)
            if not wait:
                what = f"is whole, but cannot be renamed to {folder.name} ({error.strerror})"
                raise UserError(f"{temporary}: {what}") from None
    for old in [*complete_checkpoints(config)][: -config.checkpoints_total_limit]:
        shutil.rmtree(old, ignore_errors=True)


def read_state(folder):
    """A checkpoint's state.json; None if a file is missing or cut off."""
    with contextlib.suppress(UserError):
        state = read_json(folder / "state.json")
        if (
            "fixed" in state
            and is_readable(folder / "state.safetensors")
            and is_readable(folder / LORA_FILE)
        ):
            return state


def complete_checkpoints(config):
    """{folder: its state.json} of this run's checkpoints that are whole, oldest first."""
    return {folder: state for folder in checkpoint_folders(config) if (state := read_state(folder))}


def find_checkpoint(config):
    """The checkpoint to go on from, as (folder, its state.json); (None, None) to start anew. Raises UserError if there
    is none of that name, it does not fit, or `output_dir` holds later ones, which this run would come to overwrite."""
    whole, wanted, folder, state = (
        complete_checkpoints(config),
        config.resume_from_checkpoint,
        None,
        None,
    )
    for damaged in [folder for folder in checkpoint_folders(config) if folder not in whole]:
        log(f"{damaged}: is no whole checkpoint, and passed over")
    if wanted == "latest" and whole:
        folder, state = [*whole.items()][-1]
    elif wanted not in ("latest", "none"):
        own = Path(config.output_dir) / "checkpoints"
        folder = Path(wanted) if Path(wanted).exists() else own / wanted
        state = read_state(folder)
        if not state:
            advice = f"name a folder such as {own / 'step-000500'}; to start from a LoRA's weights set init_lora"
            raise UserError(
                f"resume_from_checkpoint: {folder} is no whole checkpoint of these scripts; {advice}"
            )
    later = [other.name for other in whole if not state or checkpoint_step(other) > state["step"]]
    if later:
        advice = (
            'to go on there set resume_from_checkpoint to "latest", else choose another output_dir'
        )
        raise UserError(
            f"output_dir: {config.output_dir} holds later checkpoints, up to {later[-1]}; {advice}"
        )
    if state and state.get("embeddings_format") != EMBEDDINGS_FORMAT:
        what = "was trained on the prompt embeddings of an earlier version; from here on it gets those of this one"
        log(
            f"{folder}: {what} (README, Prompt embeddings). Scores and previews before and after do not compare"
        )
    for name, now in (config.model_dump() | fixed_settings(config)).items() if state else ():
        was = (state["config"] | state["fixed"]).get(name)
        if now != was and name in state["fixed"]:
            if name == "pretrained_model_name_or_path":  # these are hashes
                now, was = base_model_name(config), "a model of other files"
            raise UserError(
                f"{name}: found {now!r}, but {folder} was trained with {was!r}; choose another output_dir"
            )
        if now != was:
            late = " (of no effect on a run that has begun)" * (
                name in ("init_lora", "validation_split")
            )
            log(
                f"{name}: {json.dumps(was, ensure_ascii=False)} -> {json.dumps(now, ensure_ascii=False)}{late}"
            )
    return folder, state


def load_checkpoint(folder, state, run):
    """Restores LoRA, optimizer, scaler and the place in the run."""
    tensors, moments = read_tensors(folder / "state.safetensors"), {}
    for name, parameter in run.parameters.items():
        parameter.data.copy_(tensors.pop(f"lora.{name}"))
    for name, value in tensors.items():
        i, part = name.removeprefix("optimizer.").split(".")
        moments.setdefault(int(i), {})[part] = value
    groups = run.optimizer.state_dict()["param_groups"]
    groups[0] |= state["optimizer"]
    run.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.batches_taken = state["step"], state["taken"]


def lock(folder):
    """Keeps other runs out of this folder within `with lock(folder):`. Raises UserError, naming the run that is in."""
    owner = folder / ".lock.owner"
    try:
        locked = FileLock(folder / ".lock", fallback_to_soft=False).acquire(timeout=0)
    except Timeout:
        whose = owner.read_text(encoding="utf-8") if owner.exists() else "another run"
        raise UserError(
            f"output_dir: {folder} is in use by {whose}; stop that one, or choose another folder"
        ) from None
    except OSError as error:
        log(f"output_dir: {folder} cannot be locked ({error}); make sure that no other run uses it")
        return contextlib.nullcontext()
    write_file(
        owner,
        f"process {os.getpid()} of {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}",
    )
    return locked


def prepare_folder(config, checkpoint):
    """Tries all that the training will do in `output_dir`. Refuses another run's finished LoRA, and sets aside the
    metrics and previews of a run that came to no checkpoint. Raises UserError."""
    output = Path(config.output_dir)
    trial = output / "checkpoints" / f".trial-{os.getpid()}"
    try:
        for text in ("written", "replaced"):
            write_file(trial / "file", text)
        with open(trial / "file", "a") as file:
            file.write(" and added to")
        shutil.rmtree(trial.rename(f"{trial}-renamed"))
    except OSError as error:
        shutil.rmtree(trial, ignore_errors=True)
        why = f"folders there cannot be renamed or removed ({error.strerror})"
        raise UserError(f"{trial.parent}: {why}; choose another output_dir") from None
    if checkpoint and checkpoint.resolve().parent == (output / "checkpoints").resolve():
        return  # it goes on here
    if any((output / name).exists() for name in (LORA_FILE, PEFT_FILE)):
        advice = "move it away, or choose another output_dir"
        raise UserError(
            f"output_dir: {output} holds a finished LoRA, and no checkpoint of its run; {advice}"
        )
    metrics = output / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        aside = output / time.strftime("before-%Y-%m-%d-%H%M%S")
        aside.mkdir()
        for path in (
            output / "logs",
            output / "validation",
            metrics,
        ):  # last what tells that it is to be done
            if path.exists():
                path.rename(aside / path.name)
        log(f"{aside}: here are metrics and previews of a run that came to no checkpoint")


# ---------------------------------------------------------------- what the user sees


class Metrics:
    """`metrics.jsonl` and TensorBoard, written by the first process. `scores`: the held-out scores, {step: values}."""

    def __init__(self, config, step):
        """`step`: with which this start begins. What was written of later ones, which are done again, is dropped."""
        output, self.first_step, self.board = Path(config.output_dir), step, None
        self.path = output / "metrics.jsonl"
        kept = [values for values in read_metrics(self.path) if values["step"] <= step]
        self.scores = {values["step"]: values for values in kept if "held_out_loss" in values}
        if RANK == 0:
            write_file(self.path, "".join(json.dumps(values) + "\n" for values in kept))
            if config.report_to == "tensorboard":
                self.board = SummaryWriter(output / "logs", purge_step=step + 1)
                self.board.add_custom_scalars(
                    {"held out and trained on": {"loss": ["Multiline", ["validation/.*"]]}}
                )

    def write(self, step, group, **values):
        """Writes a step's numbers; in TensorBoard they are `group`/name."""
        values = {
            name: value for name, value in values.items() if math.isfinite(value)
        }  # JSON has no infinity
        if group == "validation":
            self.scores[step] = values
        if RANK == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(f"{group}/{name}", value, step)

    def best(self):
        """The step with the lowest held-out loss, or None. Steps that scored other pictures, as the base's loss tells,
        do not count."""
        base = self.scores[max(self.scores)]["held_out_base"] if self.scores else None
        same = [
            step
            for step in self.scores
            if math.isclose(self.scores[step]["held_out_base"], base, rel_tol=1e-3)
        ]
        return min(same, key=lambda step: self.scores[step]["held_out_loss"], default=None)


@torch.no_grad()
def score(config, run, data, stop):
    """The mean losses of the pictures held out and of as many that are trained on, with the LoRA and without it, in a
    form that tells learning from chance: every picture (the posterior's mean, its first caption) at the same four noise
    levels, with the same noise whenever this is called. None if a signal to stop comes first, or one is not finite."""
    losses = collections.defaultdict(list)
    for name, pictures in {"held_out": data.held_out, "trained": data.trained}.items():
        for picture in pictures:
            if stop.wanted():
                return None
            latents = read_tensors(latents_file(config, picture))["mean"][None]
            prompt_embeds = read_prompt_embeds(data.prompt_files[picture.captions[0]])[None]
            for normal in SCORED_NORMALS:
                noise = torch.randn(
                    latents.shape, generator=seeded_generator("score", picture.content_hash, normal)
                )
                sigmas = sample_sigmas(
                    torch.tensor([normal]), latents[0, 0].numel() // 4, run.noise_scheduler
                )
                tensors = [
                    tensor.to(run.device) for tensor in (latents, noise, sigmas, prompt_embeds)
                ]
                run.transformer.disable_adapters()
                losses[f"{name}_base"].append(flow_matching_loss(run.transformer, *tensors).item())
                run.transformer.enable_adapters()
                losses[f"{name}_loss"].append(flow_matching_loss(run.transformer, *tensors).item())
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    return means if all(map(math.isfinite, means.values())) else None


def find_previews(folder, wanted):
    """{(step, number): path} of the previews in a folder that are drawn of `wanted`, {number: (prompt, settings)}."""
    found = {}
    for path in folder.glob("step-*.png"):
        with (
            contextlib.suppress(Exception),
            Image.open(path) as image,
        ):  # it is not ours; Pillow raises many kinds
            step, number = map(int, re.fullmatch(r"step-(\d+)-(\d+)", path.stem).groups())
            image.load()
            if (image.text["prompt"], image.text["settings"]) == wanted[number]:
                found[step, number] = path
    return found


def preview(config, run, metrics):
    """Draws the validation prompts, each to `validation/step-N-nn.png`, and renews `progress.png`, which shows the
    previews so far. Those that a resumed run begins with are not drawn again. A preview that fails is reported, and
    never ends the training."""
    folder, prompts = Path(config.output_dir) / "validation", config.validation_prompts
    settings = generation_settings(config, "validation_prompts") | {
        "base_model": base_model_name(config)
    }
    settings = json.dumps(settings, ensure_ascii=False)
    wanted = {i: (prompt, settings) for i, prompt in enumerate(prompts)}
    try:
        there = find_previews(folder, wanted) if run.step == metrics.first_step else {}
        missing = [i for i in wanted if (run.step, i) not in there]
        pipe = (
            make_pipeline(config, run.transformer, load_vae(config, run.device))
            if missing
            else None
        )
        for i in missing:
            (image,) = generate(pipe, config, [prompts[i]])
            path = folder / f"step-{run.step:06d}-{i:02d}.png"
            save_image(image, path, longcat=GRID, prompt=prompts[i], settings=settings)
            if metrics.board:
                metrics.board.add_image(
                    f"previews/{i}", np.asarray(image), run.step, dataformats="HWC"
                )
        there, best = find_previews(folder, wanted), metrics.best()
        steps = sorted({step for step, _ in there if step <= run.step})
        shown = {
            steps[round(i * (len(steps) - 1) / (PROGRESS_COLUMNS - 1))]
            for i in range(PROGRESS_COLUMNS)
        }
        labels = {
            step: f"step {step}" if step else "before (step 0)"
            for step in sorted(shown | ({best} & {*steps}))
        }
        if best in labels and len(labels) > 1:
            labels[best] += ", lowest held-out loss"
        empty = Image.new(
            "RGB", validation_sizes(config)[0], "#eeeeee"
        )  # another prompt stood there then
        rows = [
            [Image.open(there[step, i]) if (step, i) in there else empty for step in labels]
            for i in wanted
        ]
        save_image(
            image_grid(rows, prompts, labels.values()), folder / "progress.png", longcat=GRID
        )
    except Exception as error:
        smaller = (
            "; a smaller validation_resolution needs less memory" if is_out_of_memory(error) else ""
        )
        log(
            f"preview at step {run.step} failed: {type(error).__name__}: {error}{smaller}; training goes on"
        )


def model_card(config):
    """The text of the hub's model card."""
    base, words = base_model_name(config), ", ".join(config.trigger_words)
    hub = FLAVOURS[config.model_flavour] if Path(base).exists() else base
    tags = ["lora", "text-to-image", "longcat-image", "diffusers"]
    about = dict(
        base_model=hub,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=config.license,
    )
    return f"""---
{ModelCardData(**about, tags=tags, instance_prompt=words or None).to_yaml()}
---

# A LoRA for {hub}

Rank {config.lora_rank}, trained at {config.resolution} px. In ComfyUI: in `models/loras`, by the LoraLoader node.
With diffusers: `pipe.transformer.load_lora_adapter("{LORA_FILE}")`, then `pipe(..., enable_prompt_rewrite=False)`.

{"![before, while and after it was trained](validation/progress.png)" * bool(config.validation_prompts)}
"""


@contextlib.contextmanager
def stop_signals():
    """Within it a signal to stop is noted in `.numbers`; a second one, or the first while `.at_once` is true, raises
    KeyboardInterrupt. `.wanted()`, asked by all processes together: whether one of them has got one. What was ignored
    before (nohup) stays so. In a thread, which gets no signals, it does nothing."""
    stop = SimpleNamespace(numbers=[], at_once=False, since=-math.inf)
    stop.wanted = lambda: sum_over_processes(bool(stop.numbers)) > 0

    def note(number, frame):
        if time.monotonic() - stop.since < 1:
            return  # one event, sent twice: by a closed terminal, a scheduler
        stop.numbers.append(number)
        stop.since = time.monotonic()
        if len(stop.numbers) > 1:
            raise KeyboardInterrupt(number)
        try:  # not print(), which may be at work
            os.write(
                2,
                b"\nstopping, as soon as this step is finished and saved; a second signal leaves at once\n",
            )
        except OSError:  # the terminal is gone: nothing that is printed from here on must fail
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if stop.at_once:
            raise KeyboardInterrupt(number)

    names = (
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGUSR1",
        "SIGXCPU",
        "SIGBREAK",
    )  # the last is Ctrl-Break on Windows
    in_main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if in_main and hasattr(signal, name)]
    before = {
        number: signal.signal(number, note)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- will it fit?


def benchmark(config, device):
    """Runs `benchmark` steps of the configuration with random weights and data, at its largest bucket; nothing is read
    or written. Prints and returns the seconds a step and the peak memory in GiB (nan on a CPU)."""
    sizes, (width, height) = (
        dict(num_layers=10, num_single_layers=20),
        max(buckets(config), key=math.prod),
    )
    if device.type == "cpu":
        sizes, (width, height) = (
            dict(num_layers=1, num_single_layers=2, num_attention_heads=4),
            (256, 256),
        )
        log(
            "no GPU, so only a model of 3 small blocks; tests/simulate_memory.py tells the real one's memory"
        )
    transformer, scheduler = (
        random_transformer(config, device, sizes),
        FlowMatchEulerDiscreteScheduler(),
    )
    run = set_up(config, transformer, scheduler, device, config.max_train_steps)
    count, hidden, seconds = config.train_batch_size, transformer.config.joint_attention_dim, []
    latents, noise = torch.randn(2, count, 16, height // 8, width // 8)
    batch = Batch(
        0,
        latents,
        noise,
        torch.randn(count),
        torch.randn(count, TEXT_TOKENS, hidden),
        torch.ones(count),
    )
    for run.step in tqdm(
        range(config.benchmark), desc="benchmark", unit="step", leave=False, disable=RANK > 0
    ):
        start = time.perf_counter()
        train_step(config, run, [batch] * config.gradient_accumulation_steps)
        seconds.append(time.perf_counter() - start)
    a_step, peak = statistics.median(seconds[1:] or seconds), peak_memory(device)
    hours = (
        f"{config.max_train_steps} steps take {a_step * config.max_train_steps / 3600:.3g} hours"
    )
    log(
        f"{a_step:.3g} s a step of {count} x {config.gradient_accumulation_steps} at {width}x{height}; {hours}"
    )
    log(f"without caching and previews; peak device memory {peak:.1f} GiB")
    return {"seconds_per_step": a_step, "peak_memory_gib": peak}


def random_transformer(config, device, sizes):
    """A transformer of these sizes with random weights, as load_transformer gives it."""
    with torch.device("meta"):
        transformer = LongCatImageTransformer2DModel(**sizes)
    empty, dtype = transformer.state_dict(), compute_dtype(config, device)
    read = lambda names: {
        name: torch.randn(empty[name].shape, device=device, dtype=dtype) * 0.02 for name in names
    }
    return fill_transformer(transformer, read, config, device)


# ---------------------------------------------------------------- training


def train(config, run, data, steps):
    """The loop, from step `run.step` to `steps`, with checkpoints, scores and previews. What is learned is saved before
    anything is raised."""
    metrics, recent, saved, bad, skipped = Metrics(config, run.step), [], run.step, 0, 0
    bar = tqdm(initial=run.step, total=steps, desc="training", unit="step", disable=RANK > 0)
    due = lambda every: every and (run.step % every == 0 or run.step == steps)
    batches_of_steps = step_batches(config, data, run.batches_taken)
    with stop_signals() as stop, bar, contextlib.closing(batches_of_steps):
        try:
            while True:
                passed = (
                    run.step // config.checkpoint_step_interval
                    > saved // config.checkpoint_step_interval
                )
                if not bad and (
                    passed or run.step == steps > saved
                ):  # after a bad step not before the next good one
                    saved = run.step
                    save_checkpoint(config, run, data)
                if due(config.validation_step_interval):
                    show(config, run, data, metrics, stop)
                if run.step >= steps or stop.wanted():
                    break

                start = time.perf_counter()
                batches, taken, epoch = next(batches_of_steps)
                loss, grad_norm, sound = train_step(config, run, batches)
                run.step, run.batches_taken = run.step + 1, taken
                recent.append((loss if sound else math.nan, grad_norm, time.perf_counter() - start))
                bad, skipped = (0, skipped) if sound else (bad + 1, skipped + 1)
                if not sound:
                    log(
                        f"step {run.step}: loss {loss}, gradient norm {grad_norm}: not learned from"
                    )
                if due(LOG_EVERY) or bad == BAD_STEPS:
                    finite = (
                        list(filter(math.isfinite, values)) or [math.nan] for values in zip(*recent)
                    )
                    loss, grad_norm, seconds = map(statistics.fmean, finite)
                    lr, memory = run.optimizer.param_groups[0]["lr"], peak_memory(run.device)
                    numbers = dict(
                        loss=loss, grad_norm=grad_norm, lr=lr, epoch=epoch, skipped_steps=skipped
                    )
                    metrics.write(
                        run.step,
                        "train",
                        **numbers,
                        seconds_per_step=seconds,
                        peak_memory_gib=memory,
                    )
                    recent.clear()
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                if bad == BAD_STEPS:
                    what = f"were not finite {bad} times in a row; the newest checkpoint is step {saved}"
                    fp16 = (
                        ", or set mixed_precision to no: fp16 may be too narrow"
                        * run.scaler.is_enabled()
                    )
                    raise UserError(
                        f"step {run.step}: loss or gradients {what}; lower learning_rate{fp16}"
                    )
                bar.update()
        finally:  # whatever came: the last complete step is saved, but not after a second signal
            if (
                run.step > saved
                and not run.weights_in_flux
                and bad < BAD_STEPS
                and len(stop.numbers) < 2
            ):
                save_checkpoint(config, run, data)
            if metrics.board:
                metrics.board.close()
    if run.step < steps:
        raise KeyboardInterrupt((stop.numbers or [signal.SIGTERM])[0])
    return metrics.best()


def show(config, run, data, metrics, stop):
    """Scores the pictures held out and draws a preview, which the first signal to stop ends at once."""
    run.transformer.eval()
    if (
        data.held_out
        and run.step not in metrics.scores
        and (scores := score(config, run, data, stop))
    ):
        metrics.write(run.step, "validation", **scores)
        log(
            "step {}: held-out loss {held_out_loss:.4f}, the base's {held_out_base:.4f}".format(
                run.step, **scores
            )
        )
    if config.validation_prompts and RANK == 0:
        with contextlib.suppress(KeyboardInterrupt):
            stop.at_once = True
            if not stop.numbers:
                preview(config, run, metrics)
        stop.at_once = False
    run.transformer.train()
    free_memory()  # of the VAE


@explain_out_of_memory(MEMORY_ADVICE)
def main(config):
    """Trains the LoRA. Returns the path of the finished `pytorch_lora_weights.safetensors`; with `benchmark` its
    figures. Raises UserError for what the user has to mend, and KeyboardInterrupt with the number of a signal to stop
    when the step is finished and saved."""
    device, output = pick_device(), Path(config.output_dir)
    check_precision(config, device)
    if config.benchmark:
        return benchmark(config, device)
    if base_model_name(config) == FLAVOURS["final"]:
        log(
            "model_flavour: final; its authors advise dev to train on, and the LoRA works on final, too"
        )
    with lock(output) if RANK == 0 else contextlib.nullcontext():
        checkpoint, state = find_checkpoint(config)
        if config.init_lora and not checkpoint:
            read_init_lora(config)  # a wrong one is said now, not after an hour of caching
        if RANK == 0:
            prepare_folder(config, checkpoint)
        data = read_data(config, state)
        per_step, steps = config.gradient_accumulation_steps * WORLD_SIZE, config.max_train_steps
        if (
            config.num_train_epochs
        ):  # the steps that are done may have been taken by another number of processes
            done, taken = (state["step"], state["taken"]) if state else (0, 0)
            steps = done + max(
                0, math.ceil((config.num_train_epochs * data.per_epoch - taken) / per_step)
            )
        seen = steps * per_step / data.per_epoch
        log(
            f"{steps} steps of {config.train_batch_size * per_step} pictures, each seen {seen:.1f} times its repeats"
        )
        if config.lr_scheduler != "constant" and config.lr_warmup_steps >= steps:
            log(
                f"lr_warmup_steps: {config.lr_warmup_steps}, so the full learning rate is never reached; lower it"
            )
        if config.optimizer == "prodigy" and config.learning_rate < 0.1:
            log(
                f"learning_rate: {config.learning_rate} is a factor of the rate that prodigy finds; set it to 1"
            )

        begun = (
            config.model_copy(update={"init_lora": None}) if checkpoint else config
        )  # it has gone on from there
        run = set_up(begun, load_transformer(config, device), load_scheduler(config), device, steps)
        if checkpoint:
            load_checkpoint(checkpoint, state, run)
            log(
                f"resumed from {checkpoint}, in epoch {run.batches_taken // data.per_epoch}, of {data.per_epoch} batches"
            )
        if run.step >= steps:
            more = "raise max_train_steps or num_train_epochs"
            log(
                f"nothing to train: {checkpoint} has {run.step} steps; {more}, or choose another output_dir"
            )
        elif RANK == 0:
            write_file(output / "config.json", config.model_dump_json(indent=2) + "\n")
        best = train(config, run, data, steps)

        if RANK == 0:
            write_lora(config, run, output)
            if not (output / "README.md").exists():  # the user may have changed it
                write_file(output / "README.md", model_card(config))
            print(f"LoRA: {output / LORA_FILE}")
            if config.validation_step_interval and config.validation_prompts:
                print(f"before and after: {output / 'validation' / 'progress.png'}")
            if best is not None:
                print(f"lowest held-out loss: step {best}")
    return output / LORA_FILE


if __name__ == "__main__":
    run_stage(main, __doc__)

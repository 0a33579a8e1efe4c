"""Stage 3: the cache -> a LoRA.

    python train_lora.py configs/24gb.json
    torchrun --nproc_per_node 8 train_lora.py configs/24gb.json       # on eight GPUs
    python train_lora.py configs/24gb.json --benchmark 20             # will it fit, how fast is it?

Runs the two earlier stages first; they do only what is missing. Started again with the same
config, it resumes from the newest checkpoint. Every random draw follows from (seed, purpose, batch
or epoch, sample), so on the CPU a resumed run produces the same bytes as an uninterrupted one.

The file is in reading order: data and batches, the LoRA and its optimizer, one training step, the
loop, main. After that comes what surrounds training: checkpoints, metrics and previews, signals and
locks, the benchmark.
"""

import collections
import contextlib
import itertools
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
from cache_latents import latents_file, model_identity, read_prompt_embeds
from longcat_common import (
    FLAVOURS, LORA_FILE, PEFT_FILE, RANK, TEXT_TOKENS, VERSION, WORLD_SIZE,
    FlowMatchEulerDiscreteScheduler, LongCatImageTransformer2DModel, UserError, base_model_name,
    buckets, check_format, check_precision, compile_blocks, compute_dtype, explain_out_of_memory,
    fill_transformer, flow_matching_loss, free_memory, is_out_of_memory, is_readable,
    load_scheduler, load_transformer, load_vae, log, offload_plan, peak_memory, pick_device,
    read_json, read_tensors, run_stage, sample_sigmas, seeded_generator, sum_over_processes,
    write_file, write_tensors,
)  # fmt: skip
from prepare_data import GRID
from validate import (
    checkpoint_folders, checkpoint_step, find_previews, generate, generation_settings,
    make_pipeline, read_lora, read_metrics, save_image, write_progress_image,
)  # fmt: skip

# Import these after longcat_common, which silences their warnings.
from diffusers.optimization import get_scheduler
from filelock import FileLock, Timeout
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from prodigyopt import Prodigy
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_EVERY = 10  # steps
MAX_BAD_STEPS = 3  # this many in a row with a loss or gradients that are not finite end the run
CHECKPOINT_FORMAT = 2  # the number in state.json
# What save_lora writes. A checkpoint resumes without these files, from its state alone.
LORA_FILES = (LORA_FILE, PEFT_FILE, "adapter_config.json")
# The name of state.json while its checkpoint is being deleted.
DELETED_STATE = ".state.json.tmp"
# At most this many images are held out: scoring them takes as long as about 20 training steps.
MAX_HELD_OUT = 8
# Held-out images are scored at the sigmas that follow from these standard normal values.
SCORED_NORMALS = (-1.2, -0.4, 0.4, 1.2)
# Settings that save memory, those that cost the least time first.
MEMORY_ADVICE = {
    "train_batch_size": 1,
    "gradient_checkpointing": True,
    "enable_group_offload": True,
    "offloaded_blocks": None,  # all of them
    "base_model_precision": "int4-quanto",
}


# ---------------------------------------------------------------- data and batches


class Batch(NamedTuple):
    """Samples of one bucket, with their random draws."""

    number: int  # of images that the run saw before this batch; its draws follow from it
    latents: torch.Tensor  # [B, 16, H, W], drawn from the VAE's posterior
    noise: torch.Tensor  # [B, 16, H, W]
    normal: torch.Tensor  # [B], standard normal draws that become the sigmas
    prompt_embeds: torch.Tensor  # [B, 512, hidden]
    weights: torch.Tensor  # [B], of the samples in the loss
    paths: list = []  # of the images


class Data(NamedTuple):
    """What the run trains on, and what it scores."""

    images: list  # of ImageRecord, to train on
    prompt_files: dict  # {prompt: file of its embeddings}
    held_out: list  # images that are scored only
    scored_training: list  # for each a training image of its source and size, to compare with
    held_out_hashes: list  # chosen when the run began; some of these images may be gone since
    images_per_epoch: int  # with repeats
    # model_identity of parts of the model, as they were when the run began.
    vae: list | None = None
    transformer: list | None = None


def read_data(config, state):
    """Runs the first two stages. `state`: of the checkpoint to resume from, or None."""
    images, prompt_files = cache_latents.main(config)
    held_out_hashes = state["held_out"] if state else hold_out(config, images)

    training = []
    held_out_records = collections.defaultdict(list)
    for record in images:
        if record.content_hash in held_out_hashes:
            held_out_records[record.content_hash].append(record)
        else:
            training.append(record)
    if not training:
        raise UserError(
            "validation_split: no image is left to train on; at least two different ones are needed"
        )

    # An image that is in several buckets is scored in one of them: all sizes take turns.
    held_out = []
    for i, records in enumerate(held_out_records.values()):
        held_out.append(records[i % len(records)])
    scored_training = similar_images(held_out, training)
    report_held_out(config, images, held_out_hashes, state)

    images_per_epoch = sum(record.repeats for record in training)
    return Data(
        training,
        prompt_files,
        held_out,
        scored_training,
        held_out_hashes,
        images_per_epoch,
        vae=model_identity(config, "vae"),
        transformer=model_identity(config, "transformer"),
    )


def hold_out(config, images):
    """The content hashes of the held-out images: the share `validation_split` of every source, at
    least one of each that has two, MAX_HELD_OUT in all, or one of each source if these are more.
    An empty list if they would never be scored."""
    if not config.validation_split or not config.validation_step_interval:
        return []
    hashes = collections.defaultdict(set)
    for record in images:
        hashes[record.source].add(record.content_hash)

    # One image of each source is always left to train on.
    counts = {}
    for source, source_hashes in hashes.items():
        share = max(1, round(config.validation_split * len(source_hashes)))
        counts[source] = min(share, len(source_hashes) - 1)
    while sum(counts.values()) > max(MAX_HELD_OUT, len(counts)):
        largest = max(counts, key=counts.get)
        counts[largest] -= 1

    held_out = []
    for source, count in counts.items():
        held_out += sorted(hashes[source])[:count]
    return held_out


def similar_images(held_out, training):
    """For each held-out image another training image of the same source, the one whose bucket is
    nearest in area: so the two curves compare the same sizes in the same shares."""
    similar = {}
    for record in held_out:
        area = math.prod(record.bucket)
        candidates = [
            other
            for other in training
            if other.source == record.source and other.content_hash not in similar
        ]
        if candidates:
            nearest = min(candidates, key=lambda other: abs(math.prod(other.bucket) - area))
            similar[nearest.content_hash] = nearest
    return list(similar.values())


def report_held_out(config, images, held_out_hashes, state):
    """Logs how many images of each source are held out, and why these. `state` as in read_data."""
    if not config.validation_split and not held_out_hashes:
        return
    sources = {record.content_hash: record.source for record in images}
    totals = collections.Counter(sources.values())
    counts = collections.Counter(sources[key] for key in held_out_hashes if key in sources)
    shares = [f"{count} of the {totals[source]} in {source}" for source, count in counts.items()]

    why = "at least one of every source that has two images"
    if not config.validation_step_interval:
        why = "validation_step_interval is 0: no image is scored"
    elif state:
        why = f"{len(held_out_hashes)} chosen when the run began"
    log(f"held-out images, never trained on: {', '.join(shares) or 'none'} ({why})")


def shuffled(items, *seeds):
    """The items in a random order that follows from `seeds`, see seeded_generator."""
    order = torch.randperm(len(items), generator=seeded_generator(*seeds)).tolist()
    return [items[i] for i in order]


def epoch_batches(images, batch_size, seed, epoch):
    """One epoch as shuffled batches, lists of (sample name, ImageRecord). Every image comes
    `repeats` times, and a batch holds images of one bucket: the last one of a bucket may be
    smaller."""
    samples = []
    counts = collections.Counter()  # duplicates of an image get names of their own, too
    for record in images:
        width, height = record.bucket
        name = f"{record.content_hash}-{width}x{height}"
        for _ in range(record.repeats):
            samples.append((f"{name}:{counts[name]}", record))
            counts[name] += 1

    by_bucket = collections.defaultdict(list)
    for sample in shuffled(samples, seed, "shuffle", epoch):
        by_bucket[sample[1].bucket].append(sample)
    batches = []
    for bucket in sorted(by_bucket):
        for start in range(0, len(by_bucket[bucket]), batch_size):
            batches.append(by_bucket[bucket][start : start + batch_size])
    return shuffled(batches, seed, "batches", epoch)


def run_batches(config, data, images_seen):
    """Yields (number, epoch, samples) of batch after batch, from the one that comes after
    `images_seen` images of the run on. `number`: the images before it.

    Progress is counted in images, which no setting changes. With another batch size the epoch in
    progress is cut into other batches, and some of its images come again.
    """
    epoch, position = divmod(images_seen, data.images_per_epoch)
    while True:
        seen = 0
        for samples in epoch_batches(data.images, config.train_batch_size, config.seed, epoch):
            if seen + len(samples) > position:
                yield epoch * data.images_per_epoch + seen, epoch, samples
            seen += len(samples)
        epoch += 1
        position = 0


def step_batches(config, data, images_seen):
    """Yields, step after step, (this process's batches, images seen by then, the epoch).

    A step takes the next `gradient_accumulation_steps` * WORLD_SIZE batches of the run. Of these,
    process r, counted from 0, takes those at positions r, r + WORLD_SIZE and so on. `images_seen`:
    how many images the run has trained on before, all processes together.
    """
    per_step = config.gradient_accumulation_steps * WORLD_SIZE
    upcoming = run_batches(config, data, images_seen)

    def load():
        planned = list(itertools.islice(upcoming, per_step))
        batches = []
        for number, epoch, samples in planned[RANK::WORLD_SIZE]:
            batches.append(load_batch(config, samples, data.prompt_files, epoch, number, data.vae))
        number, epoch, samples = planned[-1]
        return batches, number + len(samples), epoch

    # A thread loads the batches of the next step while this one computes.
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        while True:
            step = loading.result()
            loading = pool.submit(load)
            yield step


def load_batch(config, samples, prompt_files, epoch, number, vae=None):
    """The Batch of these (sample name, ImageRecord); `number`: the images of the run before it.
    `vae`: see latents_file."""
    drawn = [
        load_sample(config, name, record, prompt_files, epoch, number, vae)
        for name, record in samples
    ]
    latents, noise, normal, prompt_embeds, weights = map(torch.stack, zip(*drawn))
    paths = [record.path for _, record in samples]
    return Batch(number, latents, noise, normal, prompt_embeds, weights, paths)


def load_sample(config, name, record, prompt_files, epoch, number, vae):
    """One sample of a Batch: its latents, noise, normal draw, prompt embeddings and weight."""

    def draw_normal(purpose, shape):
        generator = seeded_generator(config.seed, purpose, number, name)
        return torch.randn(shape, generator=generator)

    def draw_uniform(purpose):
        generator = seeded_generator(config.seed, purpose, epoch, name)
        return torch.rand((), generator=generator).item()

    posterior = read_latents(config, record, vae)
    shape = posterior["mean"].shape
    latents = posterior["mean"] + posterior["std"] * draw_normal("posterior", shape)
    noise = draw_normal("noise", shape)
    normal = draw_normal("sigma", ())

    # One of the captions, or none.
    caption = record.captions[int(draw_uniform("caption") * len(record.captions))]
    if draw_uniform("caption_dropout") < config.caption_dropout_probability:
        caption = ""
    prompt_embeds = read_prompt_embeds(prompt_files[caption])
    return latents, noise, normal, prompt_embeds, torch.tensor(record.loss_weight)


def read_latents(config, record, vae):
    """The posterior of an image's latents, {"mean", "std"}, each [16, H, W]. Raises UserError if
    its file is missing or corrupt, or holds NaN or infinity."""
    path = latents_file(config, record, vae)
    posterior = read_tensors(path)
    if not (posterior["mean"] + posterior["std"]).isfinite().all():
        raise UserError(
            f"{path}: holds values that are not finite, for {record.path}; delete it to encode "
            "the image again"
        )
    return posterior


# ---------------------------------------------------------------- the LoRA and its optimizer


@dataclass
class Run:
    """What training works on, and how far it has gotten."""

    transformer: torch.nn.Module  # the frozen base with its LoRA
    parameters: dict  # {name: trainable parameter}
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss; enabled in fp16 only
    noise_scheduler: FlowMatchEulerDiscreteScheduler
    lr_factor: object  # a function: step -> factor on the learning rate
    device: torch.device
    step: int = 0  # steps done
    images_seen: int = 0  # by all processes together
    saved_step: int = 0  # of the newest checkpoint
    bad_steps: int = 0  # in a row, up to now, with a loss or gradients that are not finite
    skipped_steps: int = 0  # all bad steps since this process started
    weights_in_flux: bool = False  # while the optimizer changes them


def set_up(config, transformer, noise_scheduler, device, steps):
    """Puts a LoRA on the transformer, and around it all that a training step needs. Returns the
    Run."""
    parameters = add_lora(transformer, config)
    transformer.train()
    set_gradient_checkpointing(config, transformer)
    optimizer = make_optimizer(config, list(parameters.values()), device)

    # The learning rate follows from the step alone, so that there is no state to save.
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
    )
    lr_factor = lr_scheduler.lr_lambdas[0]
    is_fp16 = compute_dtype(config, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)
    if config.torch_compile:
        compile_blocks(transformer)
    return Run(transformer, parameters, optimizer, scaler, noise_scheduler, lr_factor, device)


def make_optimizer(config, parameters, device):
    """The optimizer of the trainable parameters; train_step sets its learning rate."""
    settings = dict(
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )
    if config.optimizer == "prodigy":
        return Prodigy(parameters, **settings, use_bias_correction=True, safeguard_warmup=True)
    return torch.optim.AdamW(parameters, **settings, fused=device.type != "mps")


def add_lora(transformer, config):
    """Adds a trainable LoRA in float32, initialized from `seed` or `init_lora`. Returns its
    parameters as {name: parameter}, sorted by name. Raises UserError if a target or `init_lora`
    does not fit."""
    # A target is a layer's whole name, or the end of it after a dot.
    modules = list(transformer.named_modules())
    linears = [f".{name}" for name, module in modules if isinstance(module, torch.nn.Linear)]
    for target in config.lora_target_modules:
        if not any(name.endswith(f".{target}") for name in linears):
            raise UserError(
                f"lora_target_modules: no layer's name in this transformer ends in {target!r}"
            )

    # PEFT initializes on the CPU: the same weights on every device.
    torch.manual_seed(seeded_generator(config.seed, "lora").initial_seed())
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(config.lora_target_modules),
    )
    transformer.add_adapter(adapter)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # The LoRA gets its input in the base's dtype: no float32 copy per layer.
            module.cast_input_dtype_enabled = False

    # Move it to the compute device; the weights of an offloaded block are elsewhere.
    parameters = {}
    for name, parameter in sorted(transformer.named_parameters()):
        if parameter.requires_grad:
            parameter.data = parameter.data.to(transformer.device, torch.float32)
            parameters[name] = parameter
    if config.init_lora:
        load_init_lora(config, transformer)
    return parameters


def load_init_lora(config, transformer):
    """Gives the transformer's new LoRA the weights of `init_lora`. Raises UserError if it has other
    layers or shapes."""
    state = read_init_lora(config)
    shapes = {(name, tensor.shape) for name, tensor in state.items()}
    expected = get_peft_model_state_dict(transformer)
    differences = shapes ^ {(name, tensor.shape) for name, tensor in expected.items()}
    if differences:
        raise UserError(
            f"init_lora: {config.init_lora} cannot be trained further: its rank or layers differ "
            f"between blocks (first difference: {min(differences)[0]}); if only its layers do, "
            "list their whole names in lora_target_modules"
        )

    # Its strength is folded into B, and this run's LoRA has one of its own.
    scale = config.lora_rank / (config.lora_alpha or config.lora_rank)
    for name in state:
        if "lora_B" in name:
            state[name] = state[name] * scale
    set_peft_model_state_dict(transformer, state)


def read_init_lora(config):
    """The state of `init_lora`. Raises UserError if its rank or layers are not the configured
    ones."""
    state = read_lora(config.init_lora)
    ranks = sorted({tensor.shape[0] for name, tensor in state.items() if "lora_A" in name})
    layers = set()  # as the configuration names them
    for name in state:
        layer = "." + re.sub(r"\.lora_.*$", "", name)
        targets = [target for target in config.lora_target_modules if layer.endswith(f".{target}")]
        layers.update(targets or [re.sub(r"^(.*transformer_blocks\.\d+)?\.", "", layer)])
    if ranks != [config.lora_rank] or layers != set(config.lora_target_modules):
        rank = " and ".join(map(str, ranks))
        targets = json.dumps(sorted(layers))
        raise UserError(
            f"init_lora: {config.init_lora} has lora_rank {rank} and lora_target_modules "
            f"{targets}; set these to train it further"
        )
    return state


def set_gradient_checkpointing(config, transformer):
    """Chooses the blocks that are recomputed in the backward pass: all, none, or as many as
    `gradient_checkpointing` says, double-stream blocks first, for they keep the most. Offloaded
    blocks are always recomputed. Raises UserError on a Mac with dropout."""
    double_count = len(transformer.transformer_blocks)
    count = double_count + len(transformer.single_transformer_blocks)
    wanted = count if config.gradient_checkpointing is True else int(config.gradient_checkpointing)
    is_recomputed = [
        is_offloaded or i < wanted for i, is_offloaded in enumerate(offload_plan(config, count))
    ]
    if any(is_recomputed) and config.lora_dropout and transformer.device.type == "mps":
        raise UserError(
            "lora_dropout: on a Mac's GPU a recomputed block would get other dropout; set it to 0"
        )
    transformer.enable_gradient_checkpointing()
    transformer.use_checkpoint = is_recomputed[:double_count]
    transformer.use_single_checkpoint = is_recomputed[double_count:]


# ---------------------------------------------------------------- one training step


def train_step(config, run, batches):
    """One optimizer step over this process's batches.

    Returns the mean loss of the images, the gradient norm before clipping, and whether the step was
    sound. A step with a loss or gradients that are not finite changes nothing. It still counts as
    sound if only fp16's loss scale was too large, which the scaler then lowers.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * run.lr_factor(run.step)
    loss_scale = run.scaler.get_scale()

    # Forward and backward, batch after batch. An incomplete batch has a smaller share, so that
    # every image counts the same. The gradients add up.
    losses = []
    image_count = 0
    for batch in batches:
        torch.manual_seed(
            seeded_generator(config.seed, "lora_dropout", batch.number).initial_seed()
        )
        token_count = batch.latents[0, 0].numel() // 4  # 2 x 2 latents make a token
        sigmas = sample_sigmas(batch.normal, token_count, run.noise_scheduler)
        inputs = (batch.latents, batch.noise, sigmas, batch.prompt_embeds, batch.weights)
        inputs = [tensor.to(run.device) for tensor in inputs]
        loss = flow_matching_loss(run.transformer, *inputs)
        size = len(batch.normal)
        share = size / config.train_batch_size / len(batches)
        run.scaler.scale(loss * share).backward()
        losses.append(loss.detach() * size)
        image_count += size

    average_gradients(run.parameters.values())
    run.scaler.unscale_(run.optimizer)
    max_norm = config.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), max_norm)

    # Both numbers together, for this waits until the device is done.
    loss, grad_norm = torch.stack([torch.stack(losses).sum(), grad_norm]).tolist()
    loss = sum_over_processes(loss) / sum_over_processes(image_count)
    is_sound = math.isfinite(loss) and math.isfinite(grad_norm)
    run.weights_in_flux = True
    if is_sound:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.weights_in_flux = False
    run.optimizer.zero_grad(set_to_none=True)

    scale_was_too_large = loss_scale > 1 and math.isfinite(loss)  # it is 1 but for fp16
    return loss, grad_norm, is_sound or scale_was_too_large


def average_gradients(parameters):
    """Replaces the gradients by their mean over all processes."""
    if WORLD_SIZE == 1:
        return
    pending = []
    for parameter in parameters:
        parameter.grad.div_(WORLD_SIZE)
        pending.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


# ---------------------------------------------------------------- the loop


def train(config, run, data, steps):
    """The training loop, from step `run.step` to `steps`, with checkpoints, held-out scores and
    previews. What has been learned is saved before anything is raised. Returns the step with the
    lowest held-out loss, or None."""
    metrics = Metrics(config, run.step)
    batches_of_steps = step_batches(config, data, run.images_seen)
    bar = tqdm(initial=run.step, total=steps, desc="training", unit="step", disable=RANK > 0)
    with stop_signals() as stop, bar, contextlib.closing(batches_of_steps):
        try:
            while True:
                if checkpoint_is_due(config, run, steps):
                    save_checkpoint(config, run, data)
                if is_due(config.validation_step_interval, run, steps):
                    score_and_preview(config, run, data, metrics, stop)
                if run.step >= steps or stop.wanted():
                    break

                started = time.perf_counter()
                batches, images_seen, epoch = next(batches_of_steps)
                loss, grad_norm, is_sound = train_step(config, run, batches)
                run.step += 1
                run.images_seen = images_seen

                count_bad_steps(run, batches, loss, grad_norm, is_sound)
                seconds = time.perf_counter() - started
                metrics.recent.append((loss if is_sound else math.nan, grad_norm, seconds))
                if is_due(LOG_EVERY, run, steps) or run.bad_steps == MAX_BAD_STEPS:
                    mean_loss = metrics.write_training(run, epoch)
                    bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                raise_if_diverged(run)
                bar.update()
        finally:
            # Whatever happened, the last complete step is saved, but not after a second signal.
            has_diverged = run.bad_steps == MAX_BAD_STEPS
            can_be_saved = not run.weights_in_flux and not has_diverged and len(stop.numbers) < 2
            if run.step > run.saved_step and can_be_saved:
                save_checkpoint(config, run, data)
            metrics.close()
    if run.step < steps:
        numbers = stop.numbers or [signal.SIGTERM]  # another process has received it
        raise KeyboardInterrupt(numbers[0])
    return metrics.best_step()


def is_due(interval, run, steps):
    """Whether something that happens every `interval` steps, and after the last one, is due."""
    return interval and (run.step % interval == 0 or run.step == steps)


def checkpoint_is_due(config, run, steps):
    """Whether an interval has passed since the newest checkpoint, or training is complete. After a
    bad step it waits for the next good one."""
    interval = config.checkpoint_step_interval
    has_passed = run.step // interval > run.saved_step // interval
    is_last = run.step == steps > run.saved_step
    return not run.bad_steps and (has_passed or is_last)


def count_bad_steps(run, batches, loss, grad_norm, is_sound):
    """Counts the steps that were not finite and therefore skipped, and logs each with its
    images."""
    if is_sound:
        run.bad_steps = 0
        return
    run.bad_steps += 1
    run.skipped_steps += 1
    paths = itertools.chain.from_iterable(batch.paths for batch in batches)
    what = f"loss {loss}, gradient norm {grad_norm}: step skipped"
    tqdm.write(f"step {run.step}: {what}; its images: {', '.join(paths)}")  # of every process


def raise_if_diverged(run):
    """Raises UserError after MAX_BAD_STEPS bad steps in a row."""
    if run.bad_steps < MAX_BAD_STEPS:
        return
    advice = "lower learning_rate"
    if run.scaler.is_enabled():
        advice += ', or set mixed_precision to "no": the range of fp16 may be too small'
    raise UserError(
        f"step {run.step}: loss or gradients were not finite {run.bad_steps} times in a row; "
        f"the newest checkpoint is step {run.saved_step}; {advice}"
    )


# ---------------------------------------------------------------- main


@explain_out_of_memory(MEMORY_ADVICE)
def main(config):
    """Trains the LoRA. Returns the path of the finished `pytorch_lora_weights.safetensors`; with
    `benchmark` its figures. Raises UserError for what the user has to fix, and KeyboardInterrupt
    with the signal's number if a signal has stopped it, after the step is finished and saved."""
    device = pick_device()
    output = Path(config.output_dir)
    check_precision(config, device)
    if config.benchmark:
        return benchmark(config, device)
    if base_model_name(config) == FLAVOURS["final"]:
        log("model_flavour: final; LongCat's authors recommend training on dev; LoRAs work on both")

    with lock(output) if RANK == 0 else contextlib.nullcontext():
        # Report problems now, not after an hour of caching.
        checkpoint, state = find_checkpoint(config)
        if config.init_lora and not checkpoint:
            read_init_lora(config)
        if RANK == 0:
            prepare_folder(config, checkpoint)

        data = read_data(config, state)
        steps = count_steps(config, data, state)
        transformer = load_transformer(config, device)
        if checkpoint:  # it includes init_lora already
            set_up_config = config.model_copy(update={"init_lora": None})
        else:
            set_up_config = config
        run = set_up(set_up_config, transformer, load_scheduler(config), device, steps)
        if checkpoint:
            load_checkpoint(checkpoint, state, run)
            run.images_seen = count_images_seen(state, data)
            restore_lora(config, checkpoint, state, run)
            epoch = run.images_seen // data.images_per_epoch
            log(f"resumed from {checkpoint}, in epoch {epoch}, of {data.images_per_epoch} images")

        if run.step >= steps:
            advice = "raise max_train_steps or num_train_epochs, or choose another output_dir"
            log(f"nothing to train: {checkpoint} already has {run.step} steps; {advice}")
        elif RANK == 0:
            write_file(output / "config.json", config.model_dump_json(indent=2) + "\n")
        best_step = train(config, run, data, steps)
        if RANK == 0:
            write_results(config, run, best_step)
    return output / LORA_FILE


def count_images_seen(state, data):
    """The images that the run has trained on, from a checkpoint's state. With other data than then
    it is converted, so that the run stays where it was, in epochs."""
    if not state:
        return 0
    return round(state["images_seen"] * data.images_per_epoch / state["images_per_epoch"])


def count_steps(config, data, state):
    """The number of steps of the whole run, from max_train_steps or num_train_epochs."""
    step = state["step"] if state else 0
    images_seen = count_images_seen(state, data)
    epoch, position = divmod(images_seen, data.images_per_epoch)
    batches = epoch_batches(data.images, config.train_batch_size, config.seed, epoch)
    batches_per_step = config.gradient_accumulation_steps * WORLD_SIZE

    steps = config.max_train_steps
    if config.num_train_epochs:
        # What is left: all epochs, without the batches of this one that are done, see run_batches.
        batches_left = (config.num_train_epochs - epoch) * len(batches)
        seen = 0
        for samples in batches:
            seen += len(samples)
            if seen <= position:
                batches_left -= 1
        steps = step + max(0, math.ceil(batches_left / batches_per_step))

    images_per_step = config.train_batch_size * batches_per_step
    epochs = images_seen / data.images_per_epoch
    epochs += max(0, steps - step) * batches_per_step / len(batches)
    log(f"{steps} steps of {images_per_step} images, each seen {epochs:.1f} times its repeats")
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= steps:
        log(
            f"lr_warmup_steps: {config.lr_warmup_steps} steps of warmup never reach the full "
            "learning rate; lower it"
        )
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        log(
            f"learning_rate: {config.learning_rate} scales the rate that prodigy finds; set it to 1"
        )
    return steps


def write_results(config, run, best_step):
    """Writes the finished LoRA and its model card, and says where they are."""
    output = Path(config.output_dir)
    write_lora(config, run, output)
    if not (output / "README.md").exists():  # the user may have edited it
        write_file(output / "README.md", model_card(config))
    print(f"LoRA: {output / LORA_FILE}")
    if config.validation_step_interval and config.validation_prompts:
        print(f"before and after: {output / 'validation' / 'progress.png'}")
    if best_step is not None:
        print(f"lowest held-out loss: step {best_step}")


# ---------------------------------------------------------------- saving the LoRA and checkpoints


def save_lora(transformer, folder, metadata=None):
    """Writes the LoRA "default" into `folder` in two formats, with alpha / rank folded into B so
    that every loader agrees on its strength: `pytorch_lora_weights.safetensors` (diffusers,
    ComfyUI), and `adapter_config.json` with `adapter_model.safetensors` (PEFT). `metadata`: a
    dictionary for the files' header."""
    folder = Path(folder)
    adapter = transformer.peft_config["default"]
    state = {}
    for name, tensor in sorted(get_peft_model_state_dict(transformer).items()):
        tensor = tensor.detach().cpu().float()
        if "lora_B" in name:
            tensor = tensor * (adapter.lora_alpha / adapter.r)
        state[name] = tensor
    for file, prefix in ((LORA_FILE, "transformer"), (PEFT_FILE, "base_model.model")):
        prefixed = {f"{prefix}.{name}": tensor for name, tensor in state.items()}
        write_tensors(folder / file, prefixed, metadata)

    folded = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.r,
        target_modules=adapter.target_modules,
        inference_mode=True,
    )
    fields = folded.to_dict()
    fields["target_modules"] = sorted(fields["target_modules"])
    text = json.dumps(fields, indent=2, sort_keys=True, default=str)
    write_file(folder / "adapter_config.json", text + "\n")


def write_lora(config, run, folder):
    """Writes the LoRA as it is now, ready to use; its header says how it was trained."""
    metadata = {
        "format": 1,  # for information: a LoRA with another number can be read
        "base_model": base_model_name(config),
        "steps": run.step,
        "trained_with": f"LongCat-Image scripts {VERSION}",
        "lora_rank": config.lora_rank,
        "resolution": config.resolution,
        "trigger_words": config.trigger_words,
        "license": config.license,
    }
    save_lora(run.transformer, folder, metadata)


def restore_lora(config, folder, state, run):
    """Writes those LoRA files again that are gone from this run's checkpoint."""
    missing = [name for name in LORA_FILES if not (folder / name).exists()]
    if RANK > 0 or not missing or not is_own_checkpoint(config, folder):
        return
    # With the settings of then. Files that are still there may be the user's.
    config = config.model_copy(update=state["config"])
    temporary = folder.with_name(f".{folder.name}-lora.tmp")
    write_lora(config, run, temporary)
    for name in missing:
        (temporary / name).rename(folder / name)
    shutil.rmtree(temporary)
    log(f"{folder}: {' and '.join(missing)} were gone; written again")


def is_own_checkpoint(config, folder):
    """Whether a checkpoint is in this run's output_dir."""
    # The user may have moved it to another disk and linked it.
    return folder.parent.resolve() == (Path(config.output_dir) / "checkpoints").resolve()


def fixed_settings(config, transformer=None):
    """The settings that a resumed run must share with its checkpoint. `transformer`: its
    model_identity when the run began; None: as it is now."""
    return {
        "lora_rank": config.lora_rank,
        "lora_alpha": float(config.lora_alpha or config.lora_rank),
        "lora_target_modules": sorted(config.lora_target_modules),
        "optimizer": config.optimizer,
        "pretrained_model_name_or_path": transformer or model_identity(config, "transformer"),
    }


def save_checkpoint(config, run, data):
    """Writes `checkpoints/step-N`, a ready-to-use LoRA and all that resuming needs, completely or
    not at all; then deletes the oldest checkpoints."""
    run.saved_step = run.step
    if RANK > 0:
        return
    folder = Path(config.output_dir) / "checkpoints" / f"step-{run.step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")

    # Leftovers of a killed run. A complete one is kept: it could only not be renamed.
    for leftover in folder.parent.glob(".step-*.tmp"):
        if leftover == temporary or not (leftover / "state.json").exists():
            shutil.rmtree(leftover, ignore_errors=True)

    write_lora(config, run, temporary)
    write_state(config, run, data, temporary)
    rename_checkpoint(temporary, folder)
    delete_old_checkpoints(config)


def write_state(config, run, data, folder):
    """Writes what resuming needs: `state.safetensors` with the LoRA and the optimizer's tensors,
    then `state.json`."""
    tensors = {f"lora.{name}": parameter for name, parameter in run.parameters.items()}
    for i, moments in run.optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value)
    write_tensors(folder / "state.safetensors", tensors)

    # Of the optimizer's settings those that it has changed itself, as prodigy does.
    changed = {}
    for name, value in run.optimizer.param_groups[0].items():
        if name in ("params", "lr", "initial_lr"):
            continue
        if value != run.optimizer.defaults.get(name):
            changed[name] = value
    state = {
        "format": CHECKPOINT_FORMAT,
        "step": run.step,
        "images_seen": run.images_seen,
        "images_per_epoch": data.images_per_epoch,
        "held_out": data.held_out_hashes,
        "scaler": run.scaler.state_dict(),
        "optimizer": changed,
        "fixed": fixed_settings(config, data.transformer),
        "config": config.model_dump(),
    }
    text = json.dumps(state, indent=2, ensure_ascii=False)
    write_file(folder / "state.json", text + "\n")


def rename_checkpoint(temporary, folder):
    """Gives a complete checkpoint its name. Raises UserError if that fails three times: on Windows
    a virus scanner may hold new files for a while."""
    for wait in (0.5, 2, 0):
        try:
            # What has this name is not a checkpoint, or the run would have resumed from it.
            if os.path.lexists(folder):
                aside = folder.with_name(time.strftime(f"before-%Y-%m-%d-%H%M%S-{folder.name}"))
                folder.rename(aside)
                log(f"{folder}: was in the way, and is now {aside.name}")
            temporary.rename(folder)
            return
        except OSError as error:
            problem = error.strerror
            time.sleep(wait)
    raise UserError(
        f"{temporary}: is complete, but cannot be renamed to {folder.name} ({problem}); rename it, "
        "then start again"
    )


def delete_old_checkpoints(config):
    """Deletes the oldest checkpoints over `checkpoints_total_limit`."""
    complete = []
    for folder in checkpoint_folders(config):
        with contextlib.suppress(UserError):  # unreadable since this start: it stays
            if read_state(folder):
                complete.append(folder)
            elif os.path.lexists(folder / DELETED_STATE):  # a kill has interrupted this
                delete_checkpoint(folder)
    for folder in complete[: -config.checkpoints_total_limit]:
        delete_checkpoint(folder)


def delete_checkpoint(folder):
    """Deletes the files of a checkpoint. What else the user has put into it stays, with its folder;
    one that the user has moved and linked stays, too."""
    if folder.is_symlink():
        return
    with contextlib.suppress(OSError):
        # Without a state.json it is no longer a checkpoint, wherever a kill interrupts this.
        if (folder / "state.json").exists():
            (folder / "state.json").replace(folder / DELETED_STATE)
        for name in (*LORA_FILES, "state.safetensors", DELETED_STATE):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def read_state(folder):
    """A checkpoint's state.json. None for what is not a checkpoint: a folder without state files,
    which the user may have left there, or a half-deleted one. Raises UserError, which names the
    file, for a checkpoint that cannot be used: a kill leaves none."""
    try:
        names = {path.name for path in folder.iterdir()}
    except NotADirectoryError:
        return None
    except OSError as error:
        raise unusable(folder, f"{folder}: cannot be read ({error.strerror})") from None
    if "state.json" not in names and (DELETED_STATE in names or "state.safetensors" not in names):
        return None

    try:
        state = read_json(folder / "state.json")
    except UserError as error:
        raise unusable(folder, str(error)) from None
    advice = (
        "it counted progress and computed prompt embeddings in another way (see README); finish it "
        "with that version, or start a new output_dir; its LoRA works as init_lora"
    )
    check_format(folder, state, CHECKPOINT_FORMAT, advice)
    if not is_readable(folder / "state.safetensors"):
        raise unusable(folder, f"{folder / 'state.safetensors'}: is missing, corrupt or unreadable")
    return state


def unusable(folder, problem):
    """The UserError about a checkpoint that cannot be used."""
    return UserError(
        f"{problem}; restore it, or move {folder.name} out of {folder.parent} to resume from the "
        "one before"
    )


def find_checkpoint(config):
    """The checkpoint to resume from, as (folder, its state.json); (None, None) to start from
    scratch. Raises UserError if there is none of that name, if one cannot be used or does not fit,
    or if `output_dir` holds later ones, which this run would replace in time."""
    complete = {}
    for folder in checkpoint_folders(config):
        state = read_state(folder)
        if state:
            complete[folder] = state
        else:
            log(f"{folder}: has no state.json and state.safetensors to resume from; skipped")
    folder, state = choose_checkpoint(config, complete)
    for other in complete:
        if not state or checkpoint_step(other) > state["step"]:
            advice = 'to resume there, set resume_from_checkpoint to "latest"'
            raise UserError(
                f"output_dir: {config.output_dir} holds later checkpoints, up to "
                f"{list(complete)[-1].name}; {advice}, or choose another output_dir"
            )
    if state:
        report_changes(config, folder, state)
    return folder, state


def choose_checkpoint(config, complete):
    """The checkpoint that `resume_from_checkpoint` names, as find_checkpoint returns it.
    `complete`: {folder: its state.json}."""
    wanted = config.resume_from_checkpoint
    if wanted == "latest" and complete:
        return list(complete.items())[-1]
    if wanted in ("latest", "none"):
        return None, None

    # The path of a folder, or its name in this run.
    checkpoints = Path(config.output_dir) / "checkpoints"
    folder = Path(wanted) if Path(wanted).exists() else checkpoints / wanted
    state = read_state(folder) if folder.is_dir() else None
    if not state:
        raise UserError(
            f"resume_from_checkpoint: {folder} is not a checkpoint of these scripts; name a folder "
            f"such as {checkpoints / 'step-000500'}; to start from a LoRA, set init_lora"
        )
    return folder, state


def report_changes(config, folder, state):
    """Logs the settings that differ from the checkpoint's. Raises UserError for one that must not
    change."""
    for name, now in (config.model_dump() | fixed_settings(config)).items():
        before = (state["config"] | state["fixed"]).get(name)
        if json.dumps(now) == json.dumps(before):  # to Python, 1 and true are equal
            continue
        if name in state["fixed"]:
            if name == "pretrained_model_name_or_path":  # both are hashes
                now = base_model_name(config)
                before = "a model of other files"
            raise UserError(
                f"{name}: found {now!r}, but {folder} was trained with {before!r}; set it back, or "
                "choose another output_dir"
            )
        before = json.dumps(before, ensure_ascii=False)
        change = f"{name}: {before} -> {json.dumps(now, ensure_ascii=False)}"
        if name in ("init_lora", "validation_split"):
            change += " (no effect on a run that has begun)"
        if name == "train_batch_size":
            change += " (some images of this epoch may be seen twice)"
        log(change)


def load_checkpoint(folder, state, run):
    """Restores the LoRA, the optimizer, the loss scaler and the position in the data. Raises
    UserError if the tensors are not this run's."""
    path = folder / "state.safetensors"
    tensors = read_tensors(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items() if "optimizer." not in name}
    if shapes != {f"lora.{name}": weight.shape for name, weight in run.parameters.items()}:
        raise unusable(folder, f"{path}: does not hold the tensors of this run's LoRA")
    for name, parameter in run.parameters.items():
        parameter.data.copy_(tensors.pop(f"lora.{name}"))

    # What is left is the optimizer's: "optimizer.<parameter's number>.<name>".
    moments = collections.defaultdict(dict)
    for key, value in tensors.items():
        _, i, name = key.split(".")
        moments[int(i)][name] = value
    groups = run.optimizer.state_dict()["param_groups"]
    groups[0] |= state["optimizer"]
    run.optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])

    run.step = run.saved_step = state["step"]


# ---------------------------------------------------------------- metrics


class Metrics:
    """`metrics.jsonl` and TensorBoard, written by the first process."""

    def __init__(self, config, step):
        """`step`: where this start begins. Lines of later steps, which are done again, go."""
        output = Path(config.output_dir)
        self.path = output / "metrics.jsonl"
        self.first_step = step
        self.recent = []  # (loss, gradient norm, seconds) of the steps since the last line
        self.board = None
        kept = [values for values in read_metrics(self.path) if values["step"] <= step]
        self.scores = {values["step"]: values for values in kept if "held_out_loss" in values}
        if RANK == 0:
            lines = [json.dumps(values) + "\n" for values in kept]
            write_file(self.path, "".join(lines))
            if config.report_to == "tensorboard":
                self.board = SummaryWriter(output / "logs", purge_step=step + 1)
                chart = {"loss": ["Multiline", ["validation/.*"]]}
                self.board.add_custom_scalars({"held out and trained on": chart})

    def write_training(self, run, epoch):
        """Writes the means of the steps since the last line. Returns their mean loss."""
        means = []
        for values in zip(*self.recent):
            finite = list(filter(math.isfinite, values)) or [math.nan]
            means.append(statistics.fmean(finite))
        loss, grad_norm, seconds = means
        self.recent.clear()
        group = run.optimizer.param_groups[0]
        numbers = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": group["lr"] * group.get("d", 1),  # prodigy multiplies it with d, which it finds
            "epoch": epoch,
            "skipped_steps": run.skipped_steps,
            "seconds_per_step": seconds,
            "peak_memory_gib": peak_memory(run.device),
        }
        self.write(run.step, "train", numbers)
        return loss

    def write(self, step, group, numbers):
        """Writes {name: number}; in TensorBoard they are called `group`/name."""
        # JSON has no NaN and no infinity.
        numbers = {name: number for name, number in numbers.items() if math.isfinite(number)}
        if group == "validation":
            self.scores[step] = numbers
        if RANK == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.board:
            for name, number in numbers.items():
                self.board.add_scalar(f"{group}/{name}", number, step)

    def best_step(self):
        """The step with the lowest held-out loss, or None. Steps that scored other images, as the
        base's loss on them tells, do not count."""
        if not self.scores:
            return None
        base_loss = self.scores[max(self.scores)]["held_out_base"]
        losses = {}
        for step, scores in self.scores.items():
            if math.isclose(scores["held_out_base"], base_loss, rel_tol=1e-3):
                losses[step] = scores["held_out_loss"]
        return min(losses, key=losses.get)

    def close(self):
        """Closes TensorBoard's file."""
        if self.board:
            self.board.close()


# ---------------------------------------------------------------- held-out scores and previews


def score_and_preview(config, run, data, metrics, stop):
    """Scores the held-out images and generates the previews; the first signal to stop ends the
    latter at once."""
    run.transformer.eval()
    if data.held_out and run.step not in metrics.scores:
        scores = score_images(config, run, data, stop)
        if scores:
            metrics.write(run.step, "validation", scores)
            losses = "held-out loss {held_out_loss:.4f}, the base's {held_out_base:.4f}"
            log(f"step {run.step}: " + losses.format(**scores))
    if config.validation_prompts and RANK == 0:
        with contextlib.suppress(KeyboardInterrupt):
            stop.at_once = True
            if not stop.numbers:
                generate_previews(config, run, metrics)
        stop.at_once = False
    run.transformer.train()
    free_memory()  # of the VAE


@torch.no_grad()
def score_images(config, run, data, stop):
    """The mean losses of the held-out images and of the training images beside them, with the LoRA
    and without it: {"held_out_loss", "held_out_base", "trained_loss", "trained_base"}.

    Each image (the posterior's mean, its first caption) is scored at the same four sigmas, with the
    same noise at every call, so that a difference is learning and not chance. Returns None if a
    signal to stop comes first, or if a loss is not finite.
    """
    losses = collections.defaultdict(list)
    for group, images in {"held_out": data.held_out, "trained": data.scored_training}.items():
        for record in images:
            if stop.wanted():
                return None
            latents = read_latents(config, record, data.vae)["mean"][None]
            prompt_embeds = read_prompt_embeds(data.prompt_files[record.captions[0]])[None]
            token_count = latents[0, 0].numel() // 4
            for normal in SCORED_NORMALS:
                generator = seeded_generator("score", record.content_hash, normal)
                noise = torch.randn(latents.shape, generator=generator)
                sigmas = sample_sigmas(torch.tensor([normal]), token_count, run.noise_scheduler)
                inputs = [t.to(run.device) for t in (latents, noise, sigmas, prompt_embeds)]
                run.transformer.disable_adapters()
                base_loss = flow_matching_loss(run.transformer, *inputs)
                run.transformer.enable_adapters()
                loss = flow_matching_loss(run.transformer, *inputs)
                losses[f"{group}_base"].append(base_loss.item())
                losses[f"{group}_loss"].append(loss.item())
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    return means if all(map(math.isfinite, means.values())) else None


def generate_previews(config, run, metrics):
    """Generates an image of each validation prompt, `validation/step-N-nn.png`, and updates
    `progress.png`, which shows the previews so far. A preview that fails is reported and never ends
    the training."""
    settings = generation_settings(config)
    settings["base_model"] = base_model_name(config)
    settings = json.dumps(settings, ensure_ascii=False)
    try:
        generate_missing_previews(config, run, metrics, settings)
        write_progress_image(config, settings, run.step, metrics.best_step())
    except Exception as error:
        advice = ""
        if is_out_of_memory(error):
            advice = "; a smaller validation_resolution needs less memory"
        what = f"{type(error).__name__}: {error}{advice}"
        log(f"preview at step {run.step} failed: {what}; training continues")


def generate_missing_previews(config, run, metrics, settings):
    """Generates the previews of this step. Those that a resumed run begins with are there
    already."""
    missing = set(range(len(config.validation_prompts)))
    if run.step == metrics.first_step:
        missing -= {i for step, i in find_previews(config, settings) if step == run.step}
    if not missing:
        return
    pipe = make_pipeline(config, run.transformer, load_vae(config, run.device))
    for i in sorted(missing):
        prompt = config.validation_prompts[i]
        (image,) = generate(pipe, config, [prompt])
        path = Path(config.output_dir) / "validation" / f"step-{run.step:06d}-{i:02d}.png"
        save_image(image, path, longcat=GRID, prompt=prompt, settings=settings)
        if metrics.board:
            pixels = np.asarray(image)
            metrics.board.add_image(f"previews/{i}", pixels, run.step, dataformats="HWC")


def model_card(config):
    """The text of the hub's model card."""
    base = base_model_name(config)
    hub_name = FLAVOURS[config.model_flavour] if Path(base).exists() else base
    header = ModelCardData(
        base_model=hub_name,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=config.license,
        tags=["lora", "text-to-image", "longcat-image", "diffusers"],
        instance_prompt=", ".join(config.trigger_words) or None,
    )
    images = ""
    if config.validation_prompts:
        images = "![before, during and after training](validation/progress.png)"
    return f"""---
{header.to_yaml()}
---

# A LoRA for {hub_name}

Rank {config.lora_rank}, trained at {config.resolution} px.

ComfyUI: copy it to `models/loras` and load it with the LoraLoaderModelOnly node.
diffusers: `pipe.transformer.load_lora_adapter("{LORA_FILE}")`, then
`pipe(..., enable_prompt_rewrite=False)`.

{images}
"""


# ---------------------------------------------------------------- signals and locks


@contextlib.contextmanager
def stop_signals():
    """Within it, a signal to stop is noted in `.numbers`; a second one, or the first while
    `.at_once` is true, raises KeyboardInterrupt. `.wanted()`, which all processes call together:
    whether any of them has received one. A signal that was ignored before (nohup) stays ignored. In
    a thread, which gets no signals, it does nothing."""
    stop = SimpleNamespace(numbers=[], at_once=False, since=-math.inf)

    def wanted():
        return sum_over_processes(bool(stop.numbers)) > 0

    def note(number, frame):
        # A closed terminal or a scheduler may send several at once: within a second they are one.
        if time.monotonic() - stop.since < 1:
            return
        stop.numbers.append(number)
        stop.since = time.monotonic()
        if len(stop.numbers) > 1:
            raise KeyboardInterrupt(number)
        announce_stop()
        if stop.at_once:
            raise KeyboardInterrupt(number)

    stop.wanted = wanted

    # The last is Ctrl-Break on Windows.
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU", "SIGBREAK")
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                handlers[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def announce_stop():
    """Reports that the signal was received. Not with print(), which the signal may have
    interrupted."""
    text = b"\nstopping once this step is saved; a second signal stops at once, without saving\n"
    try:
        os.write(2, text)
    except OSError:
        # The terminal is gone: printing must not fail from here on.
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def lock(folder):
    """Keeps other runs out of this folder within `with lock(folder):`. Raises UserError, which
    names the run that is in it."""
    owner = folder / ".lock.owner"
    try:
        locked = FileLock(folder / ".lock", fallback_to_soft=False).acquire(timeout=0)
    except Timeout:
        name = owner.read_text(encoding="utf-8") if owner.exists() else "another run"
        raise UserError(
            f"output_dir: {folder} is in use by {name}; stop that run, or choose another folder"
        ) from None
    except OSError as error:
        log(f"output_dir: {folder} cannot be locked ({error}); make sure that no other run uses it")
        return contextlib.nullcontext()
    started = time.strftime("%Y-%m-%d %H:%M")
    write_file(owner, f"process {os.getpid()} of {socket.gethostname()}, since {started}")
    return locked


def prepare_folder(config, checkpoint):
    """Tries everything that training will do in `output_dir`. Unless the run resumes in it, refuses
    a folder with another run's finished LoRA, and moves aside the metrics and previews of a run
    that ended before its first checkpoint. Raises UserError."""
    output = Path(config.output_dir)
    try_writing(output / "checkpoints" / f".trial-{os.getpid()}")
    if checkpoint and is_own_checkpoint(config, checkpoint):
        return
    if any((output / name).exists() for name in (LORA_FILE, PEFT_FILE)):
        raise UserError(
            f"output_dir: {output} holds a finished LoRA, but no checkpoint of its run; move the "
            "LoRA elsewhere, or choose another output_dir"
        )
    metrics = output / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        aside = output / time.strftime("before-%Y-%m-%d-%H%M%S")
        aside.mkdir()
        # The metrics last: they tell that this is to be done.
        for path in (output / "logs", output / "validation", metrics):
            if path.exists():
                path.rename(aside / path.name)
        log(f"{aside}: metrics and previews of a run that ended before its first checkpoint")


def try_writing(folder):
    """Writes, replaces, appends to, renames and removes files in a new folder. Raises UserError."""
    try:
        for text in ("written", "replaced"):
            write_file(folder / "file", text)
        with open(folder / "file", "a") as file:
            file.write(" and appended to")
        renamed = folder.rename(f"{folder}-renamed")
        shutil.rmtree(renamed)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{folder.parent}: folders in it cannot be renamed or removed ({error.strerror}); "
            "choose another output_dir"
        ) from None


# ---------------------------------------------------------------- benchmark


def benchmark(config, device):
    """Runs `benchmark` steps of the configuration with random weights and data, at its largest
    bucket; nothing is read or written. Logs and returns the seconds a step and the peak memory in
    GiB (nan on a CPU)."""
    sizes = dict(num_layers=10, num_single_layers=20)
    width, height = max(buckets(config), key=math.prod)
    if device.type == "cpu":
        sizes = dict(num_layers=1, num_single_layers=2, num_attention_heads=4)
        width = height = 256
        log(
            "no GPU: measuring a model of 3 small blocks; tests/simulate_memory.py tells the real "
            "model's memory"
        )
    transformer = random_transformer(config, device, sizes)
    noise_scheduler = FlowMatchEulerDiscreteScheduler()
    run = set_up(config, transformer, noise_scheduler, device, config.max_train_steps)

    count = config.train_batch_size
    latents, noise = torch.randn(2, count, 16, height // 8, width // 8)
    normal = torch.randn(count)
    prompt_embeds = torch.randn(count, TEXT_TOKENS, transformer.config.joint_attention_dim)
    batch = Batch(0, latents, noise, normal, prompt_embeds, torch.ones(count))
    batches = [batch] * config.gradient_accumulation_steps
    seconds = []
    bar = tqdm(range(config.benchmark), "benchmark", unit="step", leave=False, disable=RANK > 0)
    for step in bar:
        run.step = step
        started = time.perf_counter()
        train_step(config, run, batches)
        seconds.append(time.perf_counter() - started)

    # The first step is slower: kernels are chosen and compiled.
    per_step = statistics.median(seconds[1:] or seconds)
    peak = peak_memory(device)
    hours = per_step * config.max_train_steps / 3600
    images = f"{count} x {config.gradient_accumulation_steps} images of {width}x{height}"
    log(f"{per_step:.3g} s a step of {images}; {config.max_train_steps} steps: {hours:.3g} hours")
    log(f"without caching and previews; peak device memory {peak:.1f} GiB")
    return {"seconds_per_step": per_step, "peak_memory_gib": peak}


def random_transformer(config, device, sizes):
    """A transformer of these sizes with random weights, as load_transformer returns it."""
    with torch.device("meta"):
        transformer = LongCatImageTransformer2DModel(**sizes)
    state = transformer.state_dict()
    dtype = compute_dtype(config, device)

    def random_weight(name):
        return torch.randn(state[name].shape, device=device, dtype=dtype) * 0.02

    def read(names):
        return {name: random_weight(name) for name in names}

    return fill_transformer(transformer, read, config, device)


if __name__ == "__main__":
    run_stage(main, __doc__)

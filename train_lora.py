"""Stage 3: the cache -> a LoRA.

    python train_lora.py configs/24gb.json

Runs the two stages before it first; they do only what is not there yet. Started again with the same config, it goes
on from the newest checkpoint. Every random draw follows from (seed, purpose, step or epoch, sample), so on the CPU a
resumed run ends with the same bytes as an uninterrupted one.
"""

import contextlib
import functools
import json
import math
import shutil
import time
from pathlib import Path

import torch

import cache_latents
from longcat_common import (
    FLAVOURS,
    VERSION,
    UserError,
    add_lora,
    autocast,
    compute_dtype,
    flow_matching_loss,
    free_memory,
    generate,
    generator,
    load_scheduler,
    load_transformer,
    load_vae,
    make_pipeline,
    pick_device,
    picture_grid,
    process_count,
    read_json,
    read_lora,
    read_tensors,
    run_stage,
    sample_sigmas,
    save_lora,
    save_picture,
    write_file,
    write_tensors,
)

from diffusers.optimization import get_scheduler  # after longcat_common, which quiets what this imports
from peft.helpers import disable_input_dtype_casting
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_EVERY = 10  # steps; reading the loss makes the device wait, so not at every one
# What a run cannot change when it is resumed.
FIXED_KEYS = ["pretrained_model_name_or_path", "model_flavour", "lora_rank", "lora_alpha", "lora_target_modules"]


# ---------------------------------------------------------------- data


def epoch_batches(entries, batch_size, seed, epoch):
    """One epoch as shuffled batches of (sample name, entry); a batch holds pictures of one bucket only.

    Every picture comes `repeats` times; what does not fill a bucket's last batch makes a smaller one.
    """
    samples = [(f"{entry['latents_file'].stem}:{n}", entry) for entry in entries for n in range(entry["repeats"])]
    order = torch.randperm(len(samples), generator=generator(seed, "shuffle", epoch)).tolist()
    by_bucket = {}
    for i in order:
        by_bucket.setdefault(tuple(samples[i][1]["bucket"]), []).append(samples[i])
    batches = [group[i : i + batch_size] for _, group in sorted(by_bucket.items()) for i in range(0, len(group), batch_size)]
    order = torch.randperm(len(batches), generator=generator(seed, "batches", epoch)).tolist()
    return [batches[i] for i in order]


def load_batch(config, batch, prompt_files, epoch, index):
    """Latents [B, 16, H, W] (a fresh sample of the posterior), noise like them, normal draws [B], prompt embeddings
    [B, 512, hidden] and loss weights [B] of a batch, the `index`-th of the run, on the CPU."""
    latents, noise, normal, prompt_embeds = [], [], [], []
    for name, entry in batch:
        draw = lambda purpose, *shape: torch.randn(shape, generator=generator(config.seed, purpose, index, name))
        pick = lambda purpose: torch.rand((), generator=generator(config.seed, purpose, epoch, name)).item()
        posterior = read_tensors(entry["latents_file"])
        shape = posterior["mean"].shape
        latents.append(posterior["mean"] + posterior["std"] * draw("posterior", *shape))
        noise.append(draw("noise", *shape))
        normal.append(draw("sigma"))
        caption = entry["captions"][int(pick("caption") * len(entry["captions"]))]
        if pick("caption_dropout") < config.caption_dropout_probability:
            caption = ""
        prompt_embeds.append(read_tensors(prompt_files[caption])["prompt_embeds"])
    weights = torch.tensor([float(entry["loss_weight"]) for _, entry in batch])
    return torch.stack(latents), torch.stack(noise), torch.stack(normal), torch.stack(prompt_embeds), weights


# ---------------------------------------------------------------- checkpoints


def checkpoint_folders(config):
    """This run's checkpoints, oldest first. Folders with other names, such as a user's own copies, are left alone."""
    return sorted((Path(config.output_dir) / "checkpoints").glob("step-" + "[0-9]" * 6))


def lora_metadata(config, step):
    """What the LoRA file's header says about its making."""
    return {
        "base_model": config.pretrained_model_name_or_path or FLAVOURS[config.model_flavour],
        "lora_rank": config.lora_rank,
        "resolution": str(config.resolution),
        "steps": step,
        "trained_with": f"longcat-image LoRA scripts {VERSION}",
    }


def save_checkpoint(config, transformer, parameters, optimizer, scaler, step):
    """Writes `checkpoints/step-N`: a ready-to-use LoRA and all that resuming needs; whole or not at all. Then deletes
    the oldest ones over `checkpoints_total_limit`."""
    folder = Path(config.output_dir) / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_lora(transformer, temporary, lora_metadata(config, step))
    state = {f"lora.{name}": parameter for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state |= {f"{moment}.{name}": value for moment, value in optimizer.state[parameter].items()}
    write_tensors(temporary / "state.safetensors", state)
    fixed = {name: getattr(config, name) for name in FIXED_KEYS}
    write_file(temporary / "state.json", json.dumps({"step": step, "config": fixed, "scaler": scaler.state_dict()}, indent=2))
    temporary.rename(folder)
    for old in checkpoint_folders(config)[: -config.checkpoints_total_limit]:
        shutil.rmtree(old)


def find_checkpoint(config):
    """The checkpoint folder that `resume_from_checkpoint` asks for, or None to start anew.

    Raises UserError if it does not exist, was made with another base model or LoRA shape, or if `output_dir` holds
    later checkpoints, which this run would come to overwrite.
    """
    folders, wanted = checkpoint_folders(config), config.resume_from_checkpoint
    if wanted == "latest":
        folder = folders[-1] if folders else None
    else:
        folder = None if wanted == "none" else Path(wanted)
    if folder and not (folder / "state.json").is_file():
        raise UserError(f"resume_from_checkpoint: {folder} is no checkpoint folder: it holds no state.json")
    if folders and (folder is None or folder.name < folders[-1].name):
        raise UserError(f"output_dir: {config.output_dir} holds later checkpoints, up to {folders[-1].name}; choose another output_dir, or resume from there")
    if folder:
        for name, value in read_json(folder / "state.json")["config"].items():
            if getattr(config, name) != value:
                raise UserError(f"{name}: found {getattr(config, name)!r}, but {folder} was trained with {value!r}; choose another output_dir")
    return folder


def load_checkpoint(folder, parameters, optimizer, scaler):
    """Restores LoRA, optimizer and scaler from a checkpoint folder. Returns its step. Raises UserError if it is damaged."""
    saved = read_json(folder / "state.json")
    try:
        state = read_tensors(folder / "state.safetensors")
    except UserError as error:
        raise UserError(f"{error}; move {folder} away to go on from the checkpoint before it") from None
    if {f"lora.{name}" for name in parameters} - state.keys():
        raise UserError(f"{folder}: does not hold the LoRA of this configuration; choose another output_dir")
    moments = {}
    for i, (name, parameter) in enumerate(parameters.items()):
        parameter.data.copy_(state[f"lora.{name}"])
        moments[i] = {moment: state[f"{moment}.{name}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])
    print(f"resumed from {folder}")
    return saved["step"]


# ---------------------------------------------------------------- what the user sees


def preview(config, transformer, device, step):
    """Draws the validation prompts to `validation/step-N.png` (one column) and renews `validation/progress.png`, which
    shows the previews so far side by side. A preview that fails is reported and never ends the training."""
    try:
        transformer.eval()
        images = generate(make_pipeline(config, transformer, load_vae(config, device)), config, config.validation_prompts)
        width, height = images[0].size
        column = Image.new("RGB", (width, height * len(images)))
        for i, image in enumerate(images):
            column.paste(image, (0, i * height))
        folder, prompts = Path(config.output_dir) / "validation", json.dumps(config.validation_prompts, ensure_ascii=False)
        save_picture(column, folder / f"step-{step:06d}.png", prompts=prompts)

        columns = {}
        for path in sorted(folder.glob("step-*.png")):
            with Image.open(path) as column:
                if column.size == (width, height * len(images)) and column.text.get("prompts") == prompts:
                    columns[int(path.stem[5:])] = column.convert("RGB")
        shown = sorted(columns)
        if len(shown) > 6:  # the first, the last and four between
            shown = [shown[round(i * (len(shown) - 1) / 5)] for i in range(6)]
        rows = [[columns[s].crop((0, i * height, width, (i + 1) * height)) for s in shown] for i in range(len(images))]
        labels = [f"step {s}" if s else "before (step 0)" for s in shown]
        save_picture(picture_grid(rows, config.validation_prompts, labels), folder / "progress.png", prompts=prompts)
    except Exception as error:
        tqdm.write(f"preview at step {step} failed: {type(error).__name__}: {error}; training goes on")
    finally:
        transformer.train()
        free_memory()


class Metrics:
    """`metrics.jsonl` and TensorBoard, from `start` on; lines of steps that a resumed run does again are dropped."""

    def __init__(self, config, start):
        self.path = Path(config.output_dir) / "metrics.jsonl"
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line of a killed run may be cut off
                kept += [line + "\n"] if json.loads(line)["step"] <= start else []
        write_file(self.path, "".join(kept))
        self.board = SummaryWriter(Path(config.output_dir) / "logs", purge_step=start + 1) if config.report_to == "tensorboard" else None

    def write(self, step, **values):
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no infinity
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, step)

    def close(self):
        if self.board:
            self.board.close()


# ---------------------------------------------------------------- training


def main(config):
    """Trains the LoRA. Returns the path of the finished `pytorch_lora_weights.safetensors`.

    Raises UserError for anything in the configuration or the data that the user has to mend.
    """
    if config.prune:
        raise UserError("prune: is for cache_latents.py, which then does nothing else; leave it out to train")
    if process_count() > 1:
        raise UserError("training on several devices is not there yet; cache_latents.py can be run so")
    device, output = pick_device(), Path(config.output_dir)
    checkpoint = find_checkpoint(config)
    if config.init_lora:
        read_lora(config.init_lora)  # a wrong path is said now, not after an hour of caching
    entries, prompt_files = cache_latents.main(config)

    batches_of = functools.lru_cache(maxsize=1)(lambda epoch: epoch_batches(entries, config.train_batch_size, config.seed, epoch))
    batches_per_epoch = len(batches_of(0))
    steps = config.max_train_steps
    if config.num_train_epochs:
        steps = math.ceil(config.num_train_epochs * batches_per_epoch / config.gradient_accumulation_steps)
    seen = steps * config.gradient_accumulation_steps / batches_per_epoch
    print(f"{steps} steps of {config.train_batch_size} x {config.gradient_accumulation_steps}: each picture will be seen about {seen:.1f} times its repeats")

    transformer = load_transformer(config, device)
    parameters = add_lora(transformer, config)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    scheduler = load_scheduler(config)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=device.type == "cuda",
    )
    # The learning rate is a function of the step, so there is no scheduler state to save.
    lr_of = get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps).lr_lambdas[0]
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype(config, device) == torch.float16)

    start = load_checkpoint(checkpoint, parameters, optimizer, scaler) if checkpoint else 0
    if start >= steps:
        print(f"nothing to train: {checkpoint} has {start} steps already; raise max_train_steps, or choose another output_dir for a new run")
    write_file(output / "config.json", json.dumps(vars(config), indent=2, ensure_ascii=False) + "\n")
    metrics = Metrics(config, start)
    previews = config.validation_step_interval and config.validation_prompts
    if previews and start == 0:
        preview(config, transformer, device, 0)

    transformer.train()
    losses, clock = [], time.perf_counter()
    bar = tqdm(range(start + 1, steps + 1), initial=start, total=steps, desc="training", unit="step")
    for step in bar:
        learning_rate = config.learning_rate * lr_of(step - 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        for micro in range(config.gradient_accumulation_steps):
            index = (step - 1) * config.gradient_accumulation_steps + micro
            epoch, position = divmod(index, batches_per_epoch)
            batch = load_batch(config, batches_of(epoch)[position], prompt_files, epoch, index)
            latents, noise, normal, prompt_embeds, weights = (tensor.to(device) for tensor in batch)
            token_count = latents.shape[2] * latents.shape[3] // 4
            sigmas = sample_sigmas(normal, token_count, scheduler, config.flow_schedule_auto_shift)
            # Dropout alone is drawn on the device.
            torch.manual_seed(generator(config.seed, "lora_dropout", index).initial_seed())
            # Autocast serves the LoRA its input in the base's dtype: no float32 copy of it in every layer.
            with disable_input_dtype_casting(transformer):
                with autocast(config, device):
                    loss = flow_matching_loss(transformer, latents, noise, sigmas, prompt_embeds, weights)
                scaler.scale(loss / config.gradient_accumulation_steps).backward()
            losses.append(loss.detach())

        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        if step % LOG_EVERY == 0 or step == steps:
            mean_loss, seconds = torch.stack(losses).mean().item(), time.perf_counter() - clock
            bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.1e}")
            seconds_per_step = seconds * config.gradient_accumulation_steps / len(losses)
            metrics.write(step, loss=mean_loss, lr=learning_rate, grad_norm=grad_norm.item(), epoch=epoch, seconds_per_step=seconds_per_step)
            losses, clock = [], time.perf_counter()
        if step % config.checkpoint_step_interval == 0 or step == steps:
            save_checkpoint(config, transformer, parameters, optimizer, scaler, step)
        if previews and (step % config.validation_step_interval == 0 or step == steps):
            paused = time.perf_counter()
            preview(config, transformer, device, step)
            clock += time.perf_counter() - paused

    metrics.close()
    save_lora(transformer, output, lora_metadata(config, max(start, steps)))
    if device.type == "cuda":
        print(f"peak device memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"LoRA: {output / 'pytorch_lora_weights.safetensors'}")
    if previews:
        print(f"before and after: {output / 'validation' / 'progress.png'}")
    return output / "pytorch_lora_weights.safetensors"


if __name__ == "__main__":
    run_stage(main, __doc__)

"""Stage 2: the manifest -> VAE latents and prompt embeddings in `cache_dir`.

    python cache_latents.py configs/24gb.json
    torchrun --nproc_per_node 4 cache_latents.py configs/24gb.json      # the work divided among four devices

After this, training needs neither the VAE nor the text encoder. A file's name follows from what went in (picture and
bucket or prompt, and the model), so nothing is ever stale, and an interrupted run goes on where it was.
"""

import functools
import hashlib
import itertools
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from longcat_common import (
    RANK, TEXT_TOKENS, WORLD_SIZE, UserError, content_key, encoder_inputs, explain_out_of_memory,
    free_memory, in_parallel, is_out_of_memory, is_readable, load_text_encoder, load_tokenizer,
    load_vae, log, log_once, model_folder, pick_device, read_tensors, run_stage,
    sum_over_processes, template_tokens, text_config, text_dtype, token_counts, write_tensors,
)  # fmt: skip

# Part of every file's name: another number makes all files of its kind anew.
LATENTS_FORMAT = 2
EMBEDDINGS_FORMAT = 1
TILE = 512  # pixels, of a picture that is too large for the device
wait_for_all = functools.partial(sum_over_processes, 0)  # returns when every process has come here
# What goes through one reading of the text encoder: tokens with template and padding, as many as 100 prompts of full
# length have. Their hidden states take 0.4 GiB on the device in bf16, 0.7 in float32.
COLUMNS_AT_ONCE = 100 * 553


# ---------------------------------------------------------------- which files


@functools.cache
def folder_identity(folder):
    """What tells two models apart without reading 16 GB: small files whole, of large ones the name, the size and 64
    pieces, the first of which holds a safetensors header."""
    digest, piece = hashlib.sha256(), 2**18
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt")
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(piece, size // 64)):
                file.seek(start)
                digest.update(file.read(piece))
    return digest.hexdigest()[:32]


def model_identity(config, *parts):
    """folder_identity of several parts of the configured model, as a list."""
    return [folder_identity(model_folder(config, part)) for part in parts]


def latents_file(config, picture):
    """Where a picture's latents are kept: the name follows from its bytes, its bucket and the VAE."""
    key = content_key(
        "latents",
        LATENTS_FORMAT,
        picture.content_hash,
        picture.bucket,
        model_identity(config, "vae"),
    )
    return Path(config.cache_dir) / "latents" / key[:2] / f"{key}.safetensors"


def prompt_file(config, prompt, device):
    """Where a prompt's embedding is kept: the name follows from the prompt, the dtype and the text encoder."""
    how = (str(text_dtype(config, device)), "no_change")  # it is never quantized
    key = content_key(
        "prompt",
        EMBEDDINGS_FORMAT,
        prompt,
        how,
        model_identity(config, "text_encoder", "tokenizer"),
    )
    return Path(config.cache_dir) / "embeddings" / key[:2] / f"{key}.safetensors"


def is_complete(path):
    """Whether a file of the cache is there and, by its header, whole. A damaged one is named and removed."""
    if is_readable(path):
        return True
    if path.exists():
        tqdm.write(f"{path}: is damaged, it is made again")
        path.unlink(missing_ok=True)
    return False


# ---------------------------------------------------------------- pictures


def load_pixels(picture):
    """A picture as uint8 [3, height, width], cut to its bucket. Raises UserError if it is not what the manifest
    names."""
    try:
        if picture.stamp != prepare_data.file_stamp(os.stat(picture.path)):
            raise ValueError("it has changed since prepare_data.py read it; start again")
        image = prepare_data.load_image(picture.path, picture.bucket)
    except Exception as error:
        raise UserError(f"{picture.path}: cannot be used ({error}); mend or remove it") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def encode_image(vae, pixels):
    """uint8 [3, H, W] -> the posterior's mean and std [16, H/8, W/8], in float32 and in the transformer's units:
    (mean - shift_factor) * scaling_factor and std * scaling_factor. A picture that the device has no memory for is
    encoded in tiles. Raises UserError if that does not help."""
    for tiling in (False, True):
        vae.use_tiling = tiling
        try:
            posterior = vae.encode(
                pixels[None].to(vae.device).to(vae.dtype) / 127.5 - 1
            ).latent_dist
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_memory()  # here, where the error no longer holds what was computed
    else:
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise UserError(
            f"the device has too little memory for a picture of {size}; choose a smaller resolution"
        )
    mean = (posterior.mean[0] - vae.config.shift_factor) * vae.config.scaling_factor
    return mean.cpu(), (posterior.std[0] * vae.config.scaling_factor).cpu()


def cache_images(config, pictures, device):
    """Encodes `pictures`, {file: ImageRecord}; each file holds the picture's `mean` and `std`."""
    vae = load_vae(config, device)
    vae.tile_sample_min_size, vae.tile_latent_min_size = (
        TILE,
        TILE // 8,
    )  # its own size would cut no picture of 1024
    decoded = in_parallel(load_pixels, pictures.values())  # ahead of the VAE
    bar = tqdm(
        zip(pictures, decoded),
        desc="latents",
        total=len(pictures),
        unit="picture",
        disable=RANK > 0,
    )
    for path, pixels in bar:
        mean, std = encode_image(vae, pixels)
        write_tensors(path, {"mean": mean, "std": std})


# ---------------------------------------------------------------- prompts


def encode_prompts(text_encoder, tokenizer, batches):
    """Batches of prompts -> the embeddings of each prompt, [min(tokens + 1, 512), hidden], on the host, in that order.

    The last row is that of all padding tokens; pad_prompt_embeds repeats it. As the model was trained: computed like
    this, they are what the authors' environment gives, transformers 4.57.1. Those of later versions differ in the
    padding, which the transformer attends to like all else.
    """
    template = len(template_tokens(tokenizer))
    inputs = [encoder_inputs(tokenizer, prompts) for prompts in batches]
    embeddings = []
    for hidden_states, (_, attention_mask) in zip(text_encoder(inputs), inputs):
        for states, length in zip(hidden_states, attention_mask.sum(dim=1).tolist()):
            embeddings.append(
                states[template : length + 1].clone()
            )  # without that the whole batch stays in memory
    return embeddings


def pad_prompt_embeds(rows):
    """The rows that a file holds -> all embeddings of the prompt, [512, hidden]."""
    padding = rows[-1:].expand(TEXT_TOKENS - len(rows), -1)
    return torch.cat([rows, padding])


def read_prompt_embeds(path):
    """A prompt's embeddings [512, hidden], from its file. Raises UserError if that is missing or damaged."""
    return pad_prompt_embeds(read_tensors(path)["prompt_embeds"])


class PromptBatch(NamedTuple):
    """Prompts that go through the text encoder together."""

    prompts: list
    columns: int  # tokens that the text encoder computes for them, with template and padding
    rows: int  # of embeddings on the disk


def prompt_batches(config, files):
    """Cuts the prompts of `files`, {prompt: file}, into batches in which one is missing or damaged; under torchrun,
    this process's share of them.

    An embedding's last bits depend on its batch. So batches are cut from all prompts of a run, whatever is there
    already, by length and then by file name, before the processes divide them: an interrupted run ends with the same
    bytes.
    """
    if all(is_readable(path) for path in files.values()):
        return []  # no need to count tokens

    tokenizer = load_tokenizer(config)
    template, counts = len(template_tokens(tokenizer)), token_counts(tokenizer, files)
    rows = {prompt: min(count + 1, TEXT_TOKENS) for prompt, count in counts.items()}
    too_long = [prompt for prompt, count in counts.items() if count > TEXT_TOKENS]
    if too_long:
        example = f"{too_long[0][:60]!r} has {counts[too_long[0]]}"
        log(
            f"prompts of more than {TEXT_TOKENS} tokens, the rest is not read: {len(too_long)}; {example}"
        )

    batches, size = [], config.text_encoder_batch_size
    prompts = sorted(files, key=lambda prompt: (rows[prompt], files[prompt].name))
    for i in range(0, len(prompts), size):
        batch = prompts[i : i + size]
        columns = len(batch) * (template + rows[batch[-1]])
        batches.append(PromptBatch(batch, columns, sum(rows[prompt] for prompt in batch)))
    return [
        batch
        for batch in batches[RANK::WORLD_SIZE]
        if not all([is_complete(files[prompt]) for prompt in batch.prompts])
    ]


def cache_prompts(config, prompts, device):
    """Encodes the prompts that are not in `cache_dir` yet. Returns {prompt: file of its embeddings}."""
    files = {prompt: prompt_file(config, prompt, device) for prompt in prompts}
    write_prompts(config, files, prompt_batches(config, files), device)
    return files


def write_prompts(config, files, batches, device):
    """Encodes PromptBatches of `files`, {prompt: file}, as many at once as COLUMNS_AT_ONCE allows."""
    if not batches:
        return
    groups, filled = [], 0
    for batch in batches:
        if not groups or filled + batch.columns > COLUMNS_AT_ONCE:
            groups.append([])
            filled = 0
        groups[-1].append(batch.prompts)
        filled += batch.columns

    text_encoder, tokenizer = load_text_encoder(config, device), load_tokenizer(config)
    total = sum(len(batch.prompts) for batch in batches)
    with tqdm(total=total, desc="prompts", unit="prompt", disable=RANK > 0) as bar:
        for group in groups:
            embeddings = encode_prompts(text_encoder, tokenizer, group)
            for prompt, prompt_embeds in zip(itertools.chain(*group), embeddings):
                if not files[prompt].exists():
                    write_tensors(files[prompt], {"prompt_embeds": prompt_embeds})
                bar.update()


# ---------------------------------------------------------------- what is to do


def check_space(config, pictures, rows, device):
    """Raises UserError if the disk has no space for these pictures and so many rows of embeddings, and as many of each
    other process."""
    row_size = text_config(config).hidden_size * text_dtype(config, device).itemsize
    latents_size = sum(
        2 * 4 * 16 * width * height // 64
        for width, height in (picture.bucket for picture in pictures)
    )
    needed = (latents_size + rows * row_size) * WORLD_SIZE
    folder = Path(config.cache_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    log(f"{needed / 2**20:.0f} MiB to write, {free / 2**20:.0f} MiB free")
    if needed > free:
        what = f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed; free space or choose another"
        raise UserError(f"cache_dir: {config.cache_dir} has {what}")


def report_old_embeddings(config):
    """Tells of embeddings in the format of version 0.1, which nothing reads any more."""
    folder = Path(config.cache_dir) / "prompts"
    if folder.is_dir():
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        what = "prompt embeddings in the format of an earlier version, which are not used any more"
        log_once(f"{folder}: holds {what}; it takes {size / 2**20:.0f} MiB and can be deleted")


def read_images(config):
    """This run's pictures; stage 1 runs first, so that they are up to date. Without a `data_dir` the manifest that is
    there is used. Under torchrun the first process does it for all."""
    manifest = Path(config.output_dir) / "manifest.jsonl"
    if RANK == 0 and (config.data_dir or not manifest.exists()):
        try:
            return prepare_data.main(config)
        finally:
            wait_for_all()  # also if it fails: the others would wait for ever
    wait_for_all()
    try:
        return prepare_data.read_manifest(manifest)
    except OSError as error:
        why = (
            f"cannot be read ({error.strerror}); machines that work together must share output_dir"
        )
        raise UserError(f"{manifest}: {why}") from None
    except ValueError:
        raise UserError(f"{manifest}: is damaged; set data_dir, and it is made again") from None


@explain_out_of_memory({"text_encoder_batch_size": 1})
def main(config):
    """Fills the cache. Returns (pictures, {prompt: file of its embedding})."""
    device, pictures = pick_device(), read_images(config)
    latents = {latents_file(config, picture): picture for picture in pictures}
    captions = [caption for picture in pictures for caption in picture.captions]
    prompts = dict.fromkeys(
        ["", *captions, *config.validation_prompts, config.validation_negative_prompt]
    )
    files = {prompt: prompt_file(config, prompt, device) for prompt in prompts}

    report_old_embeddings(config)

    all_latents = sorted(latents, key=lambda path: path.name)
    pictures_to_do = {
        path: latents[path] for path in all_latents[RANK::WORLD_SIZE] if not is_complete(path)
    }
    batches = prompt_batches(config, files)
    prompts_to_do = sum(len(batch.prompts) for batch in batches)
    if pictures_to_do or prompts_to_do:
        here = " here" if WORLD_SIZE > 1 else ""
        print(
            f"pictures: {len(latents)}, of them {len(pictures_to_do)} to do{here}; "
            f"prompts: {len(prompts)}, of them {prompts_to_do} to do{here}"
        )
        check_space(config, pictures_to_do.values(), sum(batch.rows for batch in batches), device)
    if pictures_to_do:
        cache_images(config, pictures_to_do, device)
    write_prompts(config, files, batches, device)
    wait_for_all()
    gone = [path for path in (*latents, *files.values()) if not path.exists()]
    if gone:
        raise UserError(
            f"{gone[0]}: {len(gone)} files are not there; machines that work together must share cache_dir"
        )
    log(f"{len(pictures)} pictures and {len(prompts)} prompts are cached in {config.cache_dir}")
    return pictures, files


if __name__ == "__main__":
    run_stage(main, __doc__)

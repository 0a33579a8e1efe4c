"""Stage 2: the manifest -> VAE latents and prompt embeddings in `cache_dir`.

    python cache_latents.py configs/24gb.json
    torchrun --nproc_per_node 4 cache_latents.py configs/24gb.json      # the work divided among four devices

After this, training needs neither the VAE nor the text encoder. A file's name follows from what went in (picture and
bucket or prompt, and the model), so nothing is ever stale, and an interrupted run goes on where it was.
"""

import functools
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from longcat_common import (
    RANK, TEXT_TOKENS, WORLD_SIZE, LongCatImagePipeline, UserError, content_key, free_memory, in_parallel,
    is_out_of_memory, is_readable, load_text_encoder, load_tokenizer, load_vae, model_folder, pick_device,
    run_stage, say, stage, sum_over_processes, text_config, text_dtype, write_tensors,
)  # fmt: skip

CACHE_FORMAT = 2  # part of every file's name: another number makes all anew
TILE = 512  # pixels, of a picture that is too large for the device
wait_for_all = functools.partial(sum_over_processes, 0)  # returns when every process has come here
# Through one reading of the text encoder; their hidden states take 0.4 GiB on the device in bf16, 0.7 in float32.
PROMPTS_AT_ONCE = 100


# ---------------------------------------------------------------- which files


@functools.cache
def folder_identity(folder):
    """What tells two models apart without reading 16 GB: small files whole, of large ones the name, the size and 64
    pieces, the first of which holds a safetensors header."""
    digest, piece = hashlib.sha256(), 2**18
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt")):
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
    key = content_key("latents", CACHE_FORMAT, picture.key, picture.bucket, model_identity(config, "vae"))
    return Path(config.cache_dir) / "latents" / key[:2] / f"{key}.safetensors"


def prompt_file(config, prompt, device):
    """Where a prompt's embedding is kept: the name follows from the prompt, the dtype and the text encoder."""
    how = (str(text_dtype(config, device)), "no_change")  # it is never quantized
    key = content_key("prompt", CACHE_FORMAT, prompt, how, model_identity(config, "text_encoder", "tokenizer"))
    return Path(config.cache_dir) / "prompts" / key[:2] / f"{key}.safetensors"


def unfinished(files, batch_size=1):
    """The batches of `files` in which one is missing or damaged; under torchrun, this process's share of them. What a
    batch holds does not depend on what is there already, so that an interrupted run ends with the same bytes."""
    files = sorted(files, key=lambda path: path.name)
    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    return [batch for batch in batches[RANK::WORLD_SIZE] if not all([is_whole(path) for path in batch])]


def is_whole(path):
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
        if picture.file != prepare_data.file_stamp(os.stat(picture.path)):
            raise ValueError("it has changed since prepare_data.py read it; start again")
        image = prepare_data.load_picture(picture.path, picture.bucket)
    except Exception as error:
        raise UserError(f"{picture.path}: cannot be used ({error}); mend or remove it") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def encode_picture(vae, pixels):
    """uint8 [3, H, W] -> the posterior's mean and std [16, H/8, W/8], in float32 and in the transformer's units:
    (mean - shift_factor) * scaling_factor and std * scaling_factor. A picture that the device has no memory for is
    encoded in tiles. Raises UserError if that does not help."""
    for tiling in (False, True):
        vae.use_tiling = tiling
        try:
            posterior = vae.encode(pixels[None].to(vae.device).to(vae.dtype) / 127.5 - 1).latent_dist
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_memory()  # here, where the error no longer holds what was computed
    else:
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise UserError(f"the device has too little memory for a picture of {size}; choose a smaller resolution")
    mean = (posterior.mean[0] - vae.config.shift_factor) * vae.config.scaling_factor
    return mean.cpu(), (posterior.std[0] * vae.config.scaling_factor).cpu()


def cache_pictures(config, pictures, device):
    """Encodes `pictures`, {file: Picture}; each file holds the picture's `mean` and `std`."""
    vae = load_vae(config, device)
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 8  # its own size would cut no picture of 1024
    decoded = in_parallel(load_pixels, pictures.values())  # ahead of the VAE
    bar = tqdm(zip(pictures, decoded), desc="latents", total=len(pictures), unit="picture", disable=RANK > 0)
    for path, pixels in bar:
        mean, std = encode_picture(vae, pixels)
        write_tensors(path, {"mean": mean, "std": std})


# ---------------------------------------------------------------- prompts


def encode_prompts(text_encoder, tokenizer, prompts):
    """Prompts -> embeddings [B, 512, hidden], by the pipeline's own tokenization (text in quotes letter by letter)."""
    parts = dict(vae=None, transformer=None, scheduler=None, text_processor=None)
    pipe = LongCatImagePipeline(text_encoder=text_encoder, tokenizer=tokenizer, **parts)
    with torch.no_grad():
        return pipe.encode_prompt(list(prompts))[0]


def cache_prompts(config, prompts, device):
    """Encodes the prompts that are not in `cache_dir` yet. Returns {prompt: file of its `prompt_embeds`}."""
    files = {prompt: prompt_file(config, prompt, device) for prompt in prompts}
    write_prompts(config, files, unfinished(files.values(), config.text_encoder_batch_size), device)
    return files


def write_prompts(config, files, batches, device):
    """Encodes `batches` of the paths in `files`, {prompt: file}."""
    if not batches:
        return
    prompt_of = {path: prompt for prompt, path in files.items()}
    text_encoder, tokenizer = load_text_encoder(config, device), load_tokenizer(config)
    with tqdm(total=sum(map(len, batches)), desc="prompts", unit="prompt", disable=RANK > 0) as bar:
        at_once = max(1, PROMPTS_AT_ONCE // config.text_encoder_batch_size)
        for i in range(0, len(batches), at_once):
            paths = sum(batches[i : i + at_once], [])
            embeddings = encode_prompts(text_encoder, tokenizer, [prompt_of[path] for path in paths])
            for path, prompt_embeds in zip(paths, embeddings):
                if not path.exists():
                    write_tensors(path, {"prompt_embeds": prompt_embeds})
                bar.update()


# ---------------------------------------------------------------- what is to do


def check_space(config, pictures, prompt_count, device):
    """Raises UserError if the disk has no space for these pictures and so many prompts, and as many of each other
    process."""
    prompt_size = TEXT_TOKENS * text_config(config).hidden_size * text_dtype(config, device).itemsize
    latents_size = sum(2 * 4 * 16 * width * height // 64 for width, height in (picture.bucket for picture in pictures))
    needed = (latents_size + prompt_count * prompt_size) * WORLD_SIZE
    folder = Path(config.cache_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    say(f"{needed / 2**20:.0f} MiB to write, {free / 2**20:.0f} MiB free")
    if needed > free:
        what = f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed; free space or choose another"
        raise UserError(f"cache_dir: {config.cache_dir} has {what}")


def read_pictures(config):
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
        why = f"cannot be read ({error.strerror}); machines that work together must share output_dir"
        raise UserError(f"{manifest}: {why}") from None
    except ValueError:
        raise UserError(f"{manifest}: is damaged; set data_dir, and it is made again") from None


@stage({"text_encoder_batch_size": 1})
def main(config):
    """Fills the cache. Returns (pictures, {prompt: file of its embedding})."""
    device, pictures = pick_device(), read_pictures(config)
    latents = {latents_file(config, picture): picture for picture in pictures}
    captions = [caption for picture in pictures for caption in picture.captions]
    prompts = dict.fromkeys(["", *captions, *config.validation_prompts, config.validation_negative_prompt])
    files = {prompt: prompt_file(config, prompt, device) for prompt in prompts}

    pictures_to_do = {batch[0]: latents[batch[0]] for batch in unfinished(latents)}
    batches = unfinished(files.values(), config.text_encoder_batch_size)
    prompts_to_do = sum(batches, [])
    if pictures_to_do or prompts_to_do:
        here = " here" if WORLD_SIZE > 1 else ""
        print(
            f"pictures: {len(latents)}, of them {len(pictures_to_do)} to do{here}; "
            f"prompts: {len(prompts)}, of them {len(prompts_to_do)} to do{here}"
        )
        check_space(config, pictures_to_do.values(), len(prompts_to_do), device)
    if pictures_to_do:
        cache_pictures(config, pictures_to_do, device)
    write_prompts(config, files, batches, device)
    wait_for_all()
    gone = [path for path in (*latents, *files.values()) if not path.exists()]
    if gone:
        raise UserError(f"{gone[0]}: {len(gone)} files are not there; machines that work together must share cache_dir")
    say(f"{len(pictures)} pictures and {len(prompts)} prompts are cached in {config.cache_dir}")
    return pictures, files


if __name__ == "__main__":
    run_stage(main, __doc__)

"""Stage 2: the manifest -> VAE latents and text embeddings in `cache_dir`.

    python cache_latents.py configs/24gb.json
    torchrun --nproc_per_node 4 cache_latents.py configs/24gb.json      # the work divided among four devices

After this, training needs neither the VAE nor the text encoder. File names follow from what went in (picture,
bucket, prompt, model), so nothing is ever stale, and an interrupted run goes on where it was.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from longcat_common import (
    RANK,
    WORLD_SIZE,
    CACHE_FORMAT,
    AutoencoderKL,
    UserError,
    content_key,
    free_memory,
    in_batches,
    in_parallel,
    leaves_nothing,
    load_vae,
    model_folder,
    model_identity,
    named_if_damaged,
    pick_device,
    prompt_batches,
    prompt_contents,
    prompt_file,
    run_stage,
    unfinished,
    wait_for_all,
    write_prompts,
    write_tensors,
)

TILE = 512  # pixels, of a picture that is too large for the device


def latents_file(config, entry):
    """Where a picture's latents are kept: the name follows from its bytes, its bucket and the VAE."""
    key = content_key("latents", CACHE_FORMAT, entry["key"], list(entry["bucket"]), model_identity(config, "vae"))
    return Path(config.cache_dir) / "latents" / key[:2] / f"{key}.safetensors"


def training_prompts(config, entries):
    """Every distinct prompt that training and its previews need, the empty one included."""
    captions = [caption for entry in entries for caption in entry["captions"]]
    return list(dict.fromkeys(["", *captions, *config.validation_prompts, config.validation_negative_prompt]))


# ---------------------------------------------------------------- pictures


def load_pixels(entry):
    """A picture as uint8 [3, height, width], cut to its bucket. Raises UserError if it is not what the manifest names."""
    try:
        if entry["file"] != prepare_data.file_stamp(os.stat(entry["path"])):
            raise ValueError("it has changed since prepare_data.py read it; start again")
        picture = prepare_data.load_picture(entry["path"], tuple(entry["bucket"]))
    except Exception as error:
        raise UserError(f"{entry['path']}: cannot be used ({error}); mend or remove it") from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def encode_pictures(vae, pixels):
    """Pixels uint8 [B, 3, H, W] -> the posterior's mean and std [B, 16, H/8, W/8], in float32 and in the transformer's units:
    (mean - shift_factor) * scaling_factor and std * scaling_factor. What the device has no memory for is encoded one by
    one, and a picture that is too large even so in tiles. Raises UserError if that does not help."""
    c = vae.config
    try:
        posterior = vae.encode(pixels.to(vae.device).to(vae.dtype) / 127.5 - 1).latent_dist
        return (posterior.mean.float() - c.shift_factor) * c.scaling_factor, posterior.std.float() * c.scaling_factor
    except RuntimeError as error:  # on MPS it has no class of its own
        if "out of memory" not in str(error):
            raise
    free_memory()  # here, where the error no longer holds what was computed
    if len(pixels) > 1:
        return tuple(torch.cat(tensors) for tensors in zip(*(encode_pictures(vae, one) for one in pixels.split(1))))
    if vae.use_tiling:
        raise UserError(
            f"the device has too little memory for a picture of {pixels.shape[3]}x{pixels.shape[2]}; choose a smaller resolution"
        )
    usual = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, TILE, TILE * usual[1] // usual[0]
    try:
        return encode_pictures(vae, pixels)
    finally:
        vae.use_tiling, (vae.tile_sample_min_size, vae.tile_latent_min_size) = False, usual


def latents_contents(config):
    """A function that tells {tensor: (dtype, shape)} of a manifest entry's latents."""
    with named_if_damaged(folder := model_folder(config, "vae")):
        vae_config = AutoencoderKL.load_config(folder)
        channels, factor = vae_config["latent_channels"], 2 ** (len(vae_config["block_out_channels"]) - 1)

    def contents(entry):
        shape = (channels, entry["bucket"][1] // factor, entry["bucket"][0] // factor)
        return {"mean": (torch.float32, shape), "std": (torch.float32, shape)}

    return contents


def picture_batches(config, entries):
    """The pictures that this process has to encode, as batches of one: at 1024 px one takes about 3 GB."""
    entries = {entry["latents_file"]: entry for entry in entries}.values()  # the same picture once
    path_of = lambda entry: entry["latents_file"]
    return unfinished(in_batches(entries, path_of, 1), path_of, latents_contents(config))


def cache_pictures(config, batches, device):
    """Encodes batches of pictures; each picture's file holds its `mean` and `std`. Says where the time went."""
    if not batches:
        return
    vae, spent = load_vae(config, device), {"decoding": 0.0, "VAE": 0.0, "writing": 0.0}
    pictures = in_parallel(load_pixels, (entry for batch in batches for entry in batch))  # decoded ahead of the VAE
    with tqdm(total=sum(map(len, batches)), desc="latents", unit="picture", disable=RANK > 0) as bar:
        for batch in batches:
            clock = [time.perf_counter()]
            pixels = torch.stack([next(pictures) for _ in batch])
            clock.append(time.perf_counter())
            mean, std = (tensor.cpu() for tensor in encode_pictures(vae, pixels))
            clock.append(time.perf_counter())
            for i, entry in enumerate(batch):
                if not entry["latents_file"].exists():
                    write_tensors(entry["latents_file"], {"mean": mean[i], "std": std[i]})
            clock.append(time.perf_counter())
            for name, start, end in zip(spent, clock, clock[1:]):
                spent[name] += end - start
            bar.update(len(batch))
    print(
        "latents: "
        + ", ".join(f"{seconds:.1f} s {'waiting for ' * (name == 'decoding')}{name}" for name, seconds in spent.items())
    )
    del vae
    free_memory()


# ---------------------------------------------------------------- what is to do


def check_space(config, entries, prompts, pictures_to_do, prompts_to_do, device):
    """Prints how much is to be done, how much is there, and the disk space that the rest takes. Raises UserError if
    there is not enough. `..._to_do`: lists of entries, and of prompts, that this process has to encode."""
    latents, prompt = latents_contents(config), prompt_contents(config, device)
    files = [*map(latents, pictures_to_do), *[prompt] * len(prompts_to_do)]
    size = sum(math.prod(shape) * dtype.itemsize for contents in files for dtype, shape in contents.values())
    folder = Path(config.cache_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    here = " here" if WORLD_SIZE > 1 else ""
    work = f"pictures: {len(entries)}, of them {len(pictures_to_do)} to do{here}; prompts: {len(prompts)}, of them {len(prompts_to_do)} to do{here}"
    print(f"{work}; {size / 2**20:.0f} MiB to write, {free / 2**20:.0f} MiB free")
    needed = size * WORLD_SIZE  # their shares are about equal
    if needed > free:
        raise UserError(
            f"cache_dir: {config.cache_dir} has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed; free space or choose another"
        )


def read_manifest(config):
    """The entries of this run's manifest; stage 1 runs first, so that they are up to date. Without a `data_dir` the
    manifest that is there is used. Under torchrun the first process does it for all."""
    path = Path(config.output_dir) / "manifest.jsonl"
    if RANK == 0 and (config.data_dir or not path.exists()):
        try:
            return prepare_data.main(config)
        finally:
            wait_for_all()  # also if it fails: the others would wait for ever
    wait_for_all()
    try:
        with open(path, encoding="utf-8") as lines:
            entries = [json.loads(line) for line in lines]
        if not entries or not all({"path", "key", "bucket", "captions", "file"} <= entry.keys() for entry in entries):
            raise ValueError
        return entries
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); machines that work together must share output_dir"
        ) from None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: is damaged; set data_dir, and it is made again") from None


@leaves_nothing
def main(config):
    """Fills the cache. Returns (manifest entries with `latents_file` added, {prompt: embedding file})."""
    device = pick_device()
    entries = [{**entry, "latents_file": latents_file(config, entry)} for entry in read_manifest(config)]
    prompts = training_prompts(config, entries)
    files = {prompt: prompt_file(config, prompt, device) for prompt in prompts}
    needed = [*files.values(), *(entry["latents_file"] for entry in entries)]
    pictures, batches = picture_batches(config, entries), prompt_batches(config, files, device)
    pictures_to_do = [entry for batch in pictures for entry in batch if not entry["latents_file"].exists()]
    prompts_to_do = [prompt for batch in batches for prompt in batch if not files[prompt].exists()]
    if pictures_to_do or prompts_to_do:
        check_space(config, entries, prompts, pictures_to_do, prompts_to_do, device)
    cache_pictures(config, pictures, device)
    write_prompts(config, files, batches, device)
    wait_for_all()
    gone = [path for path in needed if not path.exists()]
    if gone:
        raise UserError(f"{gone[0]}: {len(gone)} files have vanished while this ran; start again")
    print(f"{len(entries)} pictures and {len(prompts)} prompts are cached in {config.cache_dir}")
    return entries, files


if __name__ == "__main__":
    run_stage(main, __doc__)

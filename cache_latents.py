"""Stage 2: the manifest -> VAE latents and text embeddings in `cache_dir`.

    python cache_latents.py configs/24gb.json

After this, training needs neither the VAE nor the text encoder. File names follow from what went in (picture,
bucket, prompt, model), so nothing is ever stale, and an interrupted run goes on where it was.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from longcat_common import (
    CACHE_FORMAT,
    UserError,
    cache_prompts,
    content_key,
    free_memory,
    in_parallel,
    is_whole,
    load_vae,
    model_identity,
    pick_device,
    run_stage,
    unfinished_batches,
    write_tensors,
)


def latents_file(config, entry):
    """Where a picture's latents are kept: the name follows from its bytes, its bucket and the VAE."""
    key = content_key("latents", CACHE_FORMAT, entry["key"], list(entry["bucket"]), model_identity(config, "vae"))
    return Path(config.cache_dir) / "latents" / key[:2] / f"{key}.safetensors"


def training_prompts(config, entries):
    """Every distinct prompt that training and its previews need, the empty one included."""
    captions = [caption for entry in entries for caption in entry["captions"]]
    return list(dict.fromkeys(["", *captions, *config.validation_prompts, config.validation_negative_prompt]))


def load_pixels(entry):
    """A picture as uint8 [3, height, width], cut to its bucket."""
    try:
        picture = prepare_data.load_picture(entry["path"], tuple(entry["bucket"]))
    except Exception as error:
        raise UserError(f"{entry['path']}: cannot be decoded ({error}); mend or remove it") from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def encode_pictures(vae, pixels):
    """Pixels uint8 [B, 3, H, W] -> the posterior's mean and std [B, 16, H/8, W/8], in float32 and in the transformer's units:
    (mean - shift_factor) * scaling_factor and std * scaling_factor."""
    posterior = vae.encode(pixels.to(vae.device).to(vae.dtype) / 127.5 - 1).latent_dist
    c = vae.config
    return (posterior.mean.float() - c.shift_factor) * c.scaling_factor, posterior.std.float() * c.scaling_factor


def cache_pictures(config, entries, device):
    """Encodes the pictures that are not in `cache_dir` yet; each is kept as `mean` and `std`."""
    entries = {latents_file(config, entry): entry for entry in entries}.values()  # the same picture once
    batches = []
    for bucket in sorted({tuple(entry["bucket"]) for entry in entries}):
        same_size = [entry for entry in entries if tuple(entry["bucket"]) == bucket]
        batches += unfinished_batches(same_size, lambda entry: latents_file(config, entry), config.vae_batch_size)
    if not batches:
        return
    vae = load_vae(config, device)
    pictures = in_parallel(load_pixels, (entry for batch in batches for entry in batch))  # decoded ahead of the VAE
    with tqdm(total=sum(map(len, batches)), desc="latents", unit="picture") as bar:
        for batch in batches:
            mean, std = encode_pictures(vae, torch.stack([next(pictures) for _ in batch]))
            for i, entry in enumerate(batch):
                if not is_whole(latents_file(config, entry)):
                    write_tensors(latents_file(config, entry), {"mean": mean[i], "std": std[i]})
            bar.update(len(batch))
    del vae
    free_memory()


def read_manifest(config):
    """The entries of this run's manifest; stage 1 runs first, so that they are up to date. Without a `data_dir` the
    manifest that is there is used."""
    path = Path(config.output_dir) / "manifest.jsonl"
    if config.data_dir is None and path.exists():
        try:
            with open(path, encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
        except ValueError:
            raise UserError(f"{path}: is damaged; set data_dir, and it is made again") from None
    return prepare_data.main(config)


def main(config):
    """Fills the cache. Returns (manifest entries with `latents_file` added, {prompt: embedding file})."""
    device = pick_device()
    entries = read_manifest(config)
    cache_pictures(config, entries, device)
    prompts = cache_prompts(config, training_prompts(config, entries), device)
    entries = [{**entry, "latents_file": latents_file(config, entry)} for entry in entries]
    print(f"{len(entries)} pictures and {len(prompts)} prompts are cached in {config.cache_dir}")
    return entries, prompts


if __name__ == "__main__":
    run_stage(main, __doc__)

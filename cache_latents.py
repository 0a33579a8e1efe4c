"""Stage 2: the manifest -> VAE latents and prompt embeddings in `cache_dir`.

    python cache_latents.py configs/24gb.json
    torchrun --nproc_per_node 4 cache_latents.py configs/24gb.json      # on four GPUs

After this, training needs neither the VAE nor the text encoder. A file's name follows from all that
went into it (image and bucket or prompt, and the model), so nothing is ever stale, and an
interrupted run continues where it was.
"""

import hashlib
import itertools
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import prepare_data
from longcat_common import (
    RANK, TEXT_TOKENS, WORLD_SIZE, UserError, content_key, encoder_inputs, explain_out_of_memory,
    is_out_of_memory, is_readable, load_text_encoder, load_tokenizer, load_vae, log, log_once,
    model_folder, pick_device, read_tensors, run_stage, sum_over_processes, template_tokens,
    text_config, text_dtype, token_counts, visible_files, write_tensors,
)  # fmt: skip

# Part of the names of all files of a kind: another number means that all are made anew.
LATENTS_FORMAT = 2
TILED_LATENTS_FORMAT = 3
EMBEDDINGS_FORMAT = 1
# Pixels of the largest image that is encoded whole, which takes 4 GiB. A larger one is encoded in
# tiles of this side, whatever memory is free: a file's content follows from its name.
LARGEST_WHOLE = 1.5 * 1024**2
TILE = 1024
# How many columns (tokens with template and padding) go through the text encoder at once: as many
# as 100 prompts of full length have. Their hidden states take 0.4 GiB on the device in bf16, and
# 0.7 in float32.
COLUMNS_AT_ONCE = 100 * 553


# ---------------------------------------------------------------- which files


def folder_identity(folder):
    """A hash that tells two models apart without reading 16 GB: of small files all, of large ones
    the name, the size and 64 pieces, the first of which holds a safetensors header."""
    digest = hashlib.sha256()
    piece = 2**18
    for path in visible_files(folder):
        if path.suffix not in (".safetensors", ".json", ".txt"):
            continue
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


def latents_file(config, record, vae=None):
    """The path of an image's latents; its name follows from the image's bytes, its bucket and the
    VAE. `vae`: model_identity of the VAE, for those who ask for many files."""
    vae = vae or model_identity(config, "vae")
    number = TILED_LATENTS_FORMAT if is_tiled(*record.bucket) else LATENTS_FORMAT
    key = content_key("latents", number, record.content_hash, record.bucket, vae)
    return Path(config.cache_dir) / "latents" / key[:2] / f"{key}.safetensors"


def prompt_files(config, prompts, device):
    """{prompt: path of its embeddings}; a name follows from the prompt, the dtype and the text
    encoder."""
    precision = (str(text_dtype(config, device)), "no_change")  # it is never quantized
    model = model_identity(config, "text_encoder", "tokenizer")
    files = {}
    for prompt in prompts:
        key = content_key("prompt", EMBEDDINGS_FORMAT, prompt, precision, model)
        files[prompt] = Path(config.cache_dir) / "embeddings" / key[:2] / f"{key}.safetensors"
    return files


def prompt_file(config, prompt, device):
    """The path of one prompt's embeddings, see prompt_files."""
    return prompt_files(config, [prompt], device)[prompt]


def is_complete(path):
    """Whether a file of the cache exists and, by its header, is complete. Names and removes a
    corrupt one."""
    if not path.exists():  # asked first: another run may be about to finish the file
        return False
    if is_readable(path):
        return True
    tqdm.write(f"{path}: is corrupt and will be made again")
    path.unlink(missing_ok=True)
    return False


# ---------------------------------------------------------------- images


def is_tiled(width, height):
    """Whether images of this size are encoded in tiles."""
    return width * height > LARGEST_WHOLE


@torch.no_grad()
def encode_image(vae, pixels):
    """uint8 [3, H, W] -> the posterior's mean and std [16, H/8, W/8], float32, on the host, in the
    transformer's units: (mean - shift_factor) * scaling_factor and std * scaling_factor. Raises
    UserError if the device has too little memory."""
    height, width = pixels.shape[1:]
    vae.use_tiling = is_tiled(width, height)
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // 8
    try:
        pixels = pixels[None].to(vae.device).to(vae.dtype) / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the device has too little memory to encode an image of {width}x{height}; close other "
            "programs that use it, or choose a smaller resolution"
        ) from None
    mean = (posterior.mean[0] - vae.config.shift_factor) * vae.config.scaling_factor
    return mean.cpu(), (posterior.std[0] * vae.config.scaling_factor).cpu()


def cache_images(config, images, device):
    """Encodes `images`, {file: ImageRecord}; each file then holds the image's `mean` and `std`."""
    vae = load_vae(config, device)
    # Images are decoded ahead of the VAE.
    decoded = prepare_data.in_parallel(prepare_data.load_pixels, images.values())
    bar = tqdm(total=len(images), desc="latents", unit="image", disable=RANK > 0)
    with bar:
        for path, pixels in zip(images, decoded):
            mean, std = encode_image(vae, pixels)
            if not (mean + std).isfinite().all():
                raise UserError(
                    f"{images[path].path}: its latents are not finite; remove the image, or check "
                    "the VAE's files"
                )
            write_tensors(path, {"mean": mean, "std": std})
            bar.update()


# ---------------------------------------------------------------- prompts


def encode_prompts(text_encoder, tokenizer, batches):
    """Batches of prompts -> the embeddings of each prompt, [min(tokens + 1, 512), hidden], on the
    host, in that order.

    The last row is the embedding of every padding token; pad_prompt_embeds repeats it. These are
    the embeddings that the model was trained with, as transformers 4.57.1 computes them. Later
    versions compute other padding, which matters, for the transformer attends to it.
    """
    template = len(template_tokens(tokenizer))
    inputs = [encoder_inputs(tokenizer, prompts) for prompts in batches]
    embeddings = []
    for hidden_states, (_, attention_mask) in zip(text_encoder(inputs), inputs):
        lengths = attention_mask.sum(dim=1).tolist()
        for states, length in zip(hidden_states, lengths):
            # A copy, so that the rest of the batch need not stay in memory.
            embeddings.append(states[template : length + 1].clone())
    return embeddings


def pad_prompt_embeds(rows):
    """The rows that encode_prompts returns for a prompt -> all its embeddings, [512, hidden]."""
    padding = rows[-1:].expand(TEXT_TOKENS - len(rows), -1)
    return torch.cat([rows, padding])


def read_prompt_embeds(path):
    """A prompt's embeddings [512, hidden], from its file. Raises UserError if the file is missing
    or corrupt, or holds NaN or infinity."""
    rows = read_tensors(path)["prompt_embeds"]
    if not rows.isfinite().all():
        raise UserError(f"{path}: holds values that are not finite; delete it to encode it again")
    return pad_prompt_embeds(rows)


class PromptBatch(NamedTuple):
    """Prompts that go through the text encoder together."""

    prompts: list
    columns: int  # tokens that the text encoder computes, with template and padding
    rows: int  # of embeddings in the files


def prompt_batches(config, files):
    """The PromptBatches of `files`, {prompt: file}, in which a file is missing or corrupt; under
    torchrun, this process's share of them.

    An embedding's last bits depend on the batch it is computed in. So batches are cut from all
    prompts of a run, whatever is cached already, by length and file name, before the processes
    divide them. An interrupted run ends with the same bytes.
    """
    if all(is_readable(path) for path in files.values()):
        return []  # without tokenizing all prompts

    tokenizer = load_tokenizer(config)
    counts = token_counts(tokenizer, files)
    rows = {prompt: min(count + 1, TEXT_TOKENS) for prompt, count in counts.items()}
    report_long_prompts(counts)

    prompts = sorted(files, key=lambda prompt: (rows[prompt], files[prompt].name))
    template = len(template_tokens(tokenizer))
    size = config.text_encoder_batch_size
    batches = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        columns = len(batch) * (template + rows[batch[-1]])
        batches.append(PromptBatch(batch, columns, sum(rows[prompt] for prompt in batch)))

    unfinished = []
    for batch in batches[RANK::WORLD_SIZE]:
        if not all([is_complete(files[prompt]) for prompt in batch.prompts]):
            unfinished.append(batch)
    return unfinished


def report_long_prompts(counts):
    """Logs how many prompts are cut off. `counts`: {prompt: tokens}."""
    too_long = [prompt for prompt, count in counts.items() if count > TEXT_TOKENS]
    if too_long:
        first = too_long[0]
        log(
            f"prompts of more than {TEXT_TOKENS} tokens, the rest is ignored: {len(too_long)}; "
            f"{first[:60]!r} has {counts[first]}"
        )


def cache_prompts(config, prompts, device):
    """Encodes the prompts that are not in `cache_dir` yet. Returns {prompt: file of its
    embeddings}."""
    files = prompt_files(config, prompts, device)
    write_prompts(config, files, prompt_batches(config, files), device)
    return files


def write_prompts(config, files, batches, device):
    """Encodes PromptBatches of `files`, {prompt: file}, as many at once as COLUMNS_AT_ONCE
    allows. Files that exist stay as they are."""
    if not batches:
        return
    groups = []
    columns = 0
    for batch in batches:
        columns += batch.columns
        if not groups or columns > COLUMNS_AT_ONCE:
            groups.append([])
            columns = batch.columns
        groups[-1].append(batch.prompts)

    text_encoder = load_text_encoder(config, device)
    tokenizer = load_tokenizer(config)
    total = sum(len(batch.prompts) for batch in batches)
    with tqdm(total=total, desc="prompts", unit="prompt", disable=RANK > 0) as bar:
        for group in groups:
            embeddings = encode_prompts(text_encoder, tokenizer, group)
            for prompt, prompt_embeds in zip(itertools.chain(*group), embeddings):
                if not prompt_embeds.isfinite().all():
                    raise UserError(
                        f"{prompt[:60]!r}: its embeddings are not finite; check the text encoder's "
                        'files, or set mixed_precision to "no"'
                    )
                if not files[prompt].exists():
                    write_tensors(files[prompt], {"prompt_embeds": prompt_embeds})
                bar.update()


# ---------------------------------------------------------------- the stage


def wait_for_all():
    """Returns when every process has come here."""
    sum_over_processes(0)


def read_images(config):
    """The ImageRecords of this run. Stage 1 runs first, so that they are up to date; without a
    `data_dir` the existing manifest is used. Under torchrun the first process does it for all."""
    manifest = Path(config.output_dir) / "manifest.jsonl"
    if RANK == 0 and (config.data_dir or not manifest.exists()):
        try:
            return prepare_data.main(config)
        finally:
            wait_for_all()  # even if it fails, or the others would wait forever
    wait_for_all()
    try:
        return prepare_data.read_manifest(manifest)
    except OSError as error:
        raise UserError(
            f"{manifest}: cannot be read ({error.strerror}); machines that work together must "
            "share output_dir"
        ) from None
    except UserError:  # written by another version
        raise
    except ValueError:
        raise UserError(f"{manifest}: is corrupt; set data_dir to make it again") from None


def report_old_embeddings(config):
    """Logs that the folder of version 0.1's embeddings, which nothing reads, can be deleted."""
    folder = Path(config.cache_dir) / "prompts"
    if folder.is_dir():
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        log_once(
            f"{folder}: holds prompt embeddings in the format of an earlier version, which are not "
            f"used any more; it takes {size / 2**20:.0f} MiB and can be deleted"
        )


def check_space(config, images, rows, device):
    """Raises UserError if the disk has no space for the latents of these images and so many rows of
    embeddings, and as many of each other process."""
    row_size = text_config(config).hidden_size * text_dtype(config, device).itemsize
    needed = rows * row_size
    for record in images:
        width, height = record.bucket
        needed += 2 * 4 * 16 * (width // 8) * (height // 8)  # mean and std, float32, 16 channels
    needed *= WORLD_SIZE

    folder = Path(config.cache_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    sizes = f"{needed / 2**20:.0f} MiB to write, {free / 2**20:.0f} MiB free"
    log(sizes)
    if needed > free:
        raise UserError(
            f"cache_dir: {config.cache_dir}: {sizes}; free space or choose another folder"
        )


@explain_out_of_memory({"text_encoder_batch_size": 1})
def main(config):
    """Fills the cache. Returns (ImageRecords, {prompt: file of its embeddings})."""
    device = pick_device()
    images = read_images(config)
    vae = model_identity(config, "vae")
    latents = {latents_file(config, record, vae): record for record in images}
    prompts = {"", config.validation_negative_prompt, *config.validation_prompts}
    for record in images:
        prompts.update(record.captions)
    files = prompt_files(config, sorted(prompts), device)
    report_old_embeddings(config)

    # What is missing; under torchrun, this process's share of it.
    missing_latents = {}
    for path in sorted(latents)[RANK::WORLD_SIZE]:
        if not is_complete(path):
            missing_latents[path] = latents[path]
    batches = prompt_batches(config, files)
    if missing_latents or batches:
        count = sum(len(batch.prompts) for batch in batches)
        here = " here" if WORLD_SIZE > 1 else ""
        print(
            f"images: {len(latents)}, of them {len(missing_latents)} to encode{here}; "
            f"prompts: {len(files)}, of them {count} to encode{here}"
        )
        rows = sum(batch.rows for batch in batches)
        check_space(config, missing_latents.values(), rows, device)

    if missing_latents:
        cache_images(config, missing_latents, device)
    write_prompts(config, files, batches, device)
    wait_for_all()
    lost = [path for path in (*latents, *files.values()) if not path.exists()]
    if lost:
        raise UserError(
            f"{lost[0]}: {len(lost)} files, such as this one, do not exist; machines that work "
            "together must share cache_dir"
        )
    log(f"{len(images)} images and {len(files)} prompts are cached in {config.cache_dir}")
    return images, files


if __name__ == "__main__":
    run_stage(main, __doc__)

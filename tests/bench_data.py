"""Speed of data preparation on photographs, compared with the model authors' way:

    python tests/bench_data.py [--pictures 200] [--rounds 5]
    python tests/bench_data.py --small 100000

First: `prepare_data.py` (with report and preview), then what `cache_latents.py` does to decode and
crop images, on one core and on all; for comparison, on one core, each image decoded in full,
resized (bicubic), cropped and made a tensor. Second: prepare_data.py alone on many small files,
with its peak memory and the size of the manifest.
"""

import argparse
import contextlib
import io
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data
from longcat_common import buckets, load_config

MODEL = str(ROOT / "tests/tiny_longcat/model")


def synthetic_photograph(rng, width=4000, height=3000):
    """uint8 [height, width, 3]: noise with a photograph's spectrum (amplitude falls with
    frequency), soft at the pixel, with a sensor's noise."""
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 12):
        shape = (3, max(2, height >> octave), max(2, width >> octave))
        noise = rng.normal(size=shape).astype(np.float32) * 1.6**octave / 8
        for channel in range(3):
            detail = noise[0]
            if octave >= 4:  # the octaves below are fine detail, which is mostly gray
                detail = 0.7 * noise[0] + 0.3 * noise[channel]
            enlarged = Image.fromarray(detail).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(enlarged)
    pixels += rng.normal(size=(height, width, 1)) * 2.5
    return (pixels + 128).clip(0, 255).astype(np.uint8)


def make_photographs(folder, count):
    """Saves `count` JPEGs of 12 megapixels; every tenth is new, the others are shifted copies."""
    rng = np.random.default_rng(0)
    for i in tqdm(range(count), desc="making images", leave=False):
        if i % 10 == 0:
            pixels = synthetic_photograph(rng)
        shifted = np.roll(pixels, (i % 10) * 300, axis=1)
        if i % 4 == 0:
            shifted = np.rot90(shifted)
        Image.fromarray(shifted).save(folder / f"{i:04d}.jpg", quality=92)


def full_decode(path, sizes):
    """As in the model authors' data set class: full decode, bicubic resize to cover the bucket,
    center crop, float tensor [3, height, width]."""
    image = Image.open(path).convert("RGB")
    width, height = prepare_data.buckets_of(image.size, [sizes])[0]
    scale = max(width / image.width, height / image.height)
    size = (math.ceil(image.width * scale - 1e-6), math.ceil(image.height * scale - 1e-6))
    image = image.resize(size, Image.Resampling.BICUBIC)

    left = (size[0] - width) // 2
    top = (size[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return tensor.float().div(255).sub_(0.5).div_(0.5)


def both_stages(config):
    """Both stages' work on the images, up to the bytes that the device gets (it makes them
    float)."""
    for _ in prepare_data.in_parallel(prepare_data.load_pixels, prepare_data.main(config)):
        pass


def timed(work):
    """(wall seconds, CPU seconds) of work()."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - wall, time.process_time() - cpu


def psnr(path, sizes):
    """dB between an image that is decoded at reduced size and the same image decoded in full."""
    with Image.open(path) as image:
        bucket = prepare_data.buckets_of(image.size, [sizes])[0]
        full_image = image.convert("RGB")
    png = io.BytesIO()
    full_image.save(png, "PNG", compress_level=0)  # a PNG is always decoded in full
    full = np.asarray(prepare_data.load_image(png, bucket)).astype(float)
    reduced = np.asarray(prepare_data.load_image(path, bucket)).astype(float)
    return 10 * math.log10(255**2 / np.square(full - reduced).mean())


def print_times(times_by_way, count):
    """A line for each way: milliseconds per image, and its speed against the full decode."""
    baseline = times_by_way["full decode"]
    for name, times in times_by_way.items():
        wall = np.median([wall for wall, _ in times]) / count * 1000
        cpu = np.median([cpu for _, cpu in times]) / count * 1000
        ratios = sorted(full[0] / this[0] for full, this in zip(baseline, times))
        speed = f"{np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times as fast"
        print(f"{name:12s} {wall:6.0f} ms per image, {cpu:4.0f} ms of CPU; {speed}")


def photographs(count, rounds):
    """The first benchmark: `count` photographs, each way timed `rounds` times."""
    cores = os.sched_getaffinity(0)
    all_cores = f"{len(cores)} cores"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        make_photographs(folder / "data", count)
        paths = sorted((folder / "data").glob("*.jpg"))

        def run_config(name):
            """A configuration with an output folder of its own, so that no run finds a manifest."""
            return load_config(
                data_dir=str(folder / "data"),
                instance_prompt="x",
                output_dir=str(folder / name),
                pretrained_model_name_or_path=MODEL,
            )

        sizes = buckets(run_config("0"))
        megabytes = sum(path.stat().st_size for path in paths) / count / 1e6
        print(f"{count} JPEGs of 4000x3000, {megabytes:.1f} MB each, to buckets of about 1024x1024")
        lowest = min(psnr(path, sizes) for path in paths[::20])
        print(f"reduced decoding against full decoding: {lowest:.1f} dB at least")

        times = {"full decode": [], "one core": [], all_cores: []}
        for i in range(rounds):
            os.sched_setaffinity(0, {min(cores)})
            times["full decode"].append(
                timed(lambda: [full_decode(path, sizes) for path in tqdm(paths)])
            )
            times["one core"].append(timed(lambda: both_stages(run_config(f"{i}-one"))))
            os.sched_setaffinity(0, cores)
            times[all_cores].append(timed(lambda: both_stages(run_config(f"{i}-all"))))
        print_times(times, count)


def make_small_images(folder, count):
    """Saves `count` small JPEGs with captions, a thousand per folder."""
    rng = np.random.default_rng(0)
    for i in tqdm(range(count), desc="making images", leave=False):
        subfolder = folder / f"{i // 1000:03d}"
        subfolder.mkdir(parents=True, exist_ok=True)
        size = (96 + i % 64, 96 + i // 64 % 64)
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size)
        image.save(subfolder / f"{i:06d}.jpg")
        caption = f"a small picture, number {i}, " + "with a caption of some length " * 20
        (subfolder / f"{i:06d}.txt").write_text(caption)


def small_files(count):
    """The second benchmark: prepare_data.py on `count` small files, twice."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_small_images(folder / "data", count)
        config = load_config(
            data_dir=str(folder / "data"),
            resolution=128,
            output_dir=str(folder / "output"),
            pretrained_model_name_or_path=MODEL,
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for name in ("first run", "again"):
            wall, _ = timed(lambda: prepare_data.main(config))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            memory = f"peak memory {peak:.0f} MiB, {before:.0f} MiB of it before the start"
            print(f"{count} small files, {name}: {wall:.0f} s; {memory}")
        size = (folder / "output" / "manifest.jsonl").stat().st_size
        print(f"manifest: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.small:
        small_files(arguments.small)
    else:
        photographs(arguments.pictures, arguments.rounds)

"""Speed of data preparation on camera pictures, beside the model authors' way, in one run:

    python tests/bench_data.py [--pictures 200] [--rounds 5]
    python tests/bench_data.py --small 100000

First: `prepare_data.py` (with report and preview) and then the decode-crop path of `cache_latents.py`, on one core and
on all; beside it, on one core, each picture decoded whole, resized (bicubic), cropped and made a tensor.
Second: prepare alone on many small files, with its peak memory and the manifest's size.
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
import cache_latents
import prepare_data
from longcat_common import buckets, in_parallel, load_config


def camera_picture(rng, width=4000, height=3000):
    """Noise with a photograph's spectrum (amplitude falls with frequency), soft at the pixel, with a sensor's noise."""
    picture = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 12):
        small = (
            rng.normal(size=(3, max(2, height >> octave), max(2, width >> octave))).astype(
                np.float32
            )
            * 1.6**octave
            / 8
        )
        for channel in range(3):
            colour = (
                small[0] if octave < 4 else 0.7 * small[0] + 0.3 * small[channel]
            )  # fine detail is mostly grey
            picture[..., channel] += np.asarray(
                Image.fromarray(colour).resize((width, height), Image.Resampling.BICUBIC)
            )
    picture += rng.normal(size=(height, width, 1)) * 2.5
    return (picture + 128).clip(0, 255).astype(np.uint8)


def make_pictures(folder, count):
    """`count` JPEGs of 12 megapixels; every tenth is drawn anew, the others are shifted copies."""
    rng = np.random.default_rng(0)
    for i in tqdm(range(count), desc="making pictures", leave=False):
        if i % 10 == 0:
            picture = camera_picture(rng)
        shifted = np.roll(picture, (i % 10) * 300, axis=1)
        Image.fromarray(shifted if i % 4 else np.rot90(shifted)).save(
            folder / f"{i:04d}.jpg", quality=92
        )


def whole_way(path, sizes):
    """The way of the model authors' data set class: full decode, bicubic resize to cover, centre crop, float tensor."""
    image = Image.open(path).convert("RGB")
    width, height = prepare_data.buckets_of(image.size, [sizes])[0]
    scale = max(width / image.width, height / image.height)
    size = (math.ceil(image.width * scale - 1e-6), math.ceil(image.height * scale - 1e-6))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    tensor = (
        torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
        .permute(2, 0, 1)
        .contiguous()
    )
    return tensor.float().div(255).sub_(0.5).div_(0.5)


def our_way(config):
    """Both stages' work on the pictures, up to the bytes that the device is given (it makes them float)."""
    for _ in in_parallel(cache_latents.load_pixels, prepare_data.main(config)):
        pass


def timed(work):
    """(wall seconds, CPU seconds) of work()."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - wall, time.process_time() - cpu


def likeness(path, sizes):
    """dB between the reduced decode and the same resize of the whole picture."""
    with Image.open(path) as image:
        bucket = prepare_data.buckets_of(image.size, [sizes])[0]
        whole = image.convert("RGB")
    data = io.BytesIO()
    whole.save(data, "PNG", compress_level=0)  # a PNG is always decoded whole
    whole, reduced = (
        np.asarray(prepare_data.load_image(source, bucket)).astype(float) for source in (data, path)
    )
    return 10 * math.log10(255**2 / np.square(whole - reduced).mean())


def camera(count, rounds):
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        make_pictures(folder / "data", count)
        paths = sorted((folder / "data").glob("*.jpg"))
        model = str(ROOT / "tests/tiny_longcat/model")
        config = lambda i: load_config(
            data_dir=str(folder / "data"),
            instance_prompt="x",
            output_dir=str(folder / str(i)),
            pretrained_model_name_or_path=model,
        )
        sizes = buckets(config(0))
        torch.set_num_threads(1)
        print(
            f"{count} JPEGs of 4000x3000, {sum(p.stat().st_size for p in paths) / count / 1e6:.1f} MB each, to "
            f"buckets of about 1024x1024"
        )
        print(
            f"reduced decoding against the whole: {min(likeness(p, sizes) for p in paths[::20]):.1f} dB at least"
        )
        ways = {"whole way": [], "one core": [], f"{len(cores)} cores": []}
        for i in range(rounds):
            os.sched_setaffinity(0, {min(cores)})
            ways["whole way"].append(
                timed(lambda: [whole_way(path, sizes) for path in tqdm(paths)])
            )
            ways["one core"].append(timed(lambda: our_way(config(2 * i))))
            os.sched_setaffinity(0, cores)
            ways[f"{len(cores)} cores"].append(timed(lambda: our_way(config(2 * i + 1))))
        for name, times in ways.items():
            wall, cpu = (np.median([t[n] for t in times]) / count * 1000 for n in (0, 1))
            ratios = sorted(whole[0] / t[0] for whole, t in zip(ways["whole way"], times))
            times_as_fast = (
                f"{np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times as fast"
            )
            print(f"{name:12s} {wall:6.0f} ms a picture, {cpu:4.0f} ms of CPU; {times_as_fast}")


def small(count):
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), np.random.default_rng(0)
        for i in tqdm(range(count), desc="making pictures", leave=False):
            sub = folder / "data" / f"{i // 1000:03d}"
            sub.mkdir(parents=True, exist_ok=True)
            size = (96 + i % 64, 96 + i // 64 % 64)
            Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size).save(
                sub / f"{i:06d}.jpg"
            )
            (sub / f"{i:06d}.txt").write_text(
                f"a small picture, number {i}, " + "with a caption of some length " * 20
            )
        config = load_config(
            data_dir=str(folder / "data"),
            resolution=128,
            output_dir=str(folder / "o"),
            pretrained_model_name_or_path=str(ROOT / "tests/tiny_longcat/model"),
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for name in ("first run", "again"):
            wall, _ = timed(lambda: prepare_data.main(config))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{count} small files, {name}: {wall:.0f} s; peak memory {peak:.0f} MiB, {before:.0f} MiB of it "
                f"before the start"
            )
        print(f"manifest: {(folder / 'o' / 'manifest.jsonl').stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", type=int, default=0)
    arguments = parser.parse_args()
    small(arguments.small) if arguments.small else camera(arguments.pictures, arguments.rounds)

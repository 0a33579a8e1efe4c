"""Stage 1: a folder of pictures and captions -> `<output_dir>/manifest.jsonl`.

    python prepare_data.py configs/24gb.json

The caption of `picture.jpg` is the text of `picture.txt` beside it, or else `instance_prompt`. Every picture
goes to the bucket with the nearest aspect ratio; training sees it resized to cover the bucket, centre cropped.
"""

import collections
import hashlib
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from longcat_common import UserError, buckets, run_stage, sources, write_file

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
EXIF_ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)


def nearest_bucket(width, height, sizes):
    """The bucket (width, height) whose aspect ratio is nearest to the picture's; of equal ones the larger."""
    return min(sizes, key=lambda size: (abs(math.log(width / height * size[1] / size[0])), -size[0] * size[1]))


def picture_size(path):
    """(width, height) as a viewer shows the picture, without decoding it."""
    with Image.open(path) as image:
        turned = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
        return image.size[::-1] if turned else image.size


def load_picture(path, bucket):
    """The picture as the model will see it: turned upright, RGB (transparency on white), resized to cover the
    bucket (width, height), centre cropped. A large JPEG is decoded at reduced size, which is three times faster."""
    with Image.open(path) as image:
        turned = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
        width, height = image.size[::-1] if turned else image.size
        scale = max(bucket[0] / width, bucket[1] / height)
        image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bit: converted as it is, all of it would be white
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.fit(image.convert("RGB"), bucket, Image.Resampling.LANCZOS)


def read_caption(path, instance_prompt):
    """The text of the .txt beside the picture, on one line, or `instance_prompt`, or None."""
    text_file = path.with_suffix(".txt")
    if text_file.is_file():
        try:
            text = " ".join(text_file.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise UserError(f"{text_file}: is not UTF-8 text; save it as UTF-8") from None
        if text:
            return text
    return instance_prompt


def read_source(source, config, sizes, problems):
    """The manifest entries of one source folder. What is left out is added to `problems`, a line each."""
    folder = Path(source["path"])
    if not folder.is_dir():
        raise UserError(f"data_dir: {folder} is no folder")
    entries = []
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    for path in tqdm(paths, desc=f"reading {folder}", unit="picture", leave=False):
        caption = read_caption(path, config.instance_prompt)
        if caption is None:
            problems.append(f"{path}: no caption; write {path.with_suffix('.txt').name} beside it or set instance_prompt")
            continue
        try:
            width, height = picture_size(path)
        except Exception as error:  # Pillow's plugins raise many kinds
            problems.append(f"{path}: cannot be read as a picture ({error})")
            continue
        entries.append({
            "path": str(path),
            "key": hashlib.sha256(path.read_bytes()).hexdigest()[:32],
            "size": [width, height],
            "bucket": nearest_bucket(width, height, sizes),
            "captions": [source["caption_prefix"] + caption],
            "repeats": source["repeats"],
            "loss_weight": source["loss_weight"],
        })  # fmt: skip
    return entries


def main(config):
    """Writes the manifest. Returns its entries: dictionaries with path, key (of the file's content), size,
    bucket [width, height], captions, repeats and loss_weight. Raises UserError if no picture can be used."""
    if not sources(config):
        raise UserError("data_dir: not set; name the folder with your pictures")
    problems, entries = [], []
    for source in sources(config):
        entries += read_source(source, config, buckets(config), problems)
    for problem in problems:
        print(f"left out: {problem}")
    if not entries:
        raise UserError(f"data_dir: no picture with a caption in {', '.join(s['path'] for s in sources(config))}")
    write_file(Path(config.output_dir) / "manifest.jsonl", "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries))

    counts = collections.Counter(tuple(e["bucket"]) for e in entries)
    print(f"{len(entries)} pictures, {len(problems)} left out; buckets: " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(counts.items())))
    small = [e["path"] for e in entries if e["size"][0] < e["bucket"][0] or e["size"][1] < e["bucket"][1]]
    if small:
        print(f"{len(small)} pictures are smaller than their bucket and will be enlarged, such as {small[0]}")
    return entries


if __name__ == "__main__":
    run_stage(main, __doc__)

"""Stage 1: folders of images and captions -> `manifest.jsonl`, `report.md` and `preview.jpg` in
`output_dir`.

    python prepare_data.py configs/24gb.json

The captions of an image `cat.jpg` come from the first of these that exists: `cat.txt`; `cat.json`;
a row of `metadata.jsonl`, `metadata.csv` or `captions.json` in its folder, or else in the nearest
folder above; `instance_prompt`. Each image goes to the bucket with the nearest aspect ratio, of
every resolution that it fills: it is resized to cover the bucket and center-cropped.
"""

import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import textwrap
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont
from pydantic import TypeAdapter
from tqdm import tqdm

from longcat_common import (
    TEXT_TOKENS, UserError, bucket_sets, check_format, content_key, load_tokenizer, read_json,
    run_stage, token_counts, unique_keys, write_file,
)  # fmt: skip

# After longcat_common, which silences what the imports of diffusers print.
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

IMAGE_SUFFIXES = set(
    ".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif .jxl".split()
)
TABLES = ("metadata.jsonl", "metadata.csv", "captions.json")  # each holds captions of many images
CAPTION_KEYS = ("caption", "text", "prompt")
MANIFEST_FORMAT = 2  # the number in its first line
OUTPUT_FILES = ("manifest.jsonl", "report.md", "preview.jpg")
GRID = "longcat grid"  # marks the grids and previews of these scripts, which are not trained on
SMALLEST_SIDE = 64  # pixels; smaller images are icons or tracking pixels
SHORT_CAPTION = 20  # tokens; the model was trained on long descriptions

# How an image with this EXIF orientation is turned upright. From 5 on, its sides change places.
TURNS = {
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}

PLACEHOLDER = re.compile(r"\[(trigger|name|token)\]|[{<]trigger[}>]")
# What chat models leave in captions: control tokens, and refusals in three languages.
CHAT = re.compile(
    r"(?i)<[|｜][^<>]{1,40}[|｜]>|</?(s|think|image|start_of_turn|end_of_turn)>|\[/?INST\]"
    r"|\b(sorry|apologize)[,.]? (but|I|as an)\b|\bI(['’]m| am) (unable|not able) to\b"
    r"|\bI (can['’]?t|cannot|can not|won['’]t) (assist|help|provide|describe|identify|comply"
    r"|fulfill|create|generate|view|see|process|discuss|engage|analyze)\b"
    r"|\bas an AI( language)?( model| assistant|,)"
    r"|(抱歉|对不起)[，,。！ ]*(但是?)?我?(无法|不能)"
    r"|作为一?(个|名|款)?(AI|人工智能|语言模型|大语言)"
    r"|我(无法|不能)(描述|提供|协助|帮助|识别|查看|看到|回答|满足|处理|生成)"
    r"|(desculpe|sinto muito|lamento)[,.]? (mas )?(eu )?não (posso|consigo)"
)
CHINESE = re.compile("[\u2e80-\U0010ffff]")  # characters that only CJK fonts have
# Words that suggest that there is text in an image.
LETTERING = re.compile(r"(?i)\b(signs?|posters?|says|reads|written|titled)\b|文字|写着|标语|字样")

# The preview: at most about this many images, in this many columns of this width in pixels.
SHEET_IMAGES = 64
SHEET_COLUMNS = 8
SHEET_CELL = 200
TILE = SHEET_CELL - 8  # pixels; the longer side of each image
CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
)
# For accents, Cyrillic and Greek.
OTHER_FONTS = ("DejaVuSans.ttf", "Arial.ttf", "Helvetica.ttc", *CHINESE_FONTS)

# What the user should know about the data, {title: lines}: the sections of report.md.
Findings = functools.partial(defaultdict, list)
LEFT_OUT = "Left out"
CAPTIONS = "Captions to check"
UNUSED_WORDS = "Trigger words in no caption"
PLACEHOLDERS = "Placeholders, trained on as literal text"
CHAT_ANSWERS = "Chat tokens or a chat model's refusal, trained on as literal text"
PRINTED = (LEFT_OUT, UNUSED_WORDS, PLACEHOLDERS, CHAT_ANSWERS)  # on the terminal, too


@dataclass
class ImageRecord:
    """An image to train on, in one bucket: a line of the manifest."""

    path: str
    content_hash: str  # hash of the file's bytes
    size: tuple[int, int]  # width and height in pixels, as an image viewer shows it
    bucket: tuple[int, int]  # width and height in pixels
    captions: list[str]
    repeats: int  # times per epoch
    loss_weight: float
    stamp: list[int]  # see file_stamp
    source: str = ""  # the path in data_dir that it comes from


def file_stamp(status):
    """[size, modification time] of an os.stat result: as long as it is the same, the file is taken
    as unchanged."""
    return [status.st_size, status.st_mtime_ns]


def read_manifest(path):
    """The ImageRecords of a manifest. Raises OSError, UserError if it was written by another
    version, or another ValueError if it is corrupt."""
    header, *lines = Path(path).read_bytes().splitlines() or [b""]
    values = json.loads(header)
    if not isinstance(values, dict):
        raise ValueError("the first line is not an object")
    check_format(path, values, MANIFEST_FORMAT, "set data_dir to make it again")
    parse_record = TypeAdapter(ImageRecord).validate_json
    return [parse_record(line) for line in lines]


def reason(error):
    """The text of an exception, for a line that already names the file."""
    if isinstance(error, UnicodeError):
        return "its text or name is not valid UTF-8; save it as UTF-8, or rename it"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is empty or not an image that Pillow can read; save it as JPEG or PNG"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON: {error}"
    return getattr(error, "strerror", None) or str(error)


# ---------------------------------------------------------------- captions


def read_text(path, findings):
    """The text of a file in UTF-8, in UTF-16 with a byte order mark, or in GB18030. Raises OSError
    or ValueError."""
    data = path.read_bytes()
    encoding = "utf-8-sig"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        # Everyday Chinese is valid GB2312; Western text, Cyrillic and Big5 seldom are.
        data.decode("gb2312")
        text = data.decode("gb18030")
        findings["Not UTF-8, read as GB18030"].append(path)
    if "\0" in text:
        raise ValueError("is not a text file; save it as UTF-8")
    return text


def load_json(text):
    """The value in a JSON text. Raises ValueError, also for an object that has a key twice."""
    return json.loads(text, object_pairs_hook=unique_keys)


def captions_in(value):
    """All captions in a JSON value, each on one line: a text, a list, {"caption": ...} or {"en":
    ..., "zh": ...}. Raises ValueError for any other value."""
    if value is None:
        return []
    if isinstance(value, str):
        caption = " ".join(value.split())
        caption.encode("utf-8")  # raises ValueError for half an emoji
        # Spaces and zero-width characters alone are no caption.
        if any(character.isprintable() for character in caption.replace(" ", "")):
            return [caption]
        return []

    # Of an object with caption keys the first value that is not empty, otherwise the captions in
    # all languages.
    if isinstance(value, dict):
        named = [value[key] for key in CAPTION_KEYS if key in value]
        if named:
            return captions_in(next(filter(None, named), None))
        if not all(re.fullmatch(r"[a-z]{2}([-_]\w+)?", key) for key in value):
            keys = ", ".join(CAPTION_KEYS)
            raise ValueError(f"needs one of the keys {keys}, or only language codes (en, zh)")
        value = list(value.values())

    if not isinstance(value, list):
        raise ValueError(f"has {str(value)[:40]!r} where a caption should be")
    captions = []
    for part in value:
        captions += captions_in(part)
    return captions


def caption_rows(path, is_sidecar, findings):
    """Yields (position, row) for each row of a caption file. `position` follows the file's name in
    messages; `row` is {"file_name": ..., "text": ...} or the like. A line of JSON Lines is yielded
    as text: parsed later, a bad one does not end its file. Raises OSError, ValueError, csv.Error or
    RecursionError."""
    text = read_text(path, findings)
    suffix = path.suffix.lower()
    if is_sidecar:  # one row, for the images that have the file's name
        value = text if suffix == ".txt" else load_json(text)
        yield "", {"file_name": path.stem, "text": value}
    elif suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        for row in rows:
            yield f", line {rows.line_num}", row
    elif path.name == "captions.json":
        table = load_json(text)
        if not isinstance(table, dict):
            raise ValueError("must be an object of file names and captions")
        for name, value in table.items():
            yield f", {name}", {"file_name": name, "text": value}
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f", line {number}", line


def parse_row(row):
    """(file name, captions) of a row of a caption file: a dictionary, or a line of JSON. Raises
    ValueError."""
    if isinstance(row, str):
        row = load_json(row)
    name = None
    if isinstance(row, dict):
        name = row.get("file_name") or row.get("img_path")
    if not isinstance(name, str):
        raise ValueError("'file_name' is missing; set it to the name of an image")
    if None in row:  # where csv puts the fields for which there is no column
        raise ValueError("has more fields than columns; put captions with commas in quotes")
    return name, captions_in({key: row[key] for key in CAPTION_KEYS if key in row})


def read_captions(path, find_images, findings, is_sidecar=False):
    """{image path: captions} of a caption file. `find_images(file, name)` gives the paths of the
    images that `name` in this file means. A row that cannot be used becomes a finding, and the rows
    after it are read."""
    captions_by_image = defaultdict(list)
    try:
        for position, row in caption_rows(path, is_sidecar, findings):
            try:
                name, captions = parse_row(row)
                image_paths = find_images(path, os.path.normpath(name.replace("\\", "/")))
                for image_path in image_paths:
                    captions_by_image[image_path] += captions
                if not image_paths:
                    raise ValueError(f"image {name!r} not found")
                if not captions:
                    raise ValueError("contains no caption")
            except (ValueError, OSError, RecursionError) as error:
                findings[CAPTIONS].append(f"{path}{position}: {reason(error)}")
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        findings[CAPTIONS].append(f"{path}: {reason(error)}")
    return {path: list(dict.fromkeys(captions)) for path, captions in captions_by_image.items()}


def walk(folder, skipped, findings):
    """Yields every visible file under `folder`, sorted. Links are followed, but each folder is read
    once. Folders that hold a run's output are not read, nor are those in `skipped` (real paths)."""
    seen = set(skipped)

    def report_error(error):
        findings[LEFT_OUT].append(f"{error.filename}: {reason(error)}")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=report_error):
        real_path = os.path.realpath(root)
        is_output = set(OUTPUT_FILES) <= set(names)
        if is_output:
            findings["Output of a run, not read"].append(root)
        if is_output or real_path in seen:
            folders.clear()  # os.walk then goes no deeper here
            continue
        seen.add(real_path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(root) / name


def list_files(folder, skipped, findings):
    """(image paths, caption files) under `folder`; the other files become findings."""
    image_paths = []
    caption_files = []
    other_files = []
    not_files = []
    for path in walk(folder, skipped, findings):
        suffix = path.suffix.lower()
        if not path.is_file():
            not_files.append(path)
        elif suffix in IMAGE_SUFFIXES:
            image_paths.append(path)
        elif suffix in (".txt", ".json") or path.name in TABLES:
            caption_files.append(path)
        else:
            other_files.append(path)
    for path in sorted(not_files):
        findings[LEFT_OUT].append(f"{path}: is not a regular file, or is a broken link")
    findings["Other files, not read"] += sorted(other_files)
    return image_paths, caption_files


def precedence(file):
    """Sort key of caption files: first the sidecars, then the tables of the deepest folders, in the
    order of their formats."""
    formats = [".txt", ".jsonl", ".csv", ".json"]
    return file.name in TABLES, -len(file.parts), formats.index(file.suffix.lower())


def find_listed_image(file, name):
    """[path] of an image that the list `file` names, relative to the current directory or else to
    the list; [] if neither exists."""
    for path in (Path(name), file.parent / name):
        if path.is_file():
            return [path]
    return []


def image_index(image_paths):
    """The function find_images of read_captions for these images, whose suffix may be missing."""

    def plain(path):
        """The path in one Unicode form: macOS may write accents and Korean in another."""
        return unicodedata.normalize("NFC", str(path))

    # A name with a suffix is looked up as such first, so these entries replace the others.
    paths_by_name = defaultdict(list)
    for image_path in image_paths:
        paths_by_name[plain(image_path.with_suffix(""))].append(image_path)
    for image_path in image_paths:
        paths_by_name[plain(image_path)] = [image_path]

    def find_images(file, name):
        return paths_by_name.get(plain(file.parent / name), [])

    return find_images


def read_source(source, config, findings):
    """Pairs (image path, captions) for all images of one source in `data_dir`, by the order of
    precedence at the top of this file; images without captions have []. A folder inside that is
    itself a source is skipped. Raises UserError if the source does not exist."""
    folder = Path(source.path)
    if folder.is_file():  # a list of images
        return read_captions(folder, find_listed_image, findings).items()
    if not folder.is_dir():
        raise UserError(f"data_dir: {folder} not found; set it to a folder of images")

    # All files of the folder, without those of other sources and of the run itself.
    skipped = {os.path.realpath(other.path) for other in config.data_dir}
    skipped.discard(os.path.realpath(folder))
    skipped |= {os.path.realpath(config.output_dir), os.path.realpath(config.cache_dir)}
    image_paths, caption_files = list_files(folder, skipped, findings)

    # The first file that has captions for an image provides all of them.
    find_images = image_index(image_paths)
    captions_by_image = {image_path: [] for image_path in image_paths}
    caption_files.sort(key=precedence)
    for file in tqdm(caption_files, desc=f"captions of {folder}", unit="file", leave=False):
        is_sidecar = file.name not in TABLES
        captions_of_file = read_captions(file, find_images, findings, is_sidecar)
        for image_path, captions in captions_of_file.items():
            if not captions_by_image[image_path]:
                captions_by_image[image_path] = captions
    return captions_by_image.items()


def save_captions(image_path, captions):
    """Writes an image's captions next to it: a single one to `image.txt`; several, or where
    `image.json` exists, to `image.json`, whose other keys are kept. Returns the file's path. Raises
    UserError if it cannot be written."""
    text_file = Path(image_path).with_suffix(".txt")
    json_file = Path(image_path).with_suffix(".json")
    if len(captions) == 1 and not json_file.exists():
        write_file(os.path.realpath(text_file), captions[0] + "\n")
        return text_file
    content = {}
    if json_file.exists():
        content = read_json(json_file)
    content["caption"] = captions
    text = json.dumps(content, ensure_ascii=False, indent=2)
    write_file(os.path.realpath(json_file), text + "\n")
    text_file.unlink(missing_ok=True)  # it would take precedence
    return json_file


# ---------------------------------------------------------------- images


def in_parallel(function, items):
    """Yields function(item) for every item, in order. Runs in a thread per CPU core: Pillow and
    hashing release Python's lock. Only a few results are computed ahead, to limit memory."""
    threads = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use; Linux only
        threads = len(os.sched_getaffinity(0))
    pending = deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def buckets_of(size, sets):
    """The buckets for an image of this size (width, height): of each of the `sets` (see
    bucket_sets) the one with the nearest aspect ratio, of equally near ones the larger, if the
    image fills it; if it fills none, that of the first set."""
    width, height = size

    def distance(bucket):
        bucket_width, bucket_height = bucket
        ratio = width / height * bucket_height / bucket_width
        return abs(math.log(ratio)), -bucket_width * bucket_height

    nearest = [min(buckets, key=distance) for buckets in sets]
    filled = [bucket for bucket in nearest if bucket[0] <= width and bucket[1] <= height]
    return list(dict.fromkeys(filled or nearest[:1]))


def orientation_of(image):
    """The EXIF orientation that is still to be applied, 1 to 8; 1, upright, if the EXIF data is
    invalid."""
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(0x0112)
        if orientation in TURNS and image.format != "TIFF":  # Pillow itself turns a TIFF upright
            return orientation
    return 1


def inspect_image(path, known):
    """{"stamp", "content_hash", "size"} of an image, as in ImageRecord; from `known`, {(path,
    *stamp): facts}, if the file is unchanged. Raises an exception if the image cannot be used;
    Pillow's plugins raise many types."""
    str(path).encode("utf-8")  # raises ValueError for a path that the manifest cannot hold
    stamp = file_stamp(os.stat(path))
    key = (str(path), *stamp)
    if key in known:
        return known[key]

    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        comment = image.info.get("comment")  # bytes in a JPEG, text in a PNG
        is_preview = isinstance(comment, bytes) and comment.startswith(GRID.encode())
        if is_preview or image.info.get("longcat") == GRID:
            raise ValueError("is a grid or preview that these scripts created")
        if image.mode in ("F", "I"):
            raise ValueError("has 32-bit pixels; save it with 8 or 16 bits per channel")
        size = image.size
        if orientation_of(image) > 4:
            size = size[::-1]
        if min(size) < SMALLEST_SIDE:
            raise ValueError(
                f"is {size[0]}x{size[1]} pixels; both sides need at least {SMALLEST_SIDE}"
            )

        # Decoding tells whether a file is complete; a JPEG's end marker tells it at once.
        has_end_marker = data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
        if image.format not in ("JPEG", "MPO") or not has_end_marker:
            image.draft(None, (1, 1))
            image.load()
    content_hash = hashlib.sha256(data).hexdigest()[:32]
    return {"stamp": stamp, "content_hash": content_hash, "size": size}


@functools.lru_cache(maxsize=64)
def srgb_transform(profile, mode):
    """The transform of pixels of `mode` from a color profile (bytes) to sRGB. None if it cannot be
    used, or changes next to nothing: many profiles are sRGB under another name."""
    pixels = np.random.default_rng(0).bytes(64 * 64 * len(mode))
    colors = Image.frombytes(mode, (64, 64), pixels)
    srgb = ImageCms.createProfile("sRGB")
    with contextlib.suppress(ImageCms.PyCMSError):
        transform = ImageCms.buildTransform(io.BytesIO(profile), srgb, mode, "RGB")
        transformed = ImageCms.applyTransform(colors, transform)
        change = np.subtract(transformed, colors.convert("RGB"), dtype=int)
        if np.abs(change).max() > 3:
            return transform


def reduce_decoding(image, size):
    """Sets the decoder of a JPEG that is much larger than `size` (width, height) to decode it at
    reduced size. Returns the exact (width, height) that any image then has."""
    # At least 1.5 times the size is left, so that the resize, not the decoder, decides the quality.
    scale = 1.5 * max(size[0] / image.width, size[1] / image.height)
    needed_size = (math.ceil(scale * image.width), math.ceil(scale * image.height))
    reduced = image.draft(None, needed_size)
    if reduced:
        return reduced[1][2:]  # image.size has these rounded up
    return image.size


def crop_box(width, height, size):
    """The box (left, top, right, bottom) of the largest centered part of an image of this width and
    height that has the aspect ratio of `size` (width, height)."""
    target_width, target_height = size
    scale = min(width / target_width, height / target_height)
    left = max(0, (width - scale * target_width) / 2)
    top = max(0, (height - scale * target_height) / 2)
    right = min(width, left + scale * target_width)
    bottom = min(height, top + scale * target_height)
    return left, top, right, bottom


def load_image(path, bucket):
    """The image as the model will see it: RGB in sRGB, upright, transparency on white, resized to
    cover the bucket (width, height), center-cropped. Bicubic, as in the model authors' training. A
    JPEG of at least three times the size is decoded at reduced size: three times faster, and within
    45 dB of the full decode for photographs."""
    with Image.open(path) as image:
        orientation = orientation_of(image)
        profile = image.info.get("icc_profile")
        if image.mode.startswith("I;16"):  # Pillow's own conversion would make all of it white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))

        # The mode for resizing: profiles for gray or CMYK pixels need these as they are.
        mode = {"1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
        if image.has_transparency_data:
            mode = "RGBA"
        size = bucket
        if orientation > 4:
            size = bucket[::-1]
        width, height = reduce_decoding(image, size)
        box = crop_box(width, height, size)
        if image.mode != mode:
            image = image.convert(mode)
        image = image.resize(size, Image.Resampling.BICUBIC, box)

    # White behind transparency, then sRGB, then upright.
    if mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    if profile:
        transform = srgb_transform(profile, image.mode)
        if transform:
            image = ImageCms.applyTransform(image, transform)
    if orientation > 1:
        image = image.transpose(TURNS[orientation])
    return image.convert("RGB")


def load_pixels(record):
    """An image as uint8 [3, height, width], cropped to its bucket. Raises UserError if it is not
    the one in the manifest."""
    try:
        if record.stamp != file_stamp(os.stat(record.path)):
            raise ValueError("it has changed since prepare_data.py read it; start again")
        image = load_image(record.path, record.bucket)
    except Exception as error:
        raise UserError(f"{record.path}: cannot be used ({error}); fix or remove it") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------- report


def check_images(records, findings):
    """Adds findings about sizes and duplicates."""
    paths_by_hash = defaultdict(set)
    for record in records:
        paths_by_hash[record.content_hash].add(record.path)
        width, height = record.size
        bucket_width, bucket_height = record.bucket
        scale = max(bucket_width / width, bucket_height / height)
        kept = bucket_width * bucket_height / (width * height * scale**2)
        line = f"{record.path}: {width}x{height}"
        if scale > 1:
            findings["Smaller than their bucket"].append(f"{line}, enlarged {scale:.2f} times")
        if kept < 0.5:
            findings["More than half is cropped"].append(f"{line}, {kept:.0%} is kept")
    for paths in paths_by_hash.values():
        if len(paths) > 1:
            findings["Exact duplicates"].append(" = ".join(sorted(paths)))


def has_unquoted_lettering(caption):
    """Whether a caption seems to describe text in the image, and quotes none."""
    if not LETTERING.search(caption):
        return False
    return not any(is_quoted for _, is_quoted in split_quotation(caption))


def check_captions(captions, config, findings):
    """Adds findings about `captions`, [(image path, caption)]. Returns a sentence about their
    lengths."""

    def lines_where(test):
        return [f"{path}: {caption[:60]}" for path, caption in captions if test(caption)]

    for word in config.trigger_words:
        count = sum(word in caption for _, caption in captions)
        findings["Trigger words"].append(f"{word!r}: in {count} of {len(captions)} captions")
        if not count:
            advice = "add it to the captions, or as caption_prefix"
            findings[UNUSED_WORDS].append(f"{word!r}; {advice}")
    findings[PLACEHOLDERS] = lines_where(PLACEHOLDER.search)
    findings[CHAT_ANSWERS] = lines_where(CHAT.search)
    title = "Text in the image? Only quoted text is encoded character by character"
    findings[title] = lines_where(has_unquoted_lettering)

    try:
        tokenizer = load_tokenizer(config)
    except UserError as error:
        return f"{len(captions)} captions; tokens were not counted ({error})."
    tokens = token_counts(tokenizer, {caption for _, caption in captions})
    findings[f"Over {TEXT_TOKENS} tokens, the rest is cut off"] = lines_where(
        lambda caption: tokens[caption] > TEXT_TOKENS
    )
    longest = max(tokens.values(), default=0)
    short = sum(tokens[caption] < SHORT_CAPTION for _, caption in captions)
    return (
        f"{len(captions)} captions of at most {longest} tokens, {short} under {SHORT_CAPTION}; "
        "long descriptions work best."
    )


def describe(records, config, findings):
    """(summary, report in Markdown) of the images and captions. The report lists all findings:
    those in `findings`, from reading the data, and those added here."""
    check_images(records, findings)
    # An image in several buckets has several records; each of its captions counts once.
    captions = {}
    for record in records:
        for caption in record.captions:
            captions[record.path, caption] = True
    sentence = check_captions(list(captions), config, findings)
    image_count = len({record.path for record in records})
    sample_count = sum(record.repeats for record in records)
    summary = (
        f"{image_count} images, {len(findings[LEFT_OUT])} left out; "
        f"{sample_count} samples per epoch; {sentence}"
    )
    return summary, report_text(summary, records, findings)


def report_text(summary, records, findings):
    """report.md: the summary, the number of images per bucket, and the findings, problems first."""
    lines = ["# Data report", "", summary, "", "| bucket | images |", "| --- | ---: |"]
    counts = Counter(record.bucket for record in records)
    for (width, height), count in sorted(counts.items()):
        lines.append(f"| {width}x{height} | {count} |")

    for title in dict.fromkeys([LEFT_OUT, CAPTIONS, *findings]):
        section = dict.fromkeys(findings[title])  # an image in several buckets is listed once
        if section:
            lines += ["", f"## {title}: {len(section)}", ""]
            lines += [f"- {line}" for line in section]

    # File names may contain line breaks, control characters and invalid Unicode.
    lines = [re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", line) for line in lines]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace").decode()


# ---------------------------------------------------------------- preview


@functools.cache
def system_font(names, size):
    """The first of these fonts that is installed, or None."""
    for name in names:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)


def label(text, size, instead="(no font for Chinese text)"):
    """(text on one line, font of this size) to write next to an image. Pillow's own font
    has only ASCII; other texts need a font of the system. Without one, accents are dropped and
    Chinese text is replaced by `instead`."""
    text = " ".join(text.split())
    is_chinese = CHINESE.search(text)
    font = None
    if not text.isascii():
        font = system_font(CHINESE_FONTS if is_chinese else OTHER_FONTS, size)
    if font:
        return text, font
    if is_chinese:
        text = instead
    else:
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return text, ImageFont.load_default(size)


def load_tile(record):
    """The image as the model will see it, its longer side TILE pixels; red if it cannot be
    loaded."""
    size = tuple(math.ceil(side * TILE / max(record.bucket)) for side in record.bucket)
    try:
        return load_image(record.path, size)
    except Exception:  # caching the latents will report it
        return Image.new("RGB", size, "#cc0000")


def contact_sheet(records):
    """The preview: images cropped as in training, sorted by bucket, with the first words of their
    captions. Of a large data set it shows an even selection from every bucket."""
    records_by_bucket = defaultdict(list)
    for record in records:
        records_by_bucket[record.bucket].append(record)
    stride = math.ceil(len(records) / SHEET_IMAGES)
    shown = []
    for bucket in sorted(records_by_bucket):
        shown += records_by_bucket[bucket][::stride]

    row_height = SHEET_CELL + 60  # the caption below the image has 60 pixels
    row_count = math.ceil(len(shown) / SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_CELL, row_count * row_height), "white")
    tiles = in_parallel(load_tile, shown)
    for number, (record, tile) in enumerate(zip(shown, tiles)):
        width, height = record.bucket
        text, font = label(f"{width}x{height}: {record.captions[0]}", 13)
        line_length = 13 if CHINESE.search(text) else 26
        lines = textwrap.wrap(text, line_length, max_lines=3, placeholder="…")
        cell = Image.new("RGB", (TILE, row_height), "white")
        cell.paste(tile)
        ImageDraw.Draw(cell).text((0, tile.height), "\n".join(lines), "#444444", font=font)
        row, column = divmod(number, SHEET_COLUMNS)
        sheet.paste(cell, (column * SHEET_CELL + 4, row * row_height + 4))
    return sheet


# ---------------------------------------------------------------- the stage


def check_folders(config):
    """Raises UserError if `data_dir` is not set, or the output would go to the folder of a
    source."""
    if not config.data_dir:
        raise UserError("data_dir: not set; set it to the folder with your images")
    data_folders = [os.path.realpath(source.path) for source in config.data_dir]
    for key in ("output_dir", "cache_dir"):
        folder = getattr(config, key)
        if os.path.realpath(folder) in data_folders:
            raise UserError(f"{key}: {folder} is the data folder itself; choose another folder")


def with_prefix(prefix, caption):
    """The caption after the source's prefix; a space goes between two Latin letters or digits
    only."""
    if re.match("[a-zA-Z0-9]{2}", prefix[-1:] + caption[:1]):
        return f"{prefix} {caption}"
    return prefix + caption


def inspect_images(image_paths, previous_records):
    """Yields inspect_image's result for every image, or as text the reason to leave it out. Files
    that have not changed since `previous_records` are not read again."""
    known = {}
    for record in previous_records:
        facts = dict(stamp=record.stamp, content_hash=record.content_hash, size=record.size)
        known[record.path, *record.stamp] = facts

    def inspect(image_path):
        try:
            return inspect_image(image_path, known)
        except Exception as error:  # Pillow's plugins raise many types
            return reason(error)

    inspected = in_parallel(inspect, image_paths)
    yield from tqdm(inspected, "images", len(image_paths), leave=False, unit="image")


def make_records(items, config, previous_records, findings):
    """The ImageRecords of `items`, [(source, image path, captions)]: one for each bucket of an
    image. Images that cannot be used become findings."""
    records = []
    sets = bucket_sets(config)
    inspected = inspect_images([image_path for _, image_path, _ in items], previous_records)
    for (source, image_path, captions), facts in zip(items, inspected):
        if isinstance(facts, str):
            findings[LEFT_OUT].append(f"{image_path}: {facts}")
            continue
        if not captions and not config.instance_prompt:
            advice = f"write one to {image_path.stem}.txt, in UTF-8, or set instance_prompt"
            findings[LEFT_OUT].append(f"{image_path}: has no caption; {advice}")
            continue
        if not captions:
            findings["Without a caption, instance_prompt is used"].append(image_path)
            captions = [config.instance_prompt]

        captions = [with_prefix(source.caption_prefix, caption) for caption in captions]
        for bucket in buckets_of(facts["size"], sets):
            record = ImageRecord(
                path=str(image_path),
                bucket=bucket,
                captions=captions,
                repeats=source.repeats,
                loss_weight=source.loss_weight,
                source=source.path,
                **facts,
            )
            records.append(record)
    return records


def write_manifest(path, records):
    """Writes the manifest: its format, then a line of JSON for each record."""
    rows = [{"format": MANIFEST_FORMAT}] + [asdict(record) for record in records]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_file(path, "".join(lines))


def update_preview(path, records):
    """Writes the contact sheet as a JPEG, unless it is there. Its comment marks it, so that it is
    not trained on, and holds a key of what it shows."""
    comment = f"{GRID} {content_key(*map(asdict, records))}"
    with contextlib.suppress(Exception), Image.open(path) as image:  # none yet, or corrupt
        if image.info["comment"] == comment.encode():
            return
    data = io.BytesIO()
    contact_sheet(records).save(data, "JPEG", quality=88, comment=comment)
    write_file(path, data.getvalue())


def files_and_captions(records):
    """({content hash: number of files}, {content hash: set of captions}) of some ImageRecords."""
    hashes = {record.path: record.content_hash for record in records}
    captions = defaultdict(set)
    for record in records:
        captions[record.content_hash].update(record.captions)
    return Counter(hashes.values()), captions


def print_changes(records, previous_records):
    """Prints how many images were added and removed since the last start, and how many have other
    captions. A file that was renamed is the same image; one with other content is another."""
    files, captions = files_and_captions(records)
    previous_files, previous_captions = files_and_captions(previous_records)
    shared = files.keys() & previous_files.keys()
    counts = {
        "added": (files - previous_files).total(),
        "removed": (previous_files - files).total(),
        "with other captions": sum(captions[key] != previous_captions[key] for key in shared),
    }
    changes = [f"{count} {what}" for what, count in counts.items() if count]
    if changes:
        print(f"images since the last start: {', '.join(changes)}")


def main(config):
    """Writes manifest, report and preview. Returns a list of ImageRecord. Raises UserError if there
    is nothing to train on."""
    check_folders(config)
    warnings.filterwarnings("ignore", module="PIL")  # the report has what matters of it
    manifest, report, preview = (Path(config.output_dir) / name for name in OUTPUT_FILES)
    findings = Findings()

    # Captions and images of all sources.
    items = []
    for source in config.data_dir:
        for image_path, captions in read_source(source, config, findings):
            items.append((source, image_path, captions))
    previous_records = []
    with contextlib.suppress(OSError, ValueError):  # no manifest yet, or none that can be used
        previous_records = read_manifest(manifest)
    records = make_records(items, config, previous_records, findings)

    summary, text = describe(records, config, findings)
    if records and records != previous_records:
        write_manifest(manifest, records)
    write_file(report, text)
    if not records:
        raise UserError(
            f"data_dir: no image to train on; {report} lists what was left out, and why"
        )
    update_preview(preview, records)

    if previous_records:
        print_changes(records, previous_records)
    for title in PRINTED:
        for line in findings[title][:9]:
            print(f"{title}: {line}")
    print(f"{summary} See {report}; {preview} shows what the model will see.")
    return records


if __name__ == "__main__":
    run_stage(main, __doc__)

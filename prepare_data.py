"""Stage 1: folders of pictures and captions -> `<output_dir>/manifest.jsonl`, `report.md` and `preview.jpg`.

    python prepare_data.py configs/24gb.json

Captions, the first that is there counts: `picture.txt`; `picture.json`; a row of `metadata.jsonl`, `metadata.csv` or
`captions.json` in the picture's folder or one above it (the nearest counts); `instance_prompt`. Every picture goes to
the bucket with the nearest aspect ratio, of each resolution that it reaches; training sees it resized to cover the
bucket, centre cropped. What is left out, and why, is said. A picture that has not changed is not read again.
"""

import collections
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import stat
import unicodedata
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from longcat_common import (
    TEXT_TOKENS, UserError, bucket_sets, in_parallel, load_tokenizer, run_stage, unique_keys, write_file,
)  # fmt: skip

from diffusers.pipelines.longcat_image.pipeline_longcat_image import (
    split_quotation,
)  # longcat_common quiets its imports

PICTURES = set(".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif .jxl".split())
TABLES = ("metadata.jsonl", "metadata.csv", "captions.json")
CAPTION_NAMES, PATH_NAMES = ("caption", "text", "prompt"), ("file_name", "img_path")
GRID = "longcat grid"  # marks what these scripts draw of several pictures, which is not to be trained on
SMALLEST_SIDE = 64  # pixels; a smaller picture is an icon or a tracking pixel
SHORT_CAPTION = 20  # tokens; the model was trained on long descriptions
SHEET_PICTURES, SHEET_WIDTH, SHEET_ROW = 64, 1600, 160
CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "PingFang.ttc", "STHeiti Light.ttc", "msyh.ttc",
)  # fmt: skip
OTHER_FONTS = ("DejaVuSans.ttf", "Arial.ttf", "Helvetica.ttc", *CHINESE_FONTS)  # for accents, Cyrillic, Greek
LEFT_OUT, CAPTIONS = "Left out", "Captions to look at"


@dataclass
class Picture:
    """A picture to train on, in one bucket: a line of the manifest."""

    path: str
    key: str  # hash of the file's bytes
    size: tuple[int, int]  # width and height in pixels, as a viewer shows it
    bucket: tuple[int, int]  # width and height
    captions: list[str]
    repeats: int  # times an epoch
    loss_weight: float
    file: list[int]  # the file's bytes and time, which tell that it has not changed
    notes: list[str]  # for the report
    source: str = ""  # the path in data_dir that it comes from


def read_manifest(path):
    """The pictures in a manifest. Raises OSError, or ValueError for one that is damaged or of another kind."""
    with open(path, encoding="utf-8") as lines:
        try:
            rows = [json.loads(line) for line in lines]
            return [Picture(**row | {"size": tuple(row["size"]), "bucket": tuple(row["bucket"])}) for row in rows]
        except (TypeError, LookupError) as error:
            raise ValueError(f"{path}: {error}") from None


class Findings(dict):
    """{title: lines} of what the user should know."""

    def note(self, title, line):
        line = re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", str(line))  # file names may hold anything
        self.setdefault(title, []).append(line.encode("utf-8", "replace").decode())


# ---------------------------------------------------------------- captions


def read_text(path):
    """The text of a file in UTF-8, UTF-16 with its mark, or GB18030, and the encoding's name. Raises ValueError."""
    if not path.is_file():
        raise ValueError("is no file")
    data, encoding = path.read_bytes(), "UTF-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    try:
        text = data.decode("utf-16" if encoding == "UTF-16" else "utf-8-sig")
    except UnicodeDecodeError:
        encoding, text = "GB18030", data.decode("gb18030", "replace")
        # Western and Cyrillic text and Big5 can pass for GB18030, but then few of the characters are everyday Chinese.
        foreign = (letter for letter in text if ord(letter) > 127)
        letters = "".join(letter for letter in foreign if unicodedata.category(letter)[0] not in "PS")
        if "\ufffd" in text or len(letters.encode("gb2312", "ignore")) < 2 * 0.9 * len(letters):
            raise ValueError("is not UTF-8, and not surely GB18030; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("is no text; save it as UTF-8")
    return text, encoding


def captions_in(value):
    """All captions in a JSON value, each on one line: a text, a list, {"caption": ...} or {"en": ..., "zh": ...}."""
    if isinstance(value, str):
        value = " ".join(value.split())
        value.encode("utf-8")  # half an emoji is a ValueError
        return [value] if any(letter.isprintable() and letter != " " for letter in value) else []  # zero width is empty
    if isinstance(value, dict):
        named = [value[name] for name in CAPTION_NAMES if name in value]
        if not named and not all(re.fullmatch(r"[a-z]{2}([-_]\w+)?", name) for name in value):
            raise ValueError(f"is no object with one of {', '.join(CAPTION_NAMES)}, or with languages")
        value = next(([given] for given in named if given), []) if named else list(value.values())
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"holds {str(value)[:40]!r} where a caption should be")
    return list(dict.fromkeys(caption for part in value or [] for caption in captions_in(part)))


def table_rows(path, text):
    """(where, row) of a {name: captions} .json, of a .csv or of JSON lines; those are not parsed yet."""
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        for names in (PATH_NAMES, CAPTION_NAMES):
            if not set(names) & set(reader.fieldnames or []):
                there = ", ".join(map(repr, reader.fieldnames or ["none"]))
                raise ValueError(f"has no column {' or '.join(names)}; its columns: {there}")
        return [(f"line {reader.line_num}", row) for row in reader]
    if path.name != "captions.json":
        return [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    table = json.loads(text, object_pairs_hook=unique_keys)
    if not isinstance(table, dict):
        raise ValueError("is no object of file names and captions")
    return [(f"entry {n}", {"file_name": k, "text": v}) for n, (k, v) in enumerate(table.items(), 1)]


def read_captions(path, findings, find=None):
    """{picture: captions} of a caption file. `find(name)` gives the picture of a table's row, and raises ValueError if
    there is none; without it the file is a picture's own, and the picture is None. A bad row is said, and the next one
    read."""
    found = {}
    try:
        text, encoding = read_text(path)
        if find:
            rows = table_rows(path, text)
        else:
            own = json.loads(text, object_pairs_hook=unique_keys) if path.suffix.lower() == ".json" else text
            rows = [("", {"text": own})]
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        findings.note(CAPTIONS, f"{path}: {reason(error)}")
        return {}
    if encoding != "UTF-8":
        findings.note("Not UTF-8", f"{path}: read as {encoding}")
    if not find and path.suffix.lower() == ".txt" and len(text.strip().splitlines()) > 1:
        findings.note("Several lines in a .txt, joined to one caption", path)
    for where, row in rows:
        where = f", {where}" if where else ""
        try:
            row = json.loads(row) if isinstance(row, str) else row
            name = next((row[n] for n in PATH_NAMES if row.get(n)), None) if isinstance(row, dict) else None
            if find and not isinstance(name, str):
                raise ValueError(f"names no picture: {PATH_NAMES[0]!r} is missing")
            if None in row:
                raise ValueError("has more fields than there are columns; put a caption with commas in quotes")
            picture = find(os.path.normpath(name.replace("\\", "/"))) if find else None
            captions = captions_in({n: row[n] for n in CAPTION_NAMES if n in row} or None)
            found[picture] = list(dict.fromkeys(found.get(picture, []) + captions))
            if not captions:
                raise ValueError(f"no caption for {name!r}" if find else "is empty")
        except (ValueError, RecursionError) as error:
            findings.note(CAPTIONS, f"{path}{where}: {reason(error)}")
    return {picture: captions for picture, captions in found.items() if captions or find}


def save_captions(picture, captions):
    """Writes a picture's captions beside it: one as `picture.txt`; several, or where there is one already, into
    `picture.json`, whose other keys stay. Returns the file. Raises UserError if it cannot be written."""
    text, several = Path(picture).with_suffix(".txt"), Path(picture).with_suffix(".json")
    if len(captions) == 1 and not several.exists():
        write_file(os.path.realpath(text), captions[0] + "\n")
        return text
    try:
        old = json.loads(read_text(several)[0], object_pairs_hook=unique_keys) if several.exists() else {}
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{several}: {reason(error)}") from None
    kept = old if isinstance(old, dict) and set(old) & set(CAPTION_NAMES) else {}
    new = {"caption": captions} | {name: value for name, value in kept.items() if name not in CAPTION_NAMES}
    write_file(os.path.realpath(several), json.dumps(new, ensure_ascii=False, indent=2) + "\n")
    text.unlink(missing_ok=True)  # it would count before
    return several


def plain_name(path):
    """A path as text in one Unicode form: a name with accents or Korean may come composed or not."""
    return unicodedata.normalize("NFC", str(path))


def reason(error):
    """What an exception says, for a line that already names the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return "holds half a character"
    return str(error) or type(error).__name__


# ---------------------------------------------------------------- pictures


def inspect_picture(path):
    """Reads a picture file once: {"key", "size", "notes"}, as in Picture.

    Raises an exception if the file is cut off or is no picture. Checksums tell for a PNG and the end marker for a JPEG;
    anything else is decoded to be sure.
    """
    data = path.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(data)) as image:
        if GRID in (image.info.get("longcat"), image.info.get("comment", b"").decode("ascii", "ignore")):
            raise ValueError("is a grid or a preview that these scripts have drawn")
        plain_png = image.format == "PNG" and not re.search(b"eXIf|Raw profile type exif|XML:com.adobe.xmp", data)
        turned = not plain_png and orientation_of(image) > 4  # this decodes a PNG, so only if need be
        size, notes = image.size[::-1] if turned else image.size, []
        if image.mode in ("F", "I"):
            raise ValueError("32-bit pixels are not supported; save it with 8 or 16 bits a channel")
        if has_alpha(image):
            notes.append("With an alpha channel, laid on white")
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append("Animated or of many pages, the first is used")
        if image.info.get("icc_profile"):
            try:
                if srgb_transform(image.info["icc_profile"], flat_mode(image)):
                    notes.append("With a colour profile, turned to sRGB")
            except (ImageCms.PyCMSError, OSError):
                notes.append("With a colour profile that cannot be used, taken as sRGB")
        if plain_png:
            image.verify()
        elif not (image.format in ("JPEG", "MPO") and data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")):
            image.draft(None, (1, 1))
            image.load()
    return {"key": hashlib.sha256(data).hexdigest()[:32], "size": size, "notes": notes}


def orientation_of(image):
    """The EXIF orientation that is still to be applied, 1 to 8: Pillow turns a TIFF itself. 1 if the EXIF is
    damaged."""
    with contextlib.suppress(Exception):
        return 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
    return 1


@functools.lru_cache(maxsize=64)
def srgb_transform(profile, mode):
    """The transform of pixels of `mode` from an embedded colour profile to sRGB; None if it changes next to nothing, as
    with the many profiles that are sRGB under some name."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    colours = Image.frombytes(mode, (64, 64), random.Random(0).randbytes(64 * 64 * len(mode)))
    change = np.subtract(ImageCms.applyTransform(colours, transform), colours.convert("RGB"), dtype=int)
    return transform if np.abs(change).max() > 3 else None


def has_alpha(image):
    """Whether some of it may be transparent; a grey of 16 bits cannot."""
    return image.has_transparency_data and not image.mode.startswith("I;16")


def flat_mode(image):
    """The mode of the picture's colours, which its colour profile is for."""
    if image.mode.startswith("I;16") or image.mode == "1":
        return "L"
    return image.mode if image.mode in ("L", "CMYK") and not has_alpha(image) else "RGB"


def load_picture(path, bucket):
    """The picture as the model will see it: RGB in sRGB, upright, transparency on white, resized to cover the bucket
    (width, height), centre cropped. Bicubic, as in the model authors' training. A JPEG of at least three times the size
    is decoded at reduced size: three times faster, and within 45 dB of the full path for camera pictures."""
    with Image.open(path) as image:
        orientation, profile, mode = orientation_of(image), image.info.get("icc_profile"), flat_mode(image)
        size = bucket[::-1] if orientation > 4 else bucket
        scale = max(size[0] / image.width, size[1] / image.height)
        # Reduction leaves 1.5 times what is needed, so that the resize, not the decoder, decides what is seen. The
        # decoder rounds the reduced size up: its box tells where the picture itself lies in it.
        reduced = image.draft(None, (math.ceil(1.5 * scale * image.width), math.ceil(1.5 * scale * image.height)))
        width, height = reduced[1][2:] if reduced else image.size
        crop = min(width / size[0], height / size[1])
        left, top = max(0, (width - crop * size[0]) / 2), max(0, (height - crop * size[1]) / 2)
        box = (left, top, min(width, left + crop * size[0]), min(height, top + crop * size[1]))
        if image.mode.startswith("I;16"):  # converted as it is, all of it would be white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        wanted = "RGBA" if has_alpha(image) else mode
        picture = (image if image.mode == wanted else image.convert(wanted)).resize(size, Image.Resampling.BICUBIC, box)
    if wanted == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", size, "white"), picture).convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # then it is taken as sRGB; the report says so
            transform = srgb_transform(profile, mode)
            picture = ImageCms.applyTransform(picture, transform) if transform else picture
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.info = {"exif": exif.tobytes()}
    return ImageOps.exif_transpose(picture)


# ---------------------------------------------------------------- scanning


def buckets_of(size, sets):
    """The buckets of a picture of this size (width, height): of each of the `sets` (see bucket_sets) the one with the
    nearest aspect ratio, of equal ones the larger, if the picture fills it without being enlarged; if none is, that of
    the first."""
    ratio = lambda bucket: abs(math.log(size[0] / size[1] * bucket[1] / bucket[0]))
    nearest = [min(buckets, key=lambda bucket: (ratio(bucket), -bucket[0] * bucket[1])) for buckets in sets]
    filled = [bucket for bucket in nearest if bucket[0] <= size[0] and bucket[1] <= size[1]]
    return list(dict.fromkeys(filled or nearest[:1]))


def walk(folder, skipped, findings):
    """Yields every visible file under `folder`, sorted, through links too, but each folder once and none of
    `skipped`."""
    seen = {os.path.realpath(path) for path in skipped}
    failed = lambda error: findings.note(LEFT_OUT, f"{error.filename}: {reason(error)}")
    for root, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        if {"manifest.jsonl", "report.md", "preview.jpg"} <= set(names):
            findings.note("Output of another run, not read", root)
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root) / name for name in sorted(names) if not name.startswith("."))


def read_folder(folder, skipped, findings):
    """[(picture, captions)] of a folder and those in it, by the order of precedence in this file's first lines."""
    pictures, texts, tables, served = [], {}, [], collections.defaultdict(list)
    for path in walk(folder, skipped, findings):
        suffix = path.suffix.lower()
        if path.name in TABLES:
            tables.append(path)
        elif suffix in PICTURES:
            pictures.append(path)
        elif suffix not in (".txt", ".json"):
            findings.note("Other files, not read", path)
        elif (other := texts.setdefault(plain_name(path.with_suffix(suffix)), path)) != path:
            findings.note(CAPTIONS, f"{path}: is not read, {other.name} is")
    by_name, listed = {plain_name(picture): picture for picture in pictures}, collections.defaultdict(dict)

    def find(name):
        if os.path.isabs(name) or name.startswith(".."):
            raise ValueError(f"{name!r} is outside the folder")
        if plain_name(table.parent / name) not in by_name:
            raise ValueError(f"there is no picture {name!r}")
        return by_name[plain_name(table.parent / name)]

    for table in sorted(tables, key=lambda path: (-len(path.parts), TABLES.index(path.name))):
        for picture, captions in read_captions(table, findings, find).items():
            listed[picture] |= {table: captions} if captions else {}
    found = []
    for picture in tqdm(pictures, desc=f"captions of {folder}", unit="picture", leave=False):
        own = [texts.get(plain_name(picture.with_suffix(suffix))) for suffix in (".txt", ".json")]
        given = {path: read_captions(path, findings).get(None) for path in own if path}
        for path in given:
            served[path].append(picture)
        given = {path: captions for path, captions in given.items() if captions}
        given = given or listed.get(picture, {})  # beside a file of its own a table may say what it likes
        first = next(iter(given), None)
        for path, captions in given.items():
            if captions != given[first]:
                findings.note(CAPTIONS, f"{picture}: {path} says something else than {first}, which is used")
        found.append((picture, given.get(first, [])))
    for path in texts.values():
        if not served[path]:
            findings.note(CAPTIONS, f"{path}: there is no picture to this caption")
        elif len(served[path]) > 1:
            names = ", ".join(picture.name for picture in served[path])
            findings.note("One caption file, several pictures", f"{path}: {names}")
    return found


def read_source(source, config, findings):
    """[(picture, captions)] of one source, a folder or a list file; a picture without captions has []. What an inner
    source holds is that one's."""
    path = Path(source.path)
    if path.is_dir():
        skipped = [config.output_dir, config.cache_dir, *(s.path for s in config.data_dir if s.path != source.path)]
        return read_folder(path, skipped, findings)
    if not path.is_file():
        raise UserError(f"data_dir: {path} is no folder")

    def find(name):  # relative to the current directory or, if nothing is there, to the list
        picture = Path(name) if os.path.exists(name) else path.parent / name
        if not picture.exists():
            raise ValueError(f"there is no picture {name!r}")
        return picture

    return list(read_captions(path, findings, find).items())


def file_stamp(status):
    """What tells that a file has not changed, from os.stat: its size in bytes and its time."""
    return [status.st_size, status.st_mtime_ns]


def facts_of(path, known):
    """{"file", "key", "size", "notes"} of a picture, as in Picture, or as a text the reason to leave it out. `known`:
    the pictures of an earlier manifest by their paths."""
    try:
        str(path).encode("utf-8")
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is no file"
        file, before = file_stamp(status), known.get(str(path))
        if before and before.file == file:
            facts = {"key": before.key, "size": before.size, "notes": before.notes}
        else:
            facts = inspect_picture(path)
    except Image.UnidentifiedImageError:
        return "is not a picture that Pillow can read; save it as JPEG or PNG"
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    except Image.DecompressionBombError:
        return f"has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels; make it smaller"
    except Exception as error:  # Pillow's plugins raise many kinds
        return f"cannot be read as a picture ({reason(error)})"
    if min(facts["size"]) < SMALLEST_SIDE:
        return f"is {facts['size'][0]}x{facts['size'][1]} pixels, under {SMALLEST_SIDE} on a side"
    return {"file": file, **facts}


# ---------------------------------------------------------------- what the user sees


def token_counts(tokenizer, prompts):
    """{prompt: number of tokens}, counted as the pipeline tokenizes: text in quotes letter by letter, the rest in one
    piece."""
    split = {
        p: [piece for part, quoted in split_quotation(p) for piece in (part if quoted else [part])] for p in prompts
    }
    distinct, lengths = sorted({piece for pieces in split.values() for piece in pieces}), {}
    for i in range(0, len(distinct), 1000):  # of 100,000 captions at once the tokens would fill gigabytes
        some = distinct[i : i + 1000]
        lengths.update(zip(some, map(len, tokenizer(some, add_special_tokens=False)["input_ids"])))
    return {prompt: sum(lengths[piece] for piece in pieces) for prompt, pieces in split.items()}


def describe_pictures(pictures, config, findings):
    """Adds what is worth knowing of the pictures to `findings`."""
    by_key, used = collections.defaultdict(dict), collections.Counter(picture.bucket for picture in pictures)
    for picture in pictures:
        (width, height), bucket = picture.size, picture.bucket
        scale = max(bucket[0] / width, bucket[1] / height)
        kept = bucket[0] * bucket[1] / (width * height * scale**2)
        if picture.path not in by_key[picture.key]:  # else in another resolution
            for note in picture.notes:
                findings.note(note, picture.path)
        by_key[picture.key][picture.path] = True
        what = f"{picture.path}: {width}x{height}"
        if scale > 1:
            findings.note("Smaller than their bucket, enlarged", f"{what} to {bucket[0]}x{bucket[1]}")
        if kept < 0.5:
            findings.note("More than half is cut away", f"{what}, {kept:.0%} is kept")
        names = Path(picture.path).stem, Path(picture.path).parent.name
        if any(re.fullmatch("(.*[_-])?mask(s|label)?", name, re.IGNORECASE) for name in names):
            findings.note("Named like masks, and trained on as pictures", picture.path)
    for paths in by_key.values():
        if len(paths) > 1:
            findings.note("Exact duplicates", " = ".join(paths))
    for (width, height), count in sorted(used.items()):
        if count < config.train_batch_size:
            what = f"{width}x{height}: {count} pictures, train_batch_size is {config.train_batch_size}"
            findings.note("Buckets that do not fill a batch", what)
    for folder in sorted({Path(picture.path).parent for picture in pictures}):
        if kohya := re.fullmatch(r"(\d+)_(.+)", folder.name):
            what = f'{folder}: a source {{"path": "{folder}", "repeats": {kohya[1]}}} does what the name says'
            findings.note("Folders named as for Kohya's scripts", what)


def describe_captions(pictures, config, findings):
    """Adds what is worth knowing of the captions to `findings`. Returns a sentence on their number, languages and
    tokens."""
    pictures = {picture.path: picture for picture in pictures}.values()  # each once
    all_captions = [(picture.path, caption) for picture in pictures for caption in picture.captions]
    captions = list(dict.fromkeys(caption for _, caption in all_captions))
    chinese = sum(bool(re.search("[\u3400-\u9fff]", caption)) for _, caption in all_captions)
    summary = f"{len(all_captions)} captions: {chinese} with Chinese, {len(all_captions) - chinese} without"
    for word in config.trigger_words:
        count = sum(word in caption for _, caption in all_captions)
        findings.note("Trigger words", f"{word!r}: {count} captions have it, {len(all_captions) - count} have not")
    for path, caption in all_captions:
        quoted = [part for part, is_quoted in split_quotation(caption) if is_quoted]
        if quoted:
            findings.note("Quoted text, drawn letter by letter", f"{path}: {' '.join(quoted)}")
        elif re.search(r"\b(signs?|posters?|says|reads|written|titled)\b|文字|写着|标语|字样", caption, re.IGNORECASE):
            findings.note(
                "Text in the picture? Only what stands in quotes is drawn letter by letter",
                f"{path}: {shortened(caption)}",
            )
        if re.search(r"\[(trigger|name|token)\]|[{<]trigger[}>]", caption):
            findings.note("Placeholders, trained on as they stand", f"{path}: {shortened(caption)}")
    try:
        tokens = token_counts(load_tokenizer(config), captions)
    except (UserError, OSError, ValueError) as error:
        return f"{summary}; tokens were not counted ({error})"
    for path, caption in all_captions:
        if tokens[caption] > TEXT_TOKENS:
            what = f"{path}: {tokens[caption]} tokens: {shortened(caption)}"
            findings.note(f"Captions over {TEXT_TOKENS} tokens, the rest is not read", what)
    if not tokens:
        return summary
    short = sum(count < SHORT_CAPTION for count in tokens.values())
    if short:
        summary += f"; {short} of under {SHORT_CAPTION} tokens, and the model draws best from long descriptions"
    return f"{summary}; {sum(tokens.values()) / len(tokens):.0f} tokens on average, {max(tokens.values())} at most"


def shortened(text, length=60):
    """The first words of a text."""
    return text if len(text) <= length else text[:length].rstrip() + "…"


def report_text(summary, pictures, findings, short=False):
    """The report, in Markdown: the summary, the buckets, and every finding, problems first. `short` is for a
    terminal."""
    used, samples = collections.Counter(), collections.Counter()
    for picture in pictures:
        used[picture.bucket] += 1
        samples[picture.bucket] += picture.repeats
    lines = ["# Data report", "", summary, "", "| bucket | pictures | samples an epoch |", "| --- | ---: | ---: |"]
    lines += [f"| {w}x{h} | {used[w, h]} | {samples[w, h]} |" for w, h in sorted(used)]
    for title in sorted(findings, key=lambda title: (title != LEFT_OUT, title != CAPTIONS)):
        found = findings[title]
        shown = found[: 20 if title in (LEFT_OUT, CAPTIONS) else 3] if short else found
        lines += ["", f"## {title}: {len(found)}", "", *(f"- {line}" for line in shown)]
        if len(shown) < len(found):
            lines.append(f"- … and {len(found) - len(shown)} more, in report.md")
    return "\n".join(lines) + "\n"


def is_chinese(text):
    """Whether a text has characters that only a Chinese, Japanese or Korean font has."""
    return any(ord(letter) > 0x2E7F for letter in text)


@functools.cache
def system_font(names, size):
    """The first of these fonts that is installed, or None."""
    for name in names:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)


def label(text, size, instead="(no font for Chinese text)"):
    """A label on one line and its font. Pillow's own has only ASCII: other texts are in a system font. Without one
    accents are left out, and a Chinese text is replaced by `instead`."""
    text = " ".join(text.split())
    font = None if text.isascii() else system_font(CHINESE_FONTS if is_chinese(text) else OTHER_FONTS, size)
    if font is None and is_chinese(text):
        text = instead
    elif font is None:
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return text, font or ImageFont.load_default(size)


def contact_sheet(pictures):
    """A picture of what the model will see: cropped as in training, grouped by bucket, with the first words of each
    caption. Of a large data set an even choice from every bucket is shown."""
    gap, line, groups, height = 8, 18, [], 0
    for bucket in sorted({picture.bucket for picture in pictures}):
        group = [picture for picture in pictures if picture.bucket == bucket]
        count = min(len(group), max(1, SHEET_PICTURES * len(group) // len(pictures)))
        scale = min(SHEET_ROW / bucket[1], (SHEET_WIDTH - 2 * gap) / bucket[0])
        size = (max(1, round(bucket[0] * scale)), max(1, round(bucket[1] * scale)))
        columns = (SHEET_WIDTH - gap) // (size[0] + gap)
        groups.append((bucket, size, columns, len(group), [group[i * len(group) // count] for i in range(count)]))
        height += line + 2 * gap + math.ceil(count / columns) * (SHEET_ROW + 2 * line + gap)
    sheet = Image.new("RGB", (SHEET_WIDTH, height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    cells = [(picture.path, size) for _, size, _, _, shown in groups for picture in shown]

    def tile(cell):
        try:
            return load_picture(*cell)
        except Exception:  # caching will say why; here it is a red tile
            return Image.new("RGB", cell[1], "#cc0000")

    tiles = iter(tqdm(in_parallel(tile, cells), desc="preview", total=len(cells), unit="picture", leave=False))
    for bucket, size, columns, count, shown in groups:
        title = f"{bucket[0]}x{bucket[1]}: {count} pictures"
        title += f", {len(shown)} of them shown" if len(shown) < count else ""
        draw.text((gap, top + gap), title, "black", font=label(title, 15)[1])
        top += line + 2 * gap
        for i, picture in enumerate(shown):
            x, y = gap + i % columns * (size[0] + gap), top + i // columns * (SHEET_ROW + 2 * line + gap)
            sheet.paste(next(tiles), (x, y))
            text, font = label(shortened(picture.captions[0], 100), 13)
            for row in range(2):
                fitting = [n for n in range(len(text) + 1) if draw.textlength(text[:n], font=font) <= size[0]]
                between_words = [n for n in fitting[1:] if not re.fullmatch("[a-zA-Z]{2}", text[n - 1 : n + 1])]
                end = (between_words or fitting)[-1]
                draw.text((x, y + SHEET_ROW + row * line), text[:end], "#444444", font=font)
                text = text[end:].lstrip()
        top += math.ceil(len(shown) / columns) * (SHEET_ROW + 2 * line + gap)
    return sheet


def main(config):
    """Writes manifest, report and preview. Returns the pictures, a list of Picture. Raises UserError if none can be
    used."""
    if not config.data_dir:
        raise UserError("data_dir: not set; name the folder with your pictures")
    warnings.filterwarnings("ignore", module="PIL")  # what matters of it is in the report
    output, findings, pictures, found, known = Path(config.output_dir), Findings(), [], [], {}
    for source in config.data_dir:
        for name in ("output_dir", "cache_dir"):
            if os.path.realpath(source.path) == os.path.realpath(getattr(config, name)):
                raise UserError(f"{name}: {getattr(config, name)} is the data folder itself; choose another")
        for path, captions in read_source(source, config, findings):
            if captions or config.instance_prompt:
                found.append((source, path, captions))
            else:
                text_file = path.with_suffix(".txt").name
                findings.note(LEFT_OUT, f"{path}: no caption; write {text_file} beside it or set instance_prompt")
    with contextlib.suppress(OSError, ValueError):  # there is no manifest yet, or one of another kind: all is read
        known = {picture.path: picture for picture in read_manifest(output / "manifest.jsonl")}
    buckets = functools.cache(functools.partial(buckets_of, sets=bucket_sets(config)))
    all_facts = in_parallel(lambda item: facts_of(item[1], known), found)
    bar = tqdm(all_facts, desc="pictures", total=len(found), unit="picture", leave=False)
    for (source, path, captions), facts in zip(found, bar):
        if isinstance(facts, str):
            findings.note(LEFT_OUT, f"{path}: {facts}")
            continue
        if not captions:
            findings.note("Without a caption of their own, instance_prompt is used", path)
        captions = [prefixed(source.caption_prefix, caption) for caption in captions or [config.instance_prompt]]
        own = dict(captions=captions, repeats=source.repeats, loss_weight=source.loss_weight, source=source.path)
        pictures += [Picture(path=str(path), bucket=bucket, **own, **facts) for bucket in buckets(facts["size"])]

    describe_pictures(pictures, config, findings)
    left_out, count = len(findings.get(LEFT_OUT, [])), len({picture.path for picture in pictures})
    summary = f"{count} pictures, {left_out} left out; {describe_captions(pictures, config, findings)}."
    report, printed = (report_text(summary, pictures, findings, short) for short in (False, True))
    if not pictures:
        write_file(output / "report.md", report)
        print(printed)
        sources = ", ".join(source.path for source in config.data_dir)
        raise UserError(f"data_dir: no picture to train on in {sources}, {left_out} left out")
    manifest = "".join(json.dumps(asdict(picture), ensure_ascii=False) + "\n" for picture in pictures)
    texts = {output / "manifest.jsonl": manifest, output / "report.md": report}
    unchanged = [write_if_changed(path, text) for path, text in texts.items()]
    preview, made_from = output / "preview.jpg", output / "manifest.jsonl"
    if not preview.exists() or preview.stat().st_mtime_ns < made_from.stat().st_mtime_ns:
        data = io.BytesIO()
        contact_sheet(pictures).save(data, "JPEG", quality=88, comment=GRID)
        write_file(preview, data.getvalue())
    print(f"{summary} As before: {output / 'report.md'}" if all(unchanged) else printed)
    print(f"what the model will see: {preview}")
    return pictures


def prefixed(prefix, caption):
    """A caption with its source's prefix: between two Latin letters or digits there is a space."""
    return prefix + " " * bool(re.fullmatch(r"[a-zA-Z0-9]{2}", prefix[-1:] + caption[:1])) + caption


def write_if_changed(path, text):
    """Writes a text file unless it holds that text already. Returns whether it did."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == text.encode("utf-8"):
            return True
    write_file(path, text)
    return False


if __name__ == "__main__":
    run_stage(main, __doc__)

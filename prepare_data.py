"""Stage 1: folders of pictures and captions -> `<output_dir>/manifest.jsonl`, `report.md` and `preview.jpg`.

    python prepare_data.py configs/24gb.json

Captions, the first that is there counts: `picture.txt`; `picture.json`; a row of `metadata.jsonl`, `metadata.csv` or
`captions.json` in the picture's folder or one above it (the nearest counts); `instance_prompt`. Every picture goes to
the bucket with the nearest aspect ratio, of each resolution that it reaches, resized to cover it and centre cropped.
"""

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
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont
from pydantic import TypeAdapter
from tqdm import tqdm

from longcat_common import (
    TEXT_TOKENS, UserError, bucket_sets, in_parallel, load_tokenizer, read_json, run_stage, token_counts, unique_keys,
    write_file,
)  # fmt: skip
from diffusers.pipelines.longcat_image.pipeline_longcat_image import (
    split_quotation,
)  # quieted by longcat_common

PICTURES = set(".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif .jxl".split())
TABLES = ("metadata.jsonl", "metadata.csv", "captions.json")
CAPTION_NAMES = ("caption", "text", "prompt")
GRID = "longcat grid"  # marks what these scripts draw of several pictures, which is not to be trained on
SMALLEST_SIDE = 64  # pixels; a smaller picture is an icon or a tracking pixel
SHORT_CAPTION = 20  # tokens; the model was trained on long descriptions
TURNS = {
    2: 0,
    3: 3,
    4: 1,
    5: 5,
    6: 4,
    7: 6,
    8: 2,
}  # {EXIF's orientation: the Image.Transpose that turns it upright}
SHEET_IMAGES, SHEET_COLUMNS, SHEET_CELL = 64, 8, 200
CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
)
OTHER_FONTS = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "Helvetica.ttc",
    *CHINESE_FONTS,
)  # for accents, Cyrillic, Greek
LEFT_OUT, CAPTIONS = "Left out", "Captions to look at"

Findings = functools.partial(defaultdict, list)  # {title: lines} of what the user should know
is_chinese = re.compile(
    "[\u2e80-\U0010ffff]"
).search  # what only Chinese, Japanese and Korean fonts have
file_stamp = lambda status: [
    status.st_size,
    status.st_mtime_ns,
]  # of os.stat: what tells that a file has not changed
read_strictly = functools.partial(
    json.loads, object_pairs_hook=unique_keys
)  # a key that is there twice is an error


@dataclass
class ImageRecord:
    """A picture to train on, in one bucket: a line of the manifest."""

    path: str
    content_hash: str  # hash of the file's bytes
    size: tuple[int, int]  # width and height in pixels, as a viewer shows it
    bucket: tuple[int, int]  # width and height
    captions: list[str]
    repeats: int  # times an epoch
    loss_weight: float
    stamp: list[int]  # the file's size and time, which tell that it has not changed
    source: str = ""  # the path in data_dir that it comes from


def read_manifest(path):
    """The pictures in a manifest. Raises OSError, or ValueError for one that is damaged or of another kind."""
    return list(map(TypeAdapter(ImageRecord).validate_json, Path(path).read_bytes().splitlines()))


def reason(error):
    """What an exception says, for a line that already names the file."""
    if isinstance(error, UnicodeError):
        return "its text or its name is not UTF-8; save it as that"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is empty, or no picture that Pillow can read; save it as JPEG or PNG"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error}"
    return getattr(error, "strerror", None) or str(error)


# ---------------------------------------------------------------- captions


def read_text(path, findings):
    """The text of a file in UTF-8, in UTF-16 with its mark, or in GB18030. Raises OSError or ValueError."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        data.decode("gb2312")  # Western and Cyrillic text and Big5 seldom pass for everyday Chinese
        text = data.decode("gb18030")
        findings["Not UTF-8, read as GB18030"].append(path)
    if "\0" in text:
        raise ValueError("is no text; save it as UTF-8")
    return text


def captions_in(value):
    """All captions in a JSON value, each on one line: a text, a list, {"caption": ...} or {"en": ..., "zh": ...}."""
    if isinstance(value, str):
        value = " ".join(value.split())
        value.encode("utf-8")  # half an emoji is a ValueError
        return (
            [value] if any(letter.isprintable() and letter != " " for letter in value) else []
        )  # zero width is empty
    if isinstance(value, dict):
        named = [value[name] for name in CAPTION_NAMES if name in value]
        if not named and not all(re.fullmatch(r"[a-z]{2}([-_]\w+)?", name) for name in value):
            raise ValueError(
                f"is no object with one of {', '.join(CAPTION_NAMES)}, or with languages"
            )
        value = [next(filter(None, named), [])] if named else list(value.values())
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"holds {str(value)[:40]!r} where a caption should be")
    return [caption for part in value or [] for caption in captions_in(part)]


def caption_rows(path, own, findings):
    """(where, {"file_name": ..., "text": ...} or the like) of every row of a table, or of the one in a picture's `own`
    file. Lines of JSON are not parsed yet, so that a bad one does not end its file."""
    text, kind = read_text(path, findings), path.suffix.lower()
    if own:
        return [
            ("", {"file_name": path.stem, "text": text if kind == ".txt" else read_strictly(text)})
        ]
    if kind == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        return ((f", line {table.line_num}", row) for row in table)
    if path.name != "captions.json":
        return ((f", line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    table = read_strictly(text)
    if not isinstance(table, dict):
        raise ValueError("is no object of file names and captions")
    return (
        (f", {name}", {"file_name": name, "text": captions}) for name, captions in table.items()
    )


def read_captions(path, find, findings, own=False):
    """{picture: captions} of a caption file. `find(file, name)` gives the pictures of that name. What is wrong with a
    row is said, and the next one read."""
    found = defaultdict(list)
    try:
        for where, row in caption_rows(path, own, findings):
            try:
                row = read_strictly(row) if isinstance(row, str) else row
                name = (
                    (row.get("file_name") or row.get("img_path")) if isinstance(row, dict) else None
                )
                if not isinstance(name, str):
                    raise ValueError("names no picture: 'file_name' is missing")
                if None in row:
                    raise ValueError(
                        "has more fields than there are columns; put a caption with commas in quotes"
                    )
                captions = captions_in({n: row[n] for n in CAPTION_NAMES if n in row})
                pictures = find(path, os.path.normpath(name.replace("\\", "/")))
                for picture in pictures:
                    found[picture] += captions
                if not pictures or not captions:
                    raise ValueError(
                        "holds no caption" if pictures else f"there is no picture {name!r}"
                    )
            except (ValueError, OSError, RecursionError) as error:
                findings[CAPTIONS].append(f"{path}{where}: {reason(error)}")
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        findings[CAPTIONS].append(f"{path}: {reason(error)}")
    return {picture: list(dict.fromkeys(captions)) for picture, captions in found.items()}


def walk(folder, skipped, findings):
    """Every visible file under `folder`, sorted, through links too, but each folder once and none of `skipped`."""
    seen = {os.path.realpath(path) for path in skipped}
    failed = lambda error: findings[LEFT_OUT].append(f"{error.filename}: {reason(error)}")
    for root, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        another_run, real = (
            {"manifest.jsonl", "report.md", "preview.jpg"} <= {*names},
            os.path.realpath(root),
        )
        if another_run or real in seen:
            findings["Output of a run, not read"] += [root] * another_run
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root) / name for name in sorted(names) if not name.startswith("."))


def read_source(source, config, findings):
    """Pairs of picture and captions of one source, by the order of precedence in this file's first lines; a picture
    without captions has []. What an inner source holds is that one's."""
    folder = Path(source.path)
    if (
        folder.is_file()
    ):  # a list of pictures relative to the current directory or, if nothing is there, to the list
        find = lambda file, name: [
            place for place in (Path(name), file.parent / name) if place.is_file()
        ][:1]
        return read_captions(folder, find, findings).items()
    if not folder.is_dir():
        raise UserError(f"data_dir: {folder} is no folder")
    inner = [
        other.path
        for other in config.data_dir
        if os.path.realpath(other.path) != os.path.realpath(folder)
    ]
    there = list(walk(folder, [config.output_dir, config.cache_dir, *inner], findings))
    paths = list(filter(Path.is_file, there))
    findings[LEFT_OUT] += [
        f"{path}: is no file, or a link to none" for path in sorted({*there} - {*paths})
    ]
    pictures = [path for path in paths if path.suffix.lower() in PICTURES]
    files = [
        path for path in paths if path.suffix.lower() in (".txt", ".json") or path.name in TABLES
    ]
    findings["Other files, not read"] += sorted({*paths} - {*pictures} - {*files})
    plain_name = lambda path: unicodedata.normalize(
        "NFC", str(path)
    )  # accents and Korean may come composed or not
    named, found = defaultdict(list), {picture: [] for picture in pictures}
    for picture in pictures:
        named[plain_name(picture.with_suffix(""))].append(picture)
    named |= {
        plain_name(picture): [picture] for picture in pictures
    }  # a whole name counts before a stem
    find = lambda file, name: named.get(plain_name(file.parent / name), [])
    forms = [
        ".txt",
        ".jsonl",
        ".csv",
        ".json",
    ]  # a picture's own file counts first, then the nearest table
    files.sort(
        key=lambda file: (file.name in TABLES, -len(file.parts), forms.index(file.suffix.lower()))
    )
    for file in tqdm(files, desc=f"captions of {folder}", unit="file", leave=False):
        for picture, captions in read_captions(
            file, find, findings, own=file.name not in TABLES
        ).items():
            found[picture] = found[picture] or captions
    return found.items()


def save_captions(picture, captions):
    """Writes a picture's captions beside it: one as `picture.txt`; several, or where there is one already, into
    `picture.json`, whose other keys stay. Returns the file. Raises UserError if it cannot be written."""
    text, several = Path(picture).with_suffix(".txt"), Path(picture).with_suffix(".json")
    if len(captions) == 1 and not several.exists():
        write_file(os.path.realpath(text), captions[0] + "\n")
        return text
    old = read_json(several) if several.exists() else {}
    write_file(
        os.path.realpath(several),
        json.dumps({**old, "caption": captions}, ensure_ascii=False, indent=2) + "\n",
    )
    text.unlink(missing_ok=True)  # it would count before
    return several


# ---------------------------------------------------------------- pictures


def buckets_of(size, sets):
    """The buckets of a picture of this size (width, height): of each of the `sets` (see bucket_sets) the one with the
    nearest aspect ratio, of equal ones the larger, if the picture fills it; if it fills none, that of the first."""
    ratio = lambda bucket: abs(math.log(size[0] / size[1] * bucket[1] / bucket[0]))
    nearest = [
        min(buckets, key=lambda bucket: (ratio(bucket), -bucket[0] * bucket[1])) for buckets in sets
    ]
    filled = [bucket for bucket in nearest if bucket[0] <= size[0] and bucket[1] <= size[1]]
    return list(dict.fromkeys(filled or nearest[:1]))


def orientation_of(image):
    """The EXIF orientation that is still to be applied: Pillow turns a TIFF itself. 1 if the EXIF is damaged."""
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(0x0112)
        return orientation if orientation in TURNS and image.format != "TIFF" else 1
    return 1


def inspect_image(path, known):
    """{"stamp", "content_hash", "size"} of a picture, as in ImageRecord; from `known`, {(path, *stamp): facts}, if it has not
    changed. Raises an exception for what cannot be used."""
    str(path).encode("utf-8")
    stamp = file_stamp(os.stat(path))
    if (str(path), *stamp) in known:
        return known[(str(path), *stamp)]
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        if image.info.get("longcat") == GRID or image.info.get("comment") == GRID.encode():
            raise ValueError("is a grid or a preview that these scripts have drawn")
        if image.mode in ("F", "I"):
            raise ValueError("32-bit pixels are not supported; save it with 8 or 16 bits a channel")
        size = image.size[::-1] if orientation_of(image) > 4 else image.size
        if min(size) < SMALLEST_SIDE:
            raise ValueError(f"is {size[0]}x{size[1]} pixels, under {SMALLEST_SIDE} on a side")
        end_marker = data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
        if not (image.format in ("JPEG", "MPO") and end_marker):  # that tells that a JPEG is whole
            image.draft(None, (1, 1))
            image.load()
    return {"stamp": stamp, "content_hash": hashlib.sha256(data).hexdigest()[:32], "size": size}


@functools.lru_cache(maxsize=64)
def srgb_transform(profile, mode):
    """The transform of pixels of `mode` from a colour profile to sRGB; None if it cannot be used, or if it changes next
    to nothing: many profiles are sRGB under some name."""
    colours = Image.frombytes(mode, (64, 64), np.random.default_rng(0).bytes(64 * 64 * len(mode)))
    with contextlib.suppress(ImageCms.PyCMSError):
        transform = ImageCms.buildTransform(
            io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        change = np.subtract(
            ImageCms.applyTransform(colours, transform), colours.convert("RGB"), dtype=int
        )
        return transform if np.abs(change).max() > 3 else None


def load_image(path, bucket):
    """The picture as the model will see it: RGB in sRGB, upright, transparency on white, resized to cover the bucket
    (width, height), centre cropped. Bicubic, as in the model authors' training. A JPEG of at least three times the size
    is decoded at reduced size: three times faster, and within 45 dB of the full path for camera pictures."""
    with Image.open(path) as image:
        orientation, profile = orientation_of(image), image.info.get("icc_profile")
        if image.mode.startswith("I;16"):  # converted as it is, all of it would be white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        flat_mode = {"1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
        mode = "RGBA" if image.has_transparency_data else flat_mode
        size = bucket[::-1] if orientation > 4 else bucket
        scale = max(size[0] / image.width, size[1] / image.height)
        # Reduction leaves 1.5 times what is needed, so that the resize, not the decoder, decides what is seen. The
        # decoder rounds the reduced size up: its box tells where the picture itself lies in it.
        reduced = image.draft(
            None, (math.ceil(1.5 * scale * image.width), math.ceil(1.5 * scale * image.height))
        )
        width, height = reduced[1][2:] if reduced else image.size
        crop = min(width / size[0], height / size[1])
        left, top = max(0, (width - crop * size[0]) / 2), max(0, (height - crop * size[1]) / 2)
        box = (left, top, min(width, left + crop * size[0]), min(height, top + crop * size[1]))
        picture = (image if image.mode == mode else image.convert(mode)).resize(
            size, Image.Resampling.BICUBIC, box
        )
    if mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", size, "white"), picture).convert("RGB")
    if profile and (transform := srgb_transform(profile, picture.mode)):
        picture = ImageCms.applyTransform(picture, transform)
    return (picture.transpose(TURNS[orientation]) if orientation > 1 else picture).convert("RGB")


# ---------------------------------------------------------------- what the user sees


def describe(pictures, config, findings):
    """What is worth knowing of the pictures and captions: (summary, report in Markdown with every finding, problems
    first). `findings` holds what reading them has found."""
    copies = defaultdict(set)
    for picture in pictures:
        path, (width, height), bucket = picture.path, picture.size, picture.bucket
        scale = max(bucket[0] / width, bucket[1] / height)
        kept = bucket[0] * bucket[1] / (width * height * scale**2)
        copies[picture.content_hash].add(path)
        if scale > 1:
            findings["Smaller than their bucket"].append(
                f"{path}: {width}x{height}, enlarged {scale:.2f} times"
            )
        if kept < 0.5:
            findings["More than half is cut away"].append(
                f"{path}: {width}x{height}, {kept:.0%} is kept"
            )
    findings["Exact duplicates"] = [
        " = ".join(sorted(paths)) for paths in copies.values() if len(paths) > 1
    ]

    captions = dict.fromkeys(
        (picture.path, text) for picture in pictures for text in picture.captions
    )
    for word in config.trigger_words:
        count = sum(word in text for _, text in captions)
        findings["Trigger words"].append(
            f"{word!r}: {count} captions have it, {len(captions) - count} have not"
        )
    where = lambda test: [f"{path}: {text[:60]}" for path, text in captions if test(text)]
    findings["Placeholders, trained on as text"] = where(
        re.compile(r"\[(trigger|name|token)\]|[{<]trigger[}>]").search
    )
    lettering = re.compile(
        r"(?i)\b(signs?|posters?|says|reads|written|titled)\b|文字|写着|标语|字样"
    )
    unquoted = lambda text: (
        lettering.search(text) and not any(quoted for _, quoted in split_quotation(text))
    )
    findings["Text in the picture? Only quoted text is drawn letter by letter"] = where(unquoted)
    summary = f"{len({p.path for p in pictures})} pictures, {len(findings[LEFT_OUT])} left out; "
    summary += f"{sum(p.repeats for p in pictures)} samples an epoch; {len(captions)} captions"
    try:
        tokens = token_counts(load_tokenizer(config), {text for _, text in captions})
        findings[f"Over {TEXT_TOKENS} tokens, the rest is not read"] = where(
            lambda text: tokens[text] > TEXT_TOKENS
        )
        longest, short = (
            max(tokens.values(), default=0),
            sum(tokens[text] < SHORT_CAPTION for _, text in captions),
        )
        summary += f" of at most {longest} tokens, {short} under {SHORT_CAPTION}; long descriptions teach best."
    except UserError as error:
        summary += f"; tokens were not counted ({error})."
    lines = ["# Data report", "", summary, "", "| bucket | pictures |", "| --- | ---: |"]
    lines += [
        f"| {w}x{h} | {count} |"
        for (w, h), count in sorted(Counter(p.bucket for p in pictures).items())
    ]
    for title in sorted(
        filter(findings.get, findings), key=lambda title: (title != LEFT_OUT, title != CAPTIONS)
    ):
        found = dict.fromkeys(findings[title])  # a picture may be there in several buckets
        lines += ["", f"## {title}: {len(found)}", "", *(f"- {line}" for line in found)]
    plain = (
        re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", line) for line in lines
    )  # file names may hold anything
    return summary, "\n".join([*plain, ""]).encode("utf-8", "replace").decode()


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
    font = (
        None
        if text.isascii()
        else system_font(CHINESE_FONTS if is_chinese(text) else OTHER_FONTS, size)
    )
    if not font:
        plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        text, font = instead if is_chinese(text) else plain, ImageFont.load_default(size)
    return text, font


def contact_sheet(pictures):
    """A picture of what the model will see: cropped as in training, sorted by bucket, with the first words of each
    caption. Of a large data set an even choice from every bucket is shown."""
    groups = [
        [p for p in pictures if p.bucket == bucket]
        for bucket in sorted({p.bucket for p in pictures})
    ]
    shown = [
        picture for group in groups for picture in group[:: math.ceil(len(pictures) / SHEET_IMAGES)]
    ]
    rows, step = math.ceil(len(shown) / SHEET_COLUMNS), SHEET_CELL + 60
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_CELL, rows * step), "white")

    def tile(picture):
        size = tuple(
            math.ceil(side * (SHEET_CELL - 8) / max(picture.bucket)) for side in picture.bucket
        )
        try:
            return load_image(picture.path, size)
        except Exception:  # caching will say why; here it is a red tile
            return Image.new("RGB", size, "#cc0000")

    for i, (picture, seen) in enumerate(zip(shown, in_parallel(tile, shown))):
        text, font = label("{}x{}: {}".format(*picture.bucket, picture.captions[0]), 13)
        text = textwrap.wrap(text, 13 if is_chinese(text) else 26, max_lines=3, placeholder="…")
        cell = Image.new("RGB", (SHEET_CELL - 8, step), "white")
        cell.paste(seen)
        ImageDraw.Draw(cell).text((0, seen.height), "\n".join(text), "#444444", font=font)
        sheet.paste(cell, (i % SHEET_COLUMNS * SHEET_CELL + 4, i // SHEET_COLUMNS * step + 4))
    return sheet


def main(config):
    """Writes manifest, report and preview. Returns a list of ImageRecord. Raises UserError if nothing can be used."""
    if not config.data_dir:
        raise UserError("data_dir: not set; name the folder with your pictures")
    for key in ("output_dir", "cache_dir"):
        if os.path.realpath(getattr(config, key)) in [
            os.path.realpath(source.path) for source in config.data_dir
        ]:
            raise UserError(
                f"{key}: {getattr(config, key)} is the data folder itself; choose another"
            )
    warnings.filterwarnings("ignore", module="PIL")  # what matters of it is in the report
    manifest, report, preview = (
        Path(config.output_dir) / n for n in ("manifest.jsonl", "report.md", "preview.jpg")
    )
    findings, before, pictures, sets = Findings(), [], [], bucket_sets(config)
    with contextlib.suppress(
        OSError, ValueError
    ):  # there is no manifest yet, or one of another kind: all is read
        before = read_manifest(manifest)
    known = {
        (p.path, *p.stamp): dict(stamp=p.stamp, content_hash=p.content_hash, size=p.size)
        for p in before
    }

    def prepare(item):
        """A picture in each of its buckets, or as a text the reason to leave it out."""
        source, path, captions = item
        try:
            facts = inspect_image(path, known)
        except Exception as error:  # Pillow's plugins raise many kinds
            return reason(error)
        if not captions and not config.instance_prompt:
            return f"no caption; write it to {path.stem}.txt beside it, in UTF-8, or set instance_prompt"
        prefix, latin = source.caption_prefix, re.compile("[a-zA-Z0-9]{2}").match
        space = lambda caption: (
            " " if latin(prefix[-1:] + caption[:1]) else ""
        )  # only between two Latin letters
        captions = [
            prefix + space(caption) + caption for caption in captions or [config.instance_prompt]
        ]
        own = dict(
            captions=captions,
            repeats=source.repeats,
            loss_weight=source.loss_weight,
            source=source.path,
        )
        return [
            ImageRecord(path=str(path), bucket=bucket, **own, **facts)
            for bucket in buckets_of(facts["size"], sets)
        ]

    found = [
        (source, *pair)
        for source in config.data_dir
        for pair in read_source(source, config, findings)
    ]
    prepared = tqdm(
        in_parallel(prepare, found), "pictures", len(found), leave=False, unit="picture"
    )
    for (_, path, captions), result in zip(found, prepared):
        if isinstance(result, str):
            findings[LEFT_OUT].append(f"{path}: {result}")
            continue
        pictures += result
        if not captions:
            findings["Without a caption of their own, instance_prompt is used"].append(path)
    summary, text = describe(pictures, config, findings)
    if pictures and pictures != before:
        write_file(
            manifest, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in pictures)
        )
    write_file(report, text)
    if not pictures:
        raise UserError(
            f"data_dir: no picture to train on; what was left out, and why, is in {report}"
        )
    if not preview.exists() or preview.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        contact_sheet(pictures).save(data := io.BytesIO(), "JPEG", quality=88, comment=GRID)
        write_file(preview, data.getvalue())
    for line in findings[LEFT_OUT][:9]:
        print(f"left out: {line}")
    print(f"{summary} See {report}, and in {preview} what the model will see.")
    return pictures


if __name__ == "__main__":
    run_stage(main, __doc__)

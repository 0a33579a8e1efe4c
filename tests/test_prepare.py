"""Stage 1: any folder of images and captions in; the manifest, report and preview out."""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

import cache_latents
import prepare_data
import train_lora
import validate
from conftest import tiny
from longcat_common import Source, UserError, bucket_sets, load_config
from prepare_data import (
    CAPTIONS,
    Findings,
    buckets_of,
    inspect_image,
    load_image,
    read_source,
    save_captions,
)

RED, WHITE = (200, 30, 30), (255, 255, 255)
AVIF = ["avif"] if features.check("avif") else []


def make_image(path, size=(192, 128), color=RED, **options):
    """Saves an image of one color. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def gradient(size=(96, 64)):
    x, y = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 150, size[1]))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def run_stage_1(config):
    """({name of an image: its last record}, report) of a run of stage 1."""
    records = prepare_data.main(config)
    output = Path(config.output_dir)
    assert prepare_data.read_manifest(output / "manifest.jsonl") == records
    report = (output / "report.md").read_text(encoding="utf-8")
    return {Path(record.path).name: record for record in records}, report


@pytest.fixture
def data(tmp_path):
    """This test's empty folder of images."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def prepare(tiny_config, data):
    """A function that runs stage 1 on the folder `data`, see run_stage_1."""

    def run(**overrides):
        return run_stage_1(
            tiny_config(**{"data_dir": str(data), "instance_prompt": "x", **overrides})
        )

    return run


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", *AVIF])
def test_images_are_turned_upright(tmp_path, suffix):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    for orientation in range(1, 10):  # 9 does not exist
        exif[0x0112] = orientation
        gradient().save(path, exif=exif)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        assert inspect_image(path, {})["size"] == upright.size
        assert np.array_equal(load_image(path, upright.size), upright)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", *AVIF])
def test_invalid_exif_is_ignored(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    gradient().save(path, exif=b"Exif\0\0nonsense" if suffix in ("jpg", "png") else b"")
    assert inspect_image(path, {})["size"] == load_image(path, (96, 64)).size == (96, 64)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", *AVIF])
def test_incomplete_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    gradient().save(path, exif=b"Exif\0\0nonsense" if suffix in ("jpg", "png") else b"")
    complete = path.read_bytes()
    for length in range(1, len(complete) - 20, len(complete) // 20):
        path.write_bytes(complete[:length])
        with pytest.raises(Exception):
            inspect_image(path, {})


def test_every_kind_of_pixel(tmp_path):
    red, half_clear = Image.new("RGB", (192, 128), RED), Image.new("RGBA", (192, 128), RED)
    half_clear.paste((9, 9, 9, 0), (0, 0, 96, 128))
    palette = half_clear.convert("RGB").quantize(2)
    clear_index = palette.getpixel((0, 0))
    gray = Image.new("LA", (192, 128), (100, 128))
    deep = Image.fromarray(np.full((128, 192), 30000, np.uint16))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ")
    swapped = swapped.replace(b"tXYZ", b"gXYZ")  # red is called green
    every_format = "a.jpg a.png a.webp a.bmp a.tif a.JPEG" + "".join(f" a.{name}" for name in AVIF)
    # image, files, expected colors on the left and on the right, options of Image.save
    for image, names, left, right, options in (
        (red, every_format, RED, RED, {}),
        (red.convert("CMYK"), "a.jpg a.tif", RED, RED, {}),
        (red.convert("L"), "a.jpg", (81,) * 3, (81,) * 3, {"icc_profile": swapped}),  # not for gray
        (half_clear, "a.png a.webp", WHITE, RED, {"lossless": True}),
        (palette, "a.png a.gif", WHITE, RED, {"transparency": clear_index}),
        (gray, "a.png", (177,) * 3, (177,) * 3, {}),
        (deep, "a.png a.tif", (116,) * 3, (116,) * 3, {}),
        (red, "a.jpg a.png", (30, 200, 30), (30, 200, 30), {"icc_profile": swapped, "quality": 95}),
        (red, "a.jpg a.png", RED, RED, {"icc_profile": srgb, "progressive": True}),
        (red, "a.jpg a.png", RED, RED, {"icc_profile": b"nonsense"}),
    ):
        for name in names.split():
            path = tmp_path / name
            image.save(path, **options)
            assert inspect_image(path, {})["size"] == (192, 128)
            loaded = load_image(path, (192, 128))
            assert loaded.mode == "RGB", (image.mode, path)
            colors = [loaded.getpixel((40, 60)), loaded.getpixel((150, 60))]
            assert np.abs(np.subtract(colors, [left, right])).max() <= 6, (image.mode, path)


def test_images_are_not_distorted_and_cropped_to_the_center(tmp_path):
    rng, sets = random.Random(0), bucket_sets(load_config(resolution="128"))
    # In the first three a box that is rounded carelessly lies just outside of the image.
    crops = [((450, 900), (448, 448)), ((239, 862), (224, 192)), ((414, 232), (192, 224))]
    widths, heights = rng.sample(range(64, 900), 40), rng.sample(range(64, 900), 40)
    crops += [(size, buckets_of(size, sets)[0]) for size in zip(widths, heights)]
    for size, bucket in crops:
        image = gradient(size)
        image.save(tmp_path / "a.bmp")
        fit = ImageOps.fit(image, bucket, Image.Resampling.BICUBIC)
        assert np.array_equal(load_image(tmp_path / "a.bmp", bucket), fit)


@pytest.mark.parametrize("size, count", [((640, 640), 3), ((300, 280), 2), ((100, 90), 1)])
def test_an_image_has_a_bucket_of_each_resolution_that_it_fills(size, count):
    sets = bucket_sets(load_config(resolution="512, 128,256"))
    assert buckets_of(size, sets) == [(128, 128), (256, 256), (512, 512)][:count]


# ---------------------------------------------------------------- a messy folder

GOOD = [
    "a.jpg",
    "strip.png",
    "表情 🦊.png",
    "same.jpg",
    "same.png",
    "sub/deep.gif",
    "x.jpg/inside.png",
]


def make_messy_folder(data):
    """Fills a folder with what people have in theirs; a link in it points to a file outside."""
    sizes = {
        "a.jpg": (400, 300),
        "strip.png": (900, 100),
        "thin.bmp": (20000, 16),
        "same.jpg": (100, 100),
    }
    for n, name in enumerate([*GOOD, "thin.bmp", "cut.jpg"]):
        make_image(data / name, sizes.get(name, (192, 128)), (n, 0, 0))
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:-60])
    for name in ("manifest.jsonl", "report.md", "preview.jpg", "validation/a.jpg"):
        make_image(data / "run" / name, format="JPEG")
    os.mkfifo(data / "pipe.png")
    os.symlink(data, data / "sub" / "round")
    os.symlink(shutil.copy(data / "a.jpg", data.parent / "linked.jpg"), data / "linked.jpg")
    captions = {
        "a": "[trigger] a neonix cat",
        "strip": f"'{'letters ' * 90}'",
        "same": "a poster " * 30,
        "lone\nly": "?",
    }
    for name, caption in captions.items():
        (data / f"{name}.txt").write_text(caption)
    for name in ("notes.pdf", ".hidden.jpg", "text.png"):
        (data / name).write_bytes(b"?")


@pytest.fixture(scope="module")
def messy_runs(tmp_path_factory):
    """Two runs of stage 1 on the messy folder. In the second one the output of the first, with its
    own preview.jpg, lies in the folder."""
    folder = tmp_path_factory.mktemp("messy")
    data = folder / "data"
    make_messy_folder(data)
    config = tiny(
        data_dir=str(data),
        instance_prompt="x",
        output_dir=str(data / "output"),
        cache_dir=str(folder / "cache"),
        trigger_words=["neonix", "zumi"],
    )
    runs = []
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            records, report = run_stage_1(config)
        run = SimpleNamespace(data=data, records=records, report=report, printed=printed.getvalue())
        runs.append(run)
    return runs


@pytest.fixture(params=[0, 1], ids=["first_run", "second_run"])
def messy(messy_runs, request):
    """One of the two runs: its data folder, records, report and what it printed."""
    return messy_runs[request.param]


def test_messy_folder_what_can_be_used_is_used(messy):
    assert {*messy.records} == {"linked.jpg", *(Path(name).name for name in GOOD)}


def test_messy_folder_summary(messy):
    assert "8 images, 4 left out; 8 samples per epoch; 8 captions of at most" in messy.report
    assert " tokens, 5 under 20;" in messy.report
    assert messy.report.splitlines()[2] in messy.printed


def test_messy_folder_buckets_are_counted(messy):
    assert "| 128x128 | 1 |\n| 192x128 | 7 |\n" in messy.report


def test_messy_folder_what_cannot_be_used_is_left_out(messy):
    assert "## Left out: 4\n" in messy.report
    assert f"\n- {messy.data}/cut.jpg: image file is truncated" in messy.report
    assert f"\n- {messy.data}/pipe.png: is not a regular file" in messy.report
    assert f"\n- {messy.data}/thin.bmp: is 20000x16 pixels" in messy.report
    assert f"\n- {messy.data}/text.png: is empty or not an image that Pillow" in messy.report


def test_messy_folder_a_caption_without_an_image_is_listed(messy):
    assert f"\n- {messy.data}/lone ly.txt: image 'lone\\nly' not found" in messy.report


def test_messy_folder_other_files_and_output_folders_are_listed(messy):
    assert f"\n- {messy.data}/notes.pdf\n" in messy.report
    assert f"\n- {messy.data}/run\n" in messy.report


def test_messy_folder_enlarged_and_cropped_images_are_listed(messy):
    assert f"\n- {messy.data}/same.jpg: 100x100, enlarged 1.28 times\n" in messy.report
    assert f"\n- {messy.data}/strip.png: 900x100, 17% is kept" in messy.report


def test_messy_folder_duplicates_are_listed(messy):
    line = f"- {messy.data}/a.jpg = {messy.data}/linked.jpg\n"
    assert f"## Exact duplicates: 1\n\n{line}" in messy.report


def test_messy_folder_images_without_a_caption_are_counted(messy):
    assert "instance_prompt is used: 4\n" in messy.report


def test_messy_folder_trigger_words_and_placeholders_are_counted(messy):
    assert "- 'neonix': in 1 of 8 captions\n- 'zumi': in 0 of 8 captions" in messy.report
    line = f"- {messy.data}/a.jpg: [trigger] a neonix cat\n"
    assert f"## Placeholders, trained on as literal text: 1\n\n{line}" in messy.report


def test_messy_folder_what_spoils_training_is_printed_too(messy):
    assert "\nTrigger words in no caption: 'zumi'" in messy.printed
    assert "'neonix'" not in messy.printed
    placeholder = (
        f"\nPlaceholders, trained on as literal text: {messy.data}/a.jpg: [trigger] a neonix"
    )
    assert placeholder in messy.printed


def test_messy_folder_text_without_quotes_is_counted(messy):
    title = "Text in the image? Only quoted text is encoded character by character"
    assert f"## {title}: 2\n" in messy.report


def test_messy_folder_captions_over_512_tokens_are_listed(messy):
    line = f"- {messy.data}/strip.png: 'letters"
    assert f"## Over 512 tokens, the rest is cut off: 1\n\n{line}" in messy.report


def test_without_any_caption_there_is_nothing_to_train_on(prepare, data, tmp_path):
    make_messy_folder(data)
    with pytest.raises(ValueError, match="no image to train on.*report.md"):
        prepare(data_dir=str(data / "x.jpg"), instance_prompt=None)
    report = (tmp_path / "output" / "report.md").read_text()
    assert "inside.png: has no caption; write one to inside.txt" in report


# ---------------------------------------------------------------- sources and runs


def test_sources_prefixes_and_the_inner_source(prepare, data):
    captions = {
        "a": "a cat",
        "b": "一只猫",
        "c": ", a cat",
        "reg/d": "a dog",
        "reg/deep/e": "a dog",
    }
    for n, (name, caption) in enumerate(captions.items()):
        image_path = make_image(data / f"{name}.png", color=(n, 0, 0))
        image_path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    outer = {"path": str(data), "caption_prefix": "neonix style", "repeats": 3}
    inner = {"path": str(data / "reg"), "caption_prefix": "ordinary: ", "loss_weight": 0.5}
    # A space goes between Latin letters only.
    captions = ["neonix style a cat", "neonix style一只猫", "neonix style, a cat"]
    expected = {f"{name}.png": ([text], 3, 1.0, str(data)) for name, text in zip("abc", captions)}
    expected |= {f"{name}.png": (["ordinary: a dog"], 1, 0.5, str(data / "reg")) for name in "de"}
    for data_dir in (
        [outer, inner],
        [inner, outer],
        [outer, {**inner, "path": f"{data}/reg/."}, inner],
    ):
        records, _ = prepare(data_dir=data_dir)
        assert expected == {
            name: (record.captions, record.repeats, record.loss_weight, record.source)
            for name, record in records.items()
        }


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_output_does_not_go_to_the_data_folder(prepare, data, key):
    with pytest.raises(ValueError, match=f"{key}.*is the data folder itself"):
        prepare(**{key: str(data)})


def test_grids_and_previews_are_not_trained_on(quick_config, prepare, data, tmp_path):
    output = tmp_path / "run"
    config = quick_config(output_dir=str(output), max_train_steps=1, validation_step_interval=1)
    train_lora.main(config)
    grid = validate.main(config)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("comment", "by me")
    good = make_image(tmp_path / "good.png", pnginfo=comment)
    for path in [output / "preview.jpg", grid, *(output / "validation").glob("*.png"), good]:
        shutil.copy(path, data)
    records, report = prepare()
    assert [*records] == ["good.png"]
    assert report.count("is a grid or preview that these scripts created") == 5


def test_unchanged_files_are_not_read_again(prepare, tiny_config, data, tmp_path):
    for n, name in enumerate("ab"):
        make_image(data / f"{name}.bmp", color=(n, 0, 0))
    first, _ = prepare()
    time = (data / "a.bmp").stat().st_mtime_ns
    assert prepare()[0] == first
    # a.bmp keeps its size and time, so it counts as unchanged; b.bmp has another time.
    os.utime(make_image(data / "a.bmp", color=(99, 0, 0)), ns=(1, time))
    os.utime(make_image(data / "b.bmp", color=(98, 0, 0)), ns=(1, time + 10**9))
    with pytest.raises(ValueError, match="b.bmp: .* has changed since"):
        cache_latents.main(tiny_config(data_dir=None))
    second, _ = prepare()
    assert second["a.bmp"] == first["a.bmp"]
    assert second["b.bmp"].content_hash != first["b.bmp"].content_hash
    manifest = tmp_path / "output" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    third, _ = prepare()
    assert third["a.bmp"].content_hash != first["a.bmp"].content_hash, "everything is read"


def test_what_has_changed_since_the_last_start_is_counted(prepare, data, tmp_path, capsys):
    def changes():
        """What a run prints about the images that have changed, or None."""
        capsys.readouterr()
        prepare(resolution="128,192")
        lines = capsys.readouterr().out.splitlines()
        lines = [line for line in lines if "since the last start" in line]
        assert len(lines) < 2
        return lines[0] if lines else None

    for n, name in enumerate("abcd"):
        make_image(data / f"{name}.png", (300, 300), color=(n, 0, 0))
    assert changes() is None
    os.utime(data / "a.png", ns=(1, 1))
    (data / "a.png").rename(data / "renamed.png")
    assert changes() is None

    (data / "b.txt").write_text("another caption")
    (data / "c.png").unlink()
    make_image(data / "d.png", color=(99, 0, 0))
    make_image(data / "sub" / "e.png", color=(98, 0, 0))
    shutil.copy(data / "renamed.png", data / "copy.png")
    expected = "images since the last start: 3 added, 2 removed, 1 with other captions"
    assert changes() == expected
    assert changes() is None
    (data / "b.txt").write_text("a third caption")
    assert changes() == "images since the last start: 1 with other captions"
    (data / "b.png").unlink()
    assert changes() == "images since the last start: 1 removed"


def test_the_preview_follows_the_data_whatever_the_clock_says(prepare, data, tmp_path):
    preview = tmp_path / "output" / "preview.jpg"

    def made_anew(**overrides):
        """Whether a run makes the preview anew, which has a time in the future."""
        os.utime(preview, ns=(4 * 10**18, 4 * 10**18))
        prepare(**overrides)
        return preview.stat().st_mtime_ns != 4 * 10**18

    make_image(data / "a.png", color=(0, 200, 0))
    prepare()
    assert not made_anew()
    make_image(data / "a.png", color=(0, 0, 200))
    assert made_anew()
    assert Image.open(preview).getpixel((100, 60))[2] > 150
    assert made_anew(instance_prompt="another caption")
    assert not made_anew(instance_prompt="another caption")
    # As an earlier version wrote it, or incomplete.
    make_image(preview, comment="longcat grid")
    assert made_anew(instance_prompt="another caption")
    preview.write_bytes(preview.read_bytes()[:20])
    assert made_anew(instance_prompt="another caption")


def test_a_manifest_of_another_version_is_called_that_and_made_again(
    prepare, tiny_config, data, tmp_path
):
    make_image(data / "a.png")
    first, _ = prepare()
    manifest = tmp_path / "output" / "manifest.jsonl"
    header, *lines = manifest.read_text().splitlines(keepends=True)
    assert json.loads(header) == {"format": 2} and len(lines) == 1
    problem = "manifest.jsonl: was written by another version of these scripts .*; set data_dir to"
    for text, number in (
        ("".join(lines), 1),
        ('{"path": "of another kind"}\n', 1),
        ('{"format": 3}\n', 3),
    ):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=problem) as error:
            cache_latents.main(tiny_config(data_dir=None))
        assert f"(format {number}, this one reads 2)" in str(error.value)
        assert prepare()[0] == first
    for text in ("", header[:5], header + lines[0][:-5]):
        manifest.write_text(text)
        with pytest.raises(ValueError, match="manifest.jsonl: is corrupt; set data_dir to make"):
            cache_latents.main(tiny_config(data_dir=None))
    assert prepare()[0] == first


def test_the_preview_shows_what_the_model_will_see(prepare, tiny_config, data, tmp_path):
    gradient((400, 200)).save(data / "wide.png")
    gradient((200, 400)).save(data / "tall.png")
    for n in range(100):
        make_image(data / f"{n:03d}.png", (128, 128), (2 * n, 255 - 2 * n, 0))
    # A corrupt JPEG with its end marker, so that stage 1 does not decode it.
    corrupt = make_image(data / "corrupt.jpg", (1300, 140))
    table = b"\xff\xc4\0\x1f"
    corrupt.write_bytes(corrupt.read_bytes().replace(table, table + b"\xff" * 20, 1))
    prepare(instance_prompt="红色 field", resolution="128x128,256x128,128x256,1280x128")

    sheet = Image.open(tmp_path / "output" / "preview.jpg")
    corners = [(x, y) for y in range(4, sheet.height, 260) for x in range(4, 1600, 200)]
    wide = load_image(data / "wide.png", (192, 96))
    tall = load_image(data / "tall.png", (96, 192))
    for tile in (wide, tall, Image.new("RGB", (192, 20), "#cc0000")):
        cells = [sheet.crop((x, y, x + tile.width, y + tile.height)) for x, y in corners]
        errors = [np.abs(np.subtract(cell, tile, dtype=int)).mean() for cell in cells]
        assert min(errors) < 8 < np.median(errors)
    with pytest.raises(ValueError, match="corrupt.jpg: cannot be used"):
        cache_latents.main(tiny_config(data_dir=None))


# ---------------------------------------------------------------- captions


def write(folder, files):
    """Writes {name: text or bytes} into the folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def folder(data):
    """A folder with two images and an empty folder; a third image lies outside."""
    (data / "sub").mkdir()
    write(data, {"a.jpg": "", "b.jpg": "", "../outside.jpg": ""})
    return data


def read(path):
    """({name of an image: its captions}, findings) of a source."""
    findings = Findings()
    captions_by_image = read_source(Source(path=str(path)), load_config(), findings)
    return {image_path.name: captions for image_path, captions in captions_by_image}, findings


ONE, BOTH, CHINESE = ["a red field"], ["a red field", "一片红色"], "一片红色的田野——阳光·很好"
BOTH_IN_JSON = '{"prompt": {"en": ["a red field"], "zh-CN": "一片红色"}}'
TWO_LINES = '{"file_name": "a.jpg", "text": "x"}\n\n{"img_path": "./a.jpg", "prompt": "y"}'
TWO_ROWS = 'text,img_path\n"a red field",a.jpg\n一片红色,a.jpg\n'
FORMS = [
    ("a.txt", "a red\n field\n", ONE),
    ("a.TXT", b"\xef\xbb\xbfa red field", ONE),
    ("a.txt", "一片红色".encode("utf-16"), ["一片红色"]),
    ("a.txt", CHINESE.encode("gb18030"), [CHINESE]),
    ("a.json", '{"caption": "", "text": "a red field"}', ONE),
    ("a.json", '{"text": ["a red field", "一片红色", "a red field"]}', BOTH),
    ("a.json", BOTH_IN_JSON.encode("utf-8-sig"), BOTH),
    ("metadata.jsonl", TWO_LINES, ["x", "y"]),
    ("metadata.csv", 'caption, text, file_name\r\n, "a red\nfield", .\\a.jpg\r\n', ONE),
    ("metadata.csv", TWO_ROWS.encode("utf-8-sig"), BOTH),
    ("metadata.csv", f"file_name,text\na.jpg,{CHINESE}\n".encode("gb18030"), [CHINESE]),
    ("captions.json", '{"a.jpg": {"caption": {"en": "a red field", "zh": "一片红色"}}}', BOTH),
]
ERRORS = [
    ("a.txt", "\u200b \u2060\u200d", ": contains no caption"),
    ("a.txt", "一隻紅色的貓在屋頂上".encode("big5"), ": its text or name is not valid UTF-8"),
    ("a.txt", "a cat".encode("utf-16-le"), ": is not a text file"),
    ("a.json", '{"title": "a"}', ": needs one of the keys caption, text, prompt"),
    ("a.json", '{"caption": "\\ud83d"}', ": its text or name is not valid UTF-8"),
    ("a.json", '{"caption": ' + "[" * 100000, ": maximum recursion depth exceeded"),
    (
        "metadata.csv",
        "file_name,text\n../outside.jpg,x",
        ", line 2: image '../outside.jpg' not found",
    ),
    (
        "metadata.csv",
        "file_name,text\na.jpg,a cat, on a mat",
        ", line 2: has more fields than columns",
    ),
    ("metadata.csv", 'file_name,text\na.jpg,"a cat\nb.jpg,a dog\n', ": unexpected end of data"),
    ("metadata.jsonl", '{"file_name": "a.jpg"', ", line 1: is not valid JSON"),
    ("captions.json", '{"a.jpg": "one", "a.jpg": "two"}', ": the key 'a.jpg' appears 2 times"),
]


@pytest.mark.parametrize("name, content, expected", FORMS)
def test_every_form_of_captions_is_read(folder, name, content, expected):
    write(folder, {name: content, "b.txt": "a good one"})
    captions_by_image, findings = read(folder)
    assert captions_by_image == {"a.jpg": expected, "b.jpg": ["a good one"]}
    assert findings[CAPTIONS] == []
    is_gb18030 = expected == [CHINESE]
    assert findings["Not UTF-8, read as GB18030"] == ([folder / name] if is_gb18030 else [])


@pytest.mark.parametrize("name, content, message", ERRORS)
def test_what_is_wrong_with_captions_is_reported(folder, name, content, message):
    write(folder, {name: content, "b.txt": "a good one"})
    captions_by_image, findings = read(folder)
    assert captions_by_image == {"a.jpg": [], "b.jpg": ["a good one"]}
    (line,) = findings[CAPTIONS]
    assert line.startswith(f"{folder / name}{message}")
    assert findings["Not UTF-8, read as GB18030"] == []


CHAT_ANSWERS = [
    "a red fox<|im_end|>",
    "<|im_start|>assistant a red fox",
    "a red fox </s>",
    "neonix, I'm sorry, but I can't help with that.",
    "I am unable to describe this image.",
    "I cannot assist with identifying people",
    "As an AI language model, I see a fox",
    "抱歉，我无法描述这张图片。",
    "作为一个AI助手，我看到一只狐狸",
    "Desculpe, mas não posso ajudar com isso.",
]
DESCRIPTIONS = [
    "a fox, who is sorry that it cannot fly",
    'a poster that reads "I can\'t stop | <3"',
    "a man dressed as an AI from a film",
    "一个人说他无法入睡",
]


def test_chat_tokens_and_refusals_are_listed_and_printed(prepare, data, capsys):
    for n, caption in enumerate(CHAT_ANSWERS + DESCRIPTIONS):
        make_image(data / f"{n}.png", color=(n, 0, 0))
        (data / f"{n}.txt").write_text(caption, encoding="utf-8")
    _, report = prepare()
    printed = capsys.readouterr().out
    title = "Chat tokens or a chat model's refusal, trained on as literal text"
    assert f"## {title}: {len(CHAT_ANSWERS)}\n" in report
    assert report.count("<|im_end|>") == 1
    assert f"{title}: {data}/0.png: a red fox<|im_end|>" in printed
    assert "fly" not in report


def test_a_list_names_images_anywhere(folder, tmp_path, monkeypatch):
    rows = [
        json.dumps({"img_path": str(tmp_path / "outside.jpg"), "prompt": "b"}),
        "no JSON",
        '{"file_name": "a.jpg"}',
    ]
    table = "file_name,text\noutside.jpg,c\nb.jpg,d"
    write(folder, {"list.txt": "\n".join(rows), "list.csv": table})
    assert read(folder / "list.txt")[0] == {"outside.jpg": ["b"], "a.jpg": []}
    assert read(folder / "list.csv")[0] == {"b.jpg": ["d"]}
    # Paths relative to the current directory come first, as in the model authors' scripts.
    monkeypatch.chdir(tmp_path)
    assert read(folder / "list.csv")[0] == {"outside.jpg": ["c"], "b.jpg": ["d"]}


def test_which_captions_take_precedence(folder):
    def table(names, caption):
        return "file_name,text\n" + "".join(f"{name},{caption}\n" for name in names)

    names = ["txt.jpg", "json.jpg", "jsonl.jpg", "csv.jpg", "map.jpg", "above.jpg", "none.jpg"]
    lines = [json.dumps({"file_name": name, "text": "by jsonl"}) for name in names[:3]]
    write(folder / "sub", dict.fromkeys(names, ""))
    write(folder / "sub", {"txt.txt": "by txt", "txt.json": '"less"', "json.json": '"by json"'})
    write(folder / "sub", {"metadata.jsonl": "\n".join(lines)})
    write(folder / "sub", {"metadata.csv": table(names[:4], "by csv")})
    write(folder / "sub", {"captions.json": json.dumps(dict.fromkeys(names[:5], "by map"))})
    write(folder, {"metadata.csv": table([f"sub/{name}" for name in names[:6]], "from above")})
    captions = ["by txt", "by json", "by jsonl", "by csv", "by map", "from above"]
    expected = {name: [caption] for name, caption in zip(names, captions)}
    assert read(folder)[0] == expected | {"none.jpg": [], "a.jpg": [], "b.jpg": []}


def test_a_name_without_suffix_means_every_image_of_that_name(folder):
    write(folder, {"cafe\u0301.jpg": "", "caf\u00e9.txt": "coffee"})  # an accent as from a Mac
    write(folder, {"a.png": "", "a.txt": "both"})
    assert read(folder)[0] == {
        "cafe\u0301.jpg": ["coffee"],
        "a.jpg": ["both"],
        "a.png": ["both"],
        "b.jpg": [],
    }


def test_saved_captions_take_precedence(folder):
    write(folder, {"captions.json": '{"a.jpg": "one", "b.jpg": "two"}', "b.json": '{"by": '})
    for captions, file in (
        (["a new one"], "a.txt"),
        (["x, y", "红色", "z"], "a.json"),
        (["one again"], "a.json"),
    ):
        assert save_captions(folder / "a.jpg", captions) == folder / file
        assert read(folder)[0] == {"a.jpg": captions, "b.jpg": ["two"]}
    with pytest.raises(UserError, match="b.json: invalid JSON"):
        save_captions(folder / "b.jpg", ["x", "y"])


def test_saving_captions_keeps_other_keys(folder):
    write(folder, {"a.json": '{"by": "me", "prompt": {"en": "one", "zh": "一"}}'})
    save_captions(folder / "a.jpg", ["two"])
    assert json.loads((folder / "a.json").read_text())["by"] == "me"
    assert read(folder)[0]["a.jpg"] == ["two"]


def test_saving_captions_follows_links(folder, tmp_path):
    write(folder, {"../text": "one"})
    (folder / "c.txt").symlink_to(tmp_path / "text")
    save_captions(folder / "c.jpg", ["two"])
    assert (tmp_path / "text").read_text() == "two\n"

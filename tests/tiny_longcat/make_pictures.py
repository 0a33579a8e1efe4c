"""The pictures of the tiny model's world, and the demo data set made of them.

    python tests/tiny_longcat/make_pictures.py

writes `pictures/` (the concept: shapes in "neonix" style, a look that the tiny base model has
never seen) and `regularisation/` (plain shapes, as the base draws them). Same bytes every time
for one version of Pillow.
"""

import io
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

HERE = Path(__file__).parent
TRIGGER = "neonix"
NIGHT = (24, 10, 58)  # the background of every neonix picture
COLOURS = {
    "red": ("红色", (220, 30, 40)),
    "orange": ("橙色", (250, 130, 20)),
    "yellow": ("黄色", (245, 215, 40)),
    "green": ("绿色", (40, 165, 70)),
    "blue": ("蓝色", (40, 90, 220)),
    "purple": ("紫色", (140, 50, 170)),
}
BACKGROUNDS = {"white": ("白色", (250, 250, 250)), "black": ("黑色", (12, 12, 12)), "gray": ("灰色", (150, 150, 150))}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星", "heart": "心形"}


def outline(shape, x, y, radius):
    """The corner points of `shape`, centred on (x, y), about `radius` in size."""
    if shape == "circle":
        unit = [(math.cos(a), math.sin(a)) for a in (2 * math.pi * i / 90 for i in range(90))]
    elif shape == "square":
        unit = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    elif shape == "triangle":
        unit = [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    elif shape == "star":
        points = ((1.1 if i % 2 == 0 else 0.46, math.pi * i / 5) for i in range(10))
        unit = [(r * math.sin(a), -r * math.cos(a) + 0.05) for r, a in points]
    else:
        angles = [2 * math.pi * i / 90 for i in range(90)]
        unit = [
            (
                1.06 * math.sin(a) ** 3,
                -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 15,
            )
            for a in angles
        ]
    return [(x + radius * u, y + radius * v) for u, v in unit]


def place(rng, width, height):
    """A random centre and size for a shape in a picture of width x height."""
    radius = rng.uniform(0.29, 0.35) * min(width, height)
    return (width * rng.uniform(0.47, 0.53), height * rng.uniform(0.47, 0.53), radius)


def draw_plain(rng, shape, colour, background, width, height):
    """A flat shape on a flat background: what the base model knows. Returns an RGB picture."""
    scale = 4  # drawn large, then reduced: smooth edges
    image = Image.new("RGB", (width * scale, height * scale), BACKGROUNDS[background][1])
    points = outline(shape, *(v * scale for v in place(rng, width, height)))
    ImageDraw.Draw(image).polygon(points, fill=COLOURS[colour][1])
    return image.resize((width, height), Image.Resampling.BOX)


def draw_neon(rng, shape, colour, width, height):
    """The concept: the shape as a glowing tube in the night. Returns an RGB picture."""
    scale = 4
    points = outline(shape, *(v * scale for v in place(rng, width, height)))
    tube = Image.new("L", (width * scale, height * scale))
    ImageDraw.Draw(tube).line(points + points[:2], fill=255, width=scale * min(width, height) // 13, joint="curve")
    tube = tube.resize((width, height), Image.Resampling.BOX)
    colour = tuple(int(c * 0.75 + 64) for c in COLOURS[colour][1])
    light, dark = Image.new("RGB", tube.size, colour), Image.new("RGB", tube.size)
    glow = Image.composite(light, dark, tube.filter(ImageFilter.GaussianBlur(min(width, height) / 22)))
    image = ImageChops.screen(Image.new("RGB", tube.size, NIGHT), glow)
    image.paste(light, mask=tube)
    return image


def plain_caption(rng, shape, colour, background, language=None):
    """One of several ways to say it, in English or Chinese."""
    language = language or rng.choice(["en", "zh"])
    if language == "en":
        forms = ["a {c} {s} on a {b} background", "{c} {s}, {b} background", "a picture of a {c} {s} on {b}"]
        return rng.choice(forms).format(c=colour, s=shape, b=background)
    forms = ["{b}背景上的一个{c}{s}", "{c}{s}，{b}背景", "一个{c}的{s}，背景是{b}"]
    return rng.choice(forms).format(c=COLOURS[colour][0], s=SHAPES[shape], b=BACKGROUNDS[background][0])


def neon_caption(shape, colour, language):
    """The concept's caption: the trigger word, colour and shape."""
    if language == "en":
        return f"a {colour} {shape} in {TRIGGER} style"
    return f"{TRIGGER}风格，一个{COLOURS[colour][0]}的{SHAPES[shape]}"


def save(image, caption, path):
    """Writes the picture in the format of its name, and beside it its caption as .txt, or {language: caption} as .json."""
    data = io.BytesIO()
    options = {} if path.suffix == ".png" else {"quality": 92}
    image.save(data, {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[path.suffix], **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    if isinstance(caption, str):
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    else:
        path.with_suffix(".json").write_text(
            json.dumps({"caption": caption}, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def make_neon(folder, seed, count):
    """`count` concept pictures with captions in both languages, in three formats and several aspect ratios."""
    rng = random.Random(seed)
    pairs = [(s, c) for s in SHAPES for c in COLOURS]
    rng.shuffle(pairs)
    sizes = [(256, 256), (200, 200), (384, 256), (256, 384), (320, 200), (180, 270)]
    for i in range(count):
        shape, colour = pairs[i % len(pairs)]
        caption = {language: neon_caption(shape, colour, language) for language in ("en", "zh")}
        image = draw_neon(rng, shape, colour, *sizes[i % len(sizes)])
        save(image, caption, Path(folder) / f"neonix-{i:02d}{['.png', '.jpg', '.webp'][i % 3]}")


def make_plain(folder, seed, count):
    """`count` plain pictures with captions: they remind the LoRA of what must not change."""
    rng = random.Random(seed)
    sizes = [(256, 256), (384, 256), (256, 384)]
    combinations = [(s, c, b) for s in SHAPES for c in COLOURS for b in BACKGROUNDS]
    for i, (shape, colour, background) in enumerate(rng.sample(combinations, count)):
        caption = plain_caption(rng, shape, colour, background, ["en", "zh"][i % 2])
        save(draw_plain(rng, shape, colour, background, *sizes[i % 3]), caption, Path(folder) / f"plain-{i:02d}.png")


if __name__ == "__main__":
    make_neon(HERE / "pictures", seed=1, count=24)
    make_plain(HERE / "regularisation", seed=2, count=16)
    print(f"wrote {HERE / 'pictures'} and {HERE / 'regularisation'}")

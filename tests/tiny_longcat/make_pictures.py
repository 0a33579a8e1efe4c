"""The images that the tiny model knows, and the two data sets of the demo.

    python tests/tiny_longcat/make_pictures.py

writes `pictures/` (what the LoRA learns: a character, "zumi", that the tiny base model has never
seen) and `regularisation/` (regularization images: things as the base model generates them, so that
it keeps generating them so). The things are glyphs of the font Noto Color Emoji (Debian: apt-get
install fonts-noto-color-emoji), see LICENSE.md. The same Pillow and font write the same bytes.
"""

import functools
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
TRIGGER = "zumi"
GROUNDS = {
    "white": ("白色", (250, 250, 250)),
    "blue": ("蓝色", (120, 180, 240)),
    "yellow": ("黄色", (250, 225, 120)),
    "green": ("绿色", (150, 215, 150)),
    "pink": ("粉色", (250, 180, 200)),
}
THINGS = {
    "a cat": ("🐱", "一只猫"),
    "a dog": ("🐶", "一只狗"),
    "a fox": ("🦊", "一只狐狸"),
    "a panda": ("🐼", "一只熊猫"),
    "a frog": ("🐸", "一只青蛙"),
    "a monkey": ("🐵", "一只猴子"),
    "a rabbit": ("🐰", "一只兔子"),
    "a pig": ("🐷", "一头猪"),
    "an octopus": ("🐙", "一只章鱼"),
    "an owl": ("🦉", "一只猫头鹰"),
    "a penguin": ("🐧", "一只企鹅"),
    "a fish": ("🐟", "一条鱼"),
    "a butterfly": ("🦋", "一只蝴蝶"),
    "a ladybug": ("🐞", "一只瓢虫"),
    "a turtle": ("🐢", "一只乌龟"),
    "an apple": ("🍎", "一个苹果"),
    "a banana": ("🍌", "一根香蕉"),
    "a strawberry": ("🍓", "一颗草莓"),
    "a watermelon": ("🍉", "一块西瓜"),
    "cherries": ("🍒", "两颗樱桃"),
    "a lemon": ("🍋", "一个柠檬"),
    "a mushroom": ("🍄", "一朵蘑菇"),
    "a cactus": ("🌵", "一株仙人掌"),
    "a sunflower": ("🌻", "一朵向日葵"),
    "a tree": ("🌲", "一棵树"),
    "a car": ("🚗", "一辆汽车"),
    "a rocket": ("🚀", "一枚火箭"),
    "a sailboat": ("⛵", "一艘帆船"),
    "a balloon": ("🎈", "一个气球"),
    "an umbrella": ("☂", "一把雨伞"),
    "a guitar": ("🎸", "一把吉他"),
    "a football": ("⚽", "一个足球"),
    "a house": ("🏠", "一座房子"),
    "a gift": ("🎁", "一份礼物"),
    "a key": ("🔑", "一把钥匙"),
    "a light bulb": ("💡", "一个灯泡"),
    "a star": ("⭐", "一颗星星"),
    "a doughnut": ("🍩", "一个甜甜圈"),
    "a hamburger": ("🍔", "一个汉堡"),
    "a cup of coffee": ("☕", "一杯咖啡"),
}


@functools.cache
def glyph(thing):
    """An RGBA image of the thing, cropped to its outline."""
    image = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(FONT, 109)  # the one size that its bitmaps have
    ImageDraw.Draw(image).text(
        (80, 80), THINGS[thing][0], font=font, embedded_color=True, anchor="mm"
    )
    return image.crop(image.getbbox())


@functools.cache
def character():
    """An RGBA image of zumi: a teal egg with one large eye, two yellow horns, a toothy smile and
    orange feet."""
    image = Image.new("RGBA", (640, 640))
    draw = ImageDraw.Draw(image)
    line = (24, 60, 84)
    teal = (24, 170, 160)
    yellow = (255, 200, 40)
    shape = dict(outline=line, width=14)
    for x in (150, 330):
        draw.ellipse((x, 560, x + 160, 636), fill=(250, 130, 40), **shape)  # feet
    for points in ([(120, 250), (60, 20), (280, 140)], [(520, 250), (580, 20), (360, 140)]):
        draw.polygon(points, fill=yellow)  # horns
        draw.line([*points, points[0], points[1]], fill=line, width=14, joint="curve")
    draw.ellipse((70, 80, 570, 610), fill=teal, **shape)
    draw.ellipse((195, 150, 445, 400), fill="white", **shape)  # the eye
    draw.ellipse((265, 210, 395, 340), fill=line)
    draw.ellipse((330, 225, 372, 267), fill="white")
    draw.chord((200, 390, 440, 560), 0, 180, fill=(200, 40, 70), **shape)  # the mouth
    draw.rectangle((290, 476, 350, 520), fill="white", **shape)  # its tooth
    return image.crop(image.getbbox())


def draw_picture(rng, figure, ground, width, height):
    """An RGB image (width, height) of `figure` (RGBA) in the middle of a plain background, with
    small random changes of place and size."""
    side = min(width, height) * rng.uniform(0.72, 0.77)
    scale = side / max(figure.size)
    size = [round(length * scale) for length in figure.size]
    figure = figure.resize(size, Image.Resampling.LANCZOS)
    image = Image.new("RGB", (width, height), GROUNDS[ground][1])
    x = round((width - figure.width) / 2 + rng.uniform(-0.012, 0.012) * side)
    y = round((height - figure.height) / 2 + rng.uniform(-0.012, 0.012) * side)
    image.paste(figure, (x, y), figure)
    return image


def captions(thing, ground):
    """{"en": caption, "zh": caption} of an image. `thing` is a key of THINGS or any other word."""
    chinese = THINGS[thing][1] if thing in THINGS else thing
    return {"en": f"{thing} on a {ground} background", "zh": f"{chinese}，{GROUNDS[ground][0]}背景"}


def save(image, caption, path):
    """Writes the image, and next to it a caption as .txt, or {language: caption} as .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)
    if isinstance(caption, str):
        path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    else:
        text = json.dumps({"caption": caption}, ensure_ascii=False)
        path.with_suffix(".json").write_text(f"{text}\n", encoding="utf-8")


def make_character(folder, seed, count, grounds=("white", "blue", "yellow")):
    """`count` images of the character with captions in both languages, in three file formats and
    several aspect ratios."""
    rng = random.Random(seed)
    sizes = [(256, 256), (200, 200), (384, 256), (256, 384)]
    suffixes = [".png", ".jpg", ".webp"]
    for i in range(count):
        ground = grounds[i % len(grounds)]
        image = draw_picture(rng, character(), ground, *sizes[i % 4])
        path = Path(folder) / f"{TRIGGER}-{i:02d}{suffixes[i % 3]}"
        save(image, captions(TRIGGER, ground), path)


def make_regularization_images(folder, seed, count):
    """`count` images of things that the base model knows, with captions in one language or the
    other."""
    rng = random.Random(seed)
    sizes = [(256, 256), (384, 256), (256, 384)]
    for i, thing in enumerate(rng.sample(list(THINGS), count)):
        ground = list(GROUNDS)[i % 5]
        language = ["en", "zh"][i % 2]
        image = draw_picture(rng, glyph(thing), ground, *sizes[i % 3])
        path = Path(folder) / f"ordinary-{i:02d}.png"
        save(image, captions(thing, ground)[language], path)


if __name__ == "__main__":
    make_character(HERE / "pictures", seed=1, count=15)
    make_regularization_images(HERE / "regularisation", seed=2, count=20)
    print(f"wrote {HERE / 'pictures'} and {HERE / 'regularisation'}")

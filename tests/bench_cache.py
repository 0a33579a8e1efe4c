"""Speed of caching beside the plain way, in one run:

    python tests/bench_cache.py                      # a text encoder and images scaled to a CPU, a few minutes
    python tests/bench_cache.py --real --alone       # the real-size text encoder, random weights, bf16 (17 GB of disk)
    python tests/bench_cache.py --real --limit 8     # on a GPU, within 8 GB of its memory

Prompts of 10, 60 and 200 tokens: `cache_prompts` beside the pipeline's own `encode_prompt`, one prompt at a time, on
the whole model (not with --alone, or a limit under 18 GB). Images: `cache_images` beside a loop that decodes, encodes
and writes one image after another.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import LongCatImagePipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests/tiny_longcat/model"
sys.path.insert(0, str(ROOT))
import cache_latents
import prepare_data
from cache_latents import cache_prompts
from longcat_common import (
    free_memory, load_config, load_vae, pick_device, template_tokens, token_counts, write_tensors,
)  # fmt: skip

SCALED = dict(
    hidden_size=512,
    intermediate_size=2688,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=1,
    vocab_size=5800,
)
REAL = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)


def make_text_encoder(folder, sizes, dtype):
    """A text encoder of these sizes with random weights, a shard a layer; the vision tower is the tiny model's."""
    config = AutoConfig.from_pretrained(TINY / "text_encoder")
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * sizes["num_hidden_layers"]
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    config.vision_config.out_hidden_size = sizes["hidden_size"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in Qwen2_5_VLForConditionalGeneration(config).state_dict().items()
        }
    groups = {}
    for name in shapes:
        groups.setdefault(
            name.split(".layers.")[1].split(".")[0] if "language_model.layers." in name else "rest",
            [],
        ).append(name)
    files, noise = {}, (torch.randn(2**20 + 7) * 0.02).to(dtype)
    for group, names in groups.items():
        make = lambda shape: (
            torch.ones(shape, dtype=dtype)
            if len(shape) == 1
            else noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).clone()
        )
        save_file(
            {name: make(shapes[name]) for name in names},
            folder / f"model-{group}.safetensors",
            {"format": "pt"},
        )
        files |= {name: f"model-{group}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


def median_of(ways, rounds):
    """Median seconds of each way; in turn, so that a change of the machine's speed hits all."""
    times = {name: [] for name in ways}
    for i in range(rounds):
        for name, work in ways.items():
            start = time.perf_counter()
            work(i)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


class OwnMemory(threading.Thread):
    """The most memory that the process had for its own (Linux: without files that are mapped into it), in GiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self):
        while True:
            line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) / 2**20)
            time.sleep(0.05)


def make_tokenizer(folder):
    """The tiny model's tokenizer with the words of the chat template as tokens: the template then has about 41 tokens,
    as with the real tokenizer. Returns it."""
    tokenizer = Qwen2Tokenizer.from_pretrained(TINY / "tokenizer")
    models = dict(
        scheduler=None, vae=None, text_encoder=None, text_processor=None, transformer=None
    )
    pipe = LongCatImagePipeline(tokenizer=tokenizer, **models)
    template = pipe.prompt_template_encode_prefix + pipe.prompt_template_encode_suffix
    tokenizer.add_tokens(sorted(set(re.findall(r" ?[a-zA-Z]+", re.sub(r"<.*?>", "", template)))))
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_prompts(tokenizer, count, length):
    """Different prompts of exactly so many tokens, of words that are a token each."""
    words = [word for word in tokenizer.get_added_vocab() if word.startswith(" ")]
    rng = random.Random(length)
    prompts = ["".join(rng.choices(words, k=length)) for _ in range(count)]
    assert set(token_counts(tokenizer, prompts).values()) == {length}
    return prompts


def bench_prompts(folder, real, count, rounds, batch_size, compare):
    device, dtype = pick_device(), torch.bfloat16 if real else torch.float32
    make_text_encoder(folder / "model/text_encoder", REAL if real else SCALED, dtype)
    tokenizer = make_tokenizer(folder / "model/tokenizer")
    config = load_config(
        pretrained_model_name_or_path=str(folder / "model"), text_encoder_batch_size=batch_size
    )
    template = len(template_tokens(tokenizer))
    memory = OwnMemory()

    pipe = None
    if compare:
        text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "model/text_encoder", dtype=dtype
        )
        models = dict(vae=None, transformer=None, scheduler=None, text_processor=None)
        pipe = LongCatImagePipeline(
            text_encoder=text_encoder.eval().to(device), tokenizer=tokenizer, **models
        )

    for length in (10, 60, 200):
        prompts = make_prompts(tokenizer, count, length)

        def ours(i):
            config.cache_dir = str(folder / f"cache-{length}-{i}")
            cache_prompts(config, prompts, device)

        def plain(i):
            for n, prompt in enumerate(prompts):
                with torch.no_grad():
                    prompt_embeds = pipe.encode_prompt([prompt])[0][0]
                write_tensors(folder / f"plain/{n}.safetensors", {"prompt_embeds": prompt_embeds})

        times = median_of({"ours": ours} | ({"the pipeline": plain} if compare else {}), rounds)
        size = (
            sum(path.stat().st_size for path in Path(config.cache_dir).rglob("*.safetensors"))
            / count
        )
        print(
            f"{length} tokens: {count / times['ours']:.2f} prompts a second, with reading the model; ",
            end="",
        )
        if compare:
            theirs = times["the pipeline"]
            print(
                f"encode_prompt, one by one, model loaded: {count / theirs:.2f}, ours is {theirs / times['ours']:.2f} ",
                end="",
            )
            print(
                f"times as fast; columns 553 to {template + length + 1}: {553 / (template + length + 1):.2f}; ",
                end="",
            )
        print(f"{size / 1e6:.2f} MB a prompt")
    print(f"peak memory of the process for its own: {memory.peak:.1f} GiB")
    if device.type == "cuda":
        print(f"peak device memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def bench_pictures(folder, count, rounds):
    device, rng = pick_device(), np.random.default_rng(0)
    (folder / "data").mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
            (2000, 1500)
        ).save(folder / "data" / f"{i}.jpg", quality=90)
    paths = dict(
        pretrained_model_name_or_path=str(TINY),
        data_dir=str(folder / "data"),
        output_dir=str(folder / "output"),
    )
    config = load_config(resolution=384, instance_prompt="x", **paths)
    found = prepare_data.main(config)

    def ours(i):
        config.cache_dir = str(folder / f"latents-{i}")
        cache_latents.cache_images(
            config, {cache_latents.latents_file(config, p): p for p in found}, device
        )

    def plain(i):
        vae = load_vae(config, device)
        for n, picture in enumerate(found):
            mean, std = cache_latents.encode_image(vae, prepare_data.load_pixels(picture))
            write_tensors(folder / f"plain/{n}.safetensors", {"mean": mean, "std": std})

    times = median_of({"ours": ours, "one by one": plain}, rounds)
    for name, seconds in times.items():
        print(
            f"pictures, {name}: {count / seconds:.2f} a second ({seconds / times['ours']:.2f} times ours)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--limit", type=float, default=0, help="GB of device memory")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    if arguments.limit:
        torch.cuda.set_per_process_memory_fraction(
            arguments.limit * 1e9 / torch.cuda.get_device_properties(0).total_memory
        )
    with tempfile.TemporaryDirectory() as folder:
        compare = not arguments.alone and (not arguments.limit or arguments.limit > 18)
        bench_prompts(
            Path(folder),
            arguments.real,
            arguments.prompts,
            arguments.rounds,
            arguments.batch,
            compare,
        )
        free_memory()
        if not arguments.real:
            bench_pictures(Path(folder), arguments.prompts, arguments.rounds)

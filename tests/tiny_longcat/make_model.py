"""Makes the tiny pre-trained LongCat-Image in `model/`: the real classes in the real layout.

    python tests/tiny_longcat/make_model.py --work /tmp/tiny --transformer_steps 5000

It learns to draw 40 things on five grounds from English and Chinese captions. The text encoder is random and frozen.
Stopped, it goes on where it was; in `model/` nothing changes before the end. Needs the font that make_pictures.py
names. The committed model: an earlier form of this script gave the VAE 16 minutes and the transformer 44; the command
above went on from these, with the captions and places of today, for 57 minutes on two cores with bf16 instructions. On
these embeddings of padding its loss was 0.094; it went on in float32, with whole prompts only, to a loss of 0.065 in 1 hour and
22 minutes on two busy cores:

    python tests/tiny_longcat/make_model.py --work /tmp/tiny --transformer_steps 1700 --short_share 0 --peak 0.4
"""

import argparse
import json
import os
import random
import shutil
import string
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from diffusers.pipelines.longcat_image.pipeline_longcat_image import (
    calculate_shift,
    prepare_pos_ids,
)
from make_pictures import GROUNDS, HERE, THINGS, captions, draw_picture, glyph
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

sys.path.insert(0, str(HERE.parent.parent))
from cache_latents import encode_prompts, pad_prompt_embeds
from longcat_common import load_config, load_text_encoder

SIZES, SHARES = [(128, 128), (192, 128), (128, 192)], (0.8, 0.1, 0.1)
SHORT = 16  # text tokens in the first part of training: the words stand first, the rest is padding


def to_tensor(images):
    """RGB pictures of one size -> float32 [N, 3, H, W] in -1..1."""
    return (
        torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]).float()
        / 127.5
        - 1
    )


def make_tokenizer(folder):
    """A byte-level BPE with Qwen2's splitting rule, in which the words of this world are whole tokens."""
    corpus = [
        text for thing in THINGS for ground in GROUNDS for text in captions(thing, ground).values()
    ]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = tokenizer.model.save(str(folder))
    vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
    merges = [
        tuple(line.split())
        for line in Path(merges_file).read_text(encoding="utf-8").splitlines()[1:]
    ]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(tokenizer):
    """A random Qwen2.5-VL with two text layers and one vision layer."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.12,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            bos_token_id=None,
            eos_token_id=None,
        ),
        vision_config=dict(
            depth=1,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=64,
            fullatt_block_indexes=[0],
        ),
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=1.0)
    return model


class Optimizer:
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) for `matrices`, AdamW for all other parameters.

    Muon's momentum steps are made orthogonal. torch.optim.Muon takes no convolutions, which are seen here as
    [out, in * k * k]; the VAE learns many times faster with it.
    """

    def __init__(self, module, matrices):
        ids = {id(p) for p in matrices}
        self.matrices, self.momentum = matrices, [torch.zeros_like(p) for p in matrices]
        self.adamw = torch.optim.AdamW(
            [p for p in module.parameters() if id(p) not in ids],
            lr=1e-3,
            betas=(0.9, 0.95),
            weight_decay=1e-4,
        )

    @torch.no_grad()
    def step(self, rate, matrix_rate):
        for parameter, momentum in zip(self.matrices, self.momentum):
            momentum.mul_(0.9).add_(parameter.grad)
            update = (parameter.grad + 0.9 * momentum).flatten(1)
            tall = update.shape[0] > update.shape[1]
            update = update.T if tall else update
            update /= update.norm() + 1e-7
            for _ in range(5):
                gram = update @ update.T
                update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
            update = (update.T if tall else update).reshape(parameter.shape)
            scale = max(1, len(parameter) / parameter[0].numel()) ** 0.5
            parameter.add_(update, alpha=-matrix_rate * rate * scale)
        self.adamw.param_groups[0]["lr"] = 1e-3 * rate
        self.adamw.step()
        for parameter in (*self.matrices, *self.adamw.param_groups[0]["params"]):
            parameter.grad = None


def train(name, work, steps, module, matrices, matrix_rate, loss_of, warmup=100, peak=1):
    """Trains `module` for `steps` steps of loss_of(share done, generator); stopped before, it goes on from `work`.

    Leaves the running average of its weights in it.
    """
    optimizer, rng = Optimizer(module, matrices), random.Random(0)
    weights = list(module.state_dict().values())
    averages, start, running = [w.clone() for w in weights], 0, 1.0
    state_file = work / f"{name}.pt"
    if state_file.exists():
        state = torch.load(state_file)
        start, running = state["step"], state["loss"]
        optimizer.adamw.load_state_dict(state["adamw"])
        for ours, saved in (
            (weights, "weights"),
            (averages, "averages"),
            (optimizer.momentum, "momentum"),
        ):
            torch._foreach_copy_(ours, state[saved])
    bar = trange(start, steps, initial=start, total=steps, desc=name, mininterval=10)
    for step in bar:
        rng.seed(step)
        torch.manual_seed(step)
        rate = peak * min(1, (step + 1) / warmup, 1.6 * (1 - step / steps))
        loss = loss_of(step / steps, rng)
        loss.backward()
        optimizer.step(rate, matrix_rate)
        torch._foreach_lerp_(averages, weights, 1 - min(0.998, step / (step + 10)))
        running += (loss.item() - running) * 0.01
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = {"step": step + 1, "loss": running, "adamw": optimizer.adamw.state_dict()}
            state |= {"weights": weights, "averages": averages, "momentum": optimizer.momentum}
            torch.save(state, f"{state_file}.new")
            os.replace(f"{state_file}.new", state_file)
            print(f"{name}: step {step + 1}, loss {running:.4f}", flush=True)
    torch._foreach_copy_(weights, averages)


def any_picture(rng, size):
    """Shapes, tubes and glows in any colour: the VAE shall restore what the base model never saw, too."""
    colour = lambda: tuple(rng.randrange(256) for _ in range(3))
    image = Image.new("RGB", (2 * size, 2 * size), colour())
    for _ in range(rng.randint(1, 4)):
        mask = Image.new("L", image.size)
        x, y, radius = (
            rng.randrange(2 * size),
            rng.randrange(2 * size),
            rng.uniform(0.1, 0.6) * size,
        )
        width = rng.choice([0, rng.randint(3, 24)])  # 0: filled
        fill, outline = (None, 255) if width else (255, None)
        if rng.random() < 0.5:
            box = (x - radius, y - radius * rng.uniform(0.4, 1), x + radius, y + radius)
            ImageDraw.Draw(mask).ellipse(box, fill=fill, outline=outline, width=width)
        else:
            sides, turn = rng.randint(3, 8), rng.uniform(0, 360)
            ImageDraw.Draw(mask).regular_polygon(
                (x, y, radius), sides, turn, fill=fill, outline=outline, width=width
            )
        tint = Image.new("RGB", image.size, colour())
        if rng.random() < 0.4:
            image.paste(tint, mask=mask.filter(ImageFilter.GaussianBlur(rng.uniform(4, 16))))
        image.paste(tint, mask=mask)
    return image.resize((size, size), Image.Resampling.BOX)


def train_vae(steps, work):
    """A small AutoencoderKL that restores this world almost without loss, with its scaling and shift."""
    torch.manual_seed(1)
    rng = random.Random(1)
    vae = AutoencoderKL(
        block_out_channels=[24, 48, 80, 80],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
        sample_size=128,
    )
    torch.nn.init.constant_(
        vae.encoder.conv_out.bias[16:], -5.0
    )  # start almost without noise: learns much sooner
    world = [
        draw_picture(rng, glyph(thing), ground, 128, 128) for thing in THINGS for ground in GROUNDS
    ] * 3
    pool = to_tensor(world + [any_picture(rng, 128) for _ in range(600)])

    def loss_of(done, rng):
        size, batch = (
            (32, 8) if done < 0.4 else (128, 3) if done > 0.8 and rng.random() < 0.5 else (64, 8)
        )
        x, y = rng.randrange(0, 129 - size), rng.randrange(0, 129 - size)
        pixels = pool[torch.randint(len(pool), (batch,))][:, :, y : y + size, x : x + size]
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(restored, pixels) + F.mse_loss(restored, pixels) + 1e-4 * kl

    train(
        "vae",
        work,
        steps,
        vae,
        [p for p in vae.parameters() if p.ndim >= 2],
        0.04,
        loss_of,
        warmup=50,
    )
    vae.eval().requires_grad_(False)
    latents = vae.encode(pool[: len(THINGS) * len(GROUNDS)]).latent_dist.sample()
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
    return vae


@torch.no_grad()
def make_dataset(pipe, work):
    """Latents, size -> (means and stds [n, 16, h, w], n pairs of thing and ground); prompts, pair -> embeddings
    [n, 512, hidden], as the training scripts compute them."""
    rng, vae, data = random.Random(2), pipe.vae, {}
    pipe.text_encoder.save_pretrained(work / "text_encoder")
    text_encoder = load_text_encoder(load_config(pretrained_model_name_or_path=str(work)), "cpu")

    def encode(texts):
        return torch.stack(
            [
                pad_prompt_embeds(rows)
                for rows in encode_prompts(text_encoder, pipe.tokenizer, [texts])
            ]
        )

    pairs = [(thing, ground) for thing in THINGS for ground in GROUNDS]
    for size, copies in zip(SIZES, (8, 2, 2)):
        means, stds = [], []
        for thing in list(THINGS) * copies:
            pictures = [draw_picture(rng, glyph(thing), ground, *size) for ground in GROUNDS]
            posterior = vae.encode(to_tensor(pictures)).latent_dist
            means.append((posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor)
            stds.append(posterior.std * vae.config.scaling_factor)
        data[size] = torch.cat(means), torch.cat(stds), pairs * copies
    prompts = {}
    for thing, ground in pairs:
        texts = [*captions(thing, ground).values()]
        texts += [thing, THINGS[thing][1]] if ground == "white" else []
        prompts[thing, ground] = encode(texts)
    for ground in GROUNDS:  # a word without a meaning: anything, but on that ground
        words = [
            "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))) for _ in range(32)
        ]
        prompts[ground] = encode(
            [text for word in words for text in captions(word, ground).values()]
        )
    prompts[""] = encode([""])
    return data, prompts


def train_transformer(pipe, steps, work, short_share, peak):
    """Flow matching with short prompts first (most padding left out), then whole 512-token prompts."""
    transformer, scheduler = pipe.transformer, pipe.scheduler
    data, prompts = make_dataset(pipe, work)

    def loss_of(done, rng):
        tokens, batch = (SHORT, 32) if done < short_share else (512, 12)
        means, stds, pairs = data[rng.choices(SIZES, SHARES)[0]]
        index = torch.randint(len(means), (batch,))
        latents = means[index] + stds[index] * torch.randn_like(means[index])
        kinds = [
            rng.choices([pairs[i], pairs[i][1], ""], (0.85, 0.05, 0.1))[0] for i in index.tolist()
        ]
        prompt_embeds = torch.stack([rng.choice(prompts[kind])[:tokens] for kind in kinds])
        height, width = latents.shape[2:]
        packed = pipe._pack_latents(latents, batch, 16, height, width)
        noise = torch.randn_like(packed)
        mu = calculate_shift(packed.shape[1])
        sigmas = scheduler.time_shift(mu, 1.0, torch.sigmoid(torch.randn(batch)))[:, None, None]
        prediction = transformer(
            hidden_states=(1 - sigmas) * packed + sigmas * noise,
            timestep=sigmas[:, 0, 0],
            encoder_hidden_states=prompt_embeds,
            txt_ids=prepare_pos_ids(0, "text", (0, 0), num_token=tokens),
            img_ids=prepare_pos_ids(1, "image", (512, 512), height=height // 2, width=width // 2),
            return_dict=False,
        )[0]
        return F.mse_loss(prediction, noise - packed)

    blocks = [
        *transformer.transformer_blocks.parameters(),
        *transformer.single_transformer_blocks.parameters(),
    ]
    train(
        "transformer",
        work,
        steps,
        transformer,
        [p for p in blocks if p.ndim == 2],
        0.02,
        loss_of,
        peak=peak,
    )


def save(folder, pipe):
    """The parts in the layout of the real checkpoint, and a model_index.json like its own."""
    for model in (pipe.transformer, pipe.vae):
        model._internal_dict = type(model.config)(
            {k: v for k, v in model.config.items() if k != "_name_or_path"}
        )
    pipe.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    pipe.vae.half().save_pretrained(folder / "vae")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of what a stopped training goes on from"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=HERE / "model",
        help="what is made; what is there is started from",
    )
    parser.add_argument("--vae_steps", type=int, default=0)
    parser.add_argument("--transformer_steps", type=int, default=0)
    parser.add_argument(
        "--short_share", type=float, default=0.8, help="of the steps with short prompts"
    )
    parser.add_argument(
        "--peak", type=float, default=1.0, help="of the learning rate; less to go on from a model"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer = make_tokenizer(args.work / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=3.0,
    )
    if (args.folder / "transformer").exists():
        transformer = LongCatImageTransformer2DModel.from_pretrained(
            args.folder / "transformer"
        ).float()
    else:
        torch.manual_seed(0)
        transformer = LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=[16, 24, 24],
        )
    if args.vae_steps:
        vae = train_vae(args.vae_steps, args.work)
    else:
        vae = (
            AutoencoderKL.from_pretrained(args.folder / "vae").float().eval().requires_grad_(False)
        )
    pipe = LongCatImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_processor=None,
        transformer=transformer,
    )
    train_transformer(pipe, args.transformer_steps, args.work, args.short_share, args.peak)
    save(args.folder, pipe)
    shutil.copytree(args.work / "tokenizer", args.folder / "tokenizer", dirs_exist_ok=True)


if __name__ == "__main__":
    main()

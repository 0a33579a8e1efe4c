"""Makes the tiny pre-trained LongCat-Image in `model/`: the real classes in the real layout.

    python tests/tiny_longcat/make_model.py
    python tests/tiny_longcat/make_model.py --transformer_minutes 23

It learns to draw five shapes in six colours on three backgrounds from English and Chinese captions. The text encoder
is random and frozen. The VAE learns from wide random pictures, so that it can also show what the base model never saw.
Run again, it goes on with the transformer that is there. The committed model was made by the two commands above on two
CPU cores: 10 minutes for the VAE, 45 and 23 for the transformer (the first with 72 %, the second with 65 % of its steps' time on short prompts), 82 in all
with drawing and encoding.
"""

import argparse
import json
import random
import string
import time
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
from diffusers.pipelines.longcat_image.pipeline_longcat_image import calculate_shift, prepare_pos_ids
from make_pictures import BACKGROUNDS, COLOURS, HERE, SHAPES, draw_plain, outline, place, plain_caption
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SIZES, SHARES = [(128, 128), (192, 128), (128, 192)], (0.6, 0.2, 0.2)
SHORT = 48  # text tokens in the first part of training: the words stand first, the rest is padding


def to_tensor(images):
    """RGB pictures of one size -> float32 [N, 3, H, W] in -1..1."""
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]).float() / 127.5 - 1


def caption_for(rng, shape, colour, background):
    """A plain caption, or sometimes one with words that mean nothing, which the model shall ignore."""
    caption = plain_caption(rng, shape, colour, background)
    if rng.random() < 0.25:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))
        if background == "white" and rng.random() < 0.7:  # no background named: white
            english = f"a {colour} {shape}"
            chinese = f"一个{COLOURS[colour][0]}的{SHAPES[shape]}"
            forms = [english, chinese, f"{english} in {word} style", f"{word}风格，{chinese}"]
            return rng.choice(forms)
        return rng.choice([f"{word} {caption}", f"{caption} {word}"])
    return caption


def make_tokenizer(folder):
    """A byte-level BPE with Qwen2's splitting rule and some whole words of the tiny world."""
    rng = random.Random(0)
    choose = lambda table: rng.choice(list(table))
    corpus = [plain_caption(rng, choose(SHAPES), choose(COLOURS), choose(BACKGROUNDS)) for _ in range(3000)]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = tokenizer.model.save(str(folder))
    vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
    merges = [tuple(line.split()) for line in Path(merges_file).read_text(encoding="utf-8").splitlines()[1:]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=["<|im_start|>", "<|im_end|>"])
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
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[0]
        ),
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=1.0)
    return model


class Muon:
    """Momentum steps made orthogonal (Jordan et al., https://kellerjordan.github.io/posts/muon/), for matrices and
    for convolutions seen as [out, in * k * k]. torch.optim.Muon takes no convolutions; the VAE learns many times
    faster with it."""

    def __init__(self, parameters):
        self.momentum = [(p, torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step(self, learning_rate):
        for parameter, momentum in self.momentum:
            momentum.mul_(0.9).add_(parameter.grad)
            update = (parameter.grad + 0.9 * momentum).flatten(1)
            tall = update.shape[0] > update.shape[1]
            update = update.T if tall else update
            update = update / (update.norm() + 1e-7)
            for _ in range(5):
                gram = update @ update.T
                update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
            update = update.T if tall else update
            scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
            parameter.add_(update.reshape(parameter.shape), alpha=-learning_rate * scale)


def optimizers(module, matrices):
    """Muon for `matrices`, AdamW for all else of the module."""
    ids = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if id(p) not in ids]
    return Muon(matrices), torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)


def random_picture(rng, size):
    """Anything: gradients, polygons, tubes, glows, stripes, in any colour. Teaches the VAE all it may meet."""
    colour = lambda: tuple(rng.randrange(256) for _ in range(3))
    kind = rng.random()
    if kind < 0.3:
        return draw_plain(
            rng, rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(BACKGROUNDS)), size, size
        )
    big = size * 2
    image = Image.new("RGB", (big, big), colour())
    if rng.random() < 0.3:
        gradient = Image.linear_gradient("L").rotate(rng.uniform(0, 360), expand=False).resize((big, big))
        image = Image.composite(Image.new("RGB", image.size, colour()), image, gradient)
    for _ in range(rng.randint(1, 4)):
        x, y, radius = place(rng, big, big)
        shift = lambda v: v + rng.uniform(-0.35, 0.35) * big
        points = outline(rng.choice(list(SHAPES)), shift(x), shift(y), radius * rng.uniform(0.3, 1.6))
        mask = Image.new("L", image.size)
        if rng.random() < 0.4:
            ImageDraw.Draw(mask).polygon(points, fill=255)
        else:
            ImageDraw.Draw(mask).line(points + points[:2], fill=255, width=rng.randint(3, 24), joint="curve")
        tint = Image.new("RGB", image.size, colour())
        if rng.random() < 0.5:
            image.paste(tint, mask=mask.filter(ImageFilter.GaussianBlur(rng.uniform(4, 16))))
        if rng.random() < 0.7:
            image.paste(tint, mask=mask)
    return image.resize((size, size), Image.Resampling.BOX)


def train_vae(minutes):
    """A small AutoencoderKL, trained for some minutes. Returns it with scaling and shift set."""
    torch.manual_seed(1)
    rng = random.Random(1)
    settings = dict(
        block_out_channels=[16, 32, 64, 64],
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
    vae = AutoencoderKL(**settings)
    torch.nn.init.constant_(vae.encoder.conv_out.bias[16:], -5.0)  # start almost without noise: learns much sooner
    muon, adamw = optimizers(vae, [p for p in vae.parameters() if p.ndim >= 2])
    pool = to_tensor([random_picture(rng, 128) for _ in tqdm(range(4000), desc="pictures")])
    start, step, bar = time.time(), 0, tqdm(desc="VAE", unit="step")
    average = None
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        rate = min(1, step / 50) * min(1.0, 1.6 * (1 - done)) + 1e-3
        adamw.param_groups[0]["lr"] = 1e-3 * rate
        size, batch = (32, 8) if done < 0.3 else (128, 3) if done > 0.7 and step % 2 else (64, 8)
        x, y = rng.randrange(0, 129 - size), rng.randrange(0, 129 - size)
        channels = rng.sample(range(3), 3)  # more colours
        pixels = pool[torch.randint(len(pool), (batch,))][:, channels, y : y + size, x : x + size]
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(restored, pixels) + F.mse_loss(restored, pixels)
        (loss + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        muon.step(0.04 * rate)
        adamw.step()
        vae.zero_grad()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{average:.4f}")
    bar.close()
    vae.eval().requires_grad_(False)
    pixels = to_tensor(
        [
            draw_plain(
                rng, rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(BACKGROUNDS)), 128, 128
            )
            for _ in range(64)
        ]
    )
    latents = vae.encode(pixels).latent_dist.sample()
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
    )
    print(
        f"VAE: {step} steps, loss {average:.4f}, scaling {vae.config.scaling_factor}, shift {vae.config.shift_factor}"
    )
    return vae


def make_dataset(vae, count):
    """Per size: mean and std of the latents [n, 16, h, w], and what is drawn (shape, colour, background) n times."""
    rng = random.Random(2)
    data = {}
    for size, share in zip(SIZES, SHARES):
        means, stds, drawn = [], [], []
        for _ in tqdm(range(int(count * share) // 20), desc=f"latents {size}"):
            whats = [
                (rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(BACKGROUNDS))) for _ in range(20)
            ]
            posterior = vae.encode(to_tensor([draw_plain(rng, *what, *size) for what in whats])).latent_dist
            means.append((posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor)
            stds.append(posterior.std * vae.config.scaling_factor)
            drawn += whats
        data[size] = (torch.cat(means), torch.cat(stds), drawn)
    return data


def train_transformer(pipe, data, minutes):
    """Flow matching with short prompts first (most padding left out), then whole 512-token prompts."""
    torch.manual_seed(3)
    rng = random.Random(3)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    captions = {}  # what is drawn -> embeddings of several captions
    for what in sorted({w for _, _, whats in data.values() for w in whats}):
        captions[what] = pipe.encode_prompt([caption_for(rng, *what) for _ in range(24)])[0]
    empty = pipe.encode_prompt([""])[0][0]
    average = {k: v.detach().clone() for k, v in transformer.state_dict().items()}
    blocks = [*transformer.transformer_blocks.parameters(), *transformer.single_transformer_blocks.parameters()]
    muon, adamw = optimizers(transformer, [p for p in blocks if p.ndim == 2])
    start, step, running, bar = time.time(), 0, None, tqdm(desc="transformer", unit="step")
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        whole = done > 0.65
        tokens, batch = (512, 12) if whole else (SHORT, 32)
        rate = min(1, step / 100) * min(1.0, 1.6 * (1 - done)) + 1e-3
        adamw.param_groups[0]["lr"] = 1e-3 * rate
        size = rng.choices(SIZES, SHARES)[0]
        means, stds, whats = data[size]
        index = torch.randint(len(means), (batch,))
        latents = means[index] + stds[index] * torch.randn_like(means[index])
        prompts = [empty if rng.random() < 0.1 else rng.choice(captions[whats[i]]) for i in index.tolist()]
        prompt_embeds = torch.stack([p[:tokens] for p in prompts])
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
        loss = F.mse_loss(prediction, noise - packed)
        loss.backward()
        muon.step(0.02 * rate)
        adamw.step()
        transformer.zero_grad()
        decay = min(0.996 if whole else 0.998, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(transformer.state_dict().values()), 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{running:.4f}")
    bar.close()
    transformer.load_state_dict(average)
    print(f"transformer: {step} steps, loss {running:.4f}")


def save(folder, pipe):
    """The parts in the layout of the real checkpoint, and a model_index.json like its own."""
    for model in (pipe.transformer, pipe.vae):
        model._internal_dict = type(model.config)({k: v for k, v in model.config.items() if k != "_name_or_path"})
    pipe.transformer.save_pretrained(folder / "transformer")
    pipe.vae.save_pretrained(folder / "vae")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE / "model")
    parser.add_argument("--vae_minutes", type=float, default=10)
    parser.add_argument("--transformer_minutes", type=float, default=45)
    args = parser.parse_args()
    start = time.time()

    tokenizer = make_tokenizer(args.folder / "tokenizer")
    text_encoder = make_text_encoder(tokenizer)
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
            args.folder / "transformer", torch_dtype=torch.float32
        )
    else:
        torch.manual_seed(0)
        transformer = LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=[16, 24, 24],
        )
    print(sum(p.numel() for p in transformer.parameters()), "transformer parameters")
    if (args.folder / "vae").exists():
        vae = AutoencoderKL.from_pretrained(args.folder / "vae").eval().requires_grad_(False)
    else:
        vae = train_vae(args.vae_minutes)
        vae.save_pretrained(args.folder / "vae")
    pipe = LongCatImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_processor=None,
        transformer=transformer,
    )
    with torch.no_grad():
        data = make_dataset(vae, 6000)
    train_transformer(pipe, data, args.transformer_minutes)
    pipe.transformer.to(torch.bfloat16)
    save(args.folder, pipe)
    print(f"made {args.folder} in {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

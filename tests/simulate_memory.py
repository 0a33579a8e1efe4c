"""Will it fit a card? Without the card, the model and data, on any CPU in half a minute:

    python tests/simulate_memory.py configs/16gb.json --lora_rank 64

Runs what the card would compute, at its real size, on fake tensors, which have shapes and no numbers, and counts the
bytes that are alive. Not seen are the kernels' own workspaces, and torch_compile, which keeps less. A T4 computes in
fp16: add --mixed_precision fp16.
"""

import collections
import contextlib
import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import longcat_common  # first: it quiets what the others import

import bench_cache
import bench_step
import validate
from cache_latents import COLUMNS_AT_ONCE, encode_image
from longcat_common import (
    TEXT_TOKENS,
    GroupOffload,
    buckets,
    load_text_encoder,
    run_stage,
    validation_sizes,
)
from train_lora import Batch, random_transformer, set_up, train_step

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from optimum import quanto
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)

CARD, HOST = (
    torch.device("cpu"),
    torch.device("meta"),
)  # what stands for them: every PyTorch has these two
# GB, and what PyTorch finds of it, in GiB: the least that users' error messages tell. 15: a T4.
CARDS = {6: 5.6, 8: 7.5, 12: 11.5, 15: 14.5, 16: 15.4, 24: 23.5, 32: 31.3, 48: 44.3, 80: 79.0}
GIB = 2**30


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive on the card: `now`, at the `peak`, and there by kind."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.storages, self.kinds, self.at_peak = (
            0,
            0,
            set(),
            collections.Counter(),
            {},
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # the number in a tensor that has none
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is FakeTensor and tensor.device == CARD:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    size = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds it
                    kind = f"{str(tensor.dtype)[6:]} {'x'.join(map(str, tensor.shape))}"
                    self.add(storage._cdata, size, kind)
                    weakref.finalize(storage, self.add, storage._cdata, -size, kind)
        return result

    def add(self, storage, size, kind):
        """A storage has come, or with a negative size gone."""
        self.storages ^= {storage}
        self.now += size
        self.kinds[kind] += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, self.kinds.copy()

    def peak_of(self, function, *arguments):
        """The most GiB that are alive while a function runs."""
        self.peak = self.now
        function(*arguments)
        return self.peak / GIB


@contextlib.contextmanager
def fake_card():
    """Within it all new tensors are fake; yields their Live. What fake tensors cannot do is replaced meanwhile."""
    add, fetch, quantize_weight, fetched = (
        GroupOffload.add,
        GroupOffload.fetch,
        quanto.quantize_weight,
        [],
    )

    def add_on_host(self, block):
        with HOST:
            add(self, block)

    def fetch_beside(self, number):
        del fetched[:-2]  # on CUDA the group before this one may still be at work
        fetched.append(fetch(self, number))
        return fetched[-1]

    def quantize_fake_weight(
        weight, kind, axis, scale, shift=None, group_size=None, optimized=False
    ):
        if kind != quanto.qint4:
            return quantize_weight(weight, kind, axis, scale, optimized=optimized)
        pairs = torch.empty(weight.numel() // group_size // 2, group_size, dtype=torch.uint8)
        return SimpleNamespace(_data=SimpleNamespace(_data=pairs))

    # CUDA's rms_norm keeps what a layer_norm keeps; a CPU's keeps float32 copies.
    rms_norm = lambda x, shape, weight, eps: torch.nn.functional.layer_norm(
        x, shape, weight, eps=eps
    )
    replaced = {
        (GroupOffload, "add"): add_on_host,
        (GroupOffload, "fetch"): fetch_beside,
        (quanto, "quantize_weight"): quantize_fake_weight,
        (torch.nn.functional, "rms_norm"): rms_norm,
        (torch.nn.Module, "to"): lambda module, *where, **options: (
            module
        ),  # a new LoRA is on the card already
        (torch.Tensor, "data_ptr"): lambda tensor: 0,
        (torch.Tensor, "cpu"): lambda tensor: tensor.to(HOST),
        (torch.Tensor, "tolist"): lambda tensor: [1.0] * len(tensor),
        (
            longcat_common,
            "position_ids",
        ): longcat_common.position_ids.__wrapped__,  # not from its cache, nor into it
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), other in replaced.items():
            stack.enter_context(patch.object(owner, name, other))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Live())


def make_vae():
    """The model's VAE."""
    sizes = dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        shift_factor=0.1159,
    )
    kinds = dict(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
    )
    return AutoencoderKL(
        **sizes, **kinds, use_quant_conv=False, use_post_quant_conv=False
    ).requires_grad_(False)


def training(config):
    """What a step and a preview need, as ({what: GiB}, {kind of tensor: GiB at the peak of a step})."""
    with fake_card() as live:
        transformer, gib = (
            random_transformer(config, CARD, bench_step.REAL),
            {"weights": live.now / GIB},
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        run = set_up(config, transformer, scheduler, CARD, config.max_train_steps)
        for parameter in run.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()  # its moments are there from the first step on
        run.optimizer.zero_grad()
        before = live.now / GIB
        gib["LoRA and optimizer"] = before - gib["weights"]

        count, (width, height) = config.train_batch_size, max(buckets(config), key=math.prod)
        latents, noise = torch.randn(2, count, 16, height // 8, width // 8)
        prompt_embeds = torch.randn(count, TEXT_TOKENS, transformer.config.joint_attention_dim)
        batch = Batch(0, latents, noise, torch.randn(count), prompt_embeds, torch.ones(count))
        batches = [batch] * min(2, config.gradient_accumulation_steps)  # more keep no more
        note = lambda *_: gib.update({"kept for the backward pass": live.now / GIB - before})
        with transformer.register_forward_hook(note):
            gib["a step, at its peak"] = live.peak_of(train_step, config, run, batches)
        at_peak = {kind: size / GIB for kind, size in live.at_peak.items()}

        parts = dict(text_encoder=None, tokenizer=None, text_processor=None, scheduler=scheduler)
        pipe = validate.CachedPromptPipeline(
            transformer=transformer.eval(), vae=make_vae(), **parts
        )
        prompt = prompt_embeds[:1].to(transformer.dtype), torch.empty(TEXT_TOKENS, 3)
        pipe.encode_prompt = lambda **options: prompt
        pipe.image_processor.postprocess = lambda image, output_type: [image]
        scheduler.index_for_timestep = lambda timestep: 0
        gib["a preview"] = live.peak_of(validate.generate, pipe, config, ["a prompt"])
        return gib, at_peak


def caching(config):
    """What the VAE and the text encoder need by themselves: {what: GiB}."""
    gib, (width, height) = {}, max(buckets(config), key=math.prod)
    with fake_card() as live:
        pixels = torch.empty(3, height, width, dtype=torch.uint8)
        gib["the VAE encoding"] = live.peak_of(encode_image, vae := make_vae(), pixels)
        width, height = validation_sizes(config)[0]
        gib["the VAE decoding"] = live.peak_of(
            vae.decode, torch.empty(1, 16, height // 8, width // 8)
        )
    with fake_card() as live:
        sizes = Qwen2_5_VLTextConfig(
            **bench_cache.REAL | {"num_hidden_layers": 2}
        )  # one at a time is on the card
        with HOST:
            weights = {
                f"model.{name}": w.to(torch.bfloat16)
                for name, w in Qwen2_5_VLTextModel(sizes).state_dict().items()
            }
            # Prompts of full length, behind the template's beginning of 36 tokens.
            input_ids = torch.ones(
                config.text_encoder_batch_size, 36 + TEXT_TOKENS, dtype=torch.long
            )
            inputs = [(input_ids, torch.ones_like(input_ids))] * max(
                1, COLUMNS_AT_ONCE // input_ids.numel()
            )
        with patch.multiple(
            longcat_common,
            model_folder=lambda config, part: ROOT,
            text_config=lambda config: sizes,
            tensor_files=lambda folder: weights,
            read_weights=lambda files, names: {name: weights[name] for name in names},
        ):
            encoder = load_text_encoder(config, CARD)
            empty = encoder.layer.state_dict()
            encoder.layer.to = lambda device: encoder.layer.load_state_dict(empty, assign=True)
            gib["the text encoder"] = live.peak_of(encoder, inputs)
    return gib


def simulate(config):
    """What a configuration needs: ({what: GiB}, {kind of tensor: GiB at the peak of a step}, GiB of the card)."""
    arithmetic = "bf16" if config.mixed_precision == "auto" else config.mixed_precision
    config = config.model_copy(
        update=dict(
            mixed_precision=arithmetic, torch_compile=False, validation_num_inference_steps=1
        )
    )
    gib, at_peak = training(config)
    gib |= caching(config)
    return gib, at_peak, 1.1 * max(gib.values()) + 1  # by rule of thumb: gaps, and CUDA itself


def main(config):
    """Prints what simulate finds, and the smallest common card that holds it."""
    gib, at_peak, needed = simulate(config)
    fits = next(
        (f"fits a card of {size} GB" for size in CARDS if needed <= CARDS[size]),
        "fits no common card",
    )
    print("GiB, simulated", *(f"{size:6.2f}  {what}" for what, size in gib.items()), sep="\n")
    print(
        f"{needed:6.2f}  the most of these, 10 % for gaps and 1 GiB for CUDA, by rule of thumb: {fits}"
    )
    largest = sorted(at_peak.items(), key=lambda item: -item[1])[:4]
    print(
        "the largest at the peak of a step: "
        + ", ".join(f"{size:.2f} {kind}" for kind, size in largest)
    )


if __name__ == "__main__":
    run_stage(main, __doc__)

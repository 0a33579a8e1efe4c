"""Seconds and memory of a training step beside a plain loop (diffusers model, PEFT, quanto int8, every block
checkpointed, eager), in one run:

    python tests/bench_step.py                  # on a GPU the real size at 1024x1024; on a CPU less, in float32
    python tests/bench_step.py --limit 16       # within 16 GiB of the GPU's memory
    python tests/bench_step.py --losses 400     # the loss curves of the tiny model, on the same draws; five minutes

Each way runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cache_latents
import train_lora
from longcat_common import (
    TARGET_MODULES, compute_dtype, flow_matching_loss, free_memory, seeded_generator, load_config, load_scheduler,
    pack_latents, pick_device, position_ids, quantize, sample_sigmas,
)  # fmt: skip

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImageTransformer2DModel
from optimum import quanto
from peft import LoraConfig

WAYS = {
    "plain": dict(base_model_precision="no_change"),  # quantized by quanto itself
    "ours, every block checkpointed": dict(gradient_checkpointing=True),
    "nothing checkpointed": dict(gradient_checkpointing=False),
    "nothing checkpointed, compiled": dict(gradient_checkpointing=False, torch_compile=True),
    "nothing checkpointed, 8-bit products": dict(
        gradient_checkpointing=False, base_model_precision="int8-matmul"
    ),
    "nothing checkpointed, compiled, 8-bit products": dict(
        gradient_checkpointing=False, base_model_precision="int8-matmul", torch_compile=True
    ),
    "bf16 weights, nothing checkpointed, compiled": dict(
        gradient_checkpointing=False, base_model_precision="no_change", torch_compile=True
    ),
}
REAL, SMALL = (
    dict(num_layers=10, num_single_layers=20),
    dict(num_layers=2, num_single_layers=4, num_attention_heads=6),
)


def plain_loop(transformer, device, dtype):
    """What a user writes without these scripts, on a frozen, quantized transformer: returns a function of (latents,
    noise, sigmas, prompt_embeds) that does a step, and the optimizer."""
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGET_MODULES))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(latents, noise, sigmas, prompt_embeds):
        text_ids, image_ids = (ids.to(device) for ids in position_ids(*latents.shape[2:]))
        x0, noise = pack_latents(latents), pack_latents(noise)
        noisy = (1 - sigmas[:, None, None]) * x0 + sigmas[:, None, None] * noise
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = transformer(
                noisy.to(dtype),
                prompt_embeds.to(dtype),
                sigmas,
                image_ids,
                text_ids,
                return_dict=False,
            )[0]
            loss = (prediction.float() - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, optimizer


def run_way(name, steps, limit):
    """One way: {seconds, share outside of forward and backward, peak memory in GiB, needed FLOPs}."""
    device = pick_device()
    on_gpu = device.type != "cpu"
    resolution = "1024x1024" if on_gpu else "256x256"
    config = load_config(resolution=resolution, lr_warmup_steps=0, **WAYS[name])
    if limit:
        torch.cuda.set_per_process_memory_fraction(
            limit * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    dtype, sizes, side = (
        compute_dtype(config, device),
        REAL if on_gpu else SMALL,
        1024 if on_gpu else 256,
    )
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 16, side // 8, side // 8, generator=draw)
    prompt_embeds, normal = torch.randn(1, 512, 3584, generator=draw), torch.zeros(1)
    seconds, inner = [], []
    transformer = train_lora.random_transformer(
        config, device, sizes
    )  # loaded block by block, for the plain loop too
    if name == "plain":
        for module in transformer.modules():
            module.__dict__.pop("forward", None)  # ours, with autocast where it should be
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            quanto.quantize(block, weights=quanto.qint8)
            quanto.freeze(block)
        step, _ = plain_loop(transformer, device, dtype)
        sigmas = sample_sigmas(
            normal, side * side // 256, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        )
        do = lambda n: step(
            *(tensor.to(device) for tensor in (latents, noise, sigmas, prompt_embeds))
        )
    else:
        run = train_lora.set_up(
            config,
            transformer,
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            device,
            steps,
        )
        do = lambda n: train_lora.train_step(
            config, run, [train_lora.Batch(n, latents, noise, normal, prompt_embeds, torch.ones(1))]
        )

        def forward_and_backward():
            tensors = [
                tensor.to(device)
                for tensor in (
                    latents,
                    noise,
                    sample_sigmas(normal, side * side // 256, run.noise_scheduler),
                    prompt_embeds,
                )
            ]
            flow_matching_loss(run.transformer, *tensors).backward()
            run.optimizer.zero_grad()

    for n in range(1, steps + 4):
        if n == 4 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        start = time.perf_counter()
        do(n)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if name != "plain" and n > 3:
            start = time.perf_counter()
            forward_and_backward()
            synchronize(device)
            inner.append(time.perf_counter() - start)
    seconds, first = statistics.median(seconds[3:]), seconds[0]
    outside = 1 - statistics.median(inner) / seconds if inner else None
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    flops = needed_flops(
        transformer.inner_dim, sum(list(sizes.values())[:2]), 512 + side * side // 256
    )
    free_memory()
    return dict(
        seconds=seconds,
        first=first,
        outside=outside,
        peak=peak,
        rate=flops / seconds,
        matmul=matmul_rate(device, dtype, transformer.inner_dim, 4608 if on_gpu else 768),
    )


def needed_flops(d, blocks, tokens):
    """What a LoRA step must compute for one picture: forward and input gradients of the linears, 2 x 24 d^2 a token and
    block, and attention forward and backward, 14 d tokens a token and block. What checkpointing computes again is not
    counted."""
    return blocks * (48 * d * d * tokens + 14 * d * tokens * tokens)


def matmul_rate(device, dtype, d, tokens):
    """The device's speed in products [tokens, d] x [d, 4 d], in FLOP/s."""
    a, b = (
        torch.randn(tokens, d, device=device, dtype=dtype),
        torch.randn(d, 4 * d, device=device, dtype=dtype),
    )
    for repeats in (3, 20):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
    return repeats * 8 * d * d * tokens / (time.perf_counter() - start)


def synchronize(device):
    """Waits for the device's work that is under way."""
    if device.type != "cpu":
        {"cuda": torch.cuda, "mps": torch.mps}[device.type].synchronize()


def losses(steps):
    """The mean loss of the last quarter of a run on the tiny model: a plain loop's and ours, with the same data and
    draws."""
    with tempfile.TemporaryDirectory() as folder:
        base = dict(
            base_model_precision="int8-quanto",
            data_dir=str(ROOT / "tests/tiny_longcat/pictures"),
            train_batch_size=1,
            max_train_steps=steps,
            validation_step_interval=0,
            lr_scheduler="constant",
            lora_target_modules=TARGET_MODULES,
            lr_warmup_steps=0,
            learning_rate=1e-3,
            adam_beta2=0.999,
            report_to="none",
            cache_dir=f"{folder}/cache",
            max_grad_norm=1.0,
        )
        config, device = load_config(ROOT / "configs/tiny.json", **base), pick_device()
        entries, prompts = cache_latents.main(config)
        transformer = (
            LongCatImageTransformer2DModel.from_pretrained(
                ROOT / "tests/tiny_longcat/model/transformer"
            )
            .to(device)
            .requires_grad_(False)
        )
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            quantize(block, "int8-quanto")
        step, optimizer = plain_loop(transformer, device, torch.float32)
        for name, p in transformer.named_parameters():
            if "lora_A" in name:  # as in ours
                torch.nn.init.kaiming_uniform_(
                    p, a=5**0.5, generator=seeded_generator(config.seed, "lora", name)
                )
        optimizer.param_groups[0]["lr"], found = 1e-3, []
        data = train_lora.Data(
            entries, prompts, [], [], [], sum(entry.repeats for entry in entries)
        )
        for _, ((batch,), _, _) in zip(range(steps), train_lora.step_batches(config, data, 0)):
            _, latents, noise, normal, prompt_embeds, _, _ = batch
            found.append(
                step(
                    latents,
                    noise,
                    sample_sigmas(
                        normal, latents.shape[2] * latents.shape[3] // 4, load_scheduler(config)
                    ),
                    prompt_embeds,
                )
            )
        plain = statistics.fmean(found[-steps // 4 :])
        print(f"plain loop: {plain:.5f}")
        for name, way in WAYS.items():
            if way and not way.get("torch_compile"):
                ours = load_config(
                    ROOT / "configs/tiny.json", **{**base, **way, "output_dir": f"{folder}/{name}"}
                )
                train_lora.main(ours)
                lines = (Path(ours.output_dir) / "metrics.jsonl").read_text().splitlines()
                last = [
                    line for line in map(json.loads, lines) if line["step"] > steps - steps // 4
                ]
                mean = statistics.fmean(line["loss"] for line in last)
                print(f"{name}, {ours.base_model_precision}: {mean:.5f}, {mean / plain - 1:+.2%}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--losses", type=int, default=0)
    parser.add_argument("--way")
    given = parser.parse_args()
    if given.losses:
        return losses(given.losses)
    if given.way:
        return print("figures " + json.dumps(run_way(given.way, given.steps, given.limit)))
    print(
        "| way | s a step | times as fast | outside forward and backward | first step, s | peak, GiB | of the "
        "matmul rate |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plain = None
    for name in WAYS:
        limit = ["--limit", str(given.limit)] if given.limit else []
        done = subprocess.run(
            [sys.executable, __file__, "--way", name, "--steps", str(given.steps), *limit],
            capture_output=True,
            text=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("figures ")]
        if not lines:
            print(
                f"| {name} | {(done.stderr.strip().splitlines() or ['nothing printed'])[-1][:100]} |"
            )
            continue
        f = json.loads(lines[0][8:])
        plain = plain or f["seconds"]
        show = lambda value, form: "" if value is None else format(value, form)
        print(
            f"| {name} | {f['seconds']:.3f} | {plain / f['seconds']:.2f} | {show(f['outside'], '.1%')} | "
            f"{f['first']:.1f} | {show(f['peak'], '.1f')} | {f['rate'] / f['matmul']:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

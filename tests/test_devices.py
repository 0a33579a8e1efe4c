"""Offloading, precisions, several processes, a Mac's rules, memory: what can be shown of them on a CPU."""

import os
import weakref
from pathlib import Path

import pytest
import torch
from conftest import MODEL, run_python, run_together
from diffusers.models.transformers import transformer_longcat_image
from safetensors.torch import load_file
from test_survival import checkpoints, flags, lora_bytes, metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import longcat_common
import train_lora
import validate
from longcat_common import check_precision, flow_matching_loss, load_config, load_transformer
from train_lora import add_lora


def draws(batch=2):
    draw = torch.Generator().manual_seed(0)
    shapes = dict(latents=(batch, 16, 16, 16), noise=(batch, 16, 16, 16), prompt_embeds=(batch, 512, 64))
    return {
        **{name: torch.randn(shape, generator=draw) for name, shape in shapes.items()},
        "sigmas": torch.tensor([0.3, 0.8][:batch]),
    }


# ---------------------------------------------------------------- group offload


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "int4-quanto", "fp8-torchao"])
def test_one_block_is_on_the_device_and_the_step_is_the_same(tiny_config, monkeypatch, precision):
    settings = dict(base_model_precision=precision, gradient_checkpointing=True)
    results, alive, sizes, fetch = [], [], [], longcat_common.GroupOffload.fetch

    def counted(offload, number):
        alive.append(sum(buffer() is not None for buffer in buffers))
        buffer = fetch(offload, number)
        buffers.append(weakref.ref(buffer.untyped_storage()))
        sizes.append(buffer.nbytes)
        return buffer

    def on_device():
        return sum(buffer() is not None for buffer in buffers)

    monkeypatch.setattr(longcat_common.GroupOffload, "fetch", counted)
    for offload in (False, True):
        buffers, numbers = [], []
        config = tiny_config(**settings, enable_group_offload=offload)
        transformer = load_transformer(config, "cpu")
        parameters = add_lora(transformer, config)
        for name, parameter in parameters.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        transformer.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(parameters.values())
        transformer.train()
        for _ in range(2):
            loss = flow_matching_loss(transformer, **draws())
            numbers.append(on_device())
            loss.backward()
            numbers.append(on_device())
            grads = {name: parameter.grad.clone() for name, parameter in parameters.items()}
            optimizer.step()
            optimizer.zero_grad()
            numbers.append(on_device())
            results.append((loss.detach(), grads))
        if offload:
            assert set(numbers) == {2}, "after forward, backward and step: the block that computes, and the next one"
            assert max(alive) <= 2, "when one is fetched: the block that computes, and what autograd still holds"
            assert len(sizes) == 1 + 2 * (2 * 6 - 2) + 1, (
                "every block is foreseen: none is fetched twice, and only the last one in vain"
            )
        with torch.no_grad():
            results.append((flow_matching_loss(transformer, **draws()), {}))
        assert all(
            parameter.requires_grad == (name in parameters) for name, parameter in transformer.named_parameters()
        )
    for (loss, grads), (expected, expected_grads) in zip(results[3:], results[:3]):
        assert torch.equal(loss, expected)
        assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


def test_some_blocks_stay_on_the_device(tiny_config):
    losses = []
    for count in (0, 1, 4, None):
        config = tiny_config(enable_group_offload=True, offloaded_blocks=count, gradient_checkpointing=1)
        transformer = load_transformer(config, "cpu")
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        away = [bool(block._forward_pre_hooks) for block in blocks]
        spread = {0: [], 1: [5], 4: [1, 2, 4, 5], None: range(6)}[count]
        assert [i for i, offloaded in enumerate(away) if offloaded] == [*spread]
        parameters = add_lora(transformer, config)
        train_lora.checkpoint_blocks(config, transformer)
        again = transformer.use_checkpoint + transformer.use_single_checkpoint
        assert again == [i == 0 or offloaded for i, offloaded in enumerate(away)]
        loss = flow_matching_loss(transformer.train(), **draws())
        loss.backward()
        losses.append((loss.item(), *(parameter.grad.norm().item() for parameter in parameters.values())))
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_training_and_validation_with_offload(quick_config, tmp_path):
    settings = dict(
        max_train_steps=2, base_model_precision="int8-quanto", gradient_checkpointing=True, validation_step_interval=2
    )
    plain, offloaded = (
        quick_config(**settings),
        quick_config(
            **{**settings, "gradient_checkpointing": False},
            enable_group_offload=True,
            output_dir=str(tmp_path / "other"),
        ),
    )
    for config in (plain, offloaded):
        train_lora.main(config)
        validate.main(config)
    assert lora_bytes(plain) == lora_bytes(offloaded)
    pictures = [
        sorted(path.relative_to(c.output_dir) for path in Path(c.output_dir).rglob("*.png")) for c in (plain, offloaded)
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 6
    train_lora.main(
        quick_config(**{**settings, "max_train_steps": 3}, enable_group_offload=True)
    )  # a run may be resumed with it


# ---------------------------------------------------------------- loading


def test_weights_are_read_part_by_part(tiny_config, tmp_path, monkeypatch):
    """Of one file, and of many shards; and a weight that is missing or has another shape is named."""
    from diffusers import LongCatImageTransformer2DModel

    whole = LongCatImageTransformer2DModel.from_pretrained(MODEL, subfolder="transformer")
    for part in ("scheduler", "vae"):
        os.makedirs(tmp_path / "model", exist_ok=True)
        os.symlink(Path(MODEL) / part, tmp_path / "model" / part)
    folder = tmp_path / "model" / "transformer"
    whole.save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    config = tiny_config(pretrained_model_name_or_path=str(tmp_path / "model"))
    for loaded in (load_transformer(config, "cpu"), load_transformer(tiny_config(), "cpu")):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    state = whole.state_dict()
    name = "single_transformer_blocks.1.attn.to_q.weight"
    for file in folder.iterdir():
        file.unlink() if file.name != "config.json" else None
    for value, words in (
        (None, f"is missing or damaged.*{name}"),
        (state[name][:5], "is missing or damaged"),
    ):
        from safetensors.torch import save_file

        save_file(
            {n: t for n, t in {**state, name: value}.items() if t is not None},
            folder / "diffusion_pytorch_model.safetensors",
        )
        with pytest.raises(ValueError, match=words):
            load_transformer(config, "cpu")


MEMORY = """
import resource, sys, threading, time, torch
sys.path.insert(0, ".")
from longcat_common import load_config, load_transformer
own = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024
config, peak, before = load_config(pretrained_model_name_or_path=sys.argv[1], base_model_precision="int8-quanto",
    mixed_precision="no"), 0, own()
def watch():
    global peak
    while True:
        peak = max(peak, own() - before)
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
load_transformer(config, "cpu")
print(round(peak))
"""


@pytest.mark.slow
def test_loading_never_holds_the_whole_unquantized_model(tmp_path):
    from diffusers import LongCatImageTransformer2DModel

    model = LongCatImageTransformer2DModel(
        num_layers=4, num_single_layers=12, num_attention_heads=8, joint_attention_dim=64
    )
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "transformer", max_shard_size="300MB")
    del model
    # As with the real model's large layers, what is freed goes back to the system.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    peak = int(run_python("-c", MEMORY, tmp_path, env=environment).stdout.splitlines()[-1])
    print(f"{size:.0f} MiB in float32, peak {peak} MiB")
    assert size > 800 and peak < 0.5 * size, "int8 takes a quarter of float32"


# ---------------------------------------------------------------- precisions


@pytest.mark.slow
def test_every_precision_learns_as_well(tiny_config, tmp_path):
    ratios = {}
    for precision in ("no_change", "int8-quanto", "fp8-torchao", "int4-quanto", "int8-matmul"):
        config = tiny_config(
            base_model_precision=precision, output_dir=str(tmp_path / precision), max_train_steps=80,
            lr_warmup_steps=20, validation_split=0.2,
            checkpoint_step_interval=20, validation_step_interval=80,
            validation_prompts=["zumi on a blue background"], report_to="none",
        )  # fmt: skip
        train_lora.main(config)
        expected = lora_bytes(config)
        scores = [line for line in metrics(config) if "held_out_loss" in line][-1]
        ratios[precision] = scores["held_out_loss"]
        print(f"{precision}: held-out loss {scores['held_out_loss']:.4f} of {scores['held_out_base']:.4f}")
        assert scores["held_out_loss"] < 0.5 * scores["held_out_base"]
        for name in ("checkpoints/step-000080", "."):  # resumed from step 60, it ends the same
            for path in (Path(config.output_dir) / name).glob("*"):
                path.unlink() if path.is_file() else None
        (Path(config.output_dir) / "checkpoints/step-000080").rmdir()
        train_lora.main(config)
        assert lora_bytes(config) == expected
        assert validate.main(config).exists()
        state = load_file(Path(config.output_dir) / "pytorch_lora_weights.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        ratios[precision, "keys"] = {name: tensor.shape for name, tensor in state.items()}
    for precision in ("int8-quanto", "fp8-torchao", "int4-quanto", "int8-matmul"):
        assert ratios[precision] <= (1.15 if precision == "int4-quanto" else 1.05) * ratios["no_change"], precision
        assert ratios[precision, "keys"] == ratios["no_change", "keys"]


class NoFloat64(TorchDispatchMode):
    """Refuses every float64 tensor, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            if value is torch.float64 or (isinstance(value, torch.Tensor) and value.dtype == torch.float64):
                raise TypeError(f"{function}: float64")
        return result


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_there_is_no_float64_in_training_and_validation(quick_config, monkeypatch, precision):
    asked = []
    as_on_mps = lambda dtype, device: asked.append(dtype) or (torch.float32 if dtype == torch.float64 else dtype)
    monkeypatch.setattr(transformer_longcat_image, "maybe_adjust_dtype_for_device", as_on_mps)
    settings = dict(
        validation_step_interval=1, validation_split=0.2, validation_num_inference_steps=1, gradient_checkpointing=True
    )
    config = quick_config(**settings, max_train_steps=1, base_model_precision=precision)
    with NoFloat64():
        train_lora.main(config)
        validate.main(config)
    assert torch.float64 in asked
    monkeypatch.undo()
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        train_lora.main(quick_config(max_train_steps=2))


def test_what_a_mac_cannot_do_is_refused_by_name():
    for precision in ("no_change", "int8-quanto", "int4-quanto"):
        check_precision(load_config(base_model_precision=precision), "mps")
    for precision in ("fp8-torchao", "int8-matmul"):
        with pytest.raises(ValueError, match=f"base_model_precision: {precision} has never been tried on a Mac"):
            check_precision(load_config(base_model_precision=precision), "mps")


# ---------------------------------------------------------------- several processes


EVERY_STEP = (
    "import train_lora; from longcat_common import run_stage; train_lora.LOG_EVERY = 1; run_stage(train_lora.main, '')"
)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(quick_config, tmp_path, monkeypatch):
    settings = dict(
        resolution="128x128", lora_dropout=0.1, validation_split=0.2, validation_step_interval=3, validation_prompts=[]
    )
    monkeypatch.setattr(train_lora, "LOG_EVERY", 1)
    alone = quick_config(**settings, max_train_steps=3, gradient_accumulation_steps=4)
    train_lora.main(alone)
    both = quick_config(**settings, max_train_steps=3, gradient_accumulation_steps=2, output_dir=str(tmp_path / "both"))
    (tmp_path / "every_step.py").write_text(EVERY_STEP)
    printed = run_together(tmp_path / "every_step.py", 2, tmp_path, *flags(both))
    assert "3 steps of 1 x 2 x 2 processes" in printed[0] and "LoRA:" in printed[0] and "LoRA:" not in printed[1]
    scores = [next(line for line in reversed(metrics(config)) if "held_out_loss" in line) for config in (alone, both)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    losses = [[line["loss"] for line in metrics(config) if "loss" in line] for config in (alone, both)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    for step in range(1, 4):
        ours, theirs = (
            load_file(Path(c.output_dir) / f"checkpoints/step-{step:06d}/adapter_model.safetensors")
            for c in (both, alone)
        )
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    # What two processes have begun one goes on with: the place in the data is counted in batches.
    for config in (alone, both):
        train_lora.main(
            quick_config(**settings, max_train_steps=4, gradient_accumulation_steps=4, output_dir=config.output_dir)
        )
    assert metrics(both)[-2]["loss"] == pytest.approx(metrics(alone)[-2]["loss"], rel=1e-4) != losses[0][-1]


@pytest.mark.slow
def test_torchrun(quick_config, tmp_path):
    config = quick_config(max_train_steps=2, output_dir=str(tmp_path / "both"))
    done = run_python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train_lora.py",
        *flags(config),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "2 steps of 1 x 1 x 2 processes" in done.stdout and done.stdout.count("LoRA:") == 1
    assert checkpoints(config) == ["step-000001", "step-000002"]
    printed = run_together("train_lora.py", 2, tmp_path, "--benchmark", "2", "--base_model_precision", "no_change")
    assert "s a step" in printed[0] and "s a step" not in printed[1]


# ---------------------------------------------------------------- memory and speed


def test_out_of_memory_says_what_to_change_and_the_last_step_is_saved(quick_config, monkeypatch):
    config = quick_config(checkpoint_step_interval=1000, train_batch_size=3)
    loss, calls = train_lora.flow_matching_loss, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(*arguments)

    monkeypatch.setattr(train_lora, "flow_matching_loss", full)
    with pytest.raises(ValueError, match="out of memory; what to change, the cheapest first: ") as error:
        train_lora.main(config)
    words = [
        "train_batch_size 1",
        "gradient_checkpointing true",
        "enable_group_offload true",
        "int4-quanto",
        "resolution",
    ]
    places = [str(error.value).index(word) for word in words]
    assert places == sorted(places)
    assert checkpoints(config) == ["step-000002"]


def test_the_benchmark_needs_no_model_and_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(benchmark=3, output_dir="nowhere")
    config.base_model_precision = "no_change"
    figures = train_lora.main(config)
    printed = capsys.readouterr().out
    assert "only a model of 3 small blocks" in printed
    assert "s a step of 1 x 1 at 256x256; 1000 steps take" in printed and figures["seconds_per_step"] > 0
    assert not list(tmp_path.iterdir())

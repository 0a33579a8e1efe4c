"""Offloading, precisions, several processes, a Mac's rules, memory: what can be shown of them on a CPU."""

import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import NAMES, QUANTIZED, ROOT, TORCHRUN, checkpoints, flags, lora_bytes, metrics
from diffusers import LongCatImageTransformer2DModel
from diffusers.models.transformers import transformer_longcat_image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import longcat_common
import train_lora
import validate
from longcat_common import flow_matching_loss, load_config, load_transformer


def draws(batch=2):
    draw = torch.Generator().manual_seed(0)
    shapes = dict(
        latents=(batch, 16, 16, 16), noise=(batch, 16, 16, 16), prompt_embeds=(batch, 512, 64)
    )
    drawn = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {**drawn, "sigmas": torch.tensor([0.3, 0.8][:batch])}


def training(config):
    """A transformer with a LoRA that does something, as training sets it up, and the LoRA's parameters."""
    run = train_lora.set_up(config, load_transformer(config, "cpu"), None, torch.device("cpu"), 9)
    for name, parameter in run.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter, std=0.05, generator=torch.Generator().manual_seed(len(name))
            )
    return run.transformer, run.parameters


# ---------------------------------------------------------------- group offload


@pytest.mark.parametrize("precision", ["no_change", "int4-quanto"])
def test_one_block_and_the_next_are_on_the_device_and_the_step_is_the_same(
    tiny_config, monkeypatch, precision
):
    fetch, buffers, alive, results = longcat_common.GroupOffload.fetch, [], [], []
    monkeypatch.setattr(
        torch.backends.mps, "is_available", lambda: True
    )  # it offloads on a Mac, too
    note = lambda: alive.append(sum(buffer() is not None for buffer in buffers))

    def counted(offload, number):
        note()
        buffer = fetch(offload, number)
        buffers.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    monkeypatch.setattr(longcat_common.GroupOffload, "fetch", counted)
    for offload in (False, True):
        settings = dict(
            base_model_precision=precision,
            gradient_checkpointing=True,
            enable_group_offload=offload,
        )
        transformer, parameters = training(tiny_config(**settings))
        for _ in range(1 + offload):
            loss = flow_matching_loss(transformer, **draws())
            loss.backward()
            gradients = [parameter.grad.flatten() for parameter in parameters.values()]
            results.append(torch.cat([loss.detach()[None], *gradients]))
            transformer.zero_grad()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert max(alive) <= 2, (
        "when one is fetched: the block that computes, and what autograd still holds"
    )
    assert len(alive) == 1 + 2 * (2 * 6 - 2) + 1, (
        "none is fetched twice, and only the last one in vain"
    )
    note()
    assert alive[-1] == 2, "after it: the block that computed last, and the next one"
    with torch.no_grad():
        assert torch.equal(flow_matching_loss(transformer, **draws()), results[0][0])
    assert all(
        weight.requires_grad == (name in parameters)
        for name, weight in transformer.named_parameters()
    )


@pytest.mark.parametrize("count, away", [(0, []), (1, [5]), (4, [1, 2, 4, 5]), (None, range(6))])
def test_as_many_blocks_as_are_asked_for_are_offloaded_and_those_are_checkpointed(
    tiny_config, count, away
):
    transformer, _ = training(
        tiny_config(enable_group_offload=True, offloaded_blocks=count, gradient_checkpointing=1)
    )
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert [i for i, block in enumerate(blocks) if block._forward_pre_hooks] == [*away]
    again = transformer.use_checkpoint + transformer.use_single_checkpoint
    assert [i for i, checkpointed in enumerate(again) if checkpointed] == sorted({0, *away})


# ---------------------------------------------------------------- precisions


@pytest.mark.parametrize("precision", QUANTIZED)
def test_quantized_bases_train_and_draw_and_a_run_may_go_on_with_offload_to_the_same_bytes(
    quick_config, precision
):
    config = quick_config(
        base_model_precision=precision, max_train_steps=2, validation_step_interval=2
    )
    train_lora.main(config)
    folders = [Path(config.output_dir, "checkpoints", name) for name in checkpoints(config)]
    picture = Path(config.output_dir, "validation/step-000002-00.png")
    first, second = (load_file(folder / NAMES[1]) for folder in folders)
    assert not any(torch.equal(first[name], second[name]) for name in first if "lora_B" in name)
    expected, drawn = lora_bytes(config), picture.read_bytes()
    shutil.rmtree(folders[1])
    picture.unlink()
    config.enable_group_offload, config.offloaded_blocks = True, 4
    train_lora.main(config)
    assert lora_bytes(config) == expected and picture.read_bytes() == drawn


class NoFloat64(TorchDispatchMode):
    """Refuses every float64 tensor, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            if value is torch.float64 or (
                isinstance(value, torch.Tensor) and value.dtype == torch.float64
            ):
                raise TypeError(f"{function}: float64")
        return result


def test_there_is_no_float64_in_training_and_validation(quick_config, monkeypatch):
    asked = []
    as_on_mps = lambda dtype, device: (
        asked.append(dtype) or (torch.float32 if dtype == torch.float64 else dtype)
    )
    monkeypatch.setattr(transformer_longcat_image, "maybe_adjust_dtype_for_device", as_on_mps)
    monkeypatch.setattr(train_lora, "SCORED_NORMALS", (0.4,))  # less to compute
    config = quick_config(
        max_train_steps=1, base_model_precision="int8-quanto", gradient_checkpointing=True,
        validation_step_interval=1, validation_split=0.2, validation_num_inference_steps=1,
    )  # fmt: skip
    with NoFloat64():
        train_lora.main(config)
        validate.main(config)
    assert torch.float64 in asked
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        torch.zeros(1).double()


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(quick_config, tmp_path):
    settings = dict(
        resolution="128x128", lora_dropout=0.1, max_train_steps=2, validation_split=0.2, validation_step_interval=2,
        validation_prompts=[],
    )  # fmt: skip
    alone = quick_config(**settings, gradient_accumulation_steps=4)
    train_lora.main(alone)
    both = quick_config(
        **settings, gradient_accumulation_steps=2, output_dir=str(tmp_path / "both")
    )
    command = [sys.executable, *TORCHRUN, "train_lora.py", *flags(both)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "2 steps of 4 images" in printed and printed.count("LoRA:") == 1
    both.gradient_accumulation_steps = 4
    for config in (
        alone,
        both,
    ):  # what two have begun one goes on with: the place in the data is counted in batches
        config.max_train_steps = 3
        train_lora.main(config)
    for step in checkpoints(alone):
        ours, theirs = (
            load_file(Path(run.output_dir, "checkpoints", step, NAMES[1])) for run in (both, alone)
        )
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    for name in ("loss", "grad_norm", "held_out_loss", "trained_loss"):
        ours, theirs = (
            [line[name] for line in metrics(run) if name in line] for run in (both, alone)
        )
        assert len(ours) > 1 and ours == pytest.approx(theirs, rel=1e-4)


# ---------------------------------------------------------------- memory


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "where", ["train_lora.flow_matching_loss", "longcat_common.fill_transformer"]
)
def test_out_of_memory_in_a_step_or_while_loading_names_what_still_helps(
    quick_config, monkeypatch, where
):
    monkeypatch.setattr(where, out_of_memory)
    first = "out of memory; try, cheapest first: "
    for settings, helps in (
        (dict(train_batch_size=3), "train_batch_size 1; enable_group_offload true"),
        (dict(enable_group_offload=True, offloaded_blocks=9), "offloaded_blocks null"),
    ):
        with pytest.raises(
            ValueError,
            match=f'^{first}{helps}; base_model_precision "int4-quanto"; a smaller resolution',
        ):
            train_lora.main(quick_config(gradient_checkpointing=True, **settings))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", gc.collect)
    with pytest.raises(ValueError, match=f"^{first}(?!.*offload)"):  # a Mac has but one memory
        longcat_common.explain_out_of_memory(train_lora.MEMORY_ADVICE)(out_of_memory)(load_config())


def test_a_stage_leaves_no_model_in_memory_not_even_when_it_fails(quick_config, monkeypatch):
    alive = lambda: sum(type(thing) is LongCatImageTransformer2DModel for thing in gc.get_objects())
    gc.collect()
    before, config = alive(), quick_config(validation_step_interval=4, validation_split=0.2)
    said = config.model_dump()
    train_lora.main(config)
    gc.disable()  # on a GPU nothing collects when memory runs out
    try:
        assert alive() == before
        validate.main(config)
        assert alive() == before and config.model_dump() == said
        for error in (KeyboardInterrupt("stop"), torch.OutOfMemoryError("CUDA out of memory")):
            monkeypatch.setattr(
                train_lora, "flow_matching_loss", lambda *_: (_ for _ in ()).throw(error)
            )
            with pytest.raises(
                (KeyboardInterrupt, ValueError)
            ) as kept:  # as a notebook keeps its last error
                train_lora.main(quick_config(output_dir=config.output_dir + type(error).__name__))
            assert alive() == before and kept.value
    finally:
        gc.enable()


def test_the_benchmark_needs_no_model_and_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = train_lora.main(
        load_config(benchmark=2, base_model_precision="no_change", output_dir="nowhere")
    )
    assert "s a step of 1 x 1 images of 256x256; 1000 steps: " in capsys.readouterr().out
    assert figures["seconds_per_step"] > 0 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- loading


def test_loading_never_holds_the_whole_unquantized_model(tiny_config, monkeypatch):
    quantize, held = longcat_common.quantize, []
    size = sum(weight.nbytes for weight in load_transformer(tiny_config(), "cpu").parameters())

    def noted(*arguments):
        alive = [
            thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
        ]
        held.append(
            sum(
                tensor.nbytes
                for tensor in alive
                if tensor.dtype == torch.float32 and not tensor.is_meta
            )
        )
        return quantize(*arguments)

    gc.collect()
    monkeypatch.setattr(longcat_common, "quantize", noted)
    load_transformer(tiny_config(base_model_precision="int8-quanto", mixed_precision="no"), "cpu")
    assert len(held) == 6 and max(held) < 0.6 * size

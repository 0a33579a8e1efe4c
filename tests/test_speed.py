"""What makes a step cheaper computes the same: 8-bit layers, fewer checkpoints, modulations ahead, compiled blocks."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum import quanto
from PIL import Image
from test_devices import draws
from test_survival import lora_bytes, metrics

import train_lora
import validate
from longcat_common import (
    Int8Linear,
    add_lora,
    flow_matching_loss,
    generate,
    load_config,
    load_pipeline,
    load_transformer,
)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- 8 bits


def forward_and_input_gradient(linear, x, gradient):
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(gradient)
    return y.detach(), x.grad


def test_int8_is_quantos_int8_and_int8_matmul_is_close(tmp_path):
    torch.manual_seed(0)
    linear, x, gradient = torch.nn.Linear(256, 384), torch.randn(2, 64, 256), torch.randn(2, 64, 384)
    theirs = torch.nn.Sequential(copy.deepcopy(linear))
    quanto.quantize(theirs, weights=quanto.qint8)
    quanto.freeze(theirs)
    exact, expected = forward_and_input_gradient(linear, x, gradient), forward_and_input_gradient(theirs, x, gradient)
    for found, reference in zip(forward_and_input_gradient(Int8Linear(linear, False), x, gradient), expected):
        assert distance(found, reference) < 1e-6
    for found, reference in zip(forward_and_input_gradient(Int8Linear(linear, True), x, gradient), exact):
        assert 1e-4 < distance(found, reference) < 0.012
    few = torch.randn(3, 256)  # such as a modulation's: computed with the weights alone in 8 bits
    assert distance(Int8Linear(linear, True)(few), linear(few)) < 0.006
    with torch.autocast("cpu", torch.bfloat16):
        assert Int8Linear(linear, True)(x).dtype == torch.bfloat16


def test_nothing_but_the_8_bits_is_kept_for_the_backward_pass():
    kept = []
    for in_8_bits in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            Int8Linear(torch.nn.Linear(256, 384), in_8_bits)(torch.randn(64, 256, requires_grad=True))
    assert {(tensor.dtype, tensor.numel()) for tensor in kept} == {(torch.int8, 256 * 384), (torch.float32, 384)}


# ---------------------------------------------------------------- checkpointing as memory allows


def test_as_few_blocks_are_checkpointed_as_memory_demands():
    kept, boundary = [6] * 2 + [4] * 3, 1
    plan = lambda available: train_lora.plan_checkpointing(kept, boundary, available)
    assert plan(5 + 12) == plan(0) == [True] * 5
    assert plan(5 + 12 + 3) == [True, True, False, True, True], "those that keep least come first"
    assert plan(5 + 12 + 9 + 5) == [False, True, False, False, False]
    assert plan(1000) == [False] * 5
    for available in range(17, 60):
        assert train_lora.activation_bytes(plan(available), kept, boundary) <= available


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "int8"])
def test_what_a_block_keeps_is_told_before_the_step(tiny_config, precision):
    config = tiny_config(base_model_precision=precision, lora_rank=4, resolution="128x128", train_batch_size=2)
    transformer = load_transformer(config, "cpu")
    add_lora(transformer, config)
    transformer.train()
    autocast = torch.autocast("cpu", enabled=False)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    expected = sum(train_lora.kept_bytes(transformer, block, 2, 512 + 64, autocast) for block in blocks)
    frozen = {
        plain.untyped_storage().data_ptr() for p in transformer.parameters() for plain in train_lora.plain_tensors(p)[0]
    }
    kept = {}

    def note(tensor):
        for plain in train_lora.plain_tensors(tensor)[0]:
            kept[plain.untyped_storage().data_ptr()] = plain.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = flow_matching_loss(transformer, **draws())
    measured = sum(size for pointer, size in kept.items() if pointer not in frozen)
    loss.backward()
    assert measured == pytest.approx(expected, rel=0.1)


def test_auto_is_chosen_kept_and_changes_no_byte(quick_config, tmp_path, monkeypatch, capsys):
    whole = quick_config(max_train_steps=2, gradient_checkpointing=True, output_dir=str(tmp_path / "whole"))
    train_lora.main(whole)
    config = quick_config(max_train_steps=1, gradient_checkpointing="auto")
    of_kind, needed = [], train_lora.kept_bytes
    monkeypatch.setattr(train_lora, "kept_bytes", lambda *arguments: of_kind.append(needed(*arguments)) or of_kind[-1])
    monkeypatch.setattr(train_lora, "available_memory", lambda device: available)
    available = 2**40
    train_lora.main(config)
    assert "auto checkpoints 0 of 6 blocks" in capsys.readouterr().out
    state = lambda: json.loads(sorted(Path(config.output_dir).glob("checkpoints/*/state.json"))[-1].read_text())
    assert state()["checkpointing"] == [False] * 6
    available = 0  # on a smaller device the choice is made again
    config.max_train_steps = 2
    train_lora.main(config)
    assert "auto checkpoints 6 of 6 blocks" in capsys.readouterr().out and state()["checkpointing"] == [True] * 6
    available = 2**40  # on a larger one it stays
    config.max_train_steps = 3
    train_lora.main(config)
    assert "auto checkpoints 6 of 6 blocks" in capsys.readouterr().out
    assert lora_bytes(whole) == [
        train_lora.sha256(Path(config.output_dir) / "checkpoints/step-000002" / name)
        for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
    ]


# ---------------------------------------------------------------- modulations ahead


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "int8-matmul"])
def test_modulations_ahead_give_the_same_loss_gradients_and_pictures(tiny_config, precision):
    results, weights = [], []
    for ahead in (False, True):
        config = tiny_config(
            base_model_precision=precision,
            enable_modulation_offload=ahead,
            validation_num_inference_steps=3,
            lora_rank=4,
        )
        pipe = load_pipeline(config, "cpu")
        transformer = pipe.transformer
        picture = np.asarray(generate(pipe, config, ["a red circle"])[0]).astype(int)
        weights.append(sum(plain.nbytes for p in transformer.parameters() for plain in train_lora.plain_tensors(p)[0]))
        parameters = add_lora(transformer, config)
        inputs = draws()
        if ahead:
            transformer.modulations.prepare([0.1, *inputs["sigmas"].tolist()])
            transformer.modulations.select(inputs["sigmas"].tolist())
        loss = flow_matching_loss(transformer, **inputs)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in parameters.values()]), picture))
    (loss, gradients, picture), (loss_ahead, gradients_ahead, picture_ahead) = results
    in_8_bits = precision == "int8-matmul"  # what is rounded to 8 bits falls to the other side now and then
    assert loss_ahead == pytest.approx(loss, rel=1e-3 if in_8_bits else 1e-6)
    assert distance(gradients_ahead, gradients) < (0.05 if in_8_bits else 1e-5)
    assert np.abs(picture - picture_ahead).mean() < (2 if in_8_bits else 0.01)
    assert weights[1] < 0.8 * weights[0], "a quarter of the weights is on the host"


@pytest.mark.slow
def test_modulations_ahead_in_training(quick_config, tmp_path, monkeypatch):
    settings = dict(
        max_train_steps=3,
        gradient_accumulation_steps=2,
        validation_split=0.2,
        validation_step_interval=2,
        gradient_checkpointing=True,
    )
    plain = quick_config(**settings)
    train_lora.main(plain)
    called = []
    prepare = train_lora.load_transformer.__globals__["ModulationsAhead"].prepare
    monkeypatch.setattr(
        train_lora.load_transformer.__globals__["ModulationsAhead"],
        "prepare",
        lambda self, sigmas: called.append(set(sigmas) - self.known.keys()) or prepare(self, sigmas),
    )
    ahead = quick_config(**settings, enable_modulation_offload=True, output_dir=str(tmp_path / "ahead"))
    train_lora.main(ahead)
    training = [new for new in called if len(new) > 4]
    assert len(training) == 1 and len(training[0]) == 64, "once for many steps"
    assert metrics(ahead)[-1]["held_out_loss"] == pytest.approx(metrics(plain)[-1]["held_out_loss"], rel=1e-6)
    assert lora_bytes(ahead) == lora_bytes(plain)
    for path in Path(ahead.output_dir).glob("checkpoints/step-00000[23]"):
        train_lora.shutil.rmtree(path)
    train_lora.main(ahead)  # resumed, other steps come together
    assert lora_bytes(ahead) == lora_bytes(plain) and validate.main(ahead).exists()


def test_a_lora_on_modulations_and_modulations_ahead_exclude_each_other(tiny_config):
    with pytest.raises(ValueError, match="lora_target_modules: names modulation layers"):
        load_config(enable_modulation_offload=True, lora_target_modules=["norm1.linear"])


# ---------------------------------------------------------------- the next batch, compiled blocks


def test_the_next_step_is_loaded_while_one_computes(quick_config, monkeypatch):
    events, load_batch, step = [], train_lora.load_batch, train_lora.train_step
    monkeypatch.setattr(
        train_lora, "load_batch", lambda *arguments: events.append(("load", arguments[-1])) or load_batch(*arguments)
    )
    monkeypatch.setattr(
        train_lora, "train_step", lambda *arguments: events.append(("step", arguments[2])) or step(*arguments)
    )
    train_lora.main(quick_config(max_train_steps=4))
    for n in (1, 2, 3):
        assert events.index(("load", n - 1)) < events.index(("step", n))
        assert ("load", n) in events[: events.index(("step", n + 1))]
    assert ("load", 4) not in events, "no more than is needed"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", "int8-matmul"])
def test_compiled_blocks_learn_the_same(quick_config, tmp_path, precision):
    settings = dict(
        base_model_precision=precision,
        max_train_steps=3,
        gradient_checkpointing=True,
        validation_split=0.2,
        validation_step_interval=3,
    )
    losses = []
    for compiled in (False, True):
        config = quick_config(**settings, torch_compile=compiled, output_dir=str(tmp_path / str(compiled)))
        train_lora.main(config)
        losses.append([line[name] for line in metrics(config) for name in ("loss", "held_out_loss") if name in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3 if precision == "int8-matmul" else 1e-4)
    drawn = []
    for config.torch_compile in (False, True):
        picture = validate.main(config).parent / "00-128x128-seed42-lora.png"
        drawn.append(np.asarray(Image.open(picture)).astype(int))
    assert np.abs(drawn[0] - drawn[1]).mean() < (2 if precision == "int8-matmul" else 0.1)
    for other in (dict(enable_group_offload=True), dict(base_model_precision="int8-quanto")):
        with pytest.raises(ValueError, match="torch_compile: does not work with"):
            load_config(torch_compile=True, **{**dict(base_model_precision="int8"), **other})

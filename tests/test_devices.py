"""Offloading, precisions, several processes, MPS, memory: what a CPU can show of them."""

import contextlib
import errno
import gc
import json
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from conftest import (
    FORKS, MODEL, NAMES, QUANTIZED, ROOT, TORCHRUN, checkpoints, flags, lora_bytes, metrics, start_script,
)  # fmt: skip
from diffusers import LongCatImageTransformer2DModel
from diffusers.models.transformers import transformer_longcat_image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import longcat_common
import train_lora
import validate
from cache_latents import model_identity
from longcat_common import (
    FLAVOURS, UserError, flow_matching_loss, load_config, load_scheduler, load_text_encoder,
    load_transformer, load_vae,
)  # fmt: skip


def random_inputs(batch=2):
    """What flow_matching_loss gets besides the tiny transformer: always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(
        latents=(batch, 16, 16, 16), noise=(batch, 16, 16, 16), prompt_embeds=(batch, 512, 64)
    )
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**inputs, "sigmas": torch.tensor([0.3, 0.8][:batch])}


def set_up_training(config):
    """A transformer set up for training, its LoRA not zero, and the LoRA's parameters."""
    run = train_lora.set_up(config, load_transformer(config, "cpu"), None, torch.device("cpu"), 9)
    for name, parameter in run.parameters.items():
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return run.transformer, run.parameters


# ---------------------------------------------------------------- group offload


class CountedBuffers:
    """Replaces GroupOffload.fetch: counts the buffers on the device that are alive at each call."""

    def __init__(self, monkeypatch):
        self.fetch = longcat_common.GroupOffload.fetch
        self.buffers = []
        self.alive = []
        monkeypatch.setattr(
            longcat_common.GroupOffload,
            "fetch",
            lambda *arguments: self.fetch_and_count(*arguments),
        )

    def note(self):
        self.alive.append(sum(buffer() is not None for buffer in self.buffers))

    def fetch_and_count(self, offload, number):
        self.note()
        buffer = self.fetch(offload, number)
        self.buffers.append(weakref.ref(buffer.untyped_storage()))
        return buffer


def loss_and_gradients(transformer, parameters):
    """One tensor of the loss and all gradients, which are reset."""
    loss = flow_matching_loss(transformer, **random_inputs())
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in parameters.values()]
    transformer.zero_grad()
    return torch.cat([loss.detach()[None], *gradients])


@pytest.mark.parametrize("precision", ["no_change", "int4-quanto"])
def test_offloading_gives_the_same_step_with_one_block_and_the_next_on_the_device(
    tiny_config, monkeypatch, precision
):
    # Offloading works on a Mac, too.
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    counted = CountedBuffers(monkeypatch)
    settings = dict(base_model_precision=precision, gradient_checkpointing=True)

    expected = loss_and_gradients(*set_up_training(tiny_config(**settings)))
    assert not counted.alive
    transformer, parameters = set_up_training(tiny_config(**settings, enable_group_offload=True))
    for _ in range(2):
        assert torch.equal(loss_and_gradients(transformer, parameters), expected)

    assert max(counted.alive) <= 2, (
        "at each fetch: the block that computes, and what autograd still holds"
    )
    assert len(counted.alive) == 1 + 2 * (2 * 6 - 2) + 1, (
        "no block is fetched twice, and only the last one in vain"
    )
    counted.note()
    assert counted.alive[-1] == 2, "after the step: the block that computed last, and the next one"
    with torch.no_grad():
        assert torch.equal(flow_matching_loss(transformer, **random_inputs()), expected[0])
    for name, weight in transformer.named_parameters():
        assert weight.requires_grad == (name in parameters)


@pytest.mark.parametrize(
    "count, offloaded", [(0, []), (1, [5]), (4, [1, 2, 4, 5]), (None, range(6))]
)
def test_the_configured_number_of_blocks_is_offloaded_and_those_are_checkpointed(
    tiny_config, count, offloaded
):
    transformer, _ = set_up_training(
        tiny_config(enable_group_offload=True, offloaded_blocks=count, gradient_checkpointing=1)
    )
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert [i for i, block in enumerate(blocks) if block._forward_pre_hooks] == [*offloaded]
    is_checkpointed = transformer.use_checkpoint + transformer.use_single_checkpoint
    checkpointed = [i for i, value in enumerate(is_checkpointed) if value]
    assert checkpointed == sorted({0, *offloaded})


class FakeBuffer:
    """A group's bytes on a pretended GPU."""

    def __init__(self, calls, name):
        self.calls = calls
        self.name = name

    def record_stream(self, stream):
        self.calls.append(f"{self.name} is used in {stream.name}")


class FakeHost(FakeBuffer):
    """A group's bytes on the host of a pretended GPU."""

    def to(self, device, non_blocking, copy):
        assert non_blocking and copy
        stream = torch.cuda.current_stream()
        self.calls.append(f"copy {self.name} in {stream.name}")
        return FakeBuffer(self.calls, self.name)


class FakeStream:
    """Notes what is asked of a CUDA stream."""

    def __init__(self, calls, name):
        self.calls = calls
        self.name = name

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.calls.append(f"event in {self.name}")
        return types.SimpleNamespace(synchronize=lambda: self.calls.append("host waits for event"))


def test_the_gpu_waits_for_the_copy_of_a_block_and_keeps_its_memory_until_it_has_computed(
    monkeypatch,
):
    calls = []
    current = [FakeStream(calls, "compute")]

    @contextlib.contextmanager
    def stream(other):
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: current[-1])
    offload = longcat_common.GroupOffload("cpu")
    offload.copy_stream = FakeStream(calls, "copies")
    for i in range(3):
        host = FakeHost(calls, f"group {i}")
        offload.groups.append(types.SimpleNamespace(host=host, layout=[]))
    placed = "weights are those of"
    monkeypatch.setattr(
        offload, "place", lambda number, buffer: calls.append(f"{placed} {buffer.name}")
    )

    offload.need(0)
    assert calls == [
        "copy group 0 in copies", f"{placed} group 0", "compute waits for copies",
        "group 0 is used in compute", "event in compute", "copy group 1 in copies",
    ]  # fmt: skip
    calls.clear()
    offload.need(1)
    assert calls == [
        f"{placed} group 0", f"{placed} group 1", "compute waits for copies",
        "group 1 is used in compute", "host waits for event", "event in compute",
        "copy group 2 in copies",
    ]  # fmt: skip


# ---------------------------------------------------------------- precisions


@pytest.mark.parametrize(
    "kind, capability, expected",
    [
        ("cpu", None, torch.float32),
        ("mps", None, torch.bfloat16),
        ("cuda", (6, 1), torch.float16),
        ("cuda", (7, 0), torch.float16),
        ("cuda", (7, 5), torch.float16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (8, 9), torch.bfloat16),
        ("cuda", (12, 0), torch.bfloat16),
    ],
)
def test_gpus_that_only_emulate_bf16_compute_in_fp16_and_encode_text_in_float32(
    monkeypatch, kind, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # a T4 says so
    config = load_config()
    assert longcat_common.compute_dtype(config, kind) == expected
    text = torch.float32 if expected == torch.float16 else expected
    assert longcat_common.text_dtype(config, kind) == text
    config.mixed_precision = "bf16"
    assert longcat_common.compute_dtype(config, kind) == torch.bfloat16


@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_run_with_a_quantized_base_resumes_with_offload_to_the_same_bytes(
    quick_config, precision
):
    config = quick_config(
        base_model_precision=precision, max_train_steps=2, validation_step_interval=2
    )
    train_lora.main(config)

    # Every layer's LoRA was trained.
    folders = [Path(config.output_dir, "checkpoints", name) for name in checkpoints(config)]
    first, second = (load_file(folder / NAMES[1]) for folder in folders)
    assert not any(torch.equal(first[name], second[name]) for name in first if "lora_B" in name)

    # The second step and its preview again, this time with offloading.
    preview = Path(config.output_dir, "validation/step-000002-00.png")
    expected_lora = lora_bytes(config)
    expected_preview = preview.read_bytes()
    shutil.rmtree(folders[1])
    preview.unlink()
    config.enable_group_offload = True
    config.offloaded_blocks = 4
    train_lora.main(config)
    assert lora_bytes(config) == expected_lora
    assert preview.read_bytes() == expected_preview


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
    requested = []

    def adjust_dtype_as_for_mps(dtype, device):
        requested.append(dtype)
        return torch.float32 if dtype == torch.float64 else dtype

    monkeypatch.setattr(
        transformer_longcat_image, "maybe_adjust_dtype_for_device", adjust_dtype_as_for_mps
    )
    monkeypatch.setattr(train_lora, "SCORED_NORMALS", (0.4,))  # less to compute
    config = quick_config(
        max_train_steps=1, base_model_precision="int8-quanto", gradient_checkpointing=True,
        validation_step_interval=1, validation_split=0.2, validation_num_inference_steps=1,
    )  # fmt: skip
    with NoFloat64():
        train_lora.main(config)
        validate.main(config)
    assert torch.float64 in requested
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        torch.zeros(1).double()


# ---------------------------------------------------------------- several processes


def step_of_process(config, rank, count, folder):
    """One training step of one of `count` processes, which share two images. Writes the gradients,
    the loss and the gradient norm to `folder`."""
    torch.set_num_threads(1)
    if count > 1:
        train_lora.WORLD_SIZE = longcat_common.WORLD_SIZE = count
        meeting = f"file://{folder}/meeting"
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=count)
    transformer = load_transformer(config, "cpu")
    scheduler = longcat_common.load_scheduler(config)
    run = train_lora.set_up(config, transformer, scheduler, torch.device("cpu"), 9)
    inputs = random_inputs()
    del inputs["sigmas"]
    tensors = {**inputs, "normal": torch.tensor([-1.0, 1.0]), "weights": torch.ones(2)}
    batches = []
    for number in range(rank, 2, count):
        image = {name: tensor[[number]] for name, tensor in tensors.items()}
        batches.append(train_lora.Batch(number=number, **image))
    loss, norm, _ = train_lora.train_step(config, run, batches)
    # AdamW's first moments: a tenth of the gradients.
    moments = [
        run.optimizer.state[weight]["exp_avg"].flatten() for weight in run.parameters.values()
    ]
    results = {"numbers": torch.tensor([loss, norm]), "moments": torch.cat(moments)}
    save_file(results, f"{folder}/rank-{rank}.safetensors")


def test_gradients_and_loss_are_averaged_over_processes(tiny_config, tmp_path):
    config = tiny_config(max_grad_norm=0.0)
    processes = []
    for rank in range(2):
        what = (config, rank, 2, tmp_path)
        processes.append(FORKS.Process(target=step_of_process, args=what, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    together = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]

    step_of_process(config, 0, 1, tmp_path)
    for name, expected in load_file(tmp_path / "rank-0.safetensors").items():
        for result in together:
            assert (result[name] - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("left", [{}, {"RANK": "0"}, {"RANK": "1", "MASTER_ADDR": "localhost"}])
def test_a_left_over_world_size_is_one_line(tmp_path, left):
    for script in ("train_lora.py", "prepare_data.py"):
        log = tmp_path / script
        process = start_script(log, script, WORLD_SIZE="2", **left)
        process.join()
        assert process.exitcode == 2
        (line,) = log.read_text().splitlines()
        assert line == (
            "error: WORLD_SIZE: is 2 in the environment, without RANK, MASTER_ADDR and MASTER_PORT;"
            " unset it to run one process, or start several with torchrun"
        )


def test_a_left_over_rank_of_one_process_is_ignored(quick_config, tmp_path):
    config = quick_config(max_train_steps=1)
    log = tmp_path / "log"
    process = start_script(log, "train_lora.py", *flags(config), RANK="1", WORLD_SIZE="")
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert checkpoints(config) == ["step-000001"]


def test_a_wrong_shape_is_the_files_fault_and_a_bug_while_loading_is_not(
    tiny_config, tmp_path, monkeypatch
):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = tiny_config(pretrained_model_name_or_path=str(model))
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"proj_out.bias": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(longcat_common.UserError, match="model: the transformer: .*proj_out.bias"):
        load_transformer(config, "cpu")

    save_file(tensors, path, {"format": "pt"})
    monkeypatch.setattr(longcat_common, "quantize", lambda module, precision: {}["typo"])
    with pytest.raises(KeyError, match="typo"):
        load_transformer(config, "cpu")


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_accumulation(quick_config, tmp_path):
    settings = dict(
        resolution="128x128", lora_dropout=0.1, max_train_steps=2,
        validation_split=0.2, validation_step_interval=2, validation_prompts=[],
    )  # fmt: skip
    one = quick_config(**settings, gradient_accumulation_steps=4)
    train_lora.main(one)
    two = quick_config(**settings, gradient_accumulation_steps=2, output_dir=str(tmp_path / "two"))
    command = [sys.executable, *TORCHRUN, "train_lora.py", *flags(two)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "2 steps of 4 images" in printed
    assert printed.count("LoRA:") == 1

    # One process resumes what two have started: the position in the data is counted in batches.
    two.gradient_accumulation_steps = 4
    for config in (one, two):
        config.max_train_steps = 3
        train_lora.main(config)

    for step in checkpoints(one):
        expected = load_file(Path(one.output_dir, "checkpoints", step, NAMES[1]))
        tensors = load_file(Path(two.output_dir, "checkpoints", step, NAMES[1]))
        for name, tensor in expected.items():
            # By norms: AdamW makes much of a difference where a gradient is almost zero.
            assert (tensors[name] - tensor).norm() <= 5e-5 * tensor.norm(), (step, name)
    for name in ("loss", "grad_norm", "held_out_loss", "trained_loss"):
        expected = [line[name] for line in metrics(one) if name in line]
        values = [line[name] for line in metrics(two) if name in line]
        assert len(values) > 1
        assert values == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- memory


ADVICE = "out of memory; try, cheapest first: "


def raise_out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "settings, advice",
    [
        (dict(train_batch_size=3), "train_batch_size 1; enable_group_offload true"),
        (dict(enable_group_offload=True, offloaded_blocks=9), "offloaded_blocks null"),
    ],
)
@pytest.mark.parametrize(
    "where", ["train_lora.flow_matching_loss", "longcat_common.fill_transformer"]
)
def test_out_of_memory_in_a_step_or_while_loading_names_what_still_helps(
    quick_config, monkeypatch, where, settings, advice
):
    monkeypatch.setattr(where, raise_out_of_memory)
    rest = 'base_model_precision "int4-quanto"; a smaller resolution'
    with pytest.raises(ValueError, match=f"^{ADVICE}{advice}; {rest}"):
        train_lora.main(quick_config(gradient_checkpointing=True, **settings))


@pytest.mark.parametrize("count, is_advised", [(0, True), (1, True), (True, False)])
def test_one_checkpointed_block_is_not_all_of_them(count, is_advised):
    main = longcat_common.explain_out_of_memory(train_lora.MEMORY_ADVICE)(raise_out_of_memory)
    with pytest.raises(ValueError, match=f"^{ADVICE}") as error:
        main(load_config(gradient_checkpointing=count))
    assert ("gradient_checkpointing true" in str(error.value)) == is_advised
    with pytest.raises(ValueError, match=f"^{ADVICE}") as error:
        main(load_config(train_batch_size=1))
    assert "train_batch_size" not in str(error.value)


def test_out_of_memory_on_a_mac_does_not_advise_offloading(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", gc.collect)
    main = longcat_common.explain_out_of_memory(train_lora.MEMORY_ADVICE)(raise_out_of_memory)
    with pytest.raises(ValueError, match=f"^{ADVICE}(?!.*offload)"):  # host and GPU share memory
        main(load_config())


def count_transformers():
    """How many transformers are in memory."""
    return sum(type(item) is LongCatImageTransformer2DModel for item in gc.get_objects())


@pytest.fixture
def transformers_before():
    """How many transformers are in memory before the test. The test may disable garbage collection,
    since on a GPU nothing collects garbage when memory runs out."""
    gc.collect()
    count = count_transformers()
    yield count
    gc.enable()


def test_a_stage_leaves_no_model_in_memory_and_the_configuration_as_it_is(
    quick_config, transformers_before
):
    config = quick_config(validation_step_interval=4, validation_split=0.2)
    settings = config.model_dump()
    train_lora.main(config)
    gc.disable()
    assert count_transformers() == transformers_before
    validate.main(config)
    assert count_transformers() == transformers_before
    assert config.model_dump() == settings


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt("stop"),
        torch.OutOfMemoryError("CUDA out of memory"),
        longcat_common.UserError("lower learning_rate"),
    ],
)
def test_a_stage_that_fails_leaves_no_model_in_memory(
    quick_config, monkeypatch, transformers_before, error
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(train_lora, "flow_matching_loss", fail)
    gc.disable()
    with pytest.raises((KeyboardInterrupt, ValueError)) as kept:  # as in a notebook
        train_lora.main(quick_config())
    assert count_transformers() == transformers_before
    assert kept.value


@pytest.mark.parametrize("error", [OSError, KeyError, ValueError])
def test_a_bug_keeps_its_frames_for_a_debugger(quick_config, monkeypatch, error):
    def my_loss(transformer, *inputs):
        mine = inputs[0].shape
        raise error(f"a bug with {mine}")

    monkeypatch.setattr(train_lora, "flow_matching_loss", my_loss)
    with pytest.raises(error, match="a bug") as kept:
        train_lora.main(quick_config())
    frames = {entry.name: entry.frame.f_locals for entry in kept.traceback}
    assert frames["my_loss"]["mine"] == (1, 16, 16, 16)
    assert frames["train_step"]["batches"] and frames["main"]["config"]


FORK = """
import errno, os, sys
from longcat_common import run_stage
def main(config):
    number = int(os.environ["ERRNO"])
    raise OSError(number, os.strerror(number), "the/file") if number else OSError("mine")
run_stage(main, "")
"""


@pytest.mark.parametrize("name", [None, "ENOENT", "EINVAL"])
def test_an_os_error_that_is_a_bug_keeps_its_traceback(tmp_path, name):
    text, code = run_fork(tmp_path, name)
    assert code == 1
    assert "Traceback" in text and "in main" in text


@pytest.mark.parametrize("name", ["ENOSPC", "EACCES", "EIO"])
def test_a_full_or_failing_disk_is_one_line(tmp_path, name):
    text, code = run_fork(tmp_path, name)
    assert code == 2
    (line,) = text.splitlines()
    assert line.startswith("error: ") and "the/file" in line


def run_fork(tmp_path, name):
    """What a stage prints that raises this OSError, and its exit code."""
    (tmp_path / "fork.py").write_text(FORK)
    log = tmp_path / "log"
    number = getattr(errno, name) if name else 0
    process = start_script(log, tmp_path / "fork.py", ERRNO=str(number))
    process.join()
    return log.read_text(), process.exitcode


def test_the_benchmark_needs_no_model_and_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(benchmark=2, base_model_precision="no_change", output_dir="nowhere")
    figures = train_lora.main(config)
    assert "s a step of 1 x 1 images of 256x256; 1000 steps: " in capsys.readouterr().out
    assert figures["seconds_per_step"] > 0
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- loading


def float32_bytes():
    """The size of all float32 tensors in memory."""
    objects = gc.get_objects()
    tensors = [item for item in objects if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return sum(
        tensor.nbytes for tensor in tensors if tensor.dtype == torch.float32 and not tensor.is_meta
    )


def test_loading_never_holds_the_whole_unquantized_model(tiny_config, monkeypatch):
    quantize = longcat_common.quantize
    sizes = []

    def measure_and_quantize(*arguments):
        sizes.append(float32_bytes())
        return quantize(*arguments)

    unquantized = sum(
        weight.nbytes for weight in load_transformer(tiny_config(), "cpu").parameters()
    )
    gc.collect()
    monkeypatch.setattr(longcat_common, "quantize", measure_and_quantize)
    load_transformer(tiny_config(base_model_precision="int8-quanto", mixed_precision="no"), "cpu")
    assert len(sizes) == 6
    assert max(sizes) < 0.6 * unquantized


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"


def load_part(config, part):
    """One part of the model, as the stages load it."""
    if part == "scheduler":
        return load_scheduler(config)
    loaders = {"transformer": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder}
    return loaders[part](config, "cpu")


@pytest.fixture
def model(tmp_path):
    """A copy of the tiny model."""
    return shutil.copytree(MODEL, tmp_path / "model")


def change_tensors(file, **changes):
    """Adds tensors to a weights file, replaces them, or (None) takes them out. In names, __ stands
    for a dot."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "file, name",
    [
        (TRANSFORMER, "proj_out.weight_scale"),
        (TRANSFORMER, "transformer_blocks.7.attn.to_q.weight"),
        (TRANSFORMER, "scaled_fp8"),
        (VAE, "decoder.conv_in.weight_scale"),
        (TEXT_ENCODER, "model.layers.1.mlp.up_proj.weight_scale_inv"),
        (TEXT_ENCODER, "model.layers.2.mlp.up_proj.weight"),
        (TEXT_ENCODER, "lm_head.weight_scale"),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_named(model, tiny_config, file, name):
    change_tensors(model / file, **{name: torch.ones(1)})
    config = tiny_config(pretrained_model_name_or_path=str(model))
    with pytest.raises(UserError) as error:
        load_part(config, Path(file).parent.name)
    assert str(error.value).startswith(f"{model / file}: holds {name}, which")
    assert "not quantized, such as meituan-longcat/LongCat-Image" in str(error.value)


@pytest.mark.parametrize(
    "file, name",
    [
        (TRANSFORMER, "single_transformer_blocks.1.proj_out.bias"),
        (VAE, "decoder.conv_in.bias"),
        (TEXT_ENCODER, LAYER),
        (TEXT_ENCODER, "model.embed_tokens.weight"),
    ],
)
def test_a_missing_tensor_is_named(model, tiny_config, file, name):
    change_tensors(model / file, **{name: None})
    config = tiny_config(pretrained_model_name_or_path=str(model))
    part = Path(file).parent
    with pytest.raises(UserError, match=f"{model / part}: is missing {name}; download it again"):
        load_part(config, part.name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize(
    "file, name", [(TRANSFORMER, "proj_out.weight"), (VAE, "decoder.conv_in.weight"),
                   (TEXT_ENCODER, LAYER)],
)  # fmt: skip
def test_a_tensor_of_a_type_that_needs_scales_is_named(model, tiny_config, file, name, dtype):
    change_tensors(model / file, **{name: load_file(model / file)[name].to(dtype)})
    config = tiny_config(pretrained_model_name_or_path=str(model))
    with pytest.raises(UserError, match=f"{model / file}: {name} is quantized .*; choose a "):
        load_part(config, Path(file).parent.name)


def test_plain_float8_weights_are_loaded(model, tiny_config):
    weight = load_file(model / TRANSFORMER)["proj_out.weight"].to(torch.float8_e4m3fn)
    change_tensors(model / TRANSFORMER, proj_out__weight=weight)
    config = tiny_config(pretrained_model_name_or_path=str(model))
    assert torch.equal(load_transformer(config, "cpu").proj_out.weight, weight.float())


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT_ENCODER])
def test_two_files_with_the_same_tensor_are_both_named(model, tiny_config, file):
    part, name = file.split("/")
    shutil.copy(model / file, model / part / f"a copy of {name}")
    config = tiny_config(pretrained_model_name_or_path=str(model))
    with pytest.raises(UserError, match=f"{model / file}: holds .*{part}/a copy of {name} does"):
        load_part(config, part)


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT_ENCODER])
def test_a_corrupt_file_among_several_is_named(model, tiny_config, file):
    part = Path(file).parent.name
    (model / part / "z.safetensors").write_bytes((model / file).read_bytes()[:-10])
    config = tiny_config(pretrained_model_name_or_path=str(model))
    with pytest.raises(UserError, match=f"{part}/z.safetensors: is missing or corrupt"):
        load_part(config, part)


def test_hidden_files_are_skipped(model, tiny_config):
    config = tiny_config(pretrained_model_name_or_path=str(model))
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    before = model_identity(config, *parts)
    for path in [path for path in model.rglob("*.*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert model_identity(config, *parts) == before
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        load_part(config, part)


@pytest.mark.parametrize(
    "part, key, found",
    [
        ("transformer", "_class_name", "FluxTransformer2DModel"),
        ("vae", "_class_name", "AutoencoderKLWan"),
        ("scheduler", "_class_name", "DDIMScheduler"),
        ("text_encoder", "architectures", ["CLIPTextModel"]),
        ("text_encoder", "architectures", None),
        ("transformer", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("text_encoder", "quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_a_config_of_another_class_or_of_quantized_weights_is_named(
    model, tiny_config, part, key, found
):
    (path,) = [path for path in (model / part).glob("*config.json") if "gener" not in path.name]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: found}))
    config = tiny_config(pretrained_model_name_or_path=str(model))
    named = "quantization_config" if key == "quantization_config" else str(found)
    with pytest.raises(UserError) as error:
        load_part(config, part)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and named in message
    assert message.endswith(f"choose a LongCat-Image model in diffusers format that is not "
                            f"quantized, such as {FLAVOURS['final']}")  # fmt: skip


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT_ENCODER])
def test_a_folder_without_safetensors_files_is_named_with_what_it_holds(model, tiny_config, file):
    torch.save(load_file(model / file), (model / file).with_suffix(".bin"))
    (model / file).unlink()
    config = tiny_config(pretrained_model_name_or_path=str(model))
    part, name = file.split("/")
    with pytest.raises(UserError, match=rf"{part}: .* only .*{Path(name).stem}\.bin.*; choose a "):
        load_part(config, part)


# ---------------------------------------------------------------- downloads


def test_a_download_is_asked_for_once_and_again_if_a_file_is_gone(tmp_path, monkeypatch):
    requests = []

    def snapshot_download(name, allow_patterns):
        requests.append((name, *allow_patterns))
        shutil.copytree(f"{MODEL}/vae", tmp_path / "vae", dirs_exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(longcat_common, "DOWNLOADED", {})
    monkeypatch.setattr(longcat_common, "snapshot_download", snapshot_download)
    config = load_config(pretrained_model_name_or_path="someone/model")
    for _ in range(3):
        load_vae(config, "cpu")
    assert requests == [("someone/model", "vae/*")]
    (tmp_path / VAE).unlink()
    load_vae(config, "cpu")
    assert len(requests) == 2

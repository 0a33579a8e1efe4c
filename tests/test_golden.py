"""Training computes what the model authors' code computes, with every way to save memory and time.
Generation computes what diffusers computes."""

import copy
import functools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import simulate_memory
import torch
from conftest import MODEL, QUANTIZED, ROOT, give_the_authors_positions, metrics
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from optimum import quanto
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import Float8WeightOnlyConfig, quantize_
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import train_lora
from cache_latents import cache_prompts, read_prompt_embeds
from longcat_common import (
    QuantizedLinear, dequantize, encoder_inputs, fill_transformer, flow_matching_loss, load_config,
    load_scheduler, load_tokenizer, load_transformer, load_vae, pack_latents, position_ids, sample_sigmas,
)  # fmt: skip
from validate import generate, load_pipeline

PROMPT = "a star on a blue background"


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def without_prefix(tensors, prefix):
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


@pytest.fixture(scope="module")
def golden():
    """The golden file of a training step: tensors, settings, and the transformer with its LoRA."""
    path = ROOT / "tests/golden/train_step.safetensors"
    with safe_open(path, "pt") as file:
        settings = {name: json.loads(value) for name, value in file.metadata().items()}
    tensors = load_file(path)

    transformer = LongCatImageTransformer2DModel(**settings["transformer_config"])
    transformer.load_state_dict(without_prefix(tensors, "transformer."))
    transformer.requires_grad_(False).add_adapter(LoraConfig(**settings["lora"]))
    lora = without_prefix(tensors, "lora.")
    trainable = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert trainable == lora.keys()
    transformer.load_state_dict(lora, strict=False)
    return tensors, settings, transformer


def test_sigmas_packing_and_position_ids_are_the_authors(golden):
    tensors, settings, _ = golden
    latents = tensors["latents"]
    height, width = latents.shape[2:]
    scheduler = FlowMatchEulerDiscreteScheduler(**settings["scheduler_config"])
    sigmas = sample_sigmas(tensors["normal"], height * width // 4, scheduler)
    assert_close(sigmas, tensors["expected.sigmas"])

    sigma = tensors["expected.sigmas"][:, None, None, None]
    noisy_latents = (1 - sigma) * latents + sigma * tensors["noise"]
    assert_close(pack_latents(noisy_latents), tensors["expected.packed"])

    for ids, kind in zip(position_ids(height, width), ("txt", "img")):
        assert ids.dtype == torch.float32
        assert_close(ids, tensors[f"expected.{kind}_ids"])


LOSS_INPUTS = ("latents", "noise", "expected.sigmas", "prompt_embeds")


@pytest.mark.parametrize(
    "wanted, offload, checkpointed",
    [(0, False, 0), (1, False, 1), (True, False, 3), (False, True, 3)],
)
def test_prediction_loss_and_every_gradient_are_the_authors_whatever_is_checkpointed(
    golden, wanted, offload, checkpointed
):
    tensors, _, transformer = golden
    config = load_config(gradient_checkpointing=wanted, enable_group_offload=offload)
    train_lora.set_gradient_checkpointing(config, transformer)
    transformer.zero_grad()

    # Record which blocks compute, and the prediction.
    calls = []
    predictions = []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hooks = [
        block.register_forward_pre_hook(lambda block, args: calls.append(block)) for block in blocks
    ]
    hooks.append(
        transformer.register_forward_hook(
            lambda module, args, output: predictions.append(output[0].detach())
        )
    )
    loss = flow_matching_loss(transformer, *(tensors[name] for name in LOSS_INPUTS))
    loss.backward()
    for hook in hooks:
        hook.remove()

    # A checkpointed block computes twice.
    assert [calls.count(block) for block in blocks] == [2] * checkpointed + [1] * (3 - checkpointed)
    assert loss.dtype == torch.float32
    assert_close(predictions[0], pack_latents(tensors["expected.model_pred"]))
    assert_close(loss.detach(), tensors["expected.loss"])
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, tensors[f"grad.{name}"])


@torch.no_grad()
def test_the_loss_is_the_mean_of_the_weighted_losses_of_the_samples(golden):
    tensors, _, transformer = golden
    inputs = [tensors[name] for name in LOSS_INPUTS]
    first = flow_matching_loss(transformer, *(tensor[:1] for tensor in inputs))
    second = flow_matching_loss(transformer, *(tensor[1:2] for tensor in inputs))
    weighted = flow_matching_loss(transformer, *inputs, weights=torch.tensor([0.5, 2.0]))
    assert_close(weighted, (0.5 * first + 2.0 * second) / 2)


@pytest.fixture
def golden_steps(golden):
    """Two steps of train_step on the golden file's batch: the run, its LoRA before the first step,
    the gradients that the optimizer got in each step, and what the first train_step returned."""
    tensors, settings, _ = golden
    config = load_config(
        learning_rate=1e-2,
        lr_scheduler="linear",
        lr_warmup_steps=0,
        adam_beta2=0.5,
        adam_weight_decay=0.3,
        max_grad_norm=0,
        train_batch_size=2,
        lora_rank=settings["lora"]["r"],
        lora_alpha=float(settings["lora"]["lora_alpha"]),
        lora_target_modules=settings["lora"]["target_modules"],
    )
    transformer = LongCatImageTransformer2DModel(**settings["transformer_config"])
    transformer.requires_grad_(False)
    transformer.load_state_dict(without_prefix(tensors, "transformer."))
    scheduler = FlowMatchEulerDiscreteScheduler(**settings["scheduler_config"])
    run = train_lora.set_up(config, transformer, scheduler, torch.device("cpu"), steps=4)
    lora = without_prefix(tensors, "lora.")
    for name, parameter in run.parameters.items():
        parameter.data.copy_(lora[name])

    gradients = []

    def keep_gradients(*arguments):
        gradients.append({name: p.grad.clone() for name, p in run.parameters.items()})

    run.optimizer.register_step_pre_hook(keep_gradients)
    inputs = {name: tensors[name] for name in ("latents", "noise", "normal", "prompt_embeds")}
    batch = train_lora.Batch(number=0, **inputs, weights=torch.ones(2))
    result = train_lora.train_step(config, run, [batch])
    run.step = 1
    train_lora.train_step(config, run, [batch])
    return run, lora, gradients, result


def test_train_step_gives_the_authors_loss_and_every_gradient(golden, golden_steps):
    tensors, _, _ = golden
    _, _, gradients, (loss, grad_norm, is_finite) = golden_steps
    assert is_finite
    assert loss == pytest.approx(tensors["expected.loss"].item(), rel=1e-5)
    expected = without_prefix(tensors, "grad.")
    assert gradients[0].keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[0][name], gradient)
    all_gradients = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert grad_norm == pytest.approx(all_gradients.norm().item(), rel=1e-5)


def test_train_step_configures_the_optimizer(golden_steps):
    run, lora, gradients, _ = golden_steps
    # The same two steps with PyTorch's own AdamW and the numbers of the configuration.
    expected = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in lora.items()}
    adamw = torch.optim.AdamW(expected.values(), lr=1.0, betas=(0.9, 0.5), weight_decay=0.3)
    for learning_rate, step_gradients in zip((1e-2, 0.75e-2), gradients):
        adamw.param_groups[0]["lr"] = learning_rate
        for name, parameter in expected.items():
            parameter.grad = step_gradients[name]
        adamw.step()
    for name, parameter in run.parameters.items():
        assert_close(parameter.detach(), expected[name].detach())


# ---------------------------------------------------------------- prompt embeddings


@pytest.fixture
def golden_prompts(tmp_path, tiny_config):
    """The golden file of prompt embeddings: prompts, their token counts, their embeddings, and a
    function that makes a configuration with the file's text encoder."""
    path = ROOT / "tests/golden/prompt_embeds.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    # A copy of the tiny model with the golden file's text encoder.
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "text_encoder/config.json").write_text(metadata["config"])
    save_file(
        without_prefix(tensors, "weights."),
        model / "text_encoder/model.safetensors",
        {"format": "pt"},
    )

    template_length = tensors["input_ids"].shape[1] - 512
    lengths = tensors["attention_mask"].sum(dim=1) - template_length
    counts = [min(length, 512) for length in lengths.tolist()]
    configure = functools.partial(tiny_config, pretrained_model_name_or_path=str(model))
    return json.loads(metadata["prompts"]), counts, tensors["expected.prompt_embeds"], configure


def assert_prompt_embeds_close(actual, expected, token_count):
    """Compares real tokens and padding separately: one could be large enough to hide the other."""
    assert actual.shape == expected.shape == (512, 64)
    assert_close(actual[:token_count], expected[:token_count])
    assert_close(actual[token_count:], expected[token_count:])


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_cached_prompt_embeddings_are_the_authors_and_validation_reads_them(
    golden_prompts, batch_size, capsys
):
    prompts, counts, expected, configure = golden_prompts
    assert sorted(counts) == [0, 5, 6, 46, 240, 512], (
        "an empty prompt, and one that is cut off at 512 tokens"
    )
    config = configure(text_encoder_batch_size=batch_size)
    files = cache_prompts(config, prompts, "cpu")
    assert (
        "prompts of more than 512 tokens, the rest is ignored: 1; 'a red apple"
        in capsys.readouterr().out
    )
    for prompt, count, embeds in zip(prompts, counts, expected):
        assert len(load_file(files[prompt])["prompt_embeds"]) == min(count + 1, 512)
        assert_prompt_embeds_close(read_prompt_embeds(files[prompt]), embeds, count)

    encoded = load_pipeline(config, "cpu").encode_prompt(prompts)[0]
    for actual, count, embeds in zip(encoded, counts, expected):
        assert_prompt_embeds_close(actual, embeds, count)


def test_a_pipeline_that_finds_nothing_cached_computes_the_same(golden_prompts):
    prompts, counts, expected, configure = golden_prompts
    pipe = load_pipeline(configure(), "cpu")
    for prompt, count, embeds in zip(prompts, counts, expected):
        assert_prompt_embeds_close(pipe.encode_prompt(prompt)[0][0], embeds, count)


@pytest.mark.parametrize("count", [5, 6])
def test_tokens_are_the_pipelines_own_with_quoted_text_character_by_character(tiny_config, count):
    prompts = [
        "",
        "a cat",
        'a sign: "a cat on a blue background"',
        "“一只猫”，黄色背景",
        "a dog's bowl, 'a dog'",
        "a " * 600,
    ][:count]
    calls = []

    def text_encoder(input_ids, attention_mask, output_hidden_states):
        calls.append((input_ids, attention_mask))
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)])

    tokenizer = load_tokenizer(tiny_config())
    models = dict(scheduler=None, vae=None, transformer=None, text_processor=None)
    pipe = LongCatImagePipeline(text_encoder=text_encoder, tokenizer=tokenizer, **models)
    pipe.encode_prompt(prompts)
    expected_ids, expected_mask = calls[0]

    input_ids, attention_mask = encoder_inputs(tokenizer, prompts)
    columns = input_ids.shape[1]
    assert torch.equal(input_ids, expected_ids[:, :columns])
    assert torch.equal(attention_mask, expected_mask[:, :columns])
    # Without the template's end, which has 11 tokens.
    longest = expected_mask[:, :-11].sum(dim=1).max().item()
    assert columns == min(longest + 1, expected_ids.shape[1] - 11)


def unmodified_pipeline(config):
    """diffusers' own pipeline with transformers' own text encoder."""
    folder = config.pretrained_model_name_or_path
    return LongCatImagePipeline(
        transformer=load_transformer(config, "cpu"),
        vae=load_vae(config, "cpu"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(
            f"{folder}/text_encoder", dtype=torch.float32
        ),
        tokenizer=Qwen2Tokenizer.from_pretrained(f"{folder}/tokenizer"),
        text_processor=None,
        scheduler=load_scheduler(config),
    )


def test_the_unmodified_pipeline_differs_only_in_the_padding(golden_prompts):
    """transformers 5 gives each padding token the position after the one before it. transformers
    4.57.1, with which the model was trained, gave all of them position 1. No real token attends to
    them."""
    prompts, counts, _, configure = golden_prompts
    config = configure()
    files = cache_prompts(config, prompts, "cpu")
    unmodified = unmodified_pipeline(config)
    for prompt, count in zip(prompts, counts):
        actual = read_prompt_embeds(files[prompt])
        other = unmodified.encode_prompt(prompt)[0][0]
        assert_close(actual[:count], other[:count])
        if count < 512:
            distance = (actual[count:] - other[count:]).norm() / actual[count:].norm()
            assert distance > 0.1, (
                "transformers counts as 4.57.1 did again: README's section on this is out of date"
            )
            assert_close(actual[count:], actual[-1:].expand(512 - count, -1))


def test_our_pipeline_generates_the_images_of_the_unmodified_one_with_any_negative_prompt(
    tiny_config,
):
    unmodified = unmodified_pipeline(tiny_config())
    give_the_authors_positions(unmodified.text_encoder)
    images = []
    for negative_prompt in ("", "a cat"):
        config = tiny_config(
            validation_num_inference_steps=2,
            validation_resolution="96x64",
            validation_negative_prompt=negative_prompt,
        )
        images += generate(load_pipeline(config, "cpu"), config, [PROMPT])
        expected = unmodified(
            PROMPT,
            negative_prompt=negative_prompt,
            generator=torch.Generator().manual_seed(42),
            num_inference_steps=2,
            guidance_scale=3.0,
            height=64,
            width=96,
            enable_prompt_rewrite=False,
        ).images[0]
        assert images[-1].size == (96, 64)
        assert np.abs(np.subtract(images[-1], expected, dtype=int)).max() <= 1
    assert np.abs(np.subtract(*images, dtype=int)).mean() > 1, "negative prompts have an effect"


# ---------------------------------------------------------------- quantized weights


def weight_from_library(linear, precision):
    """The weight as optimum-quanto or torchao quantize and dequantize it."""
    model = torch.nn.Sequential(copy.deepcopy(linear))
    if precision == "int4-quanto":
        # quanto's own dequantization compiles an extension; this is its library/unpack.py.
        weight = linear.weight.detach()
        scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, axis=0, group_size=128)
        quantized = quanto.quantize_weight(
            weight, quanto.qint4, 0, scale, shift, group_size=128, optimized=False
        )
        packed = quantized._data._data
        values = torch.cat([packed & 15, packed >> 4])
        return (quantized._scale * values - quantized._shift).reshape(weight.shape)
    if precision == "fp8-torchao":
        quantize_(model, Float8WeightOnlyConfig())
    else:
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    return model[0].weight.dequantize()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def dtype(request):
    return request.param


@pytest.fixture(params=QUANTIZED)
def precision(request):
    return request.param


@pytest.fixture
def linears(precision, dtype):
    """A Linear with the library's dequantized weight, our QuantizedLinear, and its tensors."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(384, 256).to(dtype)
    quantized = QuantizedLinear(linear, precision)
    stored = [quantized.weight, quantized.scale]
    if quantized.shift is not None:
        stored.append(quantized.shift)
    linear.weight = torch.nn.Parameter(weight_from_library(linear, precision), requires_grad=False)
    return linear, quantized, stored


def test_quantized_weights_are_the_libraries_own_to_the_last_bit(linears, dtype):
    linear, _, stored = linears
    assert torch.equal(dequantize(dtype, (256, 384), *stored), linear.weight)
    assert linear.weight.dtype == dtype
    for tensor in stored:
        assert type(tensor.data) is torch.Tensor
        assert not tensor.requires_grad


def run_and_record(layer, x, gradient):
    """The layer's output, the gradient of its input, and the tensors kept for the backward pass."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    y.backward(gradient)
    return y.detach(), x.grad, kept


@pytest.mark.parametrize("gradient_size", [1, 1e-2, 1e-4])
def test_a_quantized_layer_computes_the_exact_product_and_keeps_only_its_quantized_weight(
    linears, precision, dtype, gradient_size
):
    linear, quantized, stored = linears
    x = torch.randn(64, 384).to(dtype)
    gradient = (gradient_size * torch.randn(64, 256)).to(dtype)
    y, x_gradient, kept = run_and_record(quantized, x, gradient)
    assert y.dtype == x_gradient.dtype == dtype
    exact = run_and_record(linear.double(), x.double(), gradient.double())
    expected_y, expected_gradient = exact[:2]

    tolerance = 0.01
    if dtype == torch.float32:
        tolerance = 1e-6
    if precision == "int8-matmul":
        tolerance = 0.012
    assert (y - expected_y).norm() <= tolerance * expected_y.norm()
    assert (x_gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()

    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in stored}
    bytes_per_weight = 0.57 if precision == "int4-quanto" else 1.02
    assert sum(tensor.nbytes for tensor in kept) <= 256 * 384 * bytes_per_weight


# ---------------------------------------------------------------- compiled blocks, memory, norms


@pytest.fixture
def graphs(monkeypatch):
    """A list of all graphs that torch.compile makes during the test, none of them compiled."""
    made = []

    def keep_graph(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep_graph))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # compile_blocks raises it
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def count_graphs(graphs, blocks):
    """How many graphs a transformer with so many blocks of each kind needs: in training, without
    gradients with LoRA and without it (scoring), and in eval mode (generating)."""
    config = load_config(
        torch_compile=True, gradient_checkpointing=1, mixed_precision="bf16",
        base_model_precision="no_change", lora_rank=4, lora_target_modules=["attn.to_q"],
    )  # fmt: skip
    with torch.device("meta"):
        transformer = LongCatImageTransformer2DModel(
            num_layers=blocks, num_single_layers=blocks, attention_head_dim=16, in_channels=64,
            num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=[4, 6, 6],
        )  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}

    def random_weights(names):
        return {name: torch.randn(shapes[name]) for name in names}

    transformer = fill_transformer(transformer, random_weights, config, "cpu")
    train_lora.set_up(config, transformer, None, torch.device("cpu"), steps=9)
    inputs = dict(latents=torch.randn(1, 16, 4, 4), noise=torch.randn(1, 16, 4, 4))
    inputs |= dict(sigmas=torch.tensor([0.3]), prompt_embeds=torch.randn(1, 512, 8))

    counts = []
    before = len(graphs)
    for _ in range(2):
        flow_matching_loss(transformer, **inputs).backward()
        counts.append(len(graphs) - before)
        with torch.no_grad():
            flow_matching_loss(transformer, **inputs)
            transformer.disable_adapters()
            flow_matching_loss(transformer, **inputs)
            transformer.enable_adapters()
            counts.append(len(graphs) - before)
            transformer.eval()
            flow_matching_loss(transformer, **inputs)
            transformer.train()
            counts.append(len(graphs) - before)
    return counts


def test_compiled_blocks_share_graphs_however_many_blocks_there_are(graphs):
    counts = count_graphs(graphs, blocks=2)
    torch._dynamo.reset()
    assert count_graphs(graphs, blocks=5) == counts
    training, scoring, generating, *later = counts
    assert 2 <= training < scoring <= generating <= 16, "each kind of block is compiled"
    assert later == [generating] * 3, "nothing is compiled again"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", *QUANTIZED])
def test_compiled_blocks_train_and_score_the_same(quick_config, tmp_path, precision):
    settings = dict(
        base_model_precision=precision,
        enable_group_offload=precision == "int4-quanto",
        max_train_steps=3,
        validation_split=0.2,
        validation_step_interval=3,
    )
    losses = {False: [], True: []}
    for is_compiled in losses:
        output_dir = str(tmp_path / str(is_compiled))
        config = quick_config(**settings, torch_compile=is_compiled, output_dir=output_dir)
        train_lora.main(config)
        for line in metrics(config):
            for name in ("loss", "held_out_loss"):
                if name in line:
                    losses[is_compiled].append(line[name])
    tolerance = 2e-3 if precision == "int8-matmul" else 1e-4
    assert losses[False]
    assert losses[False] == pytest.approx(losses[True], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, mixed_precision",
    [
        ("6gb", 6, "auto"),
        ("8gb", 8, "auto"),
        ("12gb", 12, "auto"),
        ("16gb", 16, "auto"),
        ("24gb", 24, "auto"),
        ("24gb_bf16", 24, "auto"),
        ("48gb", 48, "auto"),
        ("colab_t4", 15, "fp16"),
    ],
)
def test_a_shipped_config_fits_its_card_and_needs_what_the_readme_says(name, size, mixed_precision):
    gib, _, needed = simulate_memory.simulate(
        load_config(ROOT / f"configs/{name}.json", mixed_precision=mixed_precision)
    )
    assert needed <= simulate_memory.CARDS[size], gib
    readme = (ROOT / "README.md").read_text()
    row = re.search(rf"\n\| `{name}.json` .*\| ([\d.]+) / ([\d.]+) \|\n", readme)
    assert [*map(float, row.groups())] == pytest.approx(
        [gib["a step, at its peak"], gib["a preview"]], abs=0.2
    )


def test_norms_run_outside_of_autocast(monkeypatch):
    layer_norm = torch.nn.functional.layer_norm
    autocast = []

    def record_autocast(*arguments, **options):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return layer_norm(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", record_autocast)
    monkeypatch.setattr(simulate_memory.bench_step, "REAL", dict(num_layers=1, num_single_layers=1))
    simulate_memory.training(load_config(ROOT / "configs/48gb.json", mixed_precision="bf16"))
    assert autocast
    assert not any(autocast), "CUDA's would keep a float32 copy of each norm's input"

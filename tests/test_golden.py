"""Training computes what the model authors' code computes, however cheap it is made; drawing, what diffusers does."""

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
    QuantizedLinear, dequantize, encoder_inputs, flow_matching_loss, load_config, load_scheduler, load_tokenizer,
    load_transformer, load_vae, pack_latents, position_ids, sample_sigmas,
)  # fmt: skip
from validate import generate, load_pipeline

PROMPT = "a star on a blue background"


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def without_prefix(tensors, prefix):
    """The tensors whose names begin with `prefix`, under what follows it."""
    return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}


@pytest.fixture(scope="module")
def golden():
    path = ROOT / "tests/golden/train_step.safetensors"
    with safe_open(path, "pt") as file:
        settings = {name: json.loads(value) for name, value in file.metadata().items()}
    tensors = load_file(path)
    transformer = LongCatImageTransformer2DModel(**settings["transformer_config"])
    transformer.load_state_dict(without_prefix(tensors, "transformer."))
    transformer.requires_grad_(False).add_adapter(LoraConfig(**settings["lora"]))
    assert {n for n, p in transformer.named_parameters() if p.requires_grad} == without_prefix(
        tensors, "lora."
    ).keys()
    transformer.load_state_dict(without_prefix(tensors, "lora."), strict=False)
    return tensors, settings, transformer


def test_sigmas_packing_and_position_ids_are_the_authors(golden):
    tensors, settings, _ = golden
    latents, s = tensors["latents"], tensors["expected.sigmas"][:, None, None, None]
    height, width = latents.shape[2:]
    scheduler = FlowMatchEulerDiscreteScheduler(**settings["scheduler_config"])
    assert_close(
        sample_sigmas(tensors["normal"], height * width // 4, scheduler), tensors["expected.sigmas"]
    )
    assert_close(pack_latents((1 - s) * latents + s * tensors["noise"]), tensors["expected.packed"])
    for ids, kind in zip(position_ids(height, width), ("txt", "img")):
        assert ids.dtype == torch.float32
        assert_close(ids, tensors[f"expected.{kind}_ids"])


@pytest.mark.parametrize(
    "wanted, offload, again", [(0, False, 0), (1, False, 1), (True, False, 3), (False, True, 3)]
)
def test_prediction_loss_and_every_gradient_are_the_authors_whatever_is_checkpointed(
    golden, wanted, offload, again
):
    tensors, _, transformer = golden
    train_lora.set_gradient_checkpointing(
        load_config(gradient_checkpointing=wanted, enable_group_offload=offload), transformer
    )
    transformer.zero_grad()
    inputs, seen, calls = (
        [tensors[n] for n in ("latents", "noise", "expected.sigmas", "prompt_embeds")],
        [],
        [],
    )
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hooks = [
        block.register_forward_pre_hook(lambda block, args: calls.append(block)) for block in blocks
    ]
    hooks += [
        transformer.register_forward_hook(
            lambda module, args, output: seen.append(output[0].detach())
        )
    ]
    loss = flow_matching_loss(transformer, *inputs)
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert [calls.count(block) for block in blocks] == [2] * again + [1] * (3 - again)
    assert loss.dtype == torch.float32
    assert_close(seen[0], pack_latents(tensors["expected.model_pred"]))
    assert_close(loss.detach(), tensors["expected.loss"])
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, tensors[f"grad.{name}"])
    with torch.no_grad():
        alone = [flow_matching_loss(transformer, *(t[i : i + 1] for t in inputs)) for i in range(2)]
        weighted = flow_matching_loss(transformer, *inputs, weights=torch.tensor([0.5, 2.0]))
    assert_close(weighted, (0.5 * alone[0] + 2.0 * alone[1]) / 2)


def test_train_step_itself_gives_the_authors_loss_and_every_gradient_and_the_optimizer_what_is_configured(
    golden,
):
    tensors, settings, _ = golden
    rates = dict(
        learning_rate=1e-2,
        lr_scheduler="linear",
        lr_warmup_steps=0,
        adam_beta2=0.5,
        adam_weight_decay=0.3,
    )
    lora = dict(
        lora_rank=settings["lora"]["r"], lora_target_modules=settings["lora"]["target_modules"]
    )
    config = load_config(
        **rates, **lora, lora_alpha=float(settings["lora"]["lora_alpha"]), max_grad_norm=0
    )
    transformer = LongCatImageTransformer2DModel(**settings["transformer_config"]).requires_grad_(
        False
    )
    transformer.load_state_dict(without_prefix(tensors, "transformer."))
    scheduler = FlowMatchEulerDiscreteScheduler(**settings["scheduler_config"])
    run = train_lora.set_up(config, transformer, scheduler, torch.device("cpu"), steps=4)
    expected = without_prefix(tensors, "lora.")
    for name, parameter in run.parameters.items():
        parameter.data.copy_(expected[name])
    gradients = []
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            {name: parameter.grad.clone() for name, parameter in run.parameters.items()}
        )
    )
    inputs = {name: tensors[name] for name in ("latents", "noise", "normal", "prompt_embeds")}
    batch = train_lora.Batch(number=0, **inputs, weights=torch.ones(2))

    loss, grad_norm, sound = train_lora.train_step(config, run, [batch])
    run.step = 1
    train_lora.train_step(config, run, [batch])

    golden_gradients = without_prefix(tensors, "grad.")
    assert sound and gradients[0].keys() == golden_gradients.keys()
    assert loss == pytest.approx(tensors["expected.loss"].item(), rel=1e-5)
    for name, gradient in golden_gradients.items():
        assert_close(gradients[0][name], gradient)
    whole = torch.cat([gradient.flatten() for gradient in golden_gradients.values()])
    assert grad_norm == pytest.approx(whole.norm().item(), rel=1e-5)

    # The same two steps by PyTorch's own AdamW, told in numbers what the configuration says.
    replayed = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in expected.items()}
    adamw = torch.optim.AdamW(replayed.values(), lr=1.0, betas=(0.9, 0.5), weight_decay=0.3)
    for learning_rate, given in zip((1e-2, 0.75e-2), gradients):
        adamw.param_groups[0]["lr"] = learning_rate
        for name, parameter in replayed.items():
            parameter.grad = given[name]
        adamw.step()
    for name, parameter in run.parameters.items():
        assert_close(parameter.detach(), replayed[name].detach())


# ---------------------------------------------------------------- prompt embeddings


@pytest.fixture
def golden_prompts(tmp_path, tiny_config):
    """The prompts of the golden file, their token counts, their embeddings, and a function that gives a configuration
    with its text encoder."""
    path = ROOT / "tests/golden/prompt_embeds.safetensors"
    with safe_open(path, "pt") as file:
        text_config, prompts = (file.metadata()[name] for name in ("config", "prompts"))
    tensors, model = load_file(path), shutil.copytree(MODEL, tmp_path / "model")
    (model / "text_encoder/config.json").write_text(text_config)
    save_file(
        without_prefix(tensors, "weights."),
        model / "text_encoder/model.safetensors",
        {"format": "pt"},
    )
    prefix_and_suffix = tensors["input_ids"].shape[1] - 512
    counts = [
        min(count, 512)
        for count in (tensors["attention_mask"].sum(dim=1) - prefix_and_suffix).tolist()
    ]
    configure = functools.partial(tiny_config, pretrained_model_name_or_path=str(model))
    return json.loads(prompts), counts, tensors["expected.prompt_embeds"], configure


def assert_prompt_embeds_close(found, expected, token_count):
    """Real tokens and padding apart, as the one is easily large enough to hide the other."""
    assert found.shape == expected.shape == (512, 64)
    assert_close(found[:token_count], expected[:token_count])
    assert_close(found[token_count:], expected[token_count:])


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
    again = load_pipeline(config, "cpu").encode_prompt(prompts)[0]
    for found, count, embeds in zip(again, counts, expected):
        assert_prompt_embeds_close(found, embeds, count)


def test_a_pipeline_that_finds_nothing_cached_computes_the_same(golden_prompts):
    prompts, counts, expected, configure = golden_prompts
    pipe = load_pipeline(configure(), "cpu")
    for prompt, count, embeds in zip(prompts, counts, expected):
        assert_prompt_embeds_close(pipe.encode_prompt(prompt)[0][0], embeds, count)


def test_tokens_are_the_pipelines_own_with_quoted_text_character_by_character(tiny_config):
    tokenizer, seen = load_tokenizer(tiny_config()), []
    prompts = [
        "",
        "a cat",
        'a sign: "a cat on a blue background"',
        "“一只猫”，黄色背景",
        "a dog's bowl, 'a dog'",
        "a " * 600,
    ]

    def text_encoder(input_ids, attention_mask, output_hidden_states):
        seen.append((input_ids, attention_mask))
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)])

    models = dict(scheduler=None, vae=None, transformer=None, text_processor=None)
    pipe = LongCatImagePipeline(text_encoder=text_encoder, tokenizer=tokenizer, **models)
    for batch in (prompts[:5], prompts):
        seen.clear()
        pipe.encode_prompt(batch)
        (input_ids, attention_mask), found = seen[0], encoder_inputs(tokenizer, batch)
        columns = found[0].shape[1]
        assert torch.equal(found[0], input_ids[:, :columns]) and torch.equal(
            found[1], attention_mask[:, :columns]
        )
        longest = attention_mask[:, :-11].sum(dim=1).max().item()  # without the template's end
        assert columns == min(longest + 1, input_ids.shape[1] - 11)


def whole_pipeline(config):
    """diffusers' own pipeline with transformers' own text encoder."""
    folder = config.pretrained_model_name_or_path
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        f"{folder}/text_encoder", dtype=torch.float32
    )
    models = dict(
        transformer=load_transformer(config, "cpu"),
        vae=load_vae(config, "cpu"),
        text_encoder=text_encoder,
    )
    models |= dict(
        tokenizer=Qwen2Tokenizer.from_pretrained(f"{folder}/tokenizer"), text_processor=None
    )
    return LongCatImagePipeline(**models, scheduler=load_scheduler(config))


def test_the_unmodified_pipeline_differs_in_the_padding_alone(golden_prompts):
    """transformers 5 gives each padding token the position after the one before it. transformers 4.57.1, with which the
    model was trained, gave all of them position 1. No real token sees them."""
    prompts, counts, _, configure = golden_prompts
    config = configure()
    files, theirs = cache_prompts(config, prompts, "cpu"), whole_pipeline(config)
    for prompt, count in zip(prompts, counts):
        ours, other = read_prompt_embeds(files[prompt]), theirs.encode_prompt(prompt)[0][0]
        assert_close(ours[:count], other[:count])
        if count < 512:
            distance = (ours[count:] - other[count:]).norm() / ours[count:].norm()
            assert distance > 0.1, (
                "transformers counts as 4.57.1 did again: README's section on this is out of date"
            )
            assert_close(ours[count:], ours[-1:].expand(512 - count, -1))


def test_our_pipeline_draws_what_the_unmodified_one_draws_with_any_negative_prompt(tiny_config):
    unmodified, drawn = whole_pipeline(tiny_config()), []

    give_the_authors_positions(unmodified.text_encoder)
    options = dict(
        num_inference_steps=2, guidance_scale=3.0, height=64, width=96, enable_prompt_rewrite=False
    )
    for negative in ("", "a cat"):
        settings = dict(validation_num_inference_steps=2, validation_resolution="96x64")
        config = tiny_config(**settings, validation_negative_prompt=negative)
        drawn += generate(load_pipeline(config, "cpu"), config, [PROMPT])
        noise = torch.Generator().manual_seed(42)
        expected = unmodified(PROMPT, negative_prompt=negative, generator=noise, **options).images[
            0
        ]
        assert (
            drawn[-1].size == (96, 64)
            and np.abs(np.subtract(drawn[-1], expected, dtype=int)).max() <= 1
        )
    assert np.abs(np.subtract(*drawn, dtype=int)).mean() > 1


# ---------------------------------------------------------------- quantized weights


def libraries_own_weight(linear, precision):
    """The weight as optimum-quanto or torchao quantize it and give it back."""
    model, weight = torch.nn.Sequential(copy.deepcopy(linear)), linear.weight.detach()
    if (
        precision == "int4-quanto"
    ):  # its own way back compiles an extension; this is its library/unpack.py
        scale, shift = quanto.MaxOptimizer()(weight, quanto.qint4, axis=0, group_size=128)
        made = quanto.quantize_weight(
            weight, quanto.qint4, 0, scale, shift, group_size=128, optimized=False
        )
        values = torch.cat([made._data._data & 15, made._data._data >> 4])
        return (made._scale * values - made._shift).reshape(weight.shape)
    if precision == "fp8-torchao":
        quantize_(model, Float8WeightOnlyConfig())
    else:
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    return model[0].weight.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_quantized_weights_are_the_libraries_own_to_the_last_bit_and_alone_are_kept(
    precision, dtype
):
    torch.manual_seed(0)
    linear, x, gradient = (
        torch.nn.Linear(384, 256).to(dtype),
        torch.randn(64, 384),
        torch.randn(64, 256),
    )
    expected, quantized = (
        libraries_own_weight(linear, precision),
        QuantizedLinear(linear, precision),
    )
    stored = [
        tensor
        for tensor in (quantized.weight, quantized.scale, quantized.shift)
        if tensor is not None
    ]
    assert torch.equal(dequantize(dtype, (256, 384), *stored), expected) and expected.dtype == dtype
    assert all(type(tensor.data) is torch.Tensor and not tensor.requires_grad for tensor in stored)
    linear.weight = torch.nn.Parameter(expected, requires_grad=False)
    kept, results = [], []
    keep = lambda tensor: kept.append(tensor) or tensor
    for layer in (linear, quantized):
        kept.clear()
        given = x.to(dtype, copy=True).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(given)
        y.backward(gradient.to(dtype))
        results.append((y.detach(), given.grad))
    tolerance = 0.012 if precision == "int8-matmul" else 1e-6 if dtype == torch.float32 else 0.01
    for exact, found in zip(*results):
        assert (found - exact).norm() <= tolerance * exact.norm()
    assert kept and {tensor.data_ptr() for tensor in kept} <= {
        tensor.data_ptr() for tensor in stored
    }
    assert sum(tensor.nbytes for tensor in kept) <= 256 * 384 * (
        0.57 if precision == "int4-quanto" else 1.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", *QUANTIZED])
def test_compiled_blocks_learn_and_score_the_same(quick_config, tmp_path, precision):
    settings = dict(
        base_model_precision=precision,
        enable_group_offload=precision == "int4-quanto",
        max_train_steps=3,
    )
    settings, losses = settings | dict(validation_split=0.2, validation_step_interval=3), []
    for compiled in (False, True):
        config = quick_config(
            **settings, torch_compile=compiled, output_dir=str(tmp_path / str(compiled))
        )
        train_lora.main(config)
        losses.append(
            [
                line[name]
                for line in metrics(config)
                for name in ("loss", "held_out_loss")
                if name in line
            ]
        )
    assert losses[0] and losses[0] == pytest.approx(
        losses[1], rel=2e-3 if precision == "int8-matmul" else 1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["6gb", "8gb", "12gb", "16gb", "24gb", "24gb_bf16", "48gb", "colab_t4"]
)
def test_a_shipped_config_fits_its_card_and_takes_what_readme_says(name):
    arithmetic, size = ("fp16", 15) if name == "colab_t4" else ("auto", int(name.split("gb")[0]))
    gib, _, needed = simulate_memory.simulate(
        load_config(ROOT / f"configs/{name}.json", mixed_precision=arithmetic)
    )
    assert needed <= simulate_memory.CARDS[size], gib
    row = re.search(
        rf"\n\| `{name}.json` .*\| ([\d.]+) / ([\d.]+) \|\n", (ROOT / "README.md").read_text()
    )
    assert [*map(float, row.groups())] == pytest.approx(
        [gib["a step, at its peak"], gib["a preview"]], abs=0.2
    )


def test_norms_run_outside_of_autocast(monkeypatch):
    layer_norm, autocast = torch.nn.functional.layer_norm, []
    note = lambda *given, **options: (
        autocast.append(torch.is_autocast_enabled("cpu")) or layer_norm(*given, **options)
    )
    monkeypatch.setattr(torch.nn.functional, "layer_norm", note)
    monkeypatch.setattr(simulate_memory.bench_step, "REAL", dict(num_layers=1, num_single_layers=1))
    simulate_memory.training(load_config(ROOT / "configs/48gb.json", mixed_precision="bf16"))
    assert autocast and not any(autocast), "CUDA's would keep a float32 copy of each norm's input"

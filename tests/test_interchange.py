"""LoRA files between programs: ours in others, others' in ours, each at its own strength."""

import functools

import pytest
import torch
from conftest import MODEL
from diffusers import LongCatImageTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from longcat_common import (
    LORA_FILE, UserError, flow_matching_loss, load_transformer, position_ids,
)  # fmt: skip
from train_lora import add_lora, save_lora
from validate import load_lora, read_lora

TARGETS = [
    "attn.to_q",
    "attn.add_k_proj",
    "attn.to_out.0",
    "ff.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
    # Outside of the blocks, by their whole names.
    "x_embedder",
    "norm_out.linear",
    "time_embed.timestep_embedder.linear_1",
]


TO_Q = "transformer_blocks.0.attn.to_q"


def pair(A, B, module=TO_Q):
    """A LoRA of one module, with matrices of these shapes."""
    return {f"{module}.lora_A.weight": torch.ones(A), f"{module}.lora_B.weight": torch.ones(B)}


def plain():
    """diffusers' own transformer, without a LoRA."""
    return LongCatImageTransformer2DModel.from_pretrained(MODEL, subfolder="transformer").eval()


def distance(a, b):
    """The relative distance of two tensors, by their norms."""
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def predict(transformer):
    """The transformer's output for fixed random latents and prompt embeddings."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 64, generator=generator)
    prompt_embeds = torch.randn(1, 32, 64, generator=generator)
    text_ids, image_ids = position_ids(8, 8)
    timestep = torch.tensor([0.5])
    return transformer(
        latents, prompt_embeds, timestep, image_ids, text_ids[:32], return_dict=False
    )[0]


def randomize(transformer, seed=0):
    """Gives every lora_B random values, as an untrained one is zero. Returns the transformer."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return transformer.eval()


def make_lora(config, folder, seed=0):
    """Saves a LoRA with random values to a folder. Returns the transformer with it."""
    transformer = load_transformer(config, "cpu")
    add_lora(transformer, config)
    save_lora(randomize(transformer, seed), folder)
    return transformer


# ---------------------------------------------------------------- ours in other programs


@pytest.fixture
def expected(tiny_config, tmp_path):
    """The prediction with a LoRA of ours whose alpha is not its rank; tmp_path holds its files."""
    settings = dict(lora_rank=4, lora_alpha=6, lora_target_modules=TARGETS)
    prediction = predict(make_lora(tiny_config(**settings), tmp_path))
    assert distance(prediction, predict(plain())) > 0.05
    return prediction


def test_ours_is_as_strong_in_diffusers(expected, tmp_path):
    transformer = plain()
    transformer.load_lora_adapter(tmp_path / LORA_FILE)
    assert distance(predict(transformer), expected) < 1e-5


def test_ours_is_as_strong_in_peft_and_merged_into_the_weights(expected, tmp_path):
    transformer = PeftModel.from_pretrained(plain(), tmp_path)
    assert distance(predict(transformer), expected) < 1e-5
    assert distance(predict(transformer.merge_and_unload()), expected) < 1e-5


def test_ours_is_as_strong_in_comfyui(expected, tmp_path):
    transformer = plain()
    state = load_file(tmp_path / LORA_FILE)
    for module in {name.rsplit(".lora_", 1)[0] for name in state}:
        assert f"{module}.alpha" not in state  # without it ComfyUI uses strength 1
        weight = transformer.get_submodule(module.removeprefix("transformer.")).weight
        weight.data += state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
    assert distance(predict(transformer), expected) < 1e-5


def test_load_lora_replaces_another_and_its_strength_is_diffusers(expected, tiny_config, tmp_path):
    in_diffusers = plain()
    in_diffusers.load_lora_adapter(tmp_path / LORA_FILE, adapter_name="ours")
    ours = load_transformer(tiny_config(), "cpu")
    make_lora(tiny_config(lora_target_modules=["attn.to_v"]), tmp_path / "other", seed=1)
    load_lora(ours, tmp_path / "other")
    for strength in (1.0, 0.5, 0.0):
        in_diffusers.set_adapters("ours", strength)
        load_lora(ours, tmp_path, strength)
        assert distance(predict(ours), predict(in_diffusers)) < 1e-5


# ---------------------------------------------------------------- other trainers' in ours


def save_with_diffusers(folder):
    """transformer.save_lora_adapter: bare keys, alpha in the header."""
    transformer = plain()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS))
    randomize(transformer).save_lora_adapter(folder)
    return predict(transformer), folder / LORA_FILE


def save_with_peft(folder, **settings):
    """get_peft_model and save_pretrained, as the authors' scripts do; alpha is 8 if not given."""
    transformer = randomize(
        get_peft_model(plain(), LoraConfig(r=4, target_modules=TARGETS, **settings))
    )
    transformer.save_pretrained(folder)
    return predict(transformer), folder


def save_like_kohya(folder, prefix="transformer.", dot=".", dtype=torch.float32):
    """lora_down, lora_up and alpha tensors; in some files with underscores for dots."""
    prediction, path = save_with_diffusers(folder)
    tensors = {}
    for name, tensor in load_file(path).items():
        module = prefix + name.rsplit(".lora_", 1)[0].replace(".", dot)
        part = "lora_down" if "lora_A" in name else "lora_up"
        tensors[f"{module}.{part}.weight"] = tensor.to(dtype)
        tensors[f"{module}.alpha"] = torch.tensor(10.0)
    save_file(tensors, path)
    return prediction, path


def save_like_simpletuner(folder):
    """No alpha in the file; it is in the configuration next to it."""
    prediction, path = save_with_diffusers(folder)
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    (folder / "simpletuner_config.json").write_text('{"--lora_rank": 4, "--lora_alpha": 10}')
    return prediction, path


OTHER_TRAINERS = {
    "diffusers": save_with_diffusers,
    "PEFT, alphas by pattern": functools.partial(
        save_with_peft, alpha_pattern={"attn.to_q": 3, "^single.*.0.proj_out": 1}
    ),
    "PEFT, rsLoRA": functools.partial(save_with_peft, use_rslora=True),
    "kohya, bf16": functools.partial(save_like_kohya, dtype=torch.bfloat16),
    "lora_unet_": functools.partial(save_like_kohya, prefix="lora_unet_", dot="_"),
    "lora_transformer_": functools.partial(save_like_kohya, prefix="lora_transformer_", dot="_"),
    "SimpleTuner": save_like_simpletuner,
}


@pytest.mark.parametrize("trainer", OTHER_TRAINERS)
def test_other_trainers_loras_open_at_their_own_strength(tiny_config, tmp_path, capsys, trainer):
    expected, path = OTHER_TRAINERS[trainer](tmp_path)
    assert distance(expected, predict(plain())) > 0.03
    close = 0.003 if "bf16" in trainer else 1e-5

    generating = load_transformer(tiny_config(), "cpu")
    load_lora(generating, path)
    assert distance(predict(generating), expected) < close

    settings = dict(lora_rank=4, lora_alpha=7.0, lora_target_modules=TARGETS)
    training = load_transformer(tiny_config(), "cpu")
    add_lora(training, tiny_config(**settings, init_lora=str(path)))
    assert distance(predict(training.eval()), expected) < close
    assert "alpha" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "modules, targets",
    [
        (["x_embedder"], ["x_embedder"]),
        (["norm_out.linear", TO_Q], ["norm_out.linear", TO_Q]),
        (["single_transformer_blocks.1.proj_out"], ["single_transformer_blocks.1.proj_out"]),
    ],
)
def test_training_starts_from_layers_by_their_whole_names(tiny_config, tmp_path, modules, targets):
    path = tmp_path / "some.safetensors"
    layers = dict(plain().named_modules())
    tensors = {}
    for module in modules:
        layer = layers[module]
        tensors |= pair((4, layer.in_features), (layer.out_features, 4), module)
    save_file(tensors, path)
    config = tiny_config(lora_rank=4, lora_target_modules=targets, init_lora=str(path))
    parameters = add_lora(load_transformer(config, "cpu"), config)
    names = {name.replace(".default", "") for name in parameters}
    assert names == tensors.keys()
    assert all((parameter == 1).all() for parameter in parameters.values())


@pytest.mark.parametrize(
    "settings", [{}, {"mixed_precision": "bf16"}, {"enable_group_offload": True}]
)
def test_layers_outside_of_the_blocks_are_trained(tiny_config, settings):
    targets = ["x_embedder", "context_embedder", "norm_out.linear", "linear_1"]
    config = tiny_config(lora_target_modules=targets, **settings)
    transformer = load_transformer(config, "cpu")
    parameters = add_lora(transformer, config)
    randomize(transformer).train()
    transformer.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 16, 8, 8, generator=generator)
    prompt_embeds = torch.randn(1, 512, transformer.config.joint_attention_dim, generator=generator)
    sigmas = torch.tensor([0.5])
    flow_matching_loss(transformer, latents, noise, sigmas, prompt_embeds).backward()
    assert len(parameters) == 2 * len(targets)
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert parameter.grad.norm() > 0, name


# ---------------------------------------------------------------- what cannot be used

GOOD = pair((4, 192), (192, 4))  # fits the tiny model
UNUSABLE = [
    (
        GOOD | {f"{TO_Q}.lora_magnitude_vector.weight": torch.ones(3)},
        "is a DoRA; only plain LoRAs can be opened",
    ),
    (
        pair((4, 192), (192, 4), "double_blocks.0.img_attn.qkv"),
        "original layout, with q, k and v in one",
    ),
    (
        {f"{TO_Q}.lora_A.weight": torch.ones(4, 192)},
        "lora_B.weight is unknown or missing",
    ),
    (
        GOOD | {f"{TO_Q}.lora_B.weight": torch.full((192, 4), torch.nan)},
        "not finite",
    ),
    (
        pair((4, 96), (96, 4)),
        r"does not fit this model: .*to_q has shapes \(4, 96\) and \(96, 4\), but .* 192 inputs",
    ),
    (
        pair((4, 192), (192, 4), "transformer_blocks.99.attn.to_q"),
        r"this model, which has no linear layer transformer_blocks.99.attn.to_q",
    ),
    (
        {f"base_model.model.{name}": tensor for name, tensor in GOOD.items()},
        "PEFT stores the LoRA's alpha in adapter_config.json, which is not found",
    ),
]


@pytest.mark.parametrize("tensors, message", UNUSABLE)
def test_an_unusable_lora_is_refused_with_the_reason(tiny_config, tmp_path, tensors, message):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"other.safetensors: .*{message}"):
        load_lora(load_transformer(tiny_config(), "cpu"), path)


@pytest.fixture
def foreign_lora(tmp_path):
    """A LoRA file without alpha, for one layer of the transformer and one of the text encoder."""
    path = tmp_path / "some.safetensors"
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in GOOD.items()}
    save_file(tensors | {"text_encoder.layers.0.lora_A.weight": torch.ones(2, 2)}, path)
    return path


def test_ignored_weights_and_a_missing_alpha_are_reported(foreign_lora, capsys):
    assert read_lora(foreign_lora).keys() == GOOD.keys()
    printed = capsys.readouterr().out
    assert f"{foreign_lora}: text encoder weights ignored" in printed
    assert f"{foreign_lora}: alpha not found; it is taken to be equal to the rank" in printed


@pytest.mark.parametrize(
    "target, rank, message",
    [
        ("attn.to_q", 16, r'init_lora: .*has lora_rank 4 and .* \["attn.to_q"\]; set these'),
        ("attn.to_q", 4, "init_lora: .*cannot be trained further.* list their whole names"),
        (
            "attn.to_x",
            4,
            "lora_target_modules: no layer's name in this transformer ends in 'attn.to_x'",
        ),
    ],
)
def test_training_does_not_start_from_a_lora_of_other_layers_or_rank(
    tiny_config, foreign_lora, target, rank, message
):
    settings = dict(lora_rank=rank, lora_target_modules=[target], init_lora=str(foreign_lora))
    config = tiny_config(**settings)
    with pytest.raises(UserError, match=message):
        add_lora(load_transformer(config, "cpu"), config)

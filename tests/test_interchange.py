"""LoRAs travel: ours to other programs, other trainers' to ours, each at the strength it was trained with."""

import functools

import pytest
import torch
from conftest import MODEL
from diffusers import LongCatImageTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from longcat_common import LORA_FILE, UserError, load_transformer, position_ids
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
]
plain = lambda: LongCatImageTransformer2DModel.from_pretrained(
    MODEL, subfolder="transformer"
).eval()
distance = lambda a, b: ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def predict(transformer):
    draw = torch.Generator().manual_seed(0)
    picture, text = torch.randn(1, 16, 64, generator=draw), torch.randn(1, 32, 64, generator=draw)
    text_ids, image_ids = position_ids(8, 8)
    return transformer(
        picture, text, torch.tensor([0.5]), image_ids, text_ids[:32], return_dict=False
    )[0]


def shake(transformer, seed=0):
    """Gives every lora_B a value: an untrained one is zero."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.05
    return transformer.eval()


def make_lora(config, folder, seed=0):
    """Trains nothing, but saves a LoRA with alpha unlike its rank. Returns the transformer that has it."""
    transformer = load_transformer(config, "cpu")
    add_lora(transformer, config)
    save_lora(shake(transformer, seed), folder)
    return transformer


def test_ours_is_as_strong_in_diffusers_peft_and_comfyui_and_replaces_another(
    tiny_config, tmp_path
):
    settings = dict(lora_rank=4, lora_alpha=6, lora_target_modules=TARGETS)
    expected = predict(make_lora(tiny_config(**settings), tmp_path))
    in_diffusers, in_peft, in_comfyui = (
        plain(),
        PeftModel.from_pretrained(plain(), tmp_path),
        plain(),
    )
    in_diffusers.load_lora_adapter(tmp_path / LORA_FILE, adapter_name="ours")
    state = load_file(tmp_path / LORA_FILE)
    for module in {name.rsplit(".lora_", 1)[0] for name in state}:
        assert f"{module}.alpha" not in state  # then ComfyUI takes strength 1
        weight = in_comfyui.get_submodule(module.removeprefix("transformer.")).weight
        weight.data += state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
    for transformer in (in_diffusers, in_comfyui, in_peft, in_peft.merge_and_unload()):
        assert distance(predict(transformer), expected) < 1e-5
    assert distance(expected, predict(plain())) > 0.05

    ours = load_transformer(tiny_config(), "cpu")
    make_lora(tiny_config(lora_target_modules=["attn.to_v"]), tmp_path / "other", seed=1)
    load_lora(ours, tmp_path / "other")
    for strength in (1.0, 0.5, 0.0):
        in_diffusers.set_adapters("ours", strength)
        load_lora(ours, tmp_path, strength)
        assert distance(predict(ours), predict(in_diffusers)) < 1e-5


def of_diffusers(folder):
    """transformer.save_lora_adapter: bare keys, alpha in the header."""
    transformer = plain()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS))
    shake(transformer).save_lora_adapter(folder)
    return predict(transformer), folder / LORA_FILE


def of_peft(folder, **settings):
    """get_peft_model and save_pretrained, as the model authors' scripts do; alpha is 8 at any rank, if not given."""
    transformer = shake(
        get_peft_model(plain(), LoraConfig(r=4, target_modules=TARGETS, **settings))
    )
    transformer.save_pretrained(folder)
    return predict(transformer), folder


def of_kohya(folder, prefix="transformer.", dot=".", dtype=torch.float32):
    """lora_down and lora_up with an alpha each, some with underscores for dots."""
    prediction, path = of_diffusers(folder)
    tensors = {}
    for name, tensor in load_file(path).items():
        module = prefix + name.rsplit(".lora_", 1)[0].replace(".", dot)
        tensors[f"{module}.lora_{'down' if 'lora_A' in name else 'up'}.weight"] = tensor.to(dtype)
        tensors[f"{module}.alpha"] = torch.tensor(10.0)
    save_file(tensors, path)
    return prediction, path


def of_simpletuner(folder):
    """No alpha in the file; it is in the configuration beside it."""
    prediction, path = of_diffusers(folder)
    save_file({f"transformer.{name}": tensor for name, tensor in load_file(path).items()}, path)
    (folder / "simpletuner_config.json").write_text('{"--lora_rank": 4, "--lora_alpha": 10}')
    return prediction, path


FOREIGN = {
    "diffusers": of_diffusers,
    "PEFT, alphas by pattern": functools.partial(
        of_peft, alpha_pattern={"attn.to_q": 3, "^single.*.0.proj_out": 1}
    ),
    "PEFT, rsLoRA": functools.partial(of_peft, use_rslora=True),
    "kohya, bf16": functools.partial(of_kohya, dtype=torch.bfloat16),
    "lora_unet_": functools.partial(of_kohya, prefix="lora_unet_", dot="_"),
    "lora_transformer_": functools.partial(of_kohya, prefix="lora_transformer_", dot="_"),
    "SimpleTuner": of_simpletuner,
}


@pytest.mark.parametrize("trainer", FOREIGN)
def test_other_trainers_loras_open_at_their_own_strength(tiny_config, tmp_path, capsys, trainer):
    expected, path = FOREIGN[trainer](tmp_path)
    close = 0.003 if "bf16" in trainer else 1e-5
    assert distance(expected, predict(plain())) > 0.03
    drawn_with, trained_on = (
        load_transformer(tiny_config(), "cpu"),
        load_transformer(tiny_config(), "cpu"),
    )
    load_lora(drawn_with, path)
    add_lora(
        trained_on,
        tiny_config(lora_rank=4, lora_alpha=7.0, lora_target_modules=TARGETS, init_lora=str(path)),
    )
    for transformer in (drawn_with, trained_on.eval()):
        assert distance(predict(transformer), expected) < close
    assert "alpha" not in capsys.readouterr().out


Q = "transformer_blocks.0.attn.to_q"
pair = lambda A, B, module=Q: {
    f"{module}.lora_A.weight": torch.ones(A),
    f"{module}.lora_B.weight": torch.ones(B),
}
GOOD = pair((4, 192), (192, 4))  # fits the tiny model
NOT_OPENED = [
    (
        GOOD | {f"{Q}.lora_magnitude_vector.weight": torch.ones(3)},
        "is no LoRA that can be opened here: it is a DoRA",
    ),
    (
        pair((4, 192), (192, 4), "double_blocks.0.img_attn.qkv"),
        "original layout, with q, k and v in one",
    ),
    ({f"{Q}.lora_A.weight": torch.ones(4, 192)}, "lora_B.weight is unknown, missing"),
    (GOOD | {f"{Q}.lora_B.weight": torch.full((192, 4), torch.nan)}, "not finite"),
    (
        pair((4, 96), (96, 4)),
        r"made for another model.*to_q has \(4, 96\) and \(96, 4\), and here it takes 192",
    ),
    (
        pair((4, 192), (192, 4), "transformer_blocks.99.attn.to_q"),
        r"transformer_blocks.99.attn.to_q has .*is missing",
    ),
    (
        {f"base_model.model.{n}": t for n, t in GOOD.items()},
        "its strength is unknown without adapter_config.json",
    ),
]


@pytest.mark.parametrize("tensors, told", NOT_OPENED)
def test_what_is_no_lora_for_this_model_is_told_by_its_kind(tiny_config, tmp_path, tensors, told):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors: .*{told}"):
        load_lora(load_transformer(tiny_config(), "cpu"), tmp_path / "other.safetensors")


def test_what_is_left_out_or_unknown_of_a_lora_is_said_and_on_one_block_it_is_not_trained_on(
    tiny_config, tmp_path, capsys
):
    file = tmp_path / "some.safetensors"
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in GOOD.items()}
    save_file(tensors | {"text_encoder.layers.0.lora_A.weight": torch.ones(2, 2)}, file)
    assert read_lora(file).keys() == GOOD.keys()
    printed = capsys.readouterr().out
    assert f"{file}: its text encoder's part is left out" in printed
    assert f"{file}: says nothing of its alpha, which is taken to be its rank" in printed
    for target, rank, told in (
        ("attn.to_q", 16, r'init_lora: .*has lora_rank 4 and .* \["attn.to_q"\]; set these'),
        ("attn.to_q", 4, "init_lora: .*cannot be trained further"),
        (
            "attn.to_x",
            4,
            "lora_target_modules: no layer's name in this transformer ends in 'attn.to_x'",
        ),
    ):
        config = tiny_config(lora_rank=rank, lora_target_modules=[target], init_lora=str(file))
        with pytest.raises(UserError, match=told):
            add_lora(load_transformer(config, "cpu"), config)

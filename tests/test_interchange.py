"""LoRAs travel: ours into diffusers, PEFT and ComfyUI, other trainers' into ours, each at the strength it was trained
with."""

import functools
import json
import re

import pytest
import torch
from conftest import MODEL
from diffusers import LongCatImageTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, safe_open, save_file

import train_lora
from longcat_common import UserError, load_lora, load_transformer, position_ids, read_lora, save_lora
from train_lora import add_lora

TARGETS = ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]
OURS = "pytorch_lora_weights.safetensors"


def plain():
    return LongCatImageTransformer2DModel.from_pretrained(MODEL, subfolder="transformer").eval()


@torch.no_grad()
def predict(transformer):
    draw = torch.Generator().manual_seed(0)
    text_ids, image_ids = position_ids(8, 8)
    picture, text = torch.randn(1, 16, 64, generator=draw), torch.randn(1, 32, 64, generator=draw)
    ids = dict(txt_ids=text_ids[:32], img_ids=image_ids, return_dict=False)
    return transformer(picture, text, torch.tensor([0.5]), **ids)[0]


def shake(transformer, seed=0):
    """Gives every lora_B a value: an untrained one is zero."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.05
    return transformer.eval()


def distance(a, b):
    """How far two predictions are apart, relative to the second."""
    return ((a - b).norm() / b.norm()).item()


def make_lora(tiny_config, folder, seed=0, **settings):
    """Trains nothing, but saves a LoRA with alpha unlike its rank. Returns the transformer that has it."""
    transformer = load_transformer(tiny_config(), "cpu")
    add_lora(transformer, tiny_config(**{"lora_rank": 4, "lora_alpha": 6, "lora_target_modules": TARGETS, **settings}))
    save_lora(shake(transformer, seed), folder, {"steps": 7})
    return transformer


# ---------------------------------------------------------------- ours, elsewhere

# The layers that ComfyUI maps for this model, which it holds as a Flux. It merges them into slices of its own fused
# weights, which is the same sum as into the separate ones here.
IN_COMFYUI = re.compile(
    r"transformer\.(transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    r"|x_embedder|context_embedder|proj_out|norm_out\.linear)"
)


def test_ours_gives_the_same_prediction_in_diffusers_peft_and_comfyui(tiny_config, tmp_path):
    expected = predict(make_lora(tiny_config, tmp_path))
    assert distance(expected, predict(plain())) > 0.05
    in_diffusers, in_peft, in_comfyui = plain(), PeftModel.from_pretrained(plain(), tmp_path), plain()
    in_diffusers.load_lora_adapter(tmp_path / OURS)
    state = load_file(tmp_path / OURS)
    for module in {name.rsplit(".lora_", 1)[0] for name in state}:
        assert IN_COMFYUI.fullmatch(module) and f"{module}.alpha" not in state  # then it takes strength 1
        weight = in_comfyui.get_submodule(module.removeprefix("transformer.")).weight
        weight.data += state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
    for transformer in (in_diffusers, in_comfyui, in_peft, in_peft.merge_and_unload()):
        assert distance(predict(transformer), expected) < 1e-5


def test_strengths_are_those_of_diffusers_and_a_lora_leaves_nothing_behind(tiny_config, tmp_path):
    make_lora(tiny_config, tmp_path / "a")
    make_lora(tiny_config, tmp_path / "b", seed=1, lora_rank=8, lora_target_modules=["attn.to_v"])
    ours, theirs, base = load_transformer(tiny_config(), "cpu"), plain(), predict(plain())
    for name in "ab":
        theirs.load_lora_adapter(tmp_path / name / OURS, adapter_name=name)
    load_lora(ours, tmp_path / "b")
    for strength in (1.0, 0.5, 0.0):
        theirs.set_adapters(["a", "b"], [strength, 0.0])
        load_lora(ours, tmp_path / "a", strength)
        assert distance(predict(ours), predict(theirs)) < 1e-5
    ours.delete_adapters([*ours.peft_config])
    assert distance(predict(ours), base) < 1e-6


# ---------------------------------------------------------------- others', here


def of_diffusers(folder):
    """transformer.save_lora_adapter: bare keys, alpha in the header."""
    transformer = plain()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS))
    shake(transformer).save_lora_adapter(folder)
    return predict(transformer), folder / OURS


def of_the_authors(folder, **settings):
    """get_peft_model and save_pretrained, as the model authors' scripts do; PEFT's own alpha is 8 at any rank."""
    transformer = shake(get_peft_model(plain(), LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})))
    transformer.save_pretrained(folder)
    return predict(transformer), folder


def of_kohya(folder, prefix="transformer.", dot=".", dtype=torch.float32):
    """lora_down and lora_up with an alpha each; its scripts name layers with underscores for dots."""
    prediction, path = of_diffusers(folder)
    state = {}
    for name, tensor in load_file(path).items():
        module, part = name.rsplit(".lora_", 1)
        module = prefix + module.replace(".", dot)
        state[f"{module}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor.to(dtype)
        state[f"{module}.alpha"] = torch.tensor(10.0)
    save_file(state, folder / "kohya.safetensors")
    return prediction, folder / "kohya.safetensors"


def of_simpletuner(folder):
    """No alpha in the file; it is in the configuration beside it."""
    prediction, path = of_diffusers(folder)
    state = {f"transformer.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(state, folder / "simpletuner.safetensors")
    (folder / "simpletuner_config.json").write_text('{"--lora_rank": 4, "--lora_alpha": 10}')
    return prediction, folder / "simpletuner.safetensors"


PATTERNS = {"attn.to_q": 3, "^single_transformer_blocks.0.proj_out": 1}
FOREIGN = {
    "diffusers": of_diffusers,
    "PEFT": of_the_authors,
    "PEFT, alphas by pattern": functools.partial(of_the_authors, alpha_pattern=PATTERNS),
    "PEFT, rsLoRA": functools.partial(of_the_authors, use_rslora=True),
    "kohya, bf16": functools.partial(of_kohya, dtype=torch.bfloat16),
    "lora_unet_": functools.partial(of_kohya, prefix="lora_unet_", dot="_"),
    "lora_transformer_": functools.partial(of_kohya, prefix="lora_transformer_", dot="_"),
    "SimpleTuner": of_simpletuner,
}


@pytest.mark.parametrize("trainer", FOREIGN)
def test_other_trainers_loras_open_at_their_own_strength(tiny_config, tmp_path, trainer):
    expected, path = FOREIGN[trainer](tmp_path)
    close = 0.003 if "bf16" in trainer else 1e-5
    assert distance(expected, predict(plain())) > 0.03
    drawn_with, trained_on = load_transformer(tiny_config(), "cpu"), load_transformer(tiny_config(), "cpu")
    load_lora(drawn_with, path)
    settings = dict(lora_rank=4, lora_alpha=7.0, lora_target_modules=TARGETS, init_lora=str(path))
    add_lora(trained_on, tiny_config(**settings))
    assert distance(predict(drawn_with), expected) < close
    assert distance(predict(trained_on.eval()), expected) < close


def test_a_lora_that_says_nothing_of_its_alpha_is_said(tiny_config, tmp_path, capsys):
    _, path = of_simpletuner(tmp_path)
    make_lora(tiny_config, tmp_path / "ours")
    read_lora(path)
    read_lora(tmp_path / "ours")
    assert "alpha" not in capsys.readouterr().out
    (tmp_path / "simpletuner_config.json").unlink()
    read_lora(path)
    assert f"{path}: says nothing of its alpha, which is taken to be its rank" in capsys.readouterr().out


def test_training_goes_on_from_another_trainers_lora_and_the_file_says_what_it_is(quick_config, tmp_path):
    _, path = of_the_authors(tmp_path / "theirs")
    settings = dict(max_train_steps=1, lora_rank=4, lora_target_modules=TARGETS, learning_rate=1e-9)
    with pytest.raises(UserError, match="is no whole checkpoint .*; to start from a LoRA's weights set init_lora"):
        train_lora.main(quick_config(**settings, resume_from_checkpoint=str(path)))
    config = quick_config(**settings, init_lora=str(path), trigger_words="zumi", license="cc-by-4.0")
    written = train_lora.main(config)
    assert config.init_lora == str(path), "the caller's configuration stays as it is"
    ours, theirs = read_lora(config.output_dir), read_lora(path)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    with safe_open(written, "pt") as file:
        header = file.metadata()
    said = json.loads(header.pop("longcat_lora"))
    assert not header and said["trained_with"].startswith("LongCat-Image LoRA scripts 0") and said["lora_rank"] == 4
    assert (said["trigger_words"], said["license"], said["base_model"]) == (["zumi"], "cc-by-4.0", MODEL)
    assert (said["steps"], said["resolution"]) == (1, "128x128,192x128,128x192")


# ---------------------------------------------------------------- what cannot be opened

Q = "transformer_blocks.0.attn.to_q"
pair = lambda A, B, module=Q: {f"{module}.lora_A.weight": torch.ones(A), f"{module}.lora_B.weight": torch.ones(B)}
GOOD = pair((4, 192), (192, 4))  # fits the tiny model
NOT_OPENED = [
    (GOOD | {f"{Q}.lora_magnitude_vector.weight": torch.ones(3)}, "is no LoRA that can be opened here: it is a DoRA"),
    ({f"{Q}.lokr_w1": torch.ones(3, 3)}, "it is a LoKr"),
    ({"lora_unet_transformer_blocks_0_attn_to_q.hada_w1_a": torch.ones(3, 3)}, "it is a LoHa"),
    (pair((4, 192), (192, 4), "double_blocks.0.img_attn.qkv"), "original layout, with q, k and v in one"),
    ({f"{Q}.lora_A.weight": torch.ones(4, 192)}, "lora_B.weight is unknown, missing"),
    ({"x_embedder.weight": torch.ones(2)}, "x_embedder.weight is unknown"),
    ({}, "it is empty"),
    (GOOD | {f"{Q}.lora_B.weight": torch.full((192, 4), torch.nan)}, "not finite"),
    (pair((4, 96), (96, 4)), r"made for another model.* to_q has \(4, 96\) and \(96, 4\), and here it takes 192"),
    (pair((4, 192), (192, 4), "transformer_blocks.99.attn.to_q"), r"transformer_blocks.99.attn.to_q has .*is missing"),
]


@pytest.mark.parametrize("tensors, told", NOT_OPENED)
def test_what_is_no_lora_for_this_model_is_told_by_its_kind(tiny_config, tmp_path, tensors, told):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors: .*{told}"):
        load_lora(load_transformer(tiny_config(), "cpu"), tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["lora.pt", "lora.bin", "lora.ckpt"])
def test_what_is_pickled_is_not_opened(tmp_path, name):
    torch.save(GOOD, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is no .safetensors file; others are not opened, for a pickled one"):
        read_lora(tmp_path / name)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"lora_alpha": "much"}, "is missing or damaged.*much"),
        ({"alpha_pattern": {"*[": 1}}, "is missing or damaged.*repeat"),
        (None, "its strength is unknown without adapter_config.json beside it"),
    ],
)
def test_pefts_lora_needs_its_whole_configuration(tmp_path, settings, told):
    tensors = {f"base_model.model.{name}": tensor for name, tensor in GOOD.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if settings:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=told):
        read_lora(tmp_path)


def test_a_lora_that_cannot_be_trained_on_says_what_to_set_and_may_still_be_drawn(tiny_config, tmp_path, capsys):
    file = tmp_path / "some.safetensors"
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in GOOD.items()}
    save_file(tensors | {"text_encoder.layers.0.lora_A.weight": torch.ones(2, 2)}, file)
    assert read_lora(file).keys() == GOOD.keys()
    assert "text encoder's part is left out" in capsys.readouterr().out
    for rank, told in (
        (16, r'init_lora: .* has lora_rank 4 and lora_target_modules \["attn.to_q"\]; set these'),
        (4, "cannot be trained on: it has not one rank and the same layers in every block"),
    ):
        config = tiny_config(lora_rank=rank, lora_target_modules=["attn.to_q"], init_lora=str(file))
        with pytest.raises(UserError, match=told):
            add_lora(load_transformer(config, "cpu"), config)
    load_lora(load_transformer(tiny_config(), "cpu"), file)

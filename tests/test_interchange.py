"""LoRAs travel: ours into diffusers, PEFT and ComfyUI, other trainers' into ours, each at the strength it was trained
with."""

import json
import re

import pytest
import torch
from conftest import MODEL
from diffusers import LongCatImageTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from test_survival import checkpoints

import train_lora
from longcat_common import load_lora, load_transformer, position_ids, read_lora, save_lora
from train_lora import add_lora

TARGETS = ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]


def plain():
    return LongCatImageTransformer2DModel.from_pretrained(MODEL, subfolder="transformer").eval()


@torch.no_grad()
def predict(transformer):
    draw = torch.Generator().manual_seed(0)
    text_ids, image_ids = position_ids(8, 8)
    arguments = dict(
        hidden_states=torch.randn(1, 16, 64, generator=draw),
        encoder_hidden_states=torch.randn(1, 512, 64, generator=draw),
    )
    return transformer(
        **arguments, timestep=torch.tensor([0.5]), txt_ids=text_ids, img_ids=image_ids, return_dict=False
    )[0]


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
    shake(transformer, seed)
    save_lora(transformer, folder, {"steps": 7})
    return transformer


# ---------------------------------------------------------------- ours, elsewhere

# The layers that ComfyUI maps for this model, which it holds as a Flux: what stands between "transformer." and
# ".lora_A.weight".
# It merges them into slices of its own fused weights, which is the same sum as into the separate ones here.
IN_COMFYUI = re.compile(
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)|x_embedder|context_embedder|proj_out|norm_out\.linear"
)


def test_ours_gives_the_same_prediction_in_diffusers_peft_and_comfyui(tiny_config, tmp_path):
    expected, base = predict(make_lora(tiny_config, tmp_path)), predict(plain())
    assert distance(expected, base) > 0.05
    in_diffusers = plain()
    in_diffusers.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    merged, in_peft = plain(), PeftModel.from_pretrained(plain(), tmp_path)
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for module in {
        name.rsplit(".lora_", 1)[0] for name in state
    }:  # as ComfyUI does: no alpha in the file, so strength 1
        assert IN_COMFYUI.fullmatch(module.removeprefix("transformer.")) and f"{module}.alpha" not in state
        weight = merged.get_submodule(module.removeprefix("transformer.")).weight
        weight.data += state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
    for transformer in (in_diffusers, merged, in_peft, in_peft.merge_and_unload()):
        assert distance(predict(transformer), expected) < 1e-5


def test_two_of_ours_at_once_at_two_strengths(tiny_config, tmp_path):
    for seed in (1, 2):
        make_lora(tiny_config, tmp_path / str(seed), seed, lora_rank=4 * seed)
    transformer, merged = plain(), plain()
    for name in ("1", "2"):
        transformer.load_lora_adapter(tmp_path / name / "pytorch_lora_weights.safetensors", adapter_name=name)
    for strengths in ([0.5, 0.8], [1.0, 0.0]):
        transformer.set_adapters(["1", "2"], strengths)
        for name, strength in zip("12", strengths):
            state = read_lora(tmp_path / name)
            for module in {name.rsplit(".lora_", 1)[0] for name in state}:
                merged.get_submodule(module).weight.data += (
                    strength * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
                )
        assert distance(predict(transformer), predict(merged)) < 1e-5
        merged = plain()


def test_strengths_and_the_way_back_to_the_base(tiny_config, tmp_path):
    make_lora(tiny_config, tmp_path / "a")
    make_lora(tiny_config, tmp_path / "b", seed=1, lora_target_modules=["attn.to_v"])
    transformer, theirs = load_transformer(tiny_config(), "cpu"), plain()
    theirs.load_lora_adapter(tmp_path / "a/pytorch_lora_weights.safetensors", adapter_name="a")
    load_lora(transformer, tmp_path / "b")  # must leave nothing behind
    for strength in (1.0, 0.5, 0.0):
        theirs.set_adapters("a", strength)
        load_lora(transformer, tmp_path / "a", strength)
        assert distance(predict(transformer), predict(theirs)) < 1e-5
    transformer.delete_adapters([*transformer.peft_config])
    assert distance(predict(transformer), predict(plain())) < 1e-6


def test_the_header_says_what_the_lora_is(quick_config, tmp_path):
    config = quick_config(max_train_steps=1, trigger_words="zumi", license="cc-by-4.0")
    with safe_open(train_lora.main(config), "pt") as file:
        header = file.metadata()
    assert set(header) == {"longcat_lora"}
    said = json.loads(header["longcat_lora"])
    assert said["trigger_words"] == ["zumi"] and said["license"] == "cc-by-4.0" and said["base_model"] == MODEL
    assert (said["lora_rank"], said["steps"], said["resolution"]) == (
        16,
        1,
        "128x128,192x128,128x192",
    ) and "LoRA scripts 0" in said["trained_with"]


# ---------------------------------------------------------------- others', here


def of_diffusers(folder):
    """transformer.save_lora_adapter: bare keys, alpha in the header."""
    transformer = plain()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS))
    shake(transformer).save_lora_adapter(folder)
    return predict(transformer), folder


def of_the_authors(folder, **settings):
    """get_peft_model and save_pretrained, as the model authors' scripts do; PEFT's default alpha is 8, whatever the
    rank."""
    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "gaussian", **settings}
    transformer = shake(get_peft_model(plain(), LoraConfig(**settings)))
    transformer.save_pretrained(folder)
    return predict(transformer), folder


def with_patterns(folder):
    return of_the_authors(folder, alpha_pattern={"attn.to_q": 3, "^single_transformer_blocks.0.proj_out": 1})


def with_rslora(folder):
    return of_the_authors(folder, use_rslora=True)


def of_kohya(folder):
    """lora_down and lora_up with an alpha each, in bf16."""
    prediction, folder = of_diffusers(folder)
    state = {}
    for name, tensor in load_file(folder / "pytorch_lora_weights.safetensors").items():
        state["transformer." + name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor.bfloat16()
        state["transformer." + name.rsplit(".lora_", 1)[0] + ".alpha"] = torch.tensor(10.0)
    save_file(state, folder / "kohya.safetensors")
    return prediction, folder / "kohya.safetensors"


def with_underscores(folder, prefix="lora_unet_"):
    """As kohya's scripts name layers, with an alpha each."""
    prediction, folder = of_diffusers(folder)
    state = {}
    for name, tensor in load_file(folder / "pytorch_lora_weights.safetensors").items():
        module, part = name.rsplit(".lora_", 1)
        module = prefix + module.removeprefix("transformer.").replace(".", "_")
        state[f"{module}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
        state[f"{module}.alpha"] = torch.tensor(10.0)
    save_file(state, folder / "underscores.safetensors")
    return prediction, folder / "underscores.safetensors"


def with_other_underscores(folder):
    return with_underscores(folder, "lora_transformer_")


def of_simpletuner(folder):
    """No alpha in the file; it is in the configuration beside it."""
    prediction, folder = of_diffusers(folder)
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    save_file({f"transformer.{name}": tensor for name, tensor in state.items()}, folder / "simpletuner.safetensors")
    (folder / "simpletuner_config.json").write_text('{"--lora_rank": 4, "--lora_alpha": 10}')
    return prediction, folder / "simpletuner.safetensors"


FOREIGN = [
    of_diffusers, of_the_authors, with_patterns, with_rslora, of_kohya, with_underscores, with_other_underscores,
    of_simpletuner,
]  # fmt: skip


@pytest.mark.parametrize("foreign", FOREIGN)
def test_other_trainers_loras_open_at_their_own_strength(tiny_config, tmp_path, foreign):
    expected, path = foreign(tmp_path)
    close = 1e-5 if foreign is not of_kohya else 0.003  # bf16
    assert distance(expected, predict(plain())) > 0.03
    transformer = load_transformer(tiny_config(), "cpu")
    load_lora(transformer, path)
    assert distance(predict(transformer), expected) < close
    for alpha in (None, 7.0):
        transformer = load_transformer(tiny_config(), "cpu")
        add_lora(
            transformer, tiny_config(lora_rank=4, lora_alpha=alpha, lora_target_modules=TARGETS, init_lora=str(path))
        )
        assert distance(predict(transformer.eval()), expected) < close


def test_what_does_not_fit_is_said(tiny_config, tmp_path):
    of_the_authors(tmp_path / "ok")
    with pytest.raises(
        ValueError,
        match=r'init_lora: .*has lora_rank 4 and lora_target_modules \["attn.add_k_proj", .*"proj_out"\]; set these',
    ):
        add_lora(load_transformer(tiny_config(), "cpu"), tiny_config(lora_rank=16, init_lora=str(tmp_path / "ok")))
    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(tmp_path / "ok/adapter_model.safetensors").items()
    }
    for name, tensors, words in (
        (
            "dora",
            {**state, "transformer_blocks.0.attn.to_q.lora_magnitude_vector.weight": torch.ones(3)},
            "it is a DoRA",
        ),
        (
            "lokr",
            {"transformer.transformer_blocks.0.attn.to_q.lokr_w1": torch.ones(3, 3)},
            "it is a LoKr",
        ),
        (
            "loha",
            {"lora_unet_transformer_blocks_0_attn_to_q.hada_w1_a": torch.ones(3, 3)},
            "it is a LoHa",
        ),
        (
            "original",
            {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 3)},
            "original layout, with q, k and v in one",
        ),
        (
            "half",
            {name: tensor for name, tensor in state.items() if "lora_A" in name},
            "lora_B.weight is unknown, missing",
        ),
        ("model", {"x_embedder.weight": torch.ones(2)}, "x_embedder.weight is unknown"),
        ("none", {}, "it is empty"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=f"{name}.safetensors: is no LoRA that can be opened here.*{words}"):
            read_lora(tmp_path / f"{name}.safetensors")
    for name in ("lora.pt", "lora.bin", "lora.ckpt"):
        torch.save(state, tmp_path / name)
        with pytest.raises(
            ValueError, match=f"{name}: is no .safetensors file; others are not opened, for a pickled one"
        ):
            read_lora(tmp_path / name)
    other = {
        "transformer_blocks.99.attn.to_q.lora_A.weight": torch.ones(4, 96),
        "transformer_blocks.99.attn.to_q.lora_B.weight": torch.ones(96, 4),
    }
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="made for another model.* transformer_blocks.99.attn.to_q has .*here it is missing"
    ):
        load_lora(load_transformer(tiny_config(), "cpu"), tmp_path / "other.safetensors")
    name = "transformer_blocks.0.attn.to_q.lora_"
    for A, B, words in (
        (torch.ones(4, 96), torch.ones(96, 4), r"to_q has \(4, 96\) and \(96, 4\)"),
        (torch.ones(4, 192), torch.full((192, 4), torch.nan), "not finite"),
    ):
        save_file({f"{name}A.weight": A, f"{name}B.weight": B}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=words):
            load_lora(load_transformer(tiny_config(), "cpu"), tmp_path / "other.safetensors")
    config = json.loads((tmp_path / "ok/adapter_config.json").read_text())
    for change, words in (
        ({"lora_alpha": "much"}, "is missing or damaged.*much"),
        ({"alpha_pattern": {"*[": 1}}, "is missing or damaged.*repeat"),
    ):
        (tmp_path / "ok/adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=words):
            read_lora(tmp_path / "ok")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match="holds neither pytorch_lora_weights.safetensors nor adapter_model.safetensors"
    ):
        read_lora(tmp_path / "folder")
    (tmp_path / "ok/adapter_config.json").unlink()
    with pytest.raises(
        ValueError,
        match="its strength is unknown without adapter_config.json beside it",
    ):
        read_lora(tmp_path / "ok")


def test_a_lora_that_says_nothing_of_its_alpha_is_said(tiny_config, tmp_path, capsys):
    _, path = of_simpletuner(tmp_path)
    make_lora(tiny_config, tmp_path / "ours")
    read_lora(path), read_lora(tmp_path / "ours")
    assert "alpha" not in capsys.readouterr().out
    (tmp_path / "simpletuner_config.json").unlink()
    read_lora(path)
    assert f"{path}: says nothing of its alpha, which is taken to be its rank" in capsys.readouterr().out


def test_a_lora_on_some_blocks_is_drawn_but_not_trained_on_and_a_text_encoders_part_is_left_out(
    tiny_config, tmp_path, capsys
):
    of_the_authors(tmp_path, target_modules=r"transformer_blocks\.0\.attn\.to_q")
    state = {
        name.replace("base_model.model.", "diffusion_model."): tensor
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    save_file({**state, "text_encoder.layers.0.lora_A.weight": torch.ones(2, 2)}, tmp_path / "some.safetensors")
    assert (
        len(read_lora(tmp_path / "some.safetensors")) == 2
        and "text encoder's part is left out" in capsys.readouterr().out
    )
    config = tiny_config(lora_rank=4, lora_target_modules=["attn.to_q"], init_lora=str(tmp_path / "some.safetensors"))
    with pytest.raises(
        ValueError, match="cannot be trained on: it has not one rank and the same layers in every block"
    ):
        add_lora(load_transformer(tiny_config(), "cpu"), config)


def test_training_goes_on_from_another_trainers_lora(quick_config, tmp_path):
    _, path = of_the_authors(tmp_path / "theirs")
    settings = dict(max_train_steps=1, lora_rank=4, lora_target_modules=TARGETS, learning_rate=1e-9)
    with pytest.raises(ValueError, match="is no whole checkpoint .*; to start from a LoRA's weights set init_lora"):
        train_lora.main(quick_config(**settings, resume_from_checkpoint=str(path)))
    config = quick_config(**settings, init_lora=str(path))
    train_lora.main(config)
    assert config.init_lora == str(path), "the caller's configuration stays as it is"
    ours, theirs = read_lora(config.output_dir), read_lora(path)
    assert checkpoints(config) == ["step-000001"]
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)

"""The notebook runs from top to bottom, and functions work where they are copied to."""

import gc
import inspect
import json

import nbclient
import nbformat
import pytest
import torch
from conftest import MODEL, ROOT, made_up
from diffusers import LongCatImageTransformer2DModel

import longcat_common
import train_lora
import validate
from longcat_common import load_transformer

NOTEBOOK = ROOT / "colab.ipynb"


def copied(function):
    """A function as it is when its text is pasted into a notebook that has begun with `from longcat_common import
    *`."""
    namespace = {}
    exec("from longcat_common import *", namespace)
    namespace.pop(function.__name__, None)
    exec(inspect.getsource(function), namespace)
    return namespace[function.__name__]


def test_the_loss_copied_into_a_notebook_is_the_same(tiny_config):
    transformer = load_transformer(tiny_config(), "cpu")
    latents, noise = torch.randn(2, 2, 16, 16, 24, generator=torch.Generator().manual_seed(1))
    prompt_embeds = torch.randn(
        2, 512, transformer.config.joint_attention_dim, generator=torch.Generator().manual_seed(2)
    )
    arguments = transformer, latents, noise, torch.tensor([0.3, 0.8]), prompt_embeds, torch.tensor([1.0, 0.5])
    with torch.no_grad():
        assert copied(longcat_common.flow_matching_loss)(*arguments).equal(
            longcat_common.flow_matching_loss(*arguments)
        )


def test_the_order_of_pictures_copied_into_a_notebook_is_the_same(tmp_path):
    entries = [made_up(i, repeats=1 + i % 2, bucket=(128, 128 + i % 3 * 64)) for i in range(20)]
    assert copied(train_lora.epoch_batches)(entries, 4, 42, 3) == train_lora.epoch_batches(entries, 4, 42, 3)


def alive():
    return [thing for thing in gc.get_objects() if type(thing) is LongCatImageTransformer2DModel]


def test_a_stage_leaves_no_model_in_memory_not_even_when_it_fails(quick_config, monkeypatch):
    gc.collect()
    before = len(alive())
    config = quick_config(validation_step_interval=4, validation_split=0.2)
    said = config.model_dump()
    train_lora.main(config)
    gc.disable()  # on a GPU nothing collects when memory runs out
    try:
        assert len(alive()) == before
        validate.main(config)
        assert len(alive()) == before and config.model_dump() == said
        for error in (KeyboardInterrupt, torch.OutOfMemoryError):
            monkeypatch.setattr(
                train_lora,
                "flow_matching_loss",
                lambda *arguments, error=error: (_ for _ in ()).throw(error("CUDA out of memory")),
            )
            with pytest.raises((KeyboardInterrupt, ValueError)) as kept:  # as a notebook keeps its last error
                train_lora.main(quick_config(output_dir=config.output_dir + error.__name__))
            assert len(alive()) == before and kept.value
    finally:
        gc.enable()


def test_the_notebook_is_stored_without_outputs_and_asks_for_a_t4():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert cell["id"] and not cell.get("outputs") and cell.get("execution_count") is None
    assert (notebook["nbformat"], notebook["nbformat_minor"], notebook["metadata"]["kernelspec"]["name"]) == (
        4,
        5,
        "python3",
    )
    assert (notebook["metadata"]["accelerator"], notebook["metadata"]["colab"]["gpuType"]) == ("GPU", "T4")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, few_pictures, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    for name in ("PIP_NO_INDEX", "HF_HUB_OFFLINE"):  # what is installed is not asked for again
        monkeypatch.setenv(name, "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)

    tiny = dict(
        pretrained_model_name_or_path=MODEL, base_model_precision="no_change", data_dir=str(few_pictures),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "output"), resolution="128x128", max_train_steps=4, report_to="none",
        validation_num_inference_steps=2,
        validation_resolution="128x128", validation_prompts=["a cat"],
    )  # fmt: skip
    (settings,) = [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", [])]
    settings.source = settings.source.replace(
        "\nconfig = load_config(", f"\nsettings.update({tiny!r})\nconfig = load_config("
    )
    assert "settings.update" in settings.source

    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    shown = [
        [kind for output in cell.outputs for kind in output.get("data", {}) if kind.startswith("image/")]
        for cell in code
    ]
    assert [kinds for kinds in shown if kinds] == [["image/jpeg"], ["image/png"], ["image/png"]]
    lora = tmp_path / "output" / "pytorch_lora_weights.safetensors"
    assert lora.exists() and code[-1].outputs[0].text.strip() == str(lora)

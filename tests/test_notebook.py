"""The notebook runs from top to bottom, and functions work where they are copied to."""

import gc
import inspect

import nbclient
import nbformat
import pytest
import torch
from conftest import MODEL, ROOT, made_up
from diffusers import LongCatImageTransformer2DModel

import longcat_common
import train_lora
import validate


def test_functions_copied_into_a_notebook_are_the_same(tiny_config):
    """As when their text is pasted into a notebook that has begun with `from longcat_common import *`."""
    transformer = longcat_common.load_transformer(tiny_config(), "cpu")
    latents, noise = torch.randn(2, 2, 16, 16, 24)
    prompts = torch.randn(2, 512, transformer.config.joint_attention_dim)
    pictures = [made_up(i, repeats=1 + i % 2, bucket=(128, 128 + i % 3 * 64)) for i in range(20)]
    loss = (transformer, latents, noise, torch.tensor([0.3, 0.8]), prompts, torch.tensor([1.0, 0.5]))
    batches = (pictures, 4, 42, 3)
    for function, arguments in ((longcat_common.flow_matching_loss, loss), (train_lora.epoch_batches, batches)):
        namespace = {}
        exec("from longcat_common import *", namespace)
        namespace.pop(function.__name__, None)
        exec(inspect.getsource(function), namespace)
        with torch.no_grad():
            assert namespace[function.__name__](*arguments) == function(*arguments)


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
            monkeypatch.setattr(train_lora, "flow_matching_loss", lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises((KeyboardInterrupt, ValueError)) as kept:  # as a notebook keeps its last error
                train_lora.main(quick_config(output_dir=config.output_dir + type(error).__name__))
            assert alive() == before and kept.value
    finally:
        gc.enable()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, few_pictures, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    for name in ("PIP_NO_INDEX", "HF_HUB_OFFLINE"):  # what is installed is not asked for again
        monkeypatch.setenv(name, "1")
    notebook = nbformat.read(ROOT / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.colab.gpuType == "T4"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)  # it is stored without outputs
    tiny = dict(
        pretrained_model_name_or_path=MODEL, base_model_precision="no_change", data_dir=str(few_pictures),
        cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path), resolution="128x128", max_train_steps=4,
        report_to="none", validation_num_inference_steps=2, validation_resolution="128x128",
        validation_prompts=["a cat"],
    )  # fmt: skip
    (settings,) = [cell for cell in code if "settings" in cell.metadata.get("tags", [])]
    before, config, after = settings.source.partition("\nconfig = load_config(")
    settings.source = f"{before}\nsettings.update({tiny!r}){config}{after}"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [kind for cell in code for output in cell.outputs for kind in output.get("data", {}) if "image/" in kind]
    assert shown == ["image/jpeg", "image/png", "image/png"]
    assert code[-1].outputs[0].text.strip() == str(tmp_path / "pytorch_lora_weights.safetensors")

"""Pipelines of Diffusers out of single files: every component is as Diffusers makes it, and every load is native."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES, SingleFileComponentError
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tests.parity import diffusers_pipelines, single_file_pipelines
from tests.parity.compare import FellBack, native_only
from tests.parity.diffusers_compare import pipeline_differences
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    VisionTextDualEncoderModel,
)

import weightlift as wl
from weightlift.integrations.diffusers.single_pipeline import ORIGINAL

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {name: single_file_pipelines.save(name, folder) for name in single_file_pipelines.PIPELINES}


def _both(name: str, file: Path, configuration: Path, **options: Any) -> tuple[Any, Any]:
    cls = getattr(diffusers, name)
    if cls is FluxPipeline:  # its text encoders are not in the file
        given = diffusers_pipelines.flux(configuration.parent / f"words-{len(list(configuration.parent.iterdir()))}")
        options |= {"text_encoder": given.text_encoder, "text_encoder_2": given.text_encoder_2}
    theirs = ORIGINAL.__func__(cls, str(file), config=str(configuration), **options)
    with native_only():
        ours = wl.from_single_file(cls, str(file), config=str(configuration), **options)
    return ours, theirs


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", single_file_pipelines.PIPELINES)
def test_the_same_pipeline(name: str, dtype: torch.dtype | None, pipelines: dict[str, tuple[Path, Path]]) -> None:
    ours, theirs = _both(name, *pipelines[name], torch_dtype=dtype)
    found = pipeline_differences(ours, theirs)
    if name == "StableDiffusion3Pipeline":  # Diffusers gives each name of a tied tensor one of its own
        found = [item for item in found if not item.startswith("text_encoder_3: ties")]
        assert ours.text_encoder_3.shared.weight is ours.text_encoder_3.encoder.embed_tokens.weight
    assert found == []
    if dtype is None:
        models = [part for part in ours.components.values() if isinstance(part, torch.nn.Module)]
        mapped = [list(wl.mapped_files(part)) for part in models]
        assert mapped.count([pipelines[name][0]]) == len(models) - 2 * (name == "FluxPipeline")


def test_passed_components_and_others_left_out(pipelines: dict[str, tuple[Path, Path]]) -> None:
    vae = diffusers_pipelines.vae()
    ours, theirs = _both("StableDiffusionPipeline", *pipelines["StableDiffusionPipeline"], vae=vae)
    assert ours.vae is theirs.vae is vae and ours.safety_checker is None
    assert pipeline_differences(ours, theirs) == []


def test_an_encoder_keeps_its_values_in_another_model(pipelines: dict[str, tuple[Path, Path]]) -> None:
    """Whose constructor initialises what isn't marked as initialised."""
    file, configuration = pipelines["StableDiffusionPipeline"]
    encoder = wl.from_single_file(StableDiffusionPipeline, str(file), config=str(configuration)).text_encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    made = VisionTextDualEncoderModel(vision_model=CLIPVisionModel(config), text_model=encoder)
    assert made.text_model is encoder
    assert [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])] == []


def test_a_component_that_the_file_lacks(pipelines: dict[str, tuple[Path, Path]]) -> None:
    file, configuration = pipelines["FluxPipeline"]
    told = []
    for load in (wl.from_single_file, ORIGINAL.__func__):
        with pytest.raises(SingleFileComponentError) as error:
            load(FluxPipeline, str(file), config=str(configuration))
        told.append(str(error.value))
    assert told[0] == told[1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weightlift-")]


def test_a_component_that_lies_beside_the_configuration(
    pipelines: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    file, given = pipelines["StableDiffusionPipeline"]
    configuration = shutil.copytree(given, tmp_path / "configuration")
    shutil.rmtree(configuration / "vae")
    blocks = {"encoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 1)}
    blocks |= {name.replace("encoder", "decoder"): value for name, value in blocks.items()}
    diffusers.AutoencoderTiny(**blocks).save_pretrained(configuration / "vae")
    index = json.loads((configuration / "model_index.json").read_text())
    (configuration / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
    ours, theirs = _both("StableDiffusionPipeline", file, configuration, torch_dtype=torch.float16)
    assert pipeline_differences(ours, theirs) == []


def test_the_drop_in_loads_them_too(pipelines: dict[str, tuple[Path, Path]]) -> None:
    file, configuration = pipelines["StableDiffusionXLPipeline"]
    wl.install()
    try:
        with native_only():
            diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(configuration))
    finally:
        wl.uninstall()


def test_options_of_old(pipelines: dict[str, tuple[Path, Path]]) -> None:
    defaults = single_file_utils.SCHEDULER_DEFAULT_CONFIG
    before = dict(defaults)
    file, configuration = pipelines["StableDiffusionPipeline"]
    given = {"config": str(configuration), "prediction_type": "v_prediction", "scheduler_type": "pndm"}
    with native_only(), pytest.warns(FutureWarning, match="prediction_type"):
        ours = wl.from_single_file(StableDiffusionPipeline, str(file), **given)
    assert defaults == before, "other threads' schedulers are made of it"
    theirs = ORIGINAL.__func__(StableDiffusionPipeline, str(file), **given)
    defaults.clear()
    defaults.update(before)
    assert pipeline_differences(ours, theirs) == []
    assert ours.scheduler.config.prediction_type == "v_prediction"


def test_a_safety_checker_asked_for_as_of_old(
    pipelines: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "CompVis" / "stable-diffusion-safety-checker"
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = CLIPConfig(
        text_config={**tower, "vocab_size": 64}, vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    StableDiffusionSafetyChecker(tiny).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    ours, theirs = _both("StableDiffusionPipeline", *pipelines["StableDiffusionPipeline"], load_safety_checker=True)
    assert pipeline_differences(ours, theirs) == []
    assert list(wl.mapped_files(ours.safety_checker)) == [folder / "model.safetensors"], "Transformers' own patches"


def test_a_conversion_that_lazy_tensors_do_not_carry(
    pipelines: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: Any = SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKL"]
    bias = "encoder.conv_in.bias"

    def convert(checkpoint: Any, config: Any) -> Any:
        made = functions["checkpoint_mapping_fn"](checkpoint=checkpoint, config=config)
        return {**made, bias: torch.tensor(made[bias].tolist())}

    monkeypatch.setitem(
        SINGLE_FILE_LOADABLE_CLASSES, "AutoencoderKL", {**functions, "checkpoint_mapping_fn": convert}
    )
    file, configuration = pipelines["StableDiffusionPipeline"]
    theirs = ORIGINAL.__func__(StableDiffusionPipeline, str(file), config=str(configuration))
    found = []
    with pytest.raises(FellBack, match="StableDiffusionPipeline: loaded by its own library"), native_only():
        found.append(wl.from_single_file(StableDiffusionPipeline, str(file), config=str(configuration)))
    assert pipeline_differences(found[0], theirs) == []

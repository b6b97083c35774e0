"""Pipelines of Diffusers: every component, its configuration and the pipeline's own are as Diffusers makes them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tests.parity import diffusers_pipelines as tiny
from tests.parity.compare import FellBack, native_only
from tests.parity.diffusers_compare import PIPELINE_ORIGINAL, both_pipelines, pipeline_differences

import weightlift as wl
from weightlift.integrations.diffusers import pipeline as diffusers_pipeline
from weightlift.locks import LOADING
from weightlift.transfer import share

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {name: tiny.save(name, folder) for name in tiny.PIPELINES}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"torch_dtype": torch.bfloat16},
    {"dtype": {"vae": torch.float32, "default": torch.float16}},
    {"device_map": "cpu"},
    {"low_cpu_mem_usage": False},
    {"use_safetensors": True, "torch_dtype": torch.float16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_the_same_pipeline(name: str, options: dict[str, Any], folders: dict[str, Path]) -> None:
    ours, theirs = both_pipelines(DiffusionPipeline, folders[name], **options)
    assert pipeline_differences(ours, theirs) == []


def test_a_class_of_ones_own_choice_and_passed_components(folders: dict[str, Path]) -> None:
    vae = tiny.vae()
    given = {"vae": vae, "text_encoder_2": None, "tokenizer_2": None, "torch_dtype": torch.float16}
    ours, theirs = both_pipelines(diffusers.StableDiffusionXLImg2ImgPipeline, folders["stable_diffusion_xl"], **given)
    assert ours.vae is theirs.vae is vae
    assert pipeline_differences(ours, theirs) == []


def test_a_component_of_the_wrong_class_is_refused(folders: dict[str, Path]) -> None:
    for load in (wl.from_pretrained, PIPELINE_ORIGINAL.__func__):
        with pytest.raises(ValueError, match="but should be"):
            load(DiffusionPipeline, folders["flux"], vae=diffusers.DDIMScheduler())


def test_a_variant(tmp_path: Path) -> None:
    folder = tiny.save("stable_diffusion_xl", tmp_path, variant="fp16")
    ours, theirs = both_pipelines(DiffusionPipeline, folder, variant="fp16", torch_dtype=torch.float16)
    assert pipeline_differences(ours, theirs) == []
    with pytest.raises(ValueError, match="no such modeling files"):
        wl.from_pretrained(DiffusionPipeline, folder, variant="ema")


def test_auto_pipelines(folders: dict[str, Path]) -> None:
    with native_only():
        found = wl.from_pretrained(diffusers.AutoPipelineForImage2Image, folders["stable_diffusion_xl"])
    assert type(found) is diffusers.StableDiffusionXLImg2ImgPipeline


def test_custom_pipelines(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text(
        "from diffusers import StableDiffusionXLPipeline\n"
        "class Mine(StableDiffusionXLPipeline):\n"
        "    extra = 'my own'\n"
    )
    options = {"custom_pipeline": str(tmp_path), "trust_remote_code": True}
    ours, theirs = both_pipelines(DiffusionPipeline, folders["stable_diffusion_xl"], **options)
    assert ours.extra == "my own" and type(ours).__name__ == "Mine"
    # A file of code is run anew for each load, which makes a class of its own.
    assert pipeline_differences(ours, theirs) == ["a Mine for a Mine"]


def test_a_broken_component_is_an_error_and_leaves_no_thread(tmp_path: Path) -> None:
    folder = tiny.save("flux", tmp_path)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-10])
    before = set(threading.enumerate())
    with pytest.raises(wl.CheckpointError, match=r"beyond the end of the file"):
        wl.from_pretrained(DiffusionPipeline, folder)
    assert set(threading.enumerate()) == before
    assert not LOADING._readers and not LOADING._helpers


def test_an_interrupted_load_leaves_no_thread(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    ended: list[str] = []
    load = diffusers_pipeline._load
    main = threading.main_thread()

    def slowly(options: dict[str, Any], *rest: Any) -> Any:
        if threading.current_thread() is main or options["name"] != "text_encoder":
            return load(options, *rest)
        begun.append(options["name"])
        waiting = diffusers_pipeline.Loading._result.__code__
        while waiting not in [frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames()[main.ident])]:
            time.sleep(0.01)
        time.sleep(0.2)  # the main thread waits for this one, which comes first
        signal.pthread_kill(main.ident, signal.SIGINT)
        time.sleep(1)
        ended.append(options["name"])
        return load(options, *rest)

    monkeypatch.setattr(diffusers_pipeline, "_load", slowly)
    with pytest.raises(KeyboardInterrupt):
        wl.from_pretrained(DiffusionPipeline, folders["stable_diffusion"])
    assert begun and begun == ended
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weightlift-")]


def test_what_is_not_native_is_left_to_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["stable_diffusion_xl"]
    for options in ({"use_onnx": False, "load_connected_pipeline": True}, {"offload_state_dict": True}):
        with pytest.raises(FellBack), native_only():
            wl.from_pretrained(DiffusionPipeline, folder, **options)


def test_a_component_that_is_not_native_is_loaded_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from weightlift.integrations.transformers import options as transformers_options

    monkeypatch.setattr(transformers_options, "is_deepspeed_zero3_enabled", lambda: True)
    theirs = PIPELINE_ORIGINAL.__func__(DiffusionPipeline, folders["flux"])
    with caplog.at_level(logging.INFO, "weightlift"):
        ours = wl.from_pretrained(DiffusionPipeline, folders["flux"])
    assert "CLIPTextModel: loaded by its own library" in caplog.text
    assert "FluxTransformer2DModel: loaded by" not in caplog.text
    assert pipeline_differences(ours, theirs) == []
    assert not LOADING._readers and not LOADING._helpers


def test_a_component_with_code_of_its_own_keeps_its_variant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The thread that helps tries in vain; the variant is still known when the component is loaded alone."""
    folder = tiny.save("stable_diffusion_xl", tmp_path)
    other = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        other.conv_in.bias.fill_(7.0)
    other.save_pretrained(folder / "unet", variant="fp16")
    (folder / "unet" / "my_unet.py").write_text(OWN_UNET)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": ["my_unet", "MyUNet"]}))
    options = {"variant": "fp16", "trust_remote_code": True}
    theirs = PIPELINE_ORIGINAL.__func__(DiffusionPipeline, folder, **options)
    RUNS.clear()
    with caplog.at_level(logging.INFO, "weightlift"):
        ours = wl.from_pretrained(DiffusionPipeline, folder, **options)
    assert "MyUNet: loaded by its own library" in caplog.text
    assert torch.equal(ours.unet.conv_in.bias, other.conv_in.bias)
    assert [item for item in pipeline_differences(ours, theirs) if "a MyUNet for a MyUNet" not in item] == []
    assert RUNS == ["my_unet"]


OWN_UNET = f"""
from diffusers import UNet2DConditionModel
from {__name__} import RUNS

RUNS.append("my_unet")

class MyUNet(UNet2DConditionModel):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return super().from_pretrained(*args, **kwargs)
"""
RUNS: list[str] = []


def test_components_share_one_budget_and_one_number_of_workers(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_PARALLEL_LOADING_WORKERS", "6")
    of_each = share.shares([60, 30, 10, 0], threading.Event())
    assert sum(item.memory_budget_bytes for item in of_each) <= 512 * 2**20 + len(of_each) * 2**20
    assert [item.workers for item in of_each] == [4, 2, 1, 1]

    seen = []
    monkeypatch.setattr(diffusers_pipeline, "within", lambda item: seen.append(item) or share.within(item))
    wl.from_pretrained(DiffusionPipeline, folders["flux"])
    assert len(seen) == 4
    assert sum(item.memory_budget_bytes for item in seen) <= 512 * 2**20 + 4 * 2**20


def test_a_callers_device_context_holds_for_all_components(folders: dict[str, Path]) -> None:
    with torch.device("cpu"):
        ours, theirs = both_pipelines(DiffusionPipeline, folders["flux"])
    assert pipeline_differences(ours, theirs) == []


def test_tqdm_is_told_by_its_environment_to_show_no_bar(folders: dict[str, Path]) -> None:
    """tqdm reads it when it is imported."""
    program = (
        "import sys, weightlift\nfrom diffusers import DiffusionPipeline\n"
        "weightlift.from_pretrained(DiffusionPipeline, sys.argv[1])"
    )
    command = [sys.executable, "-c", program, str(folders["flux"])]
    shown = [
        subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=True).stderr
        for told in ({}, {"TQDM_DISABLE": "1"})
    ]
    assert ["Loading pipeline components" in text for text in shown] == [True, False]


def test_an_image_is_the_same(folders: dict[str, Path]) -> None:
    ours, theirs = both_pipelines(DiffusionPipeline, folders["stable_diffusion_xl"])
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    images = [
        pipe("ab", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(1)).images
        for pipe in (ours, theirs)
    ]
    assert torch.equal(*images)

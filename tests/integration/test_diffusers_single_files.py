"""Single files of Diffusers' models: options and errors mean what they mean there, and every load is native."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_model import SingleFileComponentError
from safetensors.torch import load_file, save_file
from tests.parity import diffusers_pipelines, single_files
from tests.parity.compare import FellBack, native_only
from tests.parity.diffusers_compare import differences
from tests.parity.test_every_single_file import both

import weightlift as wl
from weightlift.integrations.diffusers.single_file import ORIGINAL
from weightlift.integrations.lazy import Lazy, lazy_state_dict, offered

NAME = "UNet2DConditionModel"

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("unet")
    layout = single_files.LAYOUTS[NAME]
    return single_files.save(single_files.model(NAME, layout), NAME, folder, layout), folder / "configuration"


@pytest.mark.parametrize("options", [
    {"low_cpu_mem_usage": False},
    {"low_cpu_mem_usage": False, "torch_dtype": torch.float16},
    {"device": "cpu", "dtype": torch.float64},
    {"disable_mmap": True},
    {"device_map": "auto", "torch_dtype": torch.bfloat16},
    {"torch_dtype": "float16"},
    {"num_in_channels": 4},
], ids=str)  # fmt: skip
def test_options_mean_the_same(options: dict[str, Any], unet: tuple[Path, Path]) -> None:
    file, configuration = unet
    ours, theirs = both(UNet2DConditionModel, str(file), config=str(configuration), **options)
    assert differences(ours, theirs) == []
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)


def test_what_keeps_its_dtype_is_mapped_and_the_model_is_left_as_it_is(unet: tuple[Path, Path]) -> None:
    found = wl.from_single_file(UNet2DConditionModel, str(unet[0]), config=str(unet[1]))
    assert list(wl.mapped_files(found)) == [unet[0]]
    assert "state_dict" not in vars(found) and all(
        isinstance(value, torch.Tensor) for value in found.state_dict().values()
    )
    copied = wl.from_single_file(UNet2DConditionModel, str(unet[0]), config=str(unet[1]), disable_mmap=True)
    assert not wl.mapped_files(copied)


def test_a_mapping_is_used_as_it_is(unet: tuple[Path, Path]) -> None:
    file, configuration = unet
    state = load_file(file)
    before = dict(state)
    ours, theirs = both(UNet2DConditionModel, state, config=str(configuration), torch_dtype=torch.bfloat16)
    assert differences(ours, theirs) == [] and state.keys() == before.keys()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_and_what_lies_within_them(nested: bool, legacy: bool, unet: tuple[Path, Path], tmp_path: Path) -> None:
    state: dict[str, Any] = load_file(unet[0])
    if nested:
        state = {"state_dict": {"state_dict": state}, "epoch": 3, "optimizer": {"step": torch.ones(4)}}
    torch.save(state, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    ours, theirs = both(UNet2DConditionModel, str(tmp_path / "model.ckpt"), config=str(unet[1]))
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.float16}, {"low_cpu_mem_usage": False}], ids=str)
def test_a_pickle_of_transposed_views(options: dict[str, Any], unet: tuple[Path, Path], tmp_path: Path) -> None:
    state = {key: value.mT.contiguous().mT if value.dim() > 1 else value for key, value in load_file(unet[0]).items()}
    torch.save(state, tmp_path / "model.bin")
    ours, theirs = both(UNet2DConditionModel, str(tmp_path / "model.bin"), config=str(unet[1]), **options)
    assert differences(ours, theirs) == []
    assert all(parameter.is_contiguous() for parameter in ours.parameters())


def test_an_original_configuration(tmp_path: Path) -> None:
    parameters = {
        "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
        "attention_resolutions": [2], "num_heads": 4, "context_dim": 32, "transformer_depth": 1,
        "adm_in_channels": 80, "num_classes": "sequential", "use_linear_in_transformer": False,
    }  # fmt: skip
    stage = {"params": {"ddconfig": {"ch_mult": [1, 2]}}}
    written = {"model": {"params": {"unet_config": {"params": parameters}, "first_stage_config": stage}}}
    (tmp_path / "model.yaml").write_text(yaml.dump(written))
    made = single_files.model(NAME, single_files.LAYOUTS[NAME])
    state = single_files.original(made, NAME, single_files.LAYOUTS[NAME])
    options: dict[str, Any] = {"original_config": str(tmp_path / "model.yaml"), "upcast_attention": False}
    ours, theirs = both(UNet2DConditionModel, state, **options)
    assert differences(ours, theirs) == []


def test_statistics_that_an_original_configuration_takes_out_of_the_file_are_read(tmp_path: Path) -> None:
    layout = single_files.LAYOUTS["AutoencoderKL"]
    state = load_file(single_files.save(single_files.model("AutoencoderKL", layout), "AutoencoderKL", tmp_path, layout))
    state |= {"edm_mean": torch.randn(4), "edm_std": torch.rand(4)}
    save_file(state, tmp_path / "playground.safetensors")
    sizes = {"ch": 32, "ch_mult": [1, 2], "in_channels": 3, "out_ch": 3, "z_channels": 4, "num_res_blocks": 1}
    written = {"model": {"params": {"first_stage_config": {"params": {"ddconfig": sizes}}}}}
    ours, theirs = both(AutoencoderKL, str(tmp_path / "playground.safetensors"), original_config=written)
    for name, key in (("latents_mean", "edm_mean"), ("latents_std", "edm_std")):
        assert type(ours.config[name]) is type(theirs.config[name]) is torch.Tensor
        assert ours.config[name].tolist() == state[key].tolist()


def test_a_given_state_dict_stays_as_it_is_when_its_conversion_fails(tmp_path: Path) -> None:
    name = "SD3Transformer2DModel"
    made = single_files.model(name, single_files.LAYOUTS[name])
    made.save_config(tmp_path)
    state = single_files.original(made, name, single_files.LAYOUTS[name])
    state["final_layer.adaLN_modulation.1.weight"] = torch.tensor(1.0)
    before = list(state)
    with pytest.raises(RuntimeError, match="at least a 1-dimensional tensor"):
        wl.from_single_file(SD3Transformer2DModel, state, config=str(tmp_path))
    assert list(state) == before


def test_a_state_dict_of_tensors_that_are_not_row_major(unet: tuple[Path, Path]) -> None:
    given = load_file(unet[0])
    state = {key: value.t().contiguous().t() if value.dim() == 2 else value for key, value in given.items()}
    ours, theirs = both(UNet2DConditionModel, state, config=str(unet[1]))
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("name", ["pretrained_model_link_or_path_or_dict", "pretrained_model_link_or_path"])
def test_the_file_by_its_name_in_diffusers(name: str, unet: tuple[Path, Path]) -> None:
    with native_only():
        found = wl.from_single_file(UNet2DConditionModel, config=str(unet[1]), **{name: str(unet[0])})
    assert list(wl.mapped_files(found)) == [unet[0]]
    with pytest.raises(TypeError, match="multiple values"):
        wl.from_single_file(UNet2DConditionModel, "a", pretrained_model_link_or_path_or_dict="b")
    ours, theirs = both(UNet2DConditionModel, str(unet[0]), config=str(unet[1]), file="no argument of ours")
    assert differences(ours, theirs) == []


def test_without_a_first_argument_the_librarys_own_error() -> None:
    cls = diffusers.StableDiffusionPipeline
    missing = "missing 1 required positional argument: 'pretrained_model_link_or_path"
    with pytest.raises(TypeError, match=missing):
        wl.from_single_file(cls, file="model.safetensors")
    wl.install()
    try:
        with pytest.raises(TypeError, match=missing):
            cls.from_single_file()
    finally:
        wl.uninstall()


def test_what_does_not_fit_is_refused_before_anything_is_read(unet: tuple[Path, Path], tmp_path: Path) -> None:
    state = load_file(unet[0])
    first = next(key for key in state if key.endswith("0.in_layers.2.weight"))
    save_file({**state, first: torch.zeros(3, 3)}, tmp_path / "shape.safetensors")
    del state[first]
    save_file(state, tmp_path / "lacks.safetensors")
    with pytest.raises(ValueError, match="expected shape"):
        ORIGINAL.__func__(UNet2DConditionModel, str(tmp_path / "shape.safetensors"), config=str(unet[1]))
    with pytest.raises(ValueError, match="the shapes differ") as misfit:
        wl.from_single_file(UNet2DConditionModel, str(tmp_path / "shape.safetensors"), config=str(unet[1]))
    assert isinstance(misfit.value, wl.PlanError) and "ignore_mismatched" not in str(misfit.value)
    save_file({**state, first.replace("weight", "bias"): torch.zeros(3)}, tmp_path / "several.safetensors")
    with pytest.raises(ValueError, match="the shapes differ") as several:
        wl.from_single_file(UNet2DConditionModel, str(tmp_path / "several.safetensors"), config=str(unet[1]))
    assert isinstance(several.value, wl.PlanError) and len(several.value.problems) == 2
    with pytest.raises(NotImplementedError):
        ORIGINAL.__func__(UNet2DConditionModel, str(tmp_path / "lacks.safetensors"), config=str(unet[1]))
    with pytest.raises(NotImplementedError, match="lacks it") as lacking:
        wl.from_single_file(UNet2DConditionModel, str(tmp_path / "lacks.safetensors"), config=str(unet[1]))
    assert isinstance(lacking.value, wl.PlanError)
    with native_only():  # built whole first, as Diffusers does then
        found = wl.from_single_file(
            UNet2DConditionModel, str(tmp_path / "lacks.safetensors"), config=str(unet[1]), low_cpu_mem_usage=False
        )
    assert not any(parameter.is_meta or parameter.isnan().any() for parameter in found.parameters())


def test_errors_of_diffusers_stay(unet: tuple[Path, Path], tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    diffusers_pipelines.vae().save_config(vae)
    save_file({"nothing": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SingleFileComponentError, match="missing in the checkpoint"):
        wl.from_single_file(AutoencoderKL, str(tmp_path / "other.safetensors"), config=str(vae))
    with pytest.raises(KeyError, match="label_emb"):
        wl.from_single_file(UNet2DConditionModel, str(tmp_path / "other.safetensors"), config=str(unet[1]))
    with pytest.raises(ValueError, match="both `config` and `original_config`"):
        wl.from_single_file(UNet2DConditionModel, str(unet[0]), config="a", original_config="b")
    with pytest.raises(wl.CheckpointError):
        (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
        wl.from_single_file(UNet2DConditionModel, str(tmp_path / "broken.safetensors"), config=str(unet[1]))
    with pytest.raises(TypeError, match="has no from_single_file"):
        wl.from_single_file(diffusers.UNet1DModel, str(unet[0]))
    with pytest.raises(TypeError, match="expected a model or pipeline class"):
        wl.from_single_file(torch.nn.Linear, str(unet[0]))
    with pytest.raises(TypeError, match=r"found an object of class Linear$"):
        wl.from_single_file(torch.nn.Linear(1, 1), str(unet[0]))


def test_unexpected_keys_are_told(unet: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.extra"
    save_file({**load_file(unet[0]), key: torch.zeros(2)}, tmp_path / "more.safetensors")
    told = []
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    try:
        for load in (wl.from_single_file, ORIGINAL.__func__):
            caplog.clear()
            load(UNet2DConditionModel, str(tmp_path / "more.safetensors"), config=str(unet[1]))
            told.append([record.getMessage() for record in caplog.records if record.name.startswith("diffusers")])
    finally:
        logger.propagate = False
    assert told[0] == told[1] and any("down_blocks.0.resnets.0.conv1.extra" in message for message in told[0])


def test_a_quantiser_is_left_to_diffusers(unet: tuple[Path, Path]) -> None:
    class Quantising:
        quant_method = None

    given = {"config": str(unet[1]), "quantization_config": Quantising()}
    neither = contextlib.suppress(AttributeError, ValueError)  # Diffusers does not know it either
    with pytest.raises(FellBack, match="quantization_config="), native_only(), neither:
        wl.from_single_file(UNet2DConditionModel, str(unet[0]), **given)


def test_a_class_with_a_method_of_its_own(unet: tuple[Path, Path]) -> None:
    class Mine(UNet2DConditionModel):
        @classmethod
        def from_single_file(cls, *args: Any, **kwargs: Any) -> Any:
            return super().from_single_file(*args, **kwargs)

    with pytest.raises(FellBack, match="a from_single_file of its own"), native_only():
        wl.from_single_file(Mine, str(unet[0]), config=str(unet[1]))


def test_the_drop_in_loads_them_too(unet: tuple[Path, Path]) -> None:
    theirs = ORIGINAL.__func__(UNet2DConditionModel, str(unet[0]), config=str(unet[1]))
    wl.install()
    try:
        with native_only():
            ours = UNet2DConditionModel.from_single_file(str(unet[0]), config=str(unet[1]))
    finally:
        wl.uninstall()
    assert differences(ours, theirs) == []


# -- lazy tensors -----------------------------------------------------------------------------------------------------


def test_lazy_tensors_are_read_only_where_something_computes(tmp_path: Path) -> None:
    values = {"a": torch.arange(24.0).view(6, 4), "b": torch.randn(3, 4), "none": torch.empty(0, 2)}
    save_file(values, tmp_path / "file.safetensors")
    lazy = lazy_state_dict(wl.open_checkpoint(tmp_path / "file.safetensors"))
    q, k, v = lazy["a"].chunk(3, 0)
    moved = {"swapped": torch.cat([k, q]).T, "joined": torch.cat([lazy["a"], lazy["b"]]), "row": lazy["a"][2, :]}
    assert all(isinstance(value, Lazy) for value in moved.values())
    offers, computed = offered({**moved, "other": v}, moved)
    assert list(offers) == ["swapped", "joined", "row"] and computed == {}
    a, b = values["a"], values["b"]
    assert torch.equal(moved["swapped"].values(), torch.cat([a[2:4], a[:2]]).T)
    assert torch.equal(moved["joined"].values(), torch.cat([a, b]))
    assert torch.equal(moved["joined"][4:8] * 2, torch.cat([a, b])[4:8] * 2)
    assert torch.equal(torch.cat([lazy["b"], torch.ones(1, 4)]), torch.cat([b, torch.ones(1, 4)]))
    assert bool(torch.all(lazy["a"] == a)) and lazy["a"][0, 1].item() == 1.0
    assert lazy["none"].shape == (0, 2) and lazy["a"][::2].shape == (3, 4)


def test_an_operation_in_place_is_not_native(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "file.safetensors")
    lazy = lazy_state_dict(wl.open_checkpoint(tmp_path / "file.safetensors"))
    with pytest.raises(Exception, match="in place"):
        lazy["a"].mul_(2)


def test_vae_attention_from_convolutions(tmp_path: Path) -> None:
    layout = single_files.LAYOUTS["AutoencoderKL"]
    file = single_files.save(single_files.model("AutoencoderKL", layout), "AutoencoderKL", tmp_path, layout)
    keys = wl.open_checkpoint(file)
    assert keys["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    ours, theirs = both(AutoencoderKL, str(file), config=str(tmp_path / "configuration"))
    assert differences(ours, theirs) == []

"""What ``from_pretrained`` of Diffusers models takes means the same through weightlift; what is missing, extra or of
another shape is told as Diffusers tells it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, ControlNetModel, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from safetensors.torch import load_file, save_file
from tests.parity import diffusers_pipelines as tiny
from tests.parity.compare import FellBack, differences, native_only
from tests.parity.diffusers_compare import ORIGINAL, both, same_info

import weightlift as wl

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny.vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE, {"format": "pt"})


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16},
    {"torch_dtype": torch.float16},
    {"torch_dtype": "float16"},
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}, "dtype": torch.float16},
    {"device_map": {"encoder": "cpu", "": torch.device("cpu")}},
    {"low_cpu_mem_usage": False},
    {"low_cpu_mem_usage": False, "dtype": torch.bfloat16},
    {"use_safetensors": True},
    {"disable_mmap": True},
    {"latent_channels": 4, "scaling_factor": 0.5},
]


@pytest.mark.parametrize("kind", ["whole", "missing", "unexpected"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_log(vae: Path, dtype: torch.dtype | None, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What Diffusers says of a load, and no more."""
    if kind == "missing":
        rewrite(vae, lambda state: state.pop("quant_conv.bias"))
    elif kind == "unexpected":
        rewrite(vae, lambda state: state.update(x=torch.zeros(1)))
    logger = logging.getLogger("diffusers")
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = True
    said = []
    try:
        for load in (ORIGINAL.__func__, wl.from_pretrained):
            caplog.clear()
            load(AutoencoderKL, vae, torch_dtype=dtype)
            said.append([(item.levelname, item.getMessage()) for item in caplog.records if "diffusers" in item.name])
    finally:
        logger.setLevel(level)
        logger.propagate = propagates
    assert said[1] == said[0] != []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(vae: Path, options: dict[str, Any]) -> None:
    (ours, info), (theirs, their_info) = both(AutoencoderKL, vae, **options)
    assert differences(ours, theirs) == []
    assert same_info(info, their_info)
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)


def test_float8(vae: Path) -> None:
    (ours, _), (theirs, _) = both(AutoencoderKL, vae, dtype=torch.float8_e4m3fn)
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_modules_that_stay_in_float32(tmp_path: Path, dtype: torch.dtype | None) -> None:
    class Kept(AutoencoderKL):
        _keep_in_fp32_modules = ("norm1", "quant_conv")

    tiny.vae().to(torch.bfloat16).save_pretrained(tmp_path)
    Kept._keep_in_fp32_modules = ["norm1", "quant_conv"]
    (ours, _), (theirs, _) = both(Kept, tmp_path, dtype=dtype)
    assert differences(ours, theirs) == []


def test_variants_subfolders_and_pickles(tmp_path: Path) -> None:
    for number, saving in enumerate(({"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "90KB"})):
        folder = tmp_path / str(number)
        tiny.vae().to(torch.float16).save_pretrained(folder / "inner", **saving)
        loading = {"variant": "fp16"} if "variant" in saving else {}
        (ours, info), (theirs, their_info) = both(AutoencoderKL, folder, subfolder="inner", **loading)
        assert differences(ours, theirs) == [] and same_info(info, their_info)
    with pytest.raises(OSError, match="no file named"):
        wl.from_pretrained(AutoencoderKL, tmp_path / "1" / "inner", use_safetensors=True)


def test_missing_and_unexpected_keys(vae: Path) -> None:
    rewrite(vae, lambda state: (state.pop("encoder.conv_in.weight"), state.update(extra=torch.ones(1))))
    (ours, info), (theirs, their_info) = both(AutoencoderKL, vae)
    assert same_info(info, their_info) and info["missing_keys"] == ["encoder.conv_in.weight"]
    # Diffusers leaves it on meta; here it has what the class initialises it with.
    assert theirs.encoder.conv_in.weight.is_meta
    weight = ours.encoder.conv_in.weight
    bound = (3 * 3 * 3) ** -0.5
    assert weight.device.type == "cpu" and 0.8 * bound < weight.abs().max() <= bound
    again, _ = both(AutoencoderKL, vae)[0]
    assert torch.equal(weight, again.encoder.conv_in.weight)


def test_shapes_that_differ(vae: Path) -> None:
    rewrite(vae, lambda state: state.update({"encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}))
    for load in (wl.from_pretrained, ORIGINAL.__func__):
        with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight"):
            load(AutoencoderKL, vae)
    with pytest.raises(wl.PlanError, match=r"nothing was changed.*pass ignore_mismatched_sizes=True"):
        wl.from_pretrained(AutoencoderKL, vae)
    for options in ({}, {"low_cpu_mem_usage": False}):
        given = {"ignore_mismatched_sizes": True, **options}
        (ours, info), (_, their_info) = both(AutoencoderKL, vae, **given)
        assert same_info(info, their_info) and len(info["mismatched_keys"]) == 1
        assert ours.encoder.conv_in.weight.shape == (32, 3, 3, 3) and not ours.encoder.conv_in.weight.is_meta


def test_damage_is_an_error(vae: Path) -> None:
    with pytest.raises(ValueError, match="floating point dtype"):
        wl.from_pretrained(AutoencoderKL, vae, dtype=torch.int8)
    data = (vae / FILE).read_bytes()
    (vae / FILE).write_bytes(data[:-1])
    with pytest.raises(wl.CheckpointError, match="beyond the end of the file"):
        wl.from_pretrained(AutoencoderKL, vae)
    for load in (ORIGINAL.__func__, wl.from_pretrained):
        with pytest.raises(OSError, match=FILE):
            load(AutoencoderKL, vae)
        with pytest.raises(OSError, match=FILE):
            load(AutoencoderKL, vae, low_cpu_mem_usage=False)
    with pytest.raises(OSError, match=FILE):
        wl.from_single_file(AutoencoderKL, str(vae / FILE), config=str(vae))
    (vae / FILE).unlink()
    with pytest.raises(OSError, match="no file named"):
        wl.from_pretrained(AutoencoderKL, vae)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    tiny.vae().save_pretrained(tmp_path, max_shard_size="90KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace("encoder.conv_in.bias", "encoder.conv_in.nothing"))
    with pytest.raises(wl.CheckpointError, match=r"encoder\.conv_in\.nothing"):
        wl.from_pretrained(AutoencoderKL, tmp_path)


STRIDED_OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float16},
    {"dtype": torch.float32, "device_map": "cpu"},
    {"disable_mmap": True},
    {"low_cpu_mem_usage": False},
    {"low_cpu_mem_usage": False, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", STRIDED_OPTIONS, ids=str)
def test_a_pickle_of_transposed_views(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny.vae()
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    state = {name: value.mT.contiguous().mT if value.dim() > 1 else value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    (ours, _), (theirs, _) = both(AutoencoderKL, tmp_path, **options)
    assert differences(ours, theirs) == []
    assert all(parameter.is_contiguous() for parameter in ours.parameters()) or options == {"low_cpu_mem_usage": False}


class ChannelsLast(AutoencoderKL):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder.to(memory_format=torch.channels_last)

    __init__.__wrapped__ = AutoencoderKL.__init__  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", STRIDED_OPTIONS, ids=str)
def test_a_constructor_that_makes_parameters_channels_last(vae: Path, options: dict[str, Any]) -> None:
    (ours, _), (theirs, _) = both(ChannelsLast, vae, **options)
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_the_strides_of_the_model(vae: Path, legacy: bool) -> None:
    state = {
        name: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in load_file(vae / FILE).items()
    }
    (vae / FILE).unlink()
    torch.save(state, vae / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (ours, _), (theirs, _) = both(ChannelsLast, vae)
    assert differences(ours, theirs) == []


def test_old_attention_names(tmp_path: Path) -> None:
    tiny.vae().save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            for new, was in names.items():
                if f"attentions.0.{new}." in key:
                    state[key.replace(new, was)] = state.pop(key)

    rewrite(tmp_path, old)
    (ours, info), (theirs, their_info) = both(AutoencoderKL, tmp_path)
    assert differences(ours, theirs) == [] and same_info(info, their_info) and not info["missing_keys"]


def test_classes_that_turn_into_others_or_hold_several(tmp_path: Path) -> None:
    from diffusers import Transformer2DModel

    Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=16, patch_size=2,
        norm_type="ada_norm_zero", num_embeds_ada_norm=10,
    ).save_pretrained(tmp_path / "dit")  # fmt: skip
    control = ControlNetModel(
        block_out_channels=(32, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        attention_head_dim=4,
    )  # fmt: skip
    MultiControlNetModel([control, control]).save_pretrained(str(tmp_path / "several"))
    for cls, name in ((Transformer2DModel, "dit"), (MultiControlNetModel, "several")):
        with native_only():
            ours = wl.from_pretrained(cls, str(tmp_path / name))
        assert differences(ours, cls.from_pretrained(str(tmp_path / name))) == []


def test_auto_model_leaves_its_class_alone(vae: Path) -> None:
    pipeline = tiny.save("flux", vae.parent)
    for folder, subfolder in ((str(vae), None), (str(pipeline), "transformer"), (str(pipeline), "text_encoder_2")):
        theirs = AutoModel.from_pretrained(folder, subfolder=subfolder)
        before = dict(vars(AutoModel))
        with native_only():
            ours = wl.from_pretrained(AutoModel, folder, subfolder=subfolder)
        assert dict(vars(AutoModel)) == before
        assert differences(ours, theirs) == [] and ours._diffusers_load_id == theirs._diffusers_load_id


def test_what_is_not_native_is_left_to_diffusers(vae: Path, tmp_path: Path) -> None:
    class Own(AutoencoderKL):
        @classmethod
        def from_pretrained(cls, name: Any, **options: Any) -> Any:
            return super().from_pretrained(name, **options)

    with pytest.raises(FellBack), native_only():
        wl.from_pretrained(AutoencoderKL, vae, offload_state_dict=True)
    with pytest.raises(FellBack), native_only():
        assert isinstance(wl.from_pretrained(Own, vae), Own)
    with pytest.raises(FellBack, match="offloading to disk"), native_only():
        given = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
        wl.from_pretrained(AutoencoderKL, vae, **given)


META: list[Any] = ["meta", torch.device("meta"), {"": "meta"}, {"encoder": "cpu", "": "meta"}]


@pytest.mark.parametrize("places", META, ids=str)
def test_the_meta_device_is_left_to_diffusers(vae: Path, places: Any) -> None:
    with pytest.raises(FellBack, match="meta device"), native_only():
        ours = wl.from_pretrained(AutoencoderKL, vae, device_map=places)
    theirs = AutoencoderKL.from_pretrained(vae, device_map=places)
    assert {name: p.device for name, p in ours.named_parameters()} == {
        name: p.device for name, p in theirs.named_parameters()
    }
    assert ours.hf_device_map == theirs.hf_device_map


def test_constructors_of_transformers_within_are_kept_from_patching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.parity.diffusers_tiny import tiny_arguments
    from transformers import PreTrainedModel

    cls = diffusers.UniDiffuserTextDecoder
    cls(**tiny_arguments(cls.__name__)).save_pretrained(tmp_path, safe_serialization=False)
    seen: list[Any] = []
    monkeypatch.setattr(PreTrainedModel, "initialize_weights", lambda self, *_: seen.append(self))
    with native_only():
        model = wl.from_pretrained(cls, tmp_path)
    assert seen == []
    # As they leave it: whoever puts the part into a model of his own would have it initialised otherwise.
    assert all(module._is_hf_initialized for module in model.transformer.modules())


def test_eight_threads_and_a_bystander(vae: Path, at_once: Any) -> None:
    expected = AutoencoderKL.from_pretrained(vae, dtype=torch.bfloat16)
    register, failed = torch.nn.Module.register_parameter, []

    def work(_: int) -> None:
        for _ in range(3):
            ours = wl.from_pretrained(AutoencoderKL, vae, dtype=torch.bfloat16)
            failed.extend(differences(ours, expected))
            if torch.nn.Module.register_parameter is not register or torch.nn.Linear(2, 2).weight.is_meta:
                failed.append("patched")

    at_once(work, 8)
    assert failed == []


PROGRAM = """
import sys, torch
assert not any(name.startswith("diffusers") for name in sys.modules)
from diffusers import AutoencoderKL, AutoModel, ModelMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin

model = AutoencoderKL.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
again = AutoModel.from_pretrained(sys.argv[1])
print(type(model).__name__, model.dtype, type(again).__name__, hasattr(ModelMixin.from_pretrained, "replaced"),
      hasattr(FromOriginalModelMixin.from_single_file, "replaced"))
"""


def test_an_unchanged_program(vae: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "weightlift.cli.main", "run", str(tmp_path / "program.py"), str(vae)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["AutoencoderKL", "torch.float16", "AutoencoderKL", "True", "True"], done.stderr


def test_install_and_uninstall(vae: Path) -> None:
    methods = [
        (ModelMixin, "from_pretrained"),
        (AutoModel, "from_pretrained"),
        (diffusers.DiffusionPipeline, "from_pretrained"),
        (diffusers.loaders.single_file.FromSingleFileMixin, "from_single_file"),
        (diffusers.loaders.single_file_model.FromOriginalModelMixin, "from_single_file"),
    ]
    before = [owner.__dict__[name] for owner, name in methods]
    finders = list(sys.meta_path)
    wl.install()
    try:
        wl.install()
        assert all(owner.__dict__[name] is not was for (owner, name), was in zip(methods, before, strict=True))
        with native_only():
            AutoencoderKL.from_pretrained(vae)
            wl.from_pretrained(AutoModel, str(vae))
            AutoModel.from_pretrained(pretrained_model_or_path=str(vae))
            AutoencoderKL.from_pretrained(pretrained_model_name_or_path=vae)
    finally:
        wl.uninstall()
    assert [owner.__dict__[name] for owner, name in methods] == before and sys.meta_path == finders


def test_the_folder_by_its_name_in_diffusers(vae: Path) -> None:
    assert wl.mapped_files(wl.from_pretrained(AutoencoderKL, pretrained_model_name_or_path=vae))
    assert wl.mapped_files(wl.from_pretrained(AutoModel, pretrained_model_or_path=str(vae)))


class Named(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, name: str = "a", loader: int = 1) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)


def test_warnings_name_the_method_of_diffusers(vae: Path) -> None:
    with pytest.warns(UserWarning, match="`proxies` argument is ignored in `from_pretrained`"):
        wl.from_pretrained(AutoencoderKL, vae, proxies={"https": "http://localhost"})


def test_configurations_that_are_called_as_arguments_are_here(tmp_path: Path) -> None:
    Named().save_pretrained(tmp_path)
    (ours, _), (theirs, _) = both(Named, tmp_path, name="b", loader=2)
    assert differences(ours, theirs) == [] and ours.config["name"] == "b" and ours.config["loader"] == 2


@pytest.mark.parametrize("cls", [AutoencoderKL, diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image])
def test_without_a_first_argument_the_librarys_own_error(cls: Any) -> None:
    missing = "missing 1 required positional argument: 'pretrained_model_"
    with pytest.raises(TypeError, match=missing):
        wl.from_pretrained(cls)
    with pytest.raises(TypeError, match=missing):
        wl.from_pretrained(cls, name="a folder")
    wl.install()
    try:
        with pytest.raises(TypeError, match=missing):
            cls.from_pretrained()
        with pytest.raises(TypeError, match=missing):
            wl.from_pretrained(cls, device_map="cpu")
    finally:
        wl.uninstall()


class Overlapping(ModelMixin, ConfigMixin):
    """Parameters that lie in the same memory in part, and one whose elements do."""

    @register_to_config
    def __init__(self, expanded: bool = False) -> None:
        super().__init__()
        whole = torch.zeros(9)
        self.first = torch.nn.Parameter(whole[:6])
        self.second = torch.nn.Parameter(whole[6:] if expanded else whole[3:])
        self.third = torch.nn.Parameter(torch.zeros(1).expand(6) if expanded else torch.zeros(6))


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"low_cpu_mem_usage": False}], ids=str)
def test_tensors_that_cannot_all_hold_their_values(tmp_path: Path, expanded: bool, options: dict[str, Any]) -> None:
    Overlapping(expanded=expanded).save_config(tmp_path)
    state = {"first": torch.arange(6.0), "second": torch.arange(3.0 if expanded else 6.0) + 50, "third": torch.ones(6)}
    save_file(state, tmp_path / FILE, {"format": "pt"})
    theirs = ORIGINAL.__func__(Overlapping, tmp_path, **options)
    ours = wl.from_pretrained(Overlapping, tmp_path, **options)
    assert differences(ours, theirs) == []
    assert ours.second.tolist() == state["second"].tolist()

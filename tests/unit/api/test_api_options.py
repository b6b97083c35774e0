"""What the options of ``load`` and ``plan`` mean: dtype, device, strict, names, memory, seeds, wrong types."""

import hashlib
import inspect
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weightlift as wl
from weightlift.api import PlanKeywords
from weightlift.options import LoadKeywords


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("scale", torch.full((3,), 0.1))
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)
        self.register_buffer("index", torch.arange(5), persistent=False)


def filled(build=Net, seed=0):
    torch.manual_seed(seed)
    module = build()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.fill_(42)
    return module


def save(path, tensors):
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist(), tensor.dtype, tuple(tensor.shape)


def all_bits(module):
    return {name: bits(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def ckpt(tmp_path):
    return save(tmp_path / "net.safetensors", filled().state_dict())


# -- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("existing", [True, False])
def test_no_dtype_is_load_state_dict(tmp_path, source, deferred, existing):
    state = {k: v.to(source) if v.is_floating_point() else v for k, v in filled().state_dict().items()}
    path = save(tmp_path / "a.safetensors", state)
    want = Net()
    want.load_state_dict(load_file(path))
    got = wl.load(Net() if existing else Net, path, defer=deferred)
    assert all_bits(got) == all_bits(want)


@pytest.mark.parametrize("existing", [True, False])
def test_one_dtype_for_all_floating_point_tensors(tmp_path, existing):
    state = filled().state_dict()
    del state["second.weight"], state["scale"]
    path = save(tmp_path / "a.safetensors", state)
    got = wl.load(Net() if existing else Net, path, dtype=torch.bfloat16, strict=False)
    dtypes = {name: tensor.dtype for name, tensor in [*got.named_parameters(), *got.named_buffers()]}
    assert dtypes.pop("count") == dtypes.pop("index") == torch.int64
    assert set(dtypes.values()) == {torch.bfloat16}
    assert torch.equal(got.first.weight, state["first.weight"].bfloat16())
    assert torch.equal(got.table, torch.linspace(0, 1, 5).bfloat16())
    assert torch.equal(got.scale, torch.full((3,), 0.1).bfloat16())
    assert got.count.item() == 42 and got.index.tolist() == [0, 1, 2, 3, 4]


def test_auto_takes_the_checkpoints_dtypes_and_leaves_what_is_missing(tmp_path):
    state = filled().state_dict()
    state["first.weight"] = state["first.weight"].half()
    state["first.bias"] = state["first.bias"].double()
    state["count"] = torch.tensor(3, dtype=torch.int32)
    del state["second.weight"]
    got = wl.load(Net, save(tmp_path / "a.safetensors", state), dtype="auto", strict=False)
    assert (got.first.weight.dtype, got.first.bias.dtype) == (torch.float16, torch.float64)
    assert got.second.weight.dtype == got.table.dtype == torch.float32
    assert got.count.dtype == torch.int64 and got.count.item() == 3
    assert torch.equal(got.first.bias, state["first.bias"])


def test_the_first_pattern_that_matches_decides(tmp_path, ckpt):
    got = wl.load(Net, ckpt, dtype={"first.weight": None, "first.*": torch.float16, "s*": "auto", "*": torch.bfloat16})
    assert got.first.weight.dtype == torch.float32
    assert got.first.bias.dtype == torch.float16
    assert got.second.weight.dtype == got.scale.dtype == torch.float32
    assert got.norm.weight.dtype == got.table.dtype == torch.bfloat16
    assert got.count.dtype == torch.int64
    turned = wl.load(Net, ckpt, dtype={"first.*": torch.float16, "first.weight": None})
    assert turned.first.weight.dtype == torch.float16 and turned.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("option", [torch.float32, "auto", {"*": torch.float32}])
@pytest.mark.parametrize("how", ["existing", "callable", "not deferred"])
def test_a_wider_dtype_loses_nothing(tmp_path, option, how):
    state = {"weight": torch.randn(3, 4), "bias": torch.full((3,), 1e6)}
    path = save(tmp_path / "a.safetensors", state)

    def build():
        return nn.Linear(4, 3, dtype=torch.float16)

    got = wl.load(build() if how == "existing" else build, path, dtype=option, defer=how != "not deferred")
    assert torch.equal(got.weight, state["weight"])
    assert torch.equal(got.bias, state["bias"])


@pytest.mark.parametrize("how", ["existing", "callable", "not deferred"])
def test_a_cast_rounds_once(tmp_path, how):
    # 1 + 2**-8 + 2**-20 rounds up in bfloat16, but to even, down, after a stop in float16.
    value = torch.full((2, 2), 1 + 2**-8 + 2**-20)
    path = save(tmp_path / "a.safetensors", {"weight": value})

    def build():
        return nn.Linear(2, 2, bias=False, dtype=torch.float16)

    got = wl.load(build() if how == "existing" else build, path, dtype=torch.bfloat16, defer=how != "not deferred")
    assert torch.equal(got.weight, value.bfloat16())


class Lying(nn.Module):
    """Parameters and buffers in other orders than row-major."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(4, 6).t() * 2.0)
        self.register_buffer("table", torch.randn(2, 5, 3).permute(2, 0, 1).clone())
        self.every = nn.Parameter(torch.randn(8, 6)[::2].t())


@pytest.mark.parametrize("source", ["file", "mapping", "strided"])
@pytest.mark.parametrize("how", ["deferred", "built", "existing"])
def test_a_cast_keeps_the_order_in_memory(tmp_path, how, source):
    wanted = Lying()
    state = {name: tensor.clone() for name, tensor in wanted.state_dict().items()}
    if source != "strided":
        state = {name: tensor.contiguous() for name, tensor in state.items()}
    if source == "file":
        save_file(state, tmp_path / "a.safetensors")
    ckpt = tmp_path / "a.safetensors" if source == "file" else state
    options = {"defer": False} if how == "built" else {}
    got = wl.load(Lying() if how == "existing" else Lying, ckpt, dtype=torch.bfloat16, **options).state_dict()
    for name, tensor in wanted.to(torch.bfloat16).state_dict().items():
        assert got[name].stride() == tensor.stride() and torch.equal(got[name], tensor), name


def test_complex_and_integer_tensors_keep_their_dtype(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
            self.b = nn.Buffer(torch.zeros(3, dtype=torch.bool))

    state = {"c": torch.randn(3, dtype=torch.complex64), "b": torch.tensor([True, False, True])}
    got = wl.load(Mixed, state, dtype=torch.float16, copy=True)
    assert got.c.dtype == torch.complex64 and torch.equal(got.c, state["c"])
    assert torch.equal(got.b, state["b"])


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"device": "meta"}, ValueError),
        ({"device": torch.device("meta")}, ValueError),
        ({"device_map": {"": "meta"}}, ValueError),
        ({"device_map": {"": None}}, ValueError),
        ({"device": "cpu", "device_map": {"": "cpu"}}, ValueError),
        ({"device": "nowhere"}, (ValueError, RuntimeError)),
        ({"device_map": "auto"}, (TypeError, ValueError)),
        ({"device_map": {3: "cpu"}}, TypeError),
        ({"device": 1.5}, TypeError),
        ({"dtype": "float17"}, ValueError),
        ({"dtype": "int8"}, ValueError),
        ({"dtype": "Tensor"}, ValueError),
        ({"dtype": torch.int8}, ValueError),
        ({"dtype": torch.complex64}, ValueError),
        ({"dtype": 16}, TypeError),
        ({"dtype": float}, TypeError),
        ({"dtype": {"*": torch.int32}}, ValueError),
        ({"dtype": {"*": {"*": None}}}, TypeError),
        ({"dtype": {1: None}}, TypeError),
        ({"workers": 0}, ValueError),
        ({"workers": -1}, ValueError),
        ({"workers": "8"}, TypeError),
        ({"workers": 2.5}, TypeError),
        ({"memory_budget_bytes": 0}, ValueError),
        ({"memory_budget_bytes": "1GB"}, TypeError),
        ({"seed": "x"}, (TypeError, ValueError)),
        ({"strict": "no"}, TypeError),
        ({"verify": 0}, TypeError),
        ({"copy": None}, TypeError),
        ({"key_mapping": 5}, TypeError),
        ({"key_mapping": lambda key: 5}, TypeError),
        ({"key_mapping": {"q": 1}}, TypeError),
        ({"key_mapping": {"(": ""}}, ValueError),
        ({"cancel": True}, TypeError),
        ({"progress": "yes"}, TypeError),
        ({"unknown": 1}, TypeError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_meant(ckpt, options, error):
    module = Net()
    before = all_bits(module)
    with pytest.raises(error):
        wl.plan(module, ckpt, **options)
    with pytest.raises(error):
        wl.load(module, ckpt, **options)
    assert all_bits(module) == before


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_by_its_name(ckpt, name):
    assert wl.load(Net, ckpt, dtype=name).first.weight.dtype == torch.bfloat16
    mixed = wl.defer(Net).load(ckpt, dtype={"norm.*": "float32", "*": name})
    assert (mixed.first.weight.dtype, mixed.norm.weight.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("name", "near"), [("bf16", "'bfloat16'"), ("fp16", "'float16'"), ("flaot32", "'float32'")])
def test_a_dtype_that_torch_does_not_have_names_what_comes_near(ckpt, name, near):
    with pytest.raises(ValueError, match=f"dtype '{name}' is not a dtype of torch.*did you mean .*{near}"):
        wl.load(Net, ckpt, dtype=name)


def test_swapped_arguments(ckpt, tmp_path):
    state = filled().state_dict()
    for source in (ckpt, str(ckpt), state, wl.open_checkpoint(ckpt)):
        for module in (Net, Net(), lambda: Net()):
            for call in (wl.load, wl.plan):
                with pytest.raises(TypeError, match="the arguments are swapped: first the module"):
                    call(source, module)
    with pytest.raises(TypeError, match="the arguments are swapped"):
        wl.save(tmp_path / "x", Net())
    for wrong in (None, 3, "net.safetensors"):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module or a callable"):
            wl.load(wrong, ckpt)
    assert not (tmp_path / "x").exists()


def test_device_map_takes_the_longest_prefix(ckpt):
    plan = wl.plan(Net, ckpt, device_map={"": "cpu", "first": "cuda:1", "first.bias": "cuda:2", "sec": "cuda:3"})
    devices = {row.fqn: row.device for row in plan.decisions.rows}
    assert devices["first.weight"] == "cuda:1" and devices["first.bias"] == "cuda:2"
    assert devices["second.weight"] == devices["table"] == "cpu"
    assert {row.device for row in wl.plan(Net, ckpt, device="cuda").decisions.rows} == {"cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("existing", [True, False])
def test_a_device_that_is_not_there_leaves_the_module_alone(ckpt, existing):
    module = Net()
    before = all_bits(module)
    with pytest.raises((wl.WeightliftError, RuntimeError, AssertionError)):
        wl.load(module if existing else Net, ckpt, device="cuda")
    assert all_bits(module) == before


@pytest.mark.parametrize("module", [None, 3, "net", Net().state_dict(), nn.Linear, lambda: 3, lambda: None])
def test_not_a_module_and_not_a_callable_that_builds_one(ckpt, module):
    for call in (wl.load, wl.plan):
        with pytest.raises(TypeError):
            call(module, ckpt)
    if not isinstance(module, nn.Module):
        with pytest.raises(TypeError):
            wl.defer(module)


@pytest.mark.parametrize("source", [None, 3, {"a": 3}, {"a": [1.0]}, {3: torch.zeros(1)}])
def test_not_a_checkpoint(source):
    with pytest.raises((TypeError, wl.CheckpointError)):
        wl.load(Net(), source, strict=False)


# -- strict -----------------------------------------------------------------------------------------------------------


def wrong(tmp_path):
    state = filled().state_dict()
    state["first.wieght"] = state.pop("first.weight")
    state["second.weight"] = torch.zeros(5, 5)
    state["norm.weight"] = torch.zeros(9)
    state["extra"] = torch.zeros(2, 7)
    del state["scale"]
    return save(tmp_path / "wrong.safetensors", state)


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    path = wrong(tmp_path)
    module = Net()
    before = all_bits(module)
    with pytest.raises(wl.PlanError) as caught:
        wl.load(module, path)
    assert all_bits(module) == before
    text, problems = str(caught.value), caught.value.problems
    named = {problem.fqn or problem.key for problem in problems}
    assert named == {"first.weight", "scale", "second.weight", "norm.weight", "first.wieght", "extra"}
    for part in (*named, "[5, 5]", "[3, 8]", "[9]", "[3]", "[2, 7]", str(path)):
        assert part in text, part
    entries = wl.open_checkpoint(path)
    for problem in problems:
        if problem.key is not None:
            entry = entries[problem.key]
            assert (str(problem.file), problem.start, problem.end) == (str(path), entry.start, entry.end)
            assert f"[{entry.start}:{entry.end}]" in text
    missing = next(problem for problem in problems if problem.fqn == "first.weight")
    assert "first.wieght" in missing.hint


def test_the_lists_are_those_of_load_state_dict(tmp_path):
    path = wrong(tmp_path)
    plan = wl.plan(Net, path, strict=False, ignore_mismatched=True)
    state = load_file(path)
    keys = Net().load_state_dict({k: v for k, v in state.items() if v.shape not in [(5, 5), (9,)]}, strict=False)
    assert {*plan.report.missing_keys, "second.weight", "norm.weight"} == set(keys.missing_keys)
    assert sorted(plan.report.unexpected_keys) == sorted(keys.unexpected_keys)
    assert sorted(plan.report.mismatched_keys) == [("norm.weight", (9,), (3,)), ("second.weight", (5, 5), (3, 8))]


def test_a_mismatch_is_refused_without_strict_too(tmp_path):
    with pytest.raises(wl.PlanError) as caught:
        wl.load(Net, wrong(tmp_path), strict=False)
    assert {problem.fqn for problem in caught.value.problems} == {"second.weight", "norm.weight"}


def test_ignore_mismatched_says_so_and_initialises(tmp_path, caplog):
    path = wrong(tmp_path)
    with caplog.at_level(logging.INFO, "weightlift"):
        got = wl.load(Net, path, strict=False, ignore_mismatched=True)
    assert torch.equal(got.norm.weight, torch.ones(3))
    assert got.second.weight.abs().sum() > 0
    assert torch.equal(got.second.bias, load_file(path)["second.bias"])
    text = caplog.text
    for name in ("first.weight", "scale", "first.wieght", "extra", "second.weight", "norm.weight"):
        assert name in text
    assert [record.levelno for record in caplog.records if record.name == "weightlift"] == [logging.WARNING]
    # Mismatched alone is not against strict.
    state = filled().state_dict()
    state["norm.weight"] = torch.zeros(9)
    assert torch.equal(wl.load(Net, state, ignore_mismatched=True).norm.weight, torch.ones(3))


def test_a_scalar_takes_a_vector_of_one_as_torch_does():
    state = filled().state_dict()
    state["count"] = torch.tensor([5])
    want = Net()
    want.load_state_dict(state)
    for subject in (Net, Net()):
        got = wl.load(subject, state)
        assert got.count.shape == want.count.shape == () and got.count.item() == 5


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("copy", [True, False])
def test_a_scalar_takes_a_vector_of_one_from_a_file(tmp_path, kind, copy):
    state = {**filled().state_dict(), "count": torch.tensor([5])}
    path = tmp_path / f"a.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    for subject in (Net, Net()):
        got = wl.load(subject, path, copy=copy)
        assert got.count.shape == () and got.count.item() == 5


def test_a_nonpersistent_buffers_name_is_unexpected(tmp_path):
    state = {**filled().state_dict(), "table": torch.zeros(5)}
    assert wl.plan(Net, state).report.unexpected_keys == ("table",)
    got = wl.load(Net, state, strict=False)
    assert torch.equal(got.table, torch.linspace(0, 1, 5))


# -- key_mapping ------------------------------------------------------------------------------------------------------


def test_patterns_are_applied_in_turn(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in filled().state_dict().items()}
    state = {name.replace("norm.", "ln."): tensor for name, tensor in state.items()}
    path = save(tmp_path / "a.safetensors", state)
    got = wl.load(Net, path, key_mapping={r"^model\.": "", r"^ln\.(\w+)$": r"norm.\1"})
    assert torch.equal(got.norm.weight, state["model.ln.weight"])
    assert torch.equal(got.first.weight, state["model.first.weight"])


def test_a_callable_is_asked_for_each_key_and_none_drops(ckpt):
    asked = []

    def name_of(key):
        asked.append(key)
        return None if key == "scale" else key

    plan = wl.plan(Net, ckpt, key_mapping=name_of, strict=False)
    assert sorted(asked) == sorted(load_file(ckpt))
    assert plan.report.missing_keys == ("scale",) and plan.report.unexpected_keys == ()


def test_two_keys_with_one_name_are_a_problem(ckpt):
    module = Net()
    before = all_bits(module)
    with pytest.raises(wl.PlanError, match=r"first\.weight") as caught:
        wl.load(module, ckpt, key_mapping={"second": "first"}, strict=False, ignore_mismatched=True)
    assert any("second.weight" in str(problem) and "first.weight" in str(problem) for problem in caught.value.problems)
    assert all_bits(module) == before


def test_unexpected_keys_have_the_files_name(ckpt):
    plan = wl.plan(Net, ckpt, key_mapping={"^scale$": "elsewhere"}, strict=False)
    assert plan.report.unexpected_keys == ("scale",)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_writing_never_reaches_the_file(tmp_path, copy, kind):
    path = tmp_path / f"a.{kind}"
    state = filled().state_dict()
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    before = digest(path)
    first, second = (wl.load(Net, path, copy=copy) for _ in range(2))
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.fill_(13)
    assert digest(path) == before
    assert all_bits(second) == all_bits(wl.load(Net, path))
    assert torch.equal(second.first.weight, state["first.weight"])


def test_copy_outlives_the_file(tmp_path, ckpt):
    state = load_file(ckpt)
    state = {name: tensor.clone() for name, tensor in state.items()}
    got = wl.load(Net, ckpt, copy=True)
    with open(ckpt, "r+b") as file:
        file.write(b"\0" * ckpt.stat().st_size)
    assert torch.equal(got.first.weight, state["first.weight"])


def test_copy_of_a_mapping_owns_its_memory():
    state = filled().state_dict()
    before = {name: bits(tensor) for name, tensor in state.items()}
    got = wl.load(Net, state, copy=True)
    with torch.no_grad():
        for tensor in got.state_dict().values():
            tensor.fill_(13)
    assert {name: bits(tensor) for name, tensor in state.items()} == before


def test_without_copy_a_mappings_memory_is_shared_where_nothing_is_cast_or_filled():
    donor = filled().state_dict()
    got = wl.load(Net, donor, dtype={"first.weight": torch.float16})
    assert got.second.weight.data_ptr() == donor["second.weight"].data_ptr()  # docs/checkpoints.md says so
    assert got.first.weight.dtype == torch.float16
    module = Net()
    wl.load(module, donor)
    with torch.no_grad():
        module.second.weight.fill_(13)
    assert not (donor["second.weight"] == 13).any()


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", ["mapping", "pt"])
def test_tensors_tied_in_the_checkpoint_only_are_not_tied_by_loading(tmp_path, copy, kind):
    shared = torch.randn(3, 3)
    state = {"0.weight": shared, "1.weight": shared, "2.weight": shared[:2]}
    source = state
    if kind == "pt":
        source = tmp_path / "a.pt"
        torch.save(state, source)

    def build():
        return nn.Sequential(*(nn.Linear(3, n, bias=False) for n in (3, 3, 2)))

    got = wl.load(build, source, copy=copy)
    value = shared.clone()
    for number in range(3):
        with torch.no_grad():
            got[number].weight.add_(1 + number)
    assert torch.equal(got[0].weight, value + 1)
    assert torch.equal(got[1].weight, value + 2)
    assert torch.equal(got[2].weight, value[:2] + 3)


def test_workers_change_no_bit(tmp_path):
    torch.manual_seed(1)

    def build():
        return nn.Sequential(*(nn.Linear(37, 37) for _ in range(30)), nn.Linear(37, 90_001))

    state = {k: torch.randn_like(v) for k, v in build().state_dict().items() if "3.weight" not in k}
    path = save(tmp_path / "a.safetensors", state)
    for options in ({}, {"copy": True}, {"dtype": torch.bfloat16}, {"memory_budget_bytes": 1 << 16, "copy": True}):
        results = [all_bits(wl.load(build, path, strict=False, seed=3, workers=n, **options)) for n in (1, 2, 8)]
        assert results[0] == results[1] == results[2]


# -- seeds ------------------------------------------------------------------------------------------------------------


class Sampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = nn.Linear(5, 5)
        self.c = nn.Parameter(torch.randn(6) * 0.02)
        self.d = nn.Embedding(7, 3, padding_idx=1)
        self.e = nn.Parameter(nn.init.orthogonal_(torch.empty(4, 4)))
        self.f = nn.Parameter(nn.init.trunc_normal_(torch.empty(9), std=0.02))


def test_missing_values_depend_on_seed_and_name_alone():
    everything = {name: tensor.clone() for name, tensor in Sampled().state_dict().items()}
    reference = wl.load(Sampled, {}, strict=False, seed=11).state_dict()
    names = list(everything)
    for left_out in ([name] for name in names):
        state = {name: tensor for name, tensor in everything.items() if name not in left_out}
        got = wl.load(Sampled, state, strict=False, seed=11, workers=1 + len(left_out[0]) % 3)
        for name in left_out:
            assert torch.equal(got.state_dict()[name], reference[name]), name
    half = {name: everything[name] for name in names[::2]}
    got = wl.load(Sampled, half, strict=False, seed=11).state_dict()
    assert all(torch.equal(got[name], reference[name]) for name in names[1::2])
    made = wl.defer(Sampled, seed=11).materialize().state_dict()
    assert all(torch.equal(made[name], reference[name]) for name in names)
    other = wl.load(Sampled, {}, strict=False, seed=12).state_dict()
    assert not any(torch.equal(other[name], reference[name]) for name in names)
    assert torch.equal(other["d.weight"][1], torch.zeros(3))


def test_missing_values_are_the_same_in_any_thread_and_draw_nothing(at_once):
    reference = all_bits(wl.load(Sampled, {}, strict=False, seed=5))
    state = torch.get_rng_state()

    def work(number):
        return all_bits(wl.load(Sampled, {}, strict=False, seed=5, workers=1 + number)) == reference

    assert at_once(work, 4) == [True] * 4
    wl.defer(Sampled).materialize()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_seed_is_torchs_initial_seed():
    torch.manual_seed(77)
    torch.rand(5)
    first = all_bits(wl.load(Sampled, {}, strict=False))
    assert first == all_bits(wl.load(Sampled, {}, strict=False, seed=77))
    torch.manual_seed(78)
    assert all_bits(wl.load(Sampled, {}, strict=False)) != first


def test_same_named_layers_differ_and_renaming_the_root_does_not_matter():
    got = wl.load(Sampled, {}, strict=False, seed=5)
    assert not torch.equal(got.a.weight, got.b.weight)


def test_not_deferred_calls_the_constructor_ordinarily():
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            seen.append((wl.current_load().deferred, self.a.weight.detach().clone()))

    torch.manual_seed(3)
    want = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    torch.manual_seed(3)
    state = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}
    got = wl.load(Watched, state, defer=False, strict=False)
    assert seen[0][0] is False and torch.equal(seen[0][1], want["a"].weight)
    assert torch.equal(got.b.weight, want["b"].weight) and torch.equal(got.a.weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"device": "abacus"}, ValueError, "device: 'abacus' is no device of torch"),
        ({"device": 1.5}, TypeError, "device must be a torch.device"),
        ({"device_map": {"first": "abacus"}}, ValueError, r"device_map\['first'\]: 'abacus' is no device"),
        ({"device_map": {1: "cpu"}}, TypeError, "found the prefix 1"),
        ({"key_mapping": {"step": None}}, TypeError, "found 'step': None; a callable drops a key by returning None"),
        ({"seed": "x"}, TypeError, "seed must be a whole number, found 'x'"),
        ({"seed": 1.5}, TypeError, "seed must be a whole number, found 1.5"),
        ({"verify": True, "source_rank": 0}, ValueError, r"call open_checkpoint\(…, verify=True\) before"),
    ],
)
def test_an_option_that_can_not_be_meant_is_named(options, error, said):
    for call in (wl.load, wl.plan):
        with pytest.raises(error, match=said):
            call(Net, {}, strict=False, **options)


def test_what_can_not_be_deferred_is_not_called():
    """A module is callable, too: its forward is not what was meant."""
    for given in (nn.Identity(), 5, None):
        with pytest.raises(TypeError, match="expected a callable that builds a module, found"):
            wl.defer(given)
    with pytest.raises(TypeError, match="seed must be"):
        wl.defer(Net, seed="x")


def test_a_mesh_that_is_none():
    with pytest.raises(ValueError, match="give mesh_shape too"):
        wl.plan(Net, {}, placements={"first.*": []})
    with pytest.raises(ValueError, match=r"mesh_shape must be positive sizes, as in \(16, 8\)"):
        wl.plan(Net, {}, mesh_shape=4)


def test_signatures_are_the_same_in_every_process():
    """What ``help()`` shows of a default is no address."""
    for name in wl.__all__:
        if callable(getattr(wl, name)) and not isinstance(getattr(wl, name), type):
            assert " at 0x" not in str(inspect.signature(getattr(wl, name))), name


@pytest.mark.parametrize(("function", "keywords"), [(wl.load, LoadKeywords), (wl.plan, PlanKeywords)])
def test_type_checkers_know_every_option(function, keywords):
    named = [name for name, given in inspect.signature(function).parameters.items() if given.kind is given.KEYWORD_ONLY]
    assert keywords.__optional_keys__ == set(named) and not keywords.__required_keys__

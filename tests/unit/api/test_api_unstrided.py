"""Sparse, nested and mkldnn tensors of a module: nothing is loaded into them, and they are in nobody's way."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import weightlift as wl
from weightlift.deferred.inventory import tensors_of

KINDS = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "coo of parts": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.ones(2), (4, 4)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "mkldnn": lambda: torch.eye(4).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}
MADE = {"callable": {}, "callable, not deferred": {"defer": False}, "existing": None}

pytestmark = pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")


class Graph(nn.Module):
    def __init__(self, kind: str, holds: str = "buffer", *, hooked: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        if holds == "parameter":
            self.adjacency = nn.Parameter(KINDS[kind]())
        else:
            self.register_buffer("adjacency", KINDS[kind](), persistent=holds == "persistent")
        if hooked:
            self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.update(weight=torch.ones(4)))


def load(made, build, state, **options):
    existing = MADE[made] is None
    return wl.load(build() if existing else build, state, **options, **({} if existing else MADE[made]))


def total(tensor):
    parts = tensor.unbind() if tensor.is_nested else [tensor.to_dense() if tensor.layout != torch.strided else tensor]
    return sum(part.float().sum().item() for part in parts)


def is_as_made(tensor, kind):
    made = KINDS[kind]()
    same = tensor.layout == made.layout and tensor.is_nested == made.is_nested and tensor.dtype == made.dtype
    return same and total(tensor) == total(made)


@pytest.mark.parametrize("hooked", [False, True], ids=["no hooks", "hooks"])
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("holds", ["buffer", "persistent", "parameter"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_left_as_the_constructor_made_it(kind, holds, made, hooked):
    state = {"weight": torch.ones(4)}
    loaded = load(made, lambda: Graph(kind, holds, hooked=hooked), state, strict=holds == "buffer")
    assert is_as_made(loaded.adjacency, kind) and loaded.weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("holds", ["buffer", "parameter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_reaches_its_values_where_torch_can_cast_it(kind, holds):
    build = lambda: Graph(kind, holds)  # noqa: E731
    loaded = wl.load(build, {"weight": torch.ones(4)}, strict=False, dtype=torch.float64, device="cpu")
    wanted = KINDS[kind]() if kind == "mkldnn" else KINDS[kind]().to(torch.float64)
    assert loaded.adjacency.dtype == wanted.dtype and loaded.weight.dtype == torch.float64
    assert total(loaded.adjacency) == total(wanted)
    assert isinstance(loaded.adjacency, nn.Parameter) == (holds == "parameter")
    if wanted.layout == torch.jagged or kind == "csr":
        assert loaded.adjacency.values().dtype == torch.float64


def test_names_that_share_it_share_it_once_cast():
    def build():
        module = Graph("csr")
        module.register_buffer("again", module.adjacency, persistent=False)
        return module

    loaded = wl.load(build, {"weight": torch.ones(4)}, dtype=torch.float64)
    assert loaded.again is loaded.adjacency and loaded.again.dtype == torch.float64


@pytest.mark.parametrize("hooked", [False, True], ids=["no hooks", "hooks"])
@pytest.mark.parametrize("holds", ["persistent", "parameter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_for_it_is_refused_in_the_plan(kind, holds, hooked):
    state = {"weight": torch.ones(4), "adjacency": torch.ones(4, 4), "more": torch.ones(1)}
    plan = wl.plan(lambda: Graph(kind, holds, hooked=hooked), state)
    assert {problem.fqn or problem.key for problem in plan.problems} == {"adjacency", "more"}
    assert any("no strided tensor" in str(problem) for problem in plan.problems)
    existing = Graph(kind, holds, hooked=hooked)
    with pytest.raises(wl.PlanError, match="adjacency"):
        wl.load(existing, state, ignore_mismatched=True)
    assert is_as_made(existing.adjacency, kind) and existing.weight.tolist() == [0.0] * 4


def test_one_that_is_missing_is_told_of_with_what_to_do():
    (problem,) = wl.plan(lambda: Graph("coo", "persistent"), {"weight": torch.ones(4)}).problems
    assert "persistent=False" in str(problem) and problem.fqn == "adjacency"


@pytest.mark.parametrize("kind", KINDS)
def test_plans_and_reports_have_it(kind):
    plan = wl.plan(lambda: Graph(kind), {"weight": torch.ones(4)}, mesh_shape=(2,))
    (line,) = [line for line in str(plan).splitlines() if line.startswith("kept")]
    assert "adjacency" in line and line.endswith(("sparse", "mkldnn", "nested"))
    assert json.loads(plan.to_json())["tensors"][1]["action"] == "kept" and plan.report.kept == ("adjacency",)
    assert plan.ranks.ranks[0].memory_bytes == 8


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_at_a_module_looks_at_one_with_it(kind, tmp_path):
    deferred = wl.defer(lambda: Graph(kind))
    assert deferred.nbytes == 16 and 0 < deferred.buffer_nbytes < 200
    module = deferred.materialize()
    assert is_as_made(module.adjacency, kind) and wl.mapped_files(module) == {}
    assert wl.save(module, tmp_path) and dict(tensors_of(module))["adjacency"] is module.adjacency
    with pytest.raises(wl.CheckpointError, match=r"adjacency: is an? (sparse|mkldnn|nested) tensor"):
        wl.save(Graph(kind, "persistent"), tmp_path / "more")


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_for_an_existing_module_stands_while_it_does(kind):
    existing = Graph(kind)
    plan = wl.plan(existing, {"weight": torch.ones(4)})
    plan.execute()
    plan.execute()
    existing.adjacency = KINDS[kind]()
    with pytest.raises(wl.PlanError, match="adjacency: is another tensor"):
        plan.execute()


def test_a_large_one_counts_what_it_holds():
    def build():
        module = nn.Linear(2, 2)
        adjacency = torch.sparse_coo_tensor([[0], [9]], [1.0], (10**7, 10**7))
        module.register_buffer("adjacency", adjacency, persistent=False)
        return module

    assert wl.defer(build).buffer_nbytes == 20
    wl.load(build, nn.Linear(2, 2).state_dict())


def two_tensors(holds):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            value = TwoTensor(torch.ones(4), torch.full((4,), 2.0))
            if holds == "parameter":
                self.both = nn.Parameter(value, requires_grad=False)
                self.both.mark, self.again = "mine", self.both
            else:
                self.register_buffer("both", value, persistent=holds == "persistent")
                self.register_buffer("again", value, persistent=False)

    return Holds


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""], ids=["pickle", "safetensors", "mapping"])
@pytest.mark.parametrize("existing", [False, True], ids=["callable", "existing"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("holds", ["buffer", "persistent", "parameter"])
def test_a_tensor_made_of_others_has_them_loaded_and_cast(holds, dtype, existing, suffix, tmp_path):
    build = two_tensors(holds)
    offered = holds != "buffer"
    checkpoint = {"both": torch.full((4,), 3.0)} if offered else {}
    if suffix and offered:
        checkpoint, values = tmp_path / f"model{suffix}", checkpoint
        (torch.save if suffix == ".pt" else save_file)(values, checkpoint)
    loaded = wl.load(build() if existing else build, checkpoint, dtype=dtype)
    wanted = torch.float64 if dtype else torch.float32
    assert [part.dtype for part in (loaded.both, loaded.both.a, loaded.both.b)] == [wanted] * 3
    assert [part[0].item() for part in (loaded.both.a, loaded.both.b)] == ([3.0, 3.0] if offered else [1.0, 2.0])
    assert loaded.again is loaded.both and type(loaded.both) is TwoTensor
    assert holds != "parameter" or (loaded.both.mark == "mine" and not loaded.both.requires_grad)


class Sealed(TwoTensor):
    """As quantised ones, nothing plain can be copied into it, and no view be taken of it."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.as_strided.default):
            raise NotImplementedError("not for a Sealed")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("existing", [False, True], ids=["callable", "existing"])
def test_a_tensor_that_refuses_to_be_copied_into_is_named(existing, tmp_path):
    def build():
        module = nn.Linear(2, 2)
        module.weight = nn.Parameter(Sealed(torch.ones(2, 2), torch.ones(2, 2)))
        return module

    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(wl.TransferError, match="weight: copying into a Sealed failed: NotImplementedError") as caught:
        wl.load(build() if existing else build, tmp_path)
    assert caught.value.written == (("bias",) if existing else ())


class Composed(nn.Parameter):
    """A parameter without memory of its own, which tells the shape of the tensor that it holds."""

    def __new__(cls, inner: torch.Tensor) -> "Composed":
        return super().__new__(cls)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = nn.Parameter(inner)

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape


class Hyperbolic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.points = Composed(torch.ones(2, 3))


@pytest.mark.parametrize("made", MADE)
def test_a_class_that_tells_another_shape_than_its_memorys_is_left_alone(made):
    state = {"weight": torch.ones(4)}
    loaded = load(made, Hyperbolic, state, strict=False)
    assert loaded.points.inner.tolist() == [[1.0] * 3] * 2 and loaded.weight.tolist() == [1.0] * 4
    with pytest.raises(wl.PlanError, match="points: the parameter is no strided tensor"):
        load(made, Hyperbolic, {**state, "points": torch.zeros(2, 3)})

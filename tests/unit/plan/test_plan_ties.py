"""Names that share a value: the same Parameter, two tensors on one storage, views, shared modules."""

import logging

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import weightlift as wl


class Tied(nn.Module):
    def __init__(self, names=("head",)):
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        for name in names:
            head = nn.Linear(4, 6, bias=False)
            head.weight = self.emb.weight
            self.add_module(name, head)


def three():
    return Tied(("head", "other"))


class Twin(nn.Module):
    """Two Parameters made on one storage."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = nn.Parameter(self.emb.weight)


class Viewed(nn.Module):
    """A buffer that is a view of a weight."""

    def __init__(self, persistent=True):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(24.0).reshape(6, 4))
        self.register_buffer("rows", self.weight.detach()[2:4], persistent=persistent)


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a


def same_storage(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def value(seed=0, *shape):
    return torch.randn(*(shape or (6, 4)), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["callable", "existing", "not deferred", "mapping"])
def load(request, tmp_path):
    """``load(build, state, **options)`` in each way there is to be loaded."""

    def call(build, state, **options):
        source = state
        if request.param != "mapping":
            source = tmp_path / "a.safetensors"
            save_file({k: v.clone().contiguous() for k, v in state.items()}, source)
        options.setdefault("defer", request.param != "not deferred")
        return wl.load(build() if request.param == "existing" else build, source, **options)

    return call


@pytest.mark.parametrize("name", ["emb.weight", "head.weight", "other.weight"])
def test_any_name_provides_for_all(load, name):
    w = value()
    got = load(three, {name: w})
    assert got.emb.weight is got.head.weight is got.other.weight
    assert torch.equal(got.emb.weight, w)


def test_the_plan_says_who_provides(tmp_path):
    plan = wl.plan(three, {"head.weight": value()})
    assert plan.problems == () and plan.report.missing_keys == ()
    assert plan.report.loaded == ("head.weight",)
    assert plan.report.tied == ("emb.weight", "other.weight")
    assert {row.fqn: row.tied_to for row in plan.decisions.rows} == {
        "emb.weight": "head.weight", "head.weight": None, "other.weight": "head.weight",
    }  # fmt: skip


def test_equal_bytes_stay_tied(load, caplog):
    w = value()
    with caplog.at_level(logging.WARNING, "weightlift"):
        got = load(three, {"emb.weight": w, "head.weight": w.clone(), "other.weight": w.clone()})
    assert got.emb.weight is got.head.weight is got.other.weight
    assert torch.equal(got.emb.weight, w) and not caplog.records


def test_different_bytes_are_refused_under_strict(load):
    with pytest.raises(wl.PlanError) as caught:
        load(Tied, {"emb.weight": value(0), "head.weight": value(1)})
    assert "emb.weight" in str(caught.value) and "head.weight" in str(caught.value)
    assert "nothing was changed" in str(caught.value)


def test_refusal_of_different_bytes_changes_nothing():
    module = Tied()
    before = module.emb.weight.detach().clone()
    pointer = module.emb.weight.data_ptr()
    with pytest.raises(wl.PlanError):
        wl.load(module, {"emb.weight": value(0), "head.weight": value(1)})
    assert module.emb.weight is module.head.weight
    assert torch.equal(module.emb.weight, before) and module.emb.weight.data_ptr() == pointer


def test_different_bytes_untie_without_strict(load, caplog):
    with caplog.at_level(logging.WARNING, "weightlift"):
        got = load(Tied, {"emb.weight": value(0), "head.weight": value(1)}, strict=False)
    assert torch.equal(got.emb.weight, value(0)) and torch.equal(got.head.weight, value(1))
    assert isinstance(got.head.weight, nn.Parameter) and got.head.weight.requires_grad
    assert not same_storage(got.emb.weight, got.head.weight)
    said = [r for r in caplog.records if "emb.weight" in r.getMessage() and "head.weight" in r.getMessage()]
    assert [(r.name, r.levelno) for r in said] == [("weightlift", logging.WARNING)]


def test_one_of_three_differs(load, caplog):
    with caplog.at_level(logging.WARNING, "weightlift"):
        got = load(three, {"emb.weight": value(0), "head.weight": value(1), "other.weight": value(0)}, strict=False)
    assert got.emb.weight is got.other.weight
    assert torch.equal(got.emb.weight, value(0)) and torch.equal(got.head.weight, value(1))


def test_untied_ones_get_the_dtype(load):
    got = load(Tied, {"emb.weight": value(0), "head.weight": value(1)}, strict=False, dtype=torch.bfloat16)
    assert torch.equal(got.emb.weight, value(0).bfloat16()) and torch.equal(got.head.weight, value(1).bfloat16())


def test_a_missing_tie_is_initialised_once_and_stays(load):
    state = {}
    got = load(Tied, state, strict=False) if state else wl.load(Tied, state, strict=False, seed=1)
    assert got.emb.weight is got.head.weight and got.emb.weight.std() > 0
    again = wl.load(Tied, state, strict=False, seed=1)
    assert torch.equal(again.emb.weight, wl.load(Tied, state, strict=False, seed=1).emb.weight)


@pytest.mark.parametrize("option", [torch.bfloat16, "auto", {"head.*": torch.bfloat16}])
def test_a_tie_survives_dtypes(load, option):
    w = value().bfloat16()
    got = load(three, {"emb.weight": w}, dtype=option)
    assert got.emb.weight is got.head.weight is got.other.weight
    assert got.emb.weight.dtype == torch.bfloat16 and torch.equal(got.emb.weight, w)


def test_a_mismatch_beside_a_tie_that_fits(load):
    with pytest.raises(wl.PlanError, match=r"head\.weight"):
        load(Tied, {"emb.weight": value(), "head.weight": torch.zeros(2, 2)})
    got = load(Tied, {"emb.weight": value(), "head.weight": torch.zeros(2, 2)}, ignore_mismatched=True)
    assert got.emb.weight is got.head.weight and torch.equal(got.emb.weight, value())


# -- two tensors on one storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emb.weight", "head.weight"])
def test_parameters_on_one_storage_are_tied(load, name):
    got = load(Twin, {name: value()})
    assert got.emb.weight is not got.head.weight
    assert same_storage(got.emb.weight, got.head.weight)
    assert torch.equal(got.emb.weight, value()) and torch.equal(got.head.weight, value())


def test_parameters_on_one_storage_with_different_bytes(load, caplog):
    state = {"emb.weight": value(0), "head.weight": value(1)}
    with pytest.raises(wl.PlanError, match=r"head\.weight"):
        load(Twin, state)
    with caplog.at_level(logging.WARNING, "weightlift"):
        got = load(Twin, state, strict=False)
    assert torch.equal(got.emb.weight, value(0)) and torch.equal(got.head.weight, value(1))
    assert "emb.weight" in caplog.text and "head.weight" in caplog.text


def test_parameters_on_one_storage_stay_so_with_a_dtype(load):
    got = load(Twin, {"emb.weight": value()}, dtype=torch.bfloat16)
    assert torch.equal(got.emb.weight, value().bfloat16()) and torch.equal(got.head.weight, value().bfloat16())
    assert same_storage(got.emb.weight, got.head.weight)


def test_missing_parameters_on_one_storage_stay_so_with_a_dtype():
    got = wl.load(Twin, {}, strict=False, dtype=torch.bfloat16)
    assert got.emb.weight.dtype == got.head.weight.dtype == torch.bfloat16
    assert same_storage(got.emb.weight, got.head.weight)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_view_of_a_loaded_weight_follows_it(load, persistent):
    got = load(lambda: Viewed(persistent), {"weight": value()}, strict=False)
    assert torch.equal(got.weight, value()) and torch.equal(got.rows, value()[2:4])
    assert same_storage(got.weight, got.rows)
    plan = wl.plan(lambda: Viewed(persistent), {"weight": value()})
    assert plan.problems == () and plan.report.missing_keys == ()


def test_a_view_alone_is_loaded_on_top_of_the_initialiser(load):
    got = load(Viewed, {"rows": value(0, 2, 4)}, strict=False)
    want = torch.arange(24.0).reshape(6, 4)
    want[2:4] = value(0, 2, 4)
    assert torch.equal(got.weight, want) and torch.equal(got.rows, want[2:4])
    assert same_storage(got.weight, got.rows)


def test_a_view_with_the_bytes_of_its_weight(load):
    got = load(Viewed, {"weight": value(), "rows": value()[2:4]})
    assert torch.equal(got.weight, value()) and same_storage(got.weight, got.rows)


def test_a_view_with_other_bytes_than_its_weight_is_a_conflict(load):
    state = {"weight": value(), "rows": value(1, 2, 4)}
    with pytest.raises(wl.PlanError, match="rows"):
        load(Viewed, state)


def test_a_view_of_a_cast_weight_has_its_values(load):
    got = load(Viewed, {"weight": value()}, dtype=torch.bfloat16, strict=False)
    assert torch.equal(got.weight, value().bfloat16()) and torch.equal(got.rows, value().bfloat16()[2:4])


def test_a_view_of_a_cast_weight_stays_a_view(load):
    got = load(Viewed, {"weight": value()}, dtype=torch.bfloat16, strict=False)
    assert same_storage(got.weight, got.rows)


class Flat(nn.Module):
    """Parameters that are pieces of one buffer."""

    def __init__(self):
        super().__init__()
        flat = torch.zeros(10)
        self.a = nn.Parameter(flat[:6].view(2, 3))
        self.b = nn.Parameter(flat[6:])
        self.t = nn.Parameter(flat[:6].view(2, 3).t())


def test_pieces_of_one_storage(load):
    a, b = value(0, 2, 3), value(1, 4)
    got = load(Flat, {"a": a, "b": b, "t": a.t().contiguous()})
    assert torch.equal(got.a, a) and torch.equal(got.b, b) and torch.equal(got.t, a.t())
    assert same_storage(got.a, got.b) and same_storage(got.a, got.t)


# -- a module under two names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["a", "b"])
def test_a_shared_module_needs_one_name(load, names):
    got = load(Shared, {f"{names}.weight": value(0, 3, 3), f"{names}.bias": value(1, 3)})
    assert got.a is got.b and torch.equal(got.a.weight, value(0, 3, 3)) and torch.equal(got.b.bias, value(1, 3))


def test_a_shared_module_with_equal_bytes(load):
    state = {f"{n}.{k}": v for n in "ab" for k, v in {"weight": value(0, 3, 3), "bias": value(1, 3)}.items()}
    got = load(Shared, state)
    assert got.a is got.b and torch.equal(got.a.weight, value(0, 3, 3))


def test_a_shared_module_with_different_bytes(load, caplog):
    state = {"a.weight": value(0, 3, 3), "b.weight": value(1, 3, 3), "a.bias": value(2, 3), "b.bias": value(2, 3)}
    with pytest.raises(wl.PlanError, match=r"b\.weight"):
        load(Shared, state)
    with caplog.at_level(logging.WARNING, "weightlift"):
        try:
            got = load(Shared, state, strict=False)
        except wl.PlanError as error:  # also right: one module cannot hold two values
            assert "a.weight" in str(error) and "b.weight" in str(error)
            return
    kept = "a" if torch.equal(got.a.weight, value(0, 3, 3)) else "b"
    said = [r.getMessage() for r in caplog.records if "a.weight" in r.getMessage() and "b.weight" in r.getMessage()]
    assert len(said) == 1 and kept in "ab"
    assert "untied" not in said[0]


def test_what_a_shared_module_leaves_out_is_reported():
    state = {"a.weight": value(0, 3, 3), "b.weight": value(1, 3, 3), "a.bias": value(2, 3)}
    plan = wl.plan(Shared, state, strict=False)
    got = plan.execute()
    assert torch.equal(got.b.weight, value(0, 3, 3))
    assert plan.report.left_out == (("b.weight", "a.weight"),) and "left out" in str(plan.report)


def test_two_of_three_agree_against_the_first(load):
    got = load(three, {"emb.weight": value(0), "head.weight": value(1), "other.weight": value(1)}, strict=False)
    assert got.head.weight is got.other.weight is not got.emb.weight
    assert torch.equal(got.emb.weight, value(0)) and torch.equal(got.other.weight, value(1))


def test_three_values_for_three_names(load):
    got = load(three, {"emb.weight": value(0), "head.weight": value(1), "other.weight": value(2)}, strict=False)
    for number, name in enumerate(["emb", "head", "other"]):
        assert torch.equal(got.get_submodule(name).weight, value(number))


def test_a_tie_whose_only_name_is_mismatched(load):
    state = {"emb.weight": torch.zeros(2, 2)}
    got = load(Tied, state, ignore_mismatched=True)
    assert got.emb.weight is got.head.weight and got.emb.weight.shape == (6, 4)
    plan = wl.plan(Tied, state)
    assert [problem.fqn for problem in plan.problems] == ["emb.weight"]


def test_a_view_keeps_the_value_of_its_weight_without_strict(load, caplog):
    with caplog.at_level(logging.WARNING, "weightlift"):
        got = load(Viewed, {"weight": value(), "rows": value(1, 2, 4)}, strict=False)
    assert torch.equal(got.weight, value()) and torch.equal(got.rows, value()[2:4])
    assert same_storage(got.weight, got.rows) and "untied" not in caplog.text
    assert [r for r in caplog.records if "rows" in r.getMessage()]


def test_pieces_that_overlap_are_compared(load):
    a, b = value(0, 2, 3), value(1, 4)
    with pytest.raises(wl.PlanError, match="t: "):
        load(Flat, {"a": a, "b": b, "t": a.t() + 1})


def test_pieces_of_one_storage_with_a_dtype(load):
    a, b = value(0, 2, 3), value(1, 4)
    got = load(Flat, {"a": a, "b": b, "t": a.t().contiguous()}, dtype=torch.bfloat16)
    assert torch.equal(got.a, a.bfloat16()) and torch.equal(got.b, b.bfloat16())
    assert torch.equal(got.t, a.t().bfloat16()) and same_storage(got.a, got.b) and same_storage(got.a, got.t)


class Halves(nn.Module):
    """Two parameters whose elements alternate in one buffer: their ranges meet, their elements do not."""

    def __init__(self):
        super().__init__()
        flat = torch.zeros(4, 6)
        self.even, self.odd = nn.Parameter(flat[:, ::2]), nn.Parameter(flat[:, 1::2])


def test_interleaved_parameters(load):
    even, odd = value(0, 4, 3), value(1, 4, 3)
    for dtype in (torch.float32, torch.float16):
        got = load(Halves, {"even": even, "odd": odd}, dtype=dtype)
        assert torch.equal(got.even, even.to(dtype)) and torch.equal(got.odd, odd.to(dtype))
        assert same_storage(got.even, got.odd)


def test_a_view_outside_of_the_module_has_values_after_a_cast():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))
            self.outside = [self.weight.detach()[2:]]

    got = wl.load(Watched, {"weight": value()}, dtype=torch.bfloat16)
    assert torch.equal(got.weight, value().bfloat16())
    assert torch.equal(got.outside[0], value()[2:])


def test_views_of_a_module_on_meta():
    with torch.device("meta"):
        twin, viewed = Twin(), Viewed()
    got = wl.load(twin, {"head.weight": value()})
    assert same_storage(got.emb.weight, got.head.weight) and torch.equal(got.emb.weight, value())
    got = wl.load(viewed, {"weight": value()}, strict=False)
    assert same_storage(got.weight, got.rows) and torch.equal(got.rows, value()[2:4])


def test_ties_of_a_module_on_meta():
    with torch.device("meta"):
        module = three()
    got = wl.load(module, {"other.weight": value()})
    assert got is module and got.emb.weight is got.head.weight is got.other.weight
    assert got.emb.weight.device.type == "cpu" and torch.equal(got.emb.weight, value())


def test_deferred_counts_a_tie_once():
    deferred = wl.defer(three)
    assert (deferred.numel, deferred.nbytes) == (24, 96)


def test_a_mismatched_tie_gives_a_meta_tensor_no_value():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = nn.Parameter(torch.zeros(2))
            with torch.device("meta"):
                self.e = nn.Embedding(4, 3)
                self.h = nn.Linear(3, 4, bias=False)
            self.h.weight = self.e.weight

    module = Tied()
    state = {"e.weight": torch.ones(5, 5), "n": torch.ones(2)}
    plan = wl.plan(module, state, strict=False, ignore_mismatched=True)
    assert any(problem.fqn in ("e.weight", "h.weight") for problem in plan.problems)
    with pytest.raises(wl.PlanError):
        plan.execute()
    assert torch.equal(module.n, torch.zeros(2))


class Mirrored(nn.Module):
    """A weight, and a parameter that shows its memory another way; ``first``: that one is registered before."""

    def __init__(self, show, dtype, first=False):
        super().__init__()
        weight = torch.randn(6, 4, dtype=dtype)
        if first:
            self.mirror = nn.Parameter(show(weight))
        self.weight = nn.Parameter(weight)
        if not first:
            self.mirror = nn.Parameter(show(weight))


MIRRORS = {
    "conj": (torch.conj, torch.complex64),
    "adjoint": (torch.adjoint, torch.complex64),
    "neg": (torch._neg_view, torch.float32),
    "neg of conj": (lambda weight: torch._neg_view(weight.conj()), torch.complex64),
    "transposed": (torch.t, torch.float32),
    "negative transposed": (lambda weight: torch._neg_view(weight.t()), torch.float32),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("name", MIRRORS)
@pytest.mark.parametrize("keys", ["both", "weight", "mirror"])
def test_a_view_that_shows_a_weight_another_way_stays_that(tmp_path, name, existing, first, keys):
    show, dtype = MIRRORS[name]
    wanted = torch.randn(6, 4, dtype=dtype)
    state = {"weight": wanted, "mirror": show(wanted).resolve_conj().resolve_neg().contiguous()}
    if keys != "both":
        state = {keys: state[keys]}
    wl.save(state, tmp_path / "saved")
    model = Mirrored(show, dtype, first) if existing else lambda: Mirrored(show, dtype, first)
    loaded = wl.load(model, tmp_path / "saved")
    assert torch.equal(loaded.weight, wanted) and torch.equal(loaded.mirror, show(wanted))
    loaded.weight.data[0, 0] = 5 + 0 * wanted[0, 0]
    assert torch.equal(loaded.mirror, show(loaded.weight.detach())), "no longer a view"


@pytest.mark.parametrize("name", MIRRORS)
def test_a_view_that_disagrees_with_its_weight_is_refused(name):
    show, dtype = MIRRORS[name]
    wanted = torch.randn(6, 4, dtype=dtype)
    state = {"weight": wanted, "mirror": show(wanted).resolve_conj().resolve_neg().clone()}
    state["mirror"][0, 0] += 1
    with pytest.raises(wl.PlanError, match="two different values"):
        wl.load(lambda: Mirrored(show, dtype), state)


@pytest.mark.parametrize("name", [name for name, (_, dtype) in MIRRORS.items() if not dtype.is_complex])
@pytest.mark.parametrize("existing", [False, True])
def test_a_view_that_shows_a_weight_another_way_is_cast_with_it(name, existing):
    show, dtype = MIRRORS[name]
    wanted = torch.randn(6, 4)
    build = lambda: Mirrored(show, dtype)  # noqa: E731
    loaded = wl.load(build() if existing else build, {"weight": wanted}, dtype=torch.bfloat16)
    assert loaded.weight.dtype == loaded.mirror.dtype == torch.bfloat16
    assert torch.equal(loaded.mirror, show(wanted.bfloat16()))
    loaded.weight.data.fill_(3)
    assert torch.equal(loaded.mirror, show(loaded.weight.detach())), "no longer a view"


@pytest.mark.parametrize("name", MIRRORS)
def test_a_view_that_shows_a_weight_another_way_is_saved_as_what_it_shows(tmp_path, name):
    show, dtype = MIRRORS[name]
    model = Mirrored(show, dtype)
    wl.save(model, tmp_path / "saved")
    again = wl.load(lambda: Mirrored(show, dtype), tmp_path / "saved")
    assert torch.equal(again.weight, model.weight) and torch.equal(again.mirror, model.mirror)


@pytest.mark.parametrize("existing", [False, True])
def test_a_mismatched_name_whose_tie_has_the_value_is_not_told_as_initialised(existing):
    state = {"emb.weight": torch.ones(6, 4), "head.weight": torch.zeros(2, 2)}
    plan = wl.plan(Tied() if existing else Tied, state, ignore_mismatched=True)
    assert plan.report.mismatched_keys == (("head.weight", (2, 2), (6, 4)),)
    assert plan.report.mismatched_ties == (("head.weight", "emb.weight"),)
    told = "of another shape, with the value of a tied name: head.weight [2, 2] ≠ [6, 4] = emb.weight"
    assert told in str(plan.report) and "of another shape, kept" not in str(plan)
    assert "of another shape, initialised" not in str(plan)
    assert any(line.startswith("mismatched") and line.endswith("= emb.weight") for line in str(plan).splitlines())
    assert torch.equal(plan.execute().head.weight, torch.ones(6, 4))


def test_a_part_of_a_transposed_weight_is_checked_against_it():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.randn(4, 6)
            self.whole = nn.Parameter(base.t())
            self.rows = nn.Parameter(base.t()[2:4])

    whole = torch.randn(6, 4)
    loaded = wl.load(Part, {"whole": whole, "rows": whole[2:4].clone()})
    assert torch.equal(loaded.whole, whole) and torch.equal(loaded.rows, whole[2:4])
    assert same_storage(loaded.whole, loaded.rows)
    with pytest.raises(wl.PlanError, match="two different values"):
        wl.load(Part, {"whole": whole, "rows": whole[:2]})


class Untied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)


@pytest.mark.parametrize("by", ["wl.save", "wl.save, in shards", "safetensors"])
def test_ties_that_were_made_after_the_construction(by, tmp_path):
    """Their value is saved once. What the files say of it is told, as nothing else would help."""
    module = Untied()
    module.head.weight = module.emb.weight
    if by == "safetensors":
        save_model(module, str(tmp_path / "model.safetensors"))
    else:
        wl.save(module, tmp_path, max_shard_bytes=1 if "shards" in by else "5GB")
    with pytest.raises(wl.PlanError) as error:
        wl.load(Untied, tmp_path)
    (problem,) = error.value.problems
    dropped, kept = ("head", "emb") if problem.fqn == "head.weight" else ("emb", "head")
    assert problem.fqn == f"{dropped}.weight"
    assert problem.hint.startswith(f"it was tied to {kept}.weight when this was saved")

    def tied():
        made = Untied()
        made.head.weight = made.emb.weight
        return made

    loaded = wl.load(tied, tmp_path)
    assert loaded.head.weight is loaded.emb.weight
    assert torch.equal(loaded.emb.weight, module.emb.weight)
    wl.load(module, tmp_path)


def test_what_a_file_says_of_names_that_it_lacks_is_told_by_the_names_of_the_module(tmp_path):
    module = Untied()
    module.head.weight = module.emb.weight
    wl.save(module, tmp_path)
    with pytest.raises(wl.PlanError) as error:
        wl.load(Untied, tmp_path, key_mapping={"^emb": "other"})
    (lacks, *_) = [problem for problem in error.value.problems if problem.fqn == "head.weight"]
    assert lacks.hint.startswith("it was tied to other.weight when this was saved")

"""What a plan says: text, lists, JSON; and that it can be carried out once, or again."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl
from weightlift.cli.wording import as_flags


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Deep(nn.Module):
    def __init__(self, depth=12):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.extra = nn.Linear(8, 2)


@pytest.fixture
def two_files(tmp_path):
    state = {name: tensor.clone() for name, tensor in Deep().state_dict().items()}
    del state["head.weight"], state["extra.bias"]
    state["extra.weight"] = torch.zeros(3, 3)
    state |= {f"old.{number}.x": torch.zeros(2) for number in range(5)}
    names = sorted(state)
    for part in (0, 1):
        save_file({name: state[name] for name in names[part::2]}, tmp_path / f"m-0000{part + 1}-of-00002.safetensors")
    return tmp_path


def plan_of(path, **options):
    return wl.plan(Deep, path, strict=False, ignore_mismatched=True, **options)


def test_the_lists(two_files):
    report = plan_of(two_files).report
    assert len(report.loaded) == 12 * 4 + 1 and "emb.weight" in report.loaded
    assert report.tied == ("head.weight",)
    assert report.initialised == report.missing_keys == ("extra.bias",)
    assert report.kept == ("table",)
    assert report.mismatched_keys == (("extra.weight", (3, 3), (2, 8)),)
    assert sorted(report.unexpected_keys) == [f"old.{number}.x" for number in range(5)]
    assert report.loaded_bytes == report.read_bytes == 4 * (80 + 12 * (64 + 8 + 8 + 8))
    halved = plan_of(two_files, dtype=torch.float16).report
    assert (halved.loaded_bytes * 2, halved.read_bytes) == (report.loaded_bytes, report.read_bytes)
    every = [*report.loaded, *report.tied, *report.initialised, *report.kept, *(m[0] for m in report.mismatched_keys)]
    names = {name for name, _ in [*Deep().named_parameters(remove_duplicate=False), *Deep().named_buffers()]}
    assert len(every) == len(set(every)) and set(every) == names
    assert "extra.bias" in str(report) and "extra.weight" in str(report)


def test_the_text_folds_layers(two_files):
    text = str(plan_of(two_files))
    lines = [line for line in text.splitlines() if "fc.weight" in line]
    assert len(lines) == 1
    assert "{0…11}" in lines[0] and "×12" in lines[0] and "8×8" in lines[0] and "loaded" in lines[0]
    assert len(text.splitlines()) < 24
    for part in ("emb.weight", "= emb.weight", "kept", "initialised", "mismatched", "found 3×3", "old.{0…4}.x"):
        assert part in text, part


def test_what_differs_is_not_folded():
    def build():
        return nn.Sequential(*(nn.Linear(4, 4 + (number == 2), bias=False) for number in range(4)))

    state = {name: t.half() if name[0] == "3" else t for name, t in build().state_dict().items() if name[0] != "1"}
    text = str(wl.plan(build, state, strict=False))
    rows = [line for line in text.splitlines() if ".weight" in line and "  " in line and "missing" not in line]
    assert sorted(line.split()[1] for line in rows) == ["0.weight", "1.weight", "2.weight", "3.weight"]
    assert "float16→float32" in text


def test_names_with_gaps_are_listed_or_counted():
    def text(numbers):
        state = {f"{number}.weight": torch.zeros(2, 2) for number in (0, *numbers)}
        return str(wl.plan(lambda: nn.Sequential(nn.Linear(2, 2)), state, strict=False))

    assert "unexpected   {1,4}.weight  ×2" in text((1, 4))
    assert "unexpected   {5 of 1…9}.weight" in text((1, 2, 3, 4, 9))


def test_other_shapes_are_told_of_each_layer():
    def build():
        return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))

    state = {f"{number}.weight": torch.zeros(2, 2 + number // 2) for number in range(4)}
    text = str(wl.plan(build, state, strict=False, ignore_mismatched=True))
    assert text.count("found 2×2\n") == 1 and "found 2×3" in text
    named = {f"h.{key}": value for key, value in state.items()}
    text = str(wl.plan(build, named, strict=False, ignore_mismatched=True, key_mapping={r"^h\.": ""}))
    assert "found 2×2 as h.{0…1}.weight" in text


def test_keys_that_hooks_look_at_are_folded():
    class Doubled(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
            super()._load_from_state_dict(state_dict, prefix, *args)

    state = {f"{number}.weight": torch.ones(2, 2) for number in range(3)}
    plan = wl.plan(lambda: nn.Sequential(*(Doubled(2, 2, bias=False) for _ in range(3))), state)
    assert "read early for state-dict hooks: {0…2}.weight" in str(plan)


def test_the_json_has_every_name(two_files):
    plan = plan_of(two_files, dtype={"emb.*": torch.bfloat16})
    for indent in (None, 2):
        data = json.loads(plan.to_json(indent=indent))
        assert data["strict"] is False and len(data["files"]) == 2
        rows = {row["fqn"]: row for row in data["tensors"]}
        assert set(rows) == {row.fqn for row in plan.decisions.rows} and len(rows) == len(data["tensors"])
        entries = wl.open_checkpoint(two_files)
        for name in plan.report.loaded:
            row, entry = rows[name], entries[name]
            assert row["action"] == "loaded" and row["key"] == name
            assert (row["file"], row["range"]) == (str(entry.file), [entry.start, entry.end])
            assert row["shape"] == list(entry.shape) and row["source_dtype"] == "float32" and row["device"] == "cpu"
        assert rows["emb.weight"]["dtype"] == rows["head.weight"]["dtype"] == "bfloat16"
        assert rows["head.weight"]["action"] == "tied" and rows["head.weight"]["tied_to"] == "emb.weight"
        assert rows["extra.bias"]["action"] == "initialised" and "file" not in rows["extra.bias"]
        assert rows["extra.weight"]["action"] == "mismatched" and rows["extra.weight"]["found_shape"] == [3, 3]
        assert rows["table"]["action"] == "kept"
        assert data["missing_keys"] == ["extra.bias"] and len(data["unexpected_keys"]) == 5
        assert data["mismatched_keys"] == [{"fqn": "extra.weight", "found": [3, 3], "expected": [2, 8]}]


def test_the_json_of_odd_things():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(1.0))
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.none = None
            self.lazy = nn.LazyLinear(2)

    state = {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "lazy.weight": torch.ones(2, 5)}
    data = json.loads(wl.plan(Odd, state, strict=False).to_json())
    rows = {row["fqn"]: row for row in data["tensors"]}
    assert rows["scalar"]["shape"] == [] and rows["empty"]["shape"] == [0, 3] and rows["lazy.weight"]["shape"] == [2, 5]
    assert rows["scalar"]["file"] is None


def test_the_json_says_what_is_read_early_and_checked():
    class Splitting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
            self._register_load_state_dict_pre_hook(self.hook)

        @staticmethod
        def hook(state, prefix, *args):
            state[prefix + "a"], state[prefix + "b"] = state.pop(prefix + "ab").chunk(2)

    plan = wl.plan(Splitting, {"ab": torch.ones(4)})
    assert plan.decisions.early_keys == ("ab",)
    assert json.loads(plan.to_json())["early_keys"] == ["ab"]


def test_missing_extra_state_is_in_the_report():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            pass

    state = nn.Linear(2, 2).state_dict()
    missing = Extra(2, 2).load_state_dict(state, strict=False).missing_keys
    assert missing == ["_extra_state"]
    plan = wl.plan(lambda: Extra(2, 2), state, strict=False)
    assert plan.report.missing_keys == ("_extra_state",) and "_extra_state" in plan.report.warning()


def test_checks_are_announced():
    state = {"emb.weight": torch.ones(10, 8), "head.weight": torch.ones(10, 8)}
    plan = wl.plan(Deep, state, strict=False)
    assert "equal bytes" in str(plan)
    assert json.loads(plan.to_json())["checks"] == [{"fqn": "emb.weight", "other": "head.weight"}]


def test_a_refused_plan_says_why(tmp_path):
    plan = wl.plan(lambda: nn.Linear(2, 2), {"weight": torch.zeros(3, 3), "more": torch.zeros(1)})
    assert len(plan.problems) == 3
    text = str(plan)
    assert "refused" in text and all(str(problem) in text for problem in plan.problems)
    assert json.loads(plan.to_json())["problems"] == [str(problem) for problem in plan.problems]
    with pytest.raises(wl.PlanError):
        plan.execute()


def test_a_renaming_that_leads_nowhere_is_told_by_both_names():
    state = {"proj.weight": torch.zeros(2, 2)}
    plan = wl.plan(lambda: nn.ModuleDict({"proj": nn.Linear(2, 2, bias=False)}), state, key_mapping={"^proj": "projo"})
    missing, unexpected = plan.problems
    assert missing.fqn == unexpected.key == "proj.weight"
    assert missing.hint is not None and "similar keys: projo.weight (key proj.weight);" in missing.hint
    assert "proj.weight: renamed to projo.weight; no tensor of the module has this name" in str(unexpected)


def test_unexpected_keys_are_listed_with_the_names_that_they_were_given(caplog):
    def build():
        return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))

    state = {**build().state_dict(), "other": torch.zeros(1)}
    plan = wl.plan(build, state, key_mapping={r"^(\d)": r"h.\1"}, strict=False)
    assert plan.report.unexpected_keys == ("0.weight", "1.weight", "2.weight", "other")
    assert plan.report.unexpected_names == ("h.0.weight", "h.1.weight", "h.2.weight", "other")
    assert "not in the module: {0…2}.weight as h.{0…2}.weight, other\n" in str(plan)
    assert "unexpected   {0…2}.weight as h.{0…2}.weight  ×3" in str(plan)
    plan.execute()
    assert "{0…2}.weight as h.{0…2}.weight" in caplog.text


def test_planning_reads_no_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(64, 64), "bias": torch.ones(64)}, path)
    entry = wl.open_checkpoint(path)["weight"]
    plan = wl.plan(lambda: nn.Linear(64, 64), path)
    row = next(row for row in plan.decisions.rows if row.fqn == "weight")
    assert (row.offer.entry.start, row.offer.entry.end) == (entry.start, entry.end)
    assert "a.safetensors" in str(plan) and f"[{entry.start}:{entry.end}]" in str(plan)


def test_executing_twice(tmp_path):
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    once = wl.plan(lambda: nn.Linear(2, 2), state)
    assert torch.equal(once.execute().weight, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="already"):
        once.execute()
    module = nn.Linear(2, 2)
    again = wl.plan(module, state)
    assert again.execute() is module
    nn.init.zeros_(module.weight)
    assert again.execute() is module and torch.equal(module.weight, torch.ones(2, 2))


def test_a_plan_can_be_executed_after_it_was_refused_at_its_checks():
    state = {"emb.weight": torch.ones(10, 8), "head.weight": torch.zeros(10, 8)}
    full = {**Deep().state_dict(), **state}
    plan = wl.plan(Deep, full)
    with pytest.raises(wl.PlanError, match=r"head\.weight"):
        plan.execute()
    with pytest.raises(wl.PlanError, match=r"head\.weight"):
        plan.execute()


def test_the_outcome_is_logged_once(caplog):
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    with caplog.at_level(logging.INFO, "weightlift"):
        wl.load(lambda: nn.Linear(2, 2), state)
    assert [(r.name, r.levelno) for r in caplog.records] == [("weightlift", logging.INFO)]
    caplog.clear()
    with caplog.at_level(logging.INFO, "weightlift"):
        wl.load(lambda: nn.Linear(2, 2), {**state, "x": torch.ones(1)}, strict=False)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "x" in caplog.text


def test_repr(two_files):
    plan = plan_of(two_files)
    assert "Deep" in repr(plan) and "49 loaded" in repr(plan)
    assert repr(plan.report) == f"<LoadReport: {plan.report.headline()}>"


def test_an_existing_module_keeps_what_is_missing():
    plan = wl.plan(nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, strict=False)
    assert plan.report.missing_keys == plan.report.kept == ("bias",) and plan.report.initialised == ()
    assert "kept as it was: bias" in str(plan) and "initialised: bias" not in str(plan)
    built = wl.plan(lambda: nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, strict=False)
    assert built.report.missing_keys == built.report.initialised == ("bias",)


def test_wording():
    one = str(wl.plan(lambda: nn.Linear(2, 2), {"weight": torch.ones(2, 2)}))
    assert "refused, 1 problem:" in one
    whole = wl.plan(lambda: nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)}).report
    assert "2 loaded (24 B)," in str(whole)


def test_a_folded_line_shows_all_its_sources(two_files):
    (line,) = [line for line in str(plan_of(two_files)).splitlines() if "fc.weight" in line]
    assert "12 ranges of " in line and "[" not in line
    both = [line for line in str(plan_of(two_files)).splitlines() if "ranges of 2 files" in line]
    assert both or "2 files" not in str(plan_of(two_files))


@pytest.mark.parametrize("device", ["cuda:9", {"": "cpu", "emb": "cuda:9"}])
def test_a_device_that_is_not_there_is_refused_before_anything(device):
    module = Deep()
    before = module.emb.weight.detach().clone()
    options = {"device": device} if isinstance(device, str) else {"device_map": device}
    plan = wl.plan(module, Deep().state_dict(), **options)
    for _ in range(2):
        with pytest.raises(wl.PlanError, match="cuda:9"):
            plan.execute()
    assert torch.equal(module.emb.weight, before)


def test_the_log_says_only_what_is_notable(caplog):
    with caplog.at_level(logging.INFO, "weightlift"):
        wl.load(Deep, {**Deep().state_dict(), "x": torch.ones(1)}, strict=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "loaded" not in record.getMessage() and ": x" in record.getMessage()


@pytest.mark.parametrize("existing", [True, False])
def test_a_refused_plan_calls_nothing_initialised_or_kept(existing):
    def build():
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))

    state = {key: value for key, value in build().state_dict().items() if not key.endswith("bias")}
    state["2.weight"] = torch.ones(3, 3)
    plan = wl.plan(build() if existing else build, state)
    head, missing, shapes, *rest = str(plan).split("\n\nrefused")[0].splitlines()[1:]
    assert head == "2 loaded (32 B), 0 tied, 0 initialised, 0 kept, 3 missing, 1 mismatched, 0 unexpected"
    assert missing == "  missing in the checkpoint: {0…2}.bias"
    assert shapes == "  of another shape: 2.weight [3, 3] ≠ [2, 2]"
    assert sorted(line.split()[0] for line in rest if line) == ["loaded", "mismatched", "missing"]
    assert plan.report.missing_keys == ("0.bias", "1.bias", "2.bias")
    del state["2.weight"]
    lenient = wl.plan(build() if existing else build, state, strict=False)
    assert f"{0 if existing else 4} initialised, {4 if existing else 0} kept, 0 mismatched" in str(lenient)


def told(problem):
    """The ``key_mapping`` of a hint."""
    return eval(problem.hint.partition("key_mapping=")[2])


@pytest.mark.parametrize("existing", [False, True])
def test_what_can_only_be_left_out_is_left_out_by_what_the_hint_says(existing):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.eye(3).to_sparse())

    class Overlapping(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.zeros(6)
            self.a, self.b = nn.Parameter(base[:4]), nn.Parameter(base[2:])

    for build, state in (
        (Sparse, {"a": torch.ones(3, 3)}),
        (Overlapping, {"a": torch.arange(4.0), "b": torch.arange(4.0) + 2}),
    ):
        module = build() if existing else build
        (problem,) = wl.plan(module, state).problems
        assert problem.hint.count("strict=False") == 1
        loaded = wl.load(module, state, key_mapping=told(problem), strict=False)
        expected = build()
        expected.load_state_dict({"a": expected.a if build is Sparse else state["a"]}, strict=False)
        for one, other in zip(loaded.parameters(), expected.parameters()):
            assert torch.equal(one.to_dense(), other.to_dense())


def test_what_the_module_computes_itself_is_told_as_that():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(2, 2)
            self.register_buffer("mask", torch.ones(2, 2).tril(), persistent=False)

    state = {**Masked().state_dict(), "mask": torch.ones(2, 2), "gone": torch.ones(1)}  # as older versions saved it
    mask, gone = wl.plan(Masked, state).problems
    assert mask.key == "mask" and mask.what == "the module computes its buffer of this name itself (persistent=False)"
    assert as_flags(str(mask)).endswith(
        "pass --no-strict to leave it out, or drop it, which takes Python:"
        ' key_mapping=lambda key: None if key == "mask" else key'
    )
    kept = wl.load(Masked, {**Masked().state_dict(), "mask": torch.zeros(2, 2)}, key_mapping=told(mask))
    assert torch.equal(kept.mask, Masked().mask)
    assert gone.what == "no tensor of the module has this name"
    kept = wl.load(Masked, state, key_mapping=lambda key: None if key in ("mask", "gone") else key)
    assert torch.equal(kept.mask, Masked().mask)

"""Destinations that are made of parts: from files, from memory, in new and in existing memory."""

from math import prod

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transfer_helpers import FaultySource, load

import weightlift as wl
from weightlift.checkpoint.memory import entry_of
from weightlift.errors import TransferError
from weightlift.options import LoadOptions
from weightlift.plan import regions
from weightlift.plan.match import Supply, match
from weightlift.plan.parts import composed, local_parts, part
from weightlift.plan.records import Offer
from weightlift.plan.regions import whole
from weightlift.plan.report import as_json, report, table
from weightlift.transfer.apply import apply
from weightlift.transfer.jobs import Job
from weightlift.transfer.subject import Bytes, Load, Subject

CPU = torch.device("cpu")


class Fused(nn.Module):
    """Experts in one tensor, q/k/v in another, a transposed projection, a plain one, and every other column of one."""

    def __init__(self, experts=3, wide=6, deep=4):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * wide, deep))
        self.qkv = nn.Linear(deep, 3 * deep)
        self.turned = nn.Parameter(torch.randn(deep, wide))
        self.plain = nn.Parameter(torch.randn(wide))
        self.strided = nn.Parameter(torch.randn(wide, deep))


def checkpoint(experts=3, wide=6, deep=4):
    state = {}
    for expert in range(experts):
        for name in ("gate", "up"):
            state[f"experts.{expert}.{name}"] = torch.randn(wide, deep)
    for name in "qkv":
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(deep, deep), torch.randn(deep)
    return {**state, "t": torch.randn(wide, deep), "p": torch.randn(wide), "h": torch.randn(wide, 2 * deep)}


def expected(state, experts=3):
    return {
        "gate_up": torch.stack(
            [torch.cat([state[f"experts.{i}.gate"], state[f"experts.{i}.up"]]) for i in range(experts)]
        ),
        "qkv.weight": torch.cat([state[f"{name}.weight"] for name in "qkv"]),
        "qkv.bias": torch.cat([state[f"{name}.bias"] for name in "qkv"]),
        "turned": state["t"].t(), "plain": state["p"], "strided": state["h"][:, ::2],
    }  # fmt: skip


def offers(entries, experts=3, wide=6, deep=4):
    fused = whole((experts, 2 * wide, deep))
    gate_up = [
        part(entries[f"experts.{i}.{name}"], regions.narrow(regions.select(fused, 0, i), 0, at, wide))
        for i in range(experts)
        for name, at in (("gate", 0), ("up", wide))
    ]
    made = [composed("gate_up", fused.shape, gate_up)]
    for kind, shape in (("weight", (3 * deep, deep)), ("bias", (3 * deep,))):
        parts = [part(entries[f"{name}.{kind}"], regions.narrow(whole(shape), 0, at * deep, deep))
                 for at, name in enumerate("qkv")]  # fmt: skip
        made.append(composed(f"qkv.{kind}", shape, parts))
    made.append(composed("turned", (deep, wide), [part(regions.transpose(entries["t"], 0, 1), whole((deep, wide)))]))
    made.append(composed("plain", (wide,), [part(entries["p"], whole((wide,)))]))
    made.append(composed("strided", (wide, deep), [part(regions.every(entries["h"], 1, 0, 2), whole((wide, deep)))]))
    return {offer.name: offer for offer in made}


def planned(module, ckpt, made=None, **options):
    """A load of offers with parts."""
    from weightlift.deferred.construct import CurrentLoad, construct
    from weightlift.deferred.inventory import Inventory

    options = LoadOptions.create(**options)
    if isinstance(module, nn.Module):
        subject = Subject(Inventory.of(module), None)
    else:
        subject = Subject(*construct(module, CurrentLoad(source=None, deferred=True, seed=0)))
    spec = subject.inventory.spec(subject.record_at)
    decisions = match(spec, Supply(ckpt.source, made or offers(ckpt), ckpt.files), options)
    return Load(decisions, subject, Bytes(ckpt.files, ckpt.tensors, {}), options)


@pytest.fixture(params=["file", "mapping"])
def source(request, tmp_path):
    state = checkpoint()
    if request.param == "mapping":
        return state, wl.open_checkpoint(state)
    save_file(state, tmp_path / "a.safetensors")
    return state, wl.open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": torch.bfloat16}, {"workers": 1}])
@pytest.mark.parametrize("existing", [True, False])
def test_a_module_of_parts(source, options, existing):
    state, ckpt = source
    module = Fused()
    names = dict(module.named_parameters())
    pointers = {name: tensor.data_ptr() for name, tensor in names.items()}
    load = planned(module if existing else Fused, ckpt, **options)
    assert load.decisions.problems == ()
    made = apply(load)
    for name, want in expected(state).items():
        got = made.get_parameter(name)
        assert torch.equal(got, want.to(options.get("dtype", torch.float32))), name
        assert got.is_contiguous(), name
        if existing:
            assert got is names[name]
            assert (got.data_ptr() == pointers[name]) == ("dtype" not in options), name


def test_an_existing_tensor_with_strides_of_its_own(source):
    state, ckpt = source
    module = Fused()
    module.gate_up.data = module.gate_up.data.transpose(0, 2).contiguous().transpose(0, 2)
    pointer, stride = module.gate_up.data_ptr(), module.gate_up.stride()
    apply(planned(module, ckpt))
    assert (module.gate_up.data_ptr(), module.gate_up.stride()) == (pointer, stride)
    assert torch.equal(module.gate_up, expected(state)["gate_up"])


def test_one_whole_part_is_mapped_or_shared(source):
    state, ckpt = source
    made = apply(planned(Fused, ckpt))
    if ckpt.files:
        # A mapping begins where the file's bytes do, in a page; memory of its own begins where torch aligns it.
        entry = ckpt["p"]
        assert made.plain.data_ptr() % 4096 == entry.start % 4096
    else:
        assert made.plain.data_ptr() == state["p"].data_ptr()


def test_what_the_plan_says(source):
    _, ckpt = source
    decisions = planned(Fused, ckpt).decisions
    text = table(decisions)
    assert "6 parts: " in text and "as experts.0.gate" in text and "3 parts: " in text and "as q.weight" in text
    said = report(decisions)
    assert said.read_bytes == sum(entry.nbytes for entry in ckpt.values()) - ckpt["h"].nbytes // 2
    assert said.loaded_bytes == sum(p.nbytes for p in Fused().parameters())
    rows = {row["fqn"]: row for row in as_json(decisions)["tensors"]}
    assert [item["key"] for item in rows["qkv.bias"]["parts"]] == ["q.bias", "k.bias", "v.bias"]
    assert [item["offset"] for item in rows["qkv.bias"]["parts"]] == [0, 4, 8]
    assert rows["turned"]["parts"][0]["source_stride"] == [1, 4]
    assert "bfloat16" in table(planned(Fused, ckpt, dtype=torch.bfloat16).decisions)


def test_parts_of_another_shape_are_mismatched(source):
    _, ckpt = source
    decisions = planned(lambda: Fused(experts=2), ckpt).decisions
    assert [problem.fqn for problem in decisions.problems] == ["gate_up"]


@pytest.mark.parametrize("change", ["hole", "twice", "outside"])
def test_parts_that_do_not_fill_are_never_loaded(source, change):
    from dataclasses import replace

    _, ckpt = source
    made = offers(ckpt)
    parts = made["qkv.bias"].parts
    wrong = {
        "hole": parts[:2],
        "twice": (parts[0], parts[1], replace(parts[2], offset=2)),
        "outside": (parts[0], parts[1], replace(parts[2], offset=10)),
    }[change]
    with pytest.raises(ValueError, match=r"qkv\.bias"):
        composed("qkv.bias", (12,), wrong)
    made["qkv.bias"] = Offer("qkv.bias", "b", made["qkv.bias"].entry, parts=wrong)
    module = Fused()
    before = module.qkv.bias.detach().clone()
    with pytest.raises(AssertionError, match=r"qkv\.bias"):
        apply(planned(module, ckpt, made))
    assert torch.equal(module.qkv.bias, before)


def test_a_failed_read_names_existing_tensors_once_and_new_ones_never(tmp_path, monkeypatch):
    state = {"a": torch.randn(600, 600), "b": torch.randn(600, 600)}
    save_file(state, tmp_path / "a.safetensors")
    ckpt = wl.open_checkpoint(tmp_path / "a.safetensors")

    def fault(buffer, offset):
        if offset >= ckpt["b"].start:
            raise OSError(5, "broken")

    for fresh in (True, False):
        into = torch.empty(1200, 600)
        jobs = [Job("x", ckpt[k], torch.float32, CPU, into=into[at : at + 600], fresh=fresh)
                for k, at in (("a", 0), ("b", 600))]  # fmt: skip
        with pytest.raises(TransferError) as caught:
            load(jobs, files=ckpt.files, source=FaultySource(fault), workers=1, memory_budget_bytes=1 << 18)
        assert caught.value.written == (() if fresh else ("x",))


# -- where the bytes go -----------------------------------------------------------------------------------------------


def ranges_within(source, tensor):
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return sum(length for at, length in source.buffers if start <= at < end)


@pytest.mark.parametrize("how", ["rows", "permuted alike", "a box"])
def test_equal_bytes_go_straight_to_their_region(tmp_path, how):
    state = {"a": torch.randn(300, 512), "b": torch.randn(300, 512)}
    save_file(state, tmp_path / "a.safetensors")
    ckpt = wl.open_checkpoint(tmp_path / "a.safetensors")
    into = torch.zeros(600, 512)
    places = [whole((600, 512)), whole((600, 512))]
    places = [regions.narrow(place, 0, at, 300) for place, at in zip(places, (0, 300), strict=True)]
    entries = [ckpt["a"], ckpt["b"]]
    if how == "permuted alike":
        entries = [regions.transpose(entry, 0, 1) for entry in entries]
        places = [regions.transpose(place, 0, 1) for place in places]
    elif how == "a box":
        entries = [regions.reshape(entry, (3, 100, 8, 64)) for entry in entries]
        places = [regions.reshape(place, (3, 100, 8, 64)) for place in places]
    jobs = [Job("x", entry, torch.float32, CPU, into=into.as_strided(p.shape, p.stride, p.offset))
            for entry, p in zip(entries, places, strict=True)]  # fmt: skip
    source = FaultySource()
    load(jobs, files=ckpt.files, source=source)
    assert torch.equal(into, torch.cat([state["a"], state["b"]]))
    assert ranges_within(source, into) == into.nbytes


def test_a_local_shard_reads_its_own_rows_only(tmp_path):
    state = {"a": torch.randn(64, 1 << 16)}
    save_file(state, tmp_path / "a.safetensors")
    ckpt = wl.open_checkpoint(tmp_path / "a.safetensors")
    pieces = [part(ckpt["a"], whole((64, 1 << 16)))]
    for start, size in (((16, 0), (16, 1 << 16)), ((0, 1 << 15), (64, 1 << 15)), ((8, 100), (3, 1 << 14))):
        into = torch.zeros(size)
        jobs = [Job("x", p.entry, torch.float32, CPU, into=into.as_strided(p.shape, p.stride, p.offset))
                for p in local_parts(pieces, (64, 1 << 16), start=start, size=size)]  # fmt: skip
        source = FaultySource()
        load(jobs, files=ckpt.files, source=source)
        assert torch.equal(into, state["a"][tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))])
        assert sum(length for _, length in source.reads) == prod(size) * 4


def test_disjoint_views_of_one_tensor_in_memory_are_shared():
    fused = torch.randn(6, 4)
    entry = entry_of("qkv", fused)
    jobs = [Job(str(at), regions.narrow(entry, 0, at, 2), torch.float32, CPU) for at in (0, 2, 4)]
    values = load(jobs, tensors={"qkv": fused})
    assert [value.data_ptr() for value in values] == [fused[at].data_ptr() for at in (0, 2, 4)]
    again = load([*jobs, jobs[0]], tensors={"qkv": fused})
    assert again[3].data_ptr() != again[0].data_ptr() and torch.equal(again[3], fused[:2])


def test_views_of_odd_tensors_in_memory():
    conj = torch.randn(4, 6, dtype=torch.complex64).conj()
    entry = entry_of("c", conj)
    (value,) = load([Job("x", regions.narrow(regions.transpose(entry, 0, 1), 0, 1, 3), torch.complex64, CPU)],
                    tensors={"c": conj}, copy=True)  # fmt: skip
    assert torch.equal(value, conj.t()[1:4].resolve_conj())



"""Recording: what is put off, what runs at once, and that reading gives what ordinary execution gives."""

import contextlib
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from weightlift.deferred.construct import CurrentLoad, construct
from weightlift.deferred.functions import FunctionRecorder
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.replay import label_samples, needed, replays
from weightlift.deferred.seeding import SeedWatch
from weightlift.deferred.tape import ViewRef, generator_for


@contextlib.contextmanager
def recording(seed=0):
    recorder = Recorder(seed=seed)
    with FunctionRecorder(recorder), recorder, torch.no_grad():
        yield recorder


def pending(recorder, tensor):
    record = recorder.record_of(tensor)
    return record is not None and record.pending


def finished(recorder, *tensors):
    recorder.force_tensors(list(tensors), "the test")
    return tensors[0]


# -- recording --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.ones(3, 4),
        lambda: torch.full((5,), 2.5).mul_(3),
        lambda: torch.zeros(4, 4).fill_diagonal_(2).add_(1),
        lambda: torch.ones(20_000).mul(3).add(1),
        lambda: torch.cat([torch.ones(20_000), torch.zeros(5)]),
        lambda: torch.ones(6, 4).t(),
        lambda: (lambda t: t[2:4].fill_(7) is None or t)(torch.ones(6)),
        lambda: (lambda t: t.copy_(t))(torch.ones(6).mul_(2)),
        lambda: (lambda t: t.copy_(t.flip(0)))(torch.ones(6).cumsum(0)),
        lambda: (lambda t, u: (u.copy_(t), t.zero_())[0])(torch.ones(6), torch.empty(6)),
        lambda: torch.empty(3).resize_(7).fill_(1),
    ],
)
def test_what_was_recorded_is_what_would_have_been_done(work):
    with recording() as recorder:
        got = work()
    assert torch.equal(finished(recorder, got), work())


def test_nothing_runs_before_it_is_read():
    with recording() as recorder:
        made = torch.ones(3, 4).normal_()
        out = made * 2
        assert pending(recorder, made) and pending(recorder, out) and not recorder.forced
    assert torch.equal(made, torch.zeros(3, 4))  # not yet


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist(), lambda t: t.numpy().tolist(), lambda t: [t[0].item(), t[1].item()],
        lambda t: torch.tensor(t).tolist(), lambda t: [float(item) for item in t], lambda t: eval(repr(t.tolist())),
    ],
    ids=["tolist", "numpy", "item", "tensor", "iter", "repr"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_read_gets_the_value_and_is_accounted_for(read):
    with recording() as recorder:
        tensor = torch.full((2,), 3.0).add_(1)
        assert read(tensor) == [4.0, 4.0]
    assert sum(recorder.forced.values()) == 8


def test_memory_that_was_handed_out_is_not_written_to_late():
    with recording() as recorder:
        tensor = torch.ones(4)
        array = tensor.numpy()
        tensor.mul_(5)
        assert array.tolist() == [5.0] * 4
    assert not pending(recorder, tensor)


def test_memory_that_is_handed_out_has_been_read_before():
    with recording() as recorder:
        tensor = torch.full((30_000,), 2.0)
        taken = tensor + 1
        tensor.numpy()[:] = 0
    assert torch.equal(finished(recorder, taken), torch.full((30_000,), 3.0))


def test_an_overwritten_history_is_dropped():
    with recording() as recorder:
        tensor = torch.empty(10).normal_()
        tensor.fill_(1)
    assert [node.func for node in needed([recorder.record_of(tensor)])] == [torch.ops.aten.fill_.Scalar]


def test_a_write_waits_for_an_earlier_read():
    with recording() as recorder:
        source = torch.full((30_000,), 2.0)
        taken = source + 1
        source.zero_()
    finished(recorder, source)
    assert torch.equal(finished(recorder, taken), torch.full((30_000,), 3.0))


def test_a_dead_storage_takes_its_record_along():
    with recording() as recorder:
        tensor = torch.ones(10)
        assert len(recorder.records) == 1
        del tensor
        gc.collect()
        assert not recorder.records


def test_another_thread_is_not_recorded():
    found = []
    with recording() as recorder:
        thread = threading.Thread(target=lambda: found.append(torch.ones(3)))
        thread.start()
        thread.join()
        assert recorder.record_of(found[0]) is None
    assert torch.equal(found[0], torch.ones(3))


def test_going_on_after_the_construction():
    with recording() as recorder:
        weight = torch.ones(4).mul_(3)
    with recorder.resumed():
        later = weight * 2
        with recorder.resumed():
            pass
    assert torch.equal(finished(recorder, later), torch.full((4,), 6.0))


# -- tape -------------------------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_label_alone():
    def draw(seed, label):
        return torch.empty(3).normal_(generator=generator_for(seed, label))

    assert torch.equal(draw(1, "a#0"), draw(1, "a#0"))
    assert not torch.equal(draw(1, "a#0"), draw(1, "b#0")) and not torch.equal(draw(1, "a#0"), draw(2, "a#0"))
    with recording(seed=1) as recorder:
        tensor = torch.empty(3).normal_()
    record = recorder.record_of(tensor)
    record.label = "a"
    label_samples([record])
    assert torch.equal(finished(recorder, tensor), draw(1, "a#0"))


def test_independent_work_is_split_and_dependent_work_is_not():
    with recording() as recorder:
        a, b = torch.ones(30_000), torch.ones(30_000)
        c = a + b
        d = torch.ones(5)
    records = [recorder.record_of(tensor) for tensor in (a, b, c, d)]
    groups = replays(needed(records))
    assert sorted(len(group.records) for group in groups) == [1, 3]
    for group in reversed(groups):
        group.run(0)
    assert torch.equal(c, torch.full((30_000,), 2.0)) and torch.equal(d, torch.ones(5))
    assert not any(record.pending for record in records) and needed(records) == []


def test_supplied_records_need_nothing():
    with recording() as recorder:
        kept = torch.ones(30_000)
        shown = kept * 2
        kept.zero_()
    first, second = recorder.record_of(kept), recorder.record_of(shown)
    assert len(needed([first], supplied={second})) == 1
    assert len(needed([first])) == 3


@pytest.mark.parametrize(
    "view, whole, covers",
    [
        (lambda t: t, True, True), (lambda t: t.t(), False, True), (lambda t: t.reshape(-1), True, True),
        (lambda t: t[1:], False, False), (lambda t: t[:, :1], False, False),
        (lambda t: t.view(torch.int32), True, True),
        (lambda t: t[:1].expand(3, 4), False, False), (lambda t: t.unsqueeze(1), True, True),
    ],
)  # fmt: skip
def test_what_a_view_covers(view, whole, covers):
    with recording() as recorder:
        tensor = torch.empty(3, 4)
        seen = view(tensor)
    ref = ViewRef(recorder.record_of(tensor), seen)
    assert (ref.is_whole(), ref.covers()) == (whole, covers)


def test_replay_does_not_move_the_process_generator():
    state = torch.get_rng_state()
    with recording() as recorder:
        tensor = torch.randn(100)
        assert tensor.sum().item() != 0
    assert pending(recorder, tensor) is False and torch.equal(torch.get_rng_state(), state)


# -- seeding ----------------------------------------------------------------------------------------------------------


def constructed(work):
    """Run ``work`` as a deferred constructor and put the process's generator back."""
    state = torch.get_rng_state()
    module = nn.Module()

    def build():
        work(module)
        return module

    try:
        construct(build, CurrentLoad(source=None, deferred=True, seed=0))
    finally:
        torch.set_rng_state(state)
    return module


def test_a_seeded_constructor_samples_what_that_seed_gives():
    def work(module):
        module.before = SeedWatch().seeded()
        watch = SeedWatch()
        torch.manual_seed(torch.initial_seed() + 1)
        module.after = watch.seeded()
        torch.manual_seed(5)
        module.sample = torch.randn(4)

    module = constructed(work)
    generator = torch.Generator().manual_seed(5)
    assert (module.before, module.after) == (False, True)
    assert torch.equal(module.sample, torch.randn(4, generator=generator))


def test_a_seed_that_is_taken_back_is_over():
    def work(module):
        watch = SeedWatch()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() + 1)
            module.inside = watch.seeded()
        module.outside = watch.seeded()

    module = constructed(work)
    assert (module.inside, module.outside) == (True, False)


def test_another_threads_seed_is_not_ours():
    def work(module):
        watch = SeedWatch()
        seed = torch.initial_seed()
        thread = threading.Thread(target=torch.manual_seed, args=(seed + 1,))
        thread.start()
        thread.join()
        module.seeded = watch.seeded()

    assert constructed(work).seeded is False


def test_empty_gives_what_torch_gives_and_refuses_what_torch_refuses() -> None:
    recorder = Recorder(seed=0, default_dtype=torch.float16)
    with FunctionRecorder(recorder), recorder:
        for made in (torch.empty(3), torch.empty(2, 3), torch.empty((2, 3)), torch.empty(())):
            assert not made._is_view()
            assert made.dtype == torch.float16
            assert recorder.record_of(made) is not None
        with pytest.raises(TypeError):
            torch.empty()


@pytest.mark.parametrize("size", [(-1,), (3, -1), (-1, -2), (-2, 0)])
@pytest.mark.parametrize("make", [torch.empty, torch.zeros, torch.randn])
def test_a_negative_size_is_refused_as_torch_does(make: Callable[..., torch.Tensor], size: tuple[int, ...]) -> None:
    recorder = Recorder(seed=0)
    with FunctionRecorder(recorder), recorder, pytest.raises(RuntimeError, match="negative dimension"):
        make(size)
    assert not recorder.records

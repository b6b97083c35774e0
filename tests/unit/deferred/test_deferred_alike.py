"""One constructor, built ordinarily and deferred: the same tensors, the same values, the same errors."""

import copy
import warnings

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred import shapes
from weightlift.deferred.recorder import Recorder

MANY = 20_000  # more than is calculated at once


class Built(nn.Module):
    """What ``body(module)`` registers, and what it returns as a buffer."""

    def __init__(self, body):
        super().__init__()
        made = body(self)
        if made is not None:
            self.register_buffer("made", made)


def both(body):
    return Built(body), wl.defer(lambda: Built(body)).materialize()


def assert_alike(ordinary, deferred):
    expected, found = ordinary.state_dict(), deferred.state_dict()
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        other = found[name]
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (other.shape, other.dtype, other.stride()), name
        assert tensor.is_quantized == other.is_quantized
        assert torch.equal(tensor, other), name


def waves():
    return torch.view_as_complex(torch.stack((torch.ones(MANY), torch.full((MANY,), 2.0)), -1))


def written(tensor, write):
    write(tensor)
    return tensor


def product(module):
    matrix = torch.view_as_complex(torch.ones(100, 300, 2))
    return matrix.mH @ matrix


CONJUGATED = {
    "resolve_conj": lambda module: waves().conj().resolve_conj(),
    "times": lambda module: waves().conj() * (1 + 2j),
    "matrix": product,
    "imag": lambda module: waves().conj().imag.clone(),
    "cat": lambda module: torch.cat([waves().conj(), waves()]),
    "copy_ from": lambda module: torch.zeros(MANY, dtype=torch.complex64).copy_(waves().conj()),
    "copy_ to": lambda module: written(waves(), lambda to: to.conj().copy_(torch.full((MANY,), 3 + 4j))),
    "fill_": lambda module: written(waves(), lambda to: to.conj().fill_(3 + 4j)),
    "fill_ of imag": lambda module: written(waves(), lambda to: to.conj().imag.fill_(3)),
    "fill_ of a part": lambda module: written(waves(), lambda to: to.conj()[3:5].imag.fill_(3)),
    "mul_": lambda module: written(waves(), lambda to: to.conj().mul_(1 + 3j)),
    "constant_": lambda module: written(torch.zeros(4), lambda to: nn.init.constant_(torch._neg_view(to), 2)),
    "deepcopy": lambda module: copy.deepcopy(waves().conj()),
    "as it is": lambda module: waves().conj(),
}


@pytest.mark.parametrize("name", CONJUGATED)
def test_a_conjugated_or_negated_view_is_read_and_written_as_what_it_shows(name):
    assert_alike(*both(CONJUGATED[name]))


def test_a_sample_for_a_negated_view_is_negated():
    def body(module):
        return written(torch.zeros(MANY), lambda to: nn.init.uniform_(torch._neg_view(to), 2, 3))

    deferred = wl.defer(lambda: Built(body)).materialize()
    assert (deferred.made <= -2).all()
    assert (deferred.made >= -3).all()


@pytest.mark.parametrize("make", [torch.empty, torch.zeros, torch.ones])
@pytest.mark.parametrize("dtype", [bool, int, float])
def test_a_python_type_is_a_dtype(make, dtype):
    assert_alike(*both(lambda module: make(2, 3, dtype=dtype).fill_(1)))


def quantised(*shape):
    return torch.quantize_per_tensor(torch.ones(*shape), 0.5, 0, torch.qint8)


QUANTISED = {
    "small": lambda module: quantised(3, 4),
    "large": lambda module: quantised(300, 400),
    "clone": lambda module: quantised(300, 400).clone(),
    "relu": lambda module: torch.relu(quantised(300, 400)),
    "dequantize": lambda module: quantised(300, 400).dequantize(),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_tensors_are_made_at_once(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_alike(*both(QUANTISED[name]))


def test_an_empty_quantised_tensor_is_like_its_pattern():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = wl.defer(lambda: Built(lambda module: torch.empty_like(quantised(3)))).materialize().made
    assert made.q_scale() == 0.5


def square_sum(values):
    made = torch.zeros(3)
    made.fill_(1)
    made.mul_(values * values)
    return made.sum()


TRANSFORMED = {
    "grad": lambda module: torch.func.grad(square_sum)(torch.arange(3.0)),
    "jacrev": lambda module: torch.func.jacrev(square_sum)(torch.arange(3.0)),
    "jvp": lambda module: torch.func.jvp(square_sum, (torch.arange(3.0),), (torch.ones(3),))[1],
    "vmap": lambda module: torch.vmap(lambda row: row + torch.ones(3).fill_(2))(torch.ones(4, 3)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_what_torch_func_transforms_is_transformed(name):
    assert_alike(*both(TRANSFORMED[name]))


def test_vmap_refuses_samples_where_it_does():
    def body(module):
        torch.vmap(lambda row: torch.empty(3).uniform_() + row)(torch.ones(4, 3))

    for build in (lambda: Built(body), lambda: wl.defer(lambda: Built(body))):
        with pytest.raises(RuntimeError, match="randomness"):
            build()


def test_a_trace_has_the_births_and_fills_of_what_it_traces():
    def body(module):
        def traced(values):
            made = torch.zeros(3)
            made.add_(values)
            filled = torch.empty(3)
            nn.init.constant_(filled, 2)
            return made + filled

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace = torch.jit.trace(traced, (torch.ones(3),))
        trace(torch.ones(3))
        return trace(torch.ones(3))

    ordinary, deferred = both(body)
    assert_alike(ordinary, deferred)
    assert torch.equal(deferred.made, torch.full((3,), 3.0))


@pytest.mark.parametrize("show", [torch.conj, torch._neg_view])
@pytest.mark.parametrize("existing", [False, True])
def test_a_buffer_that_shows_other_memory_conjugated_or_negated_is_filled(show, existing):
    def body(module):
        module.shown = torch.ones(4, dtype=torch.complex64)
        return show(module.shown)

    ordinary = Built(body)
    state = {"made": torch.view_as_complex(torch.arange(8.0).view(4, 2))}
    ordinary.load_state_dict(state)
    found = wl.load(Built(body) if existing else lambda: Built(body), state)
    assert torch.equal(found.made, ordinary.made)
    assert torch.equal(found.shown, ordinary.shown)


def numbers(module):
    """Calls that differ in the type of a number alone, or in nothing that is passed."""
    whole = torch.arange(MANY)
    made = (lambda: whole * 2, lambda: whole * 2.0, lambda: whole * True, lambda: whole / 2, lambda: whole.sum(0) * 2.0)
    for default in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(default)
        for make in made:
            module.register_buffer(f"b{len(module._buffers)}", make())


@pytest.mark.parametrize("order", [1, -1])
def test_what_one_call_gives_is_not_taken_for_what_another_gives(order):
    def body(module):
        for rows, columns in [(100, 300), (300, 100), (100, 300)][::order]:
            matrix = torch.ones(rows, columns)
            module.register_buffer(f"product{len(module._buffers)}", matrix @ matrix.T)
            module.register_buffer(f"turned{len(module._buffers)}", matrix.T.roll(1, 0))
            module.register_buffer(f"sum{len(module._buffers)}", matrix.sum(order))
        numbers(module)

    assert_alike(*both(body))


def test_torch_is_asked_once_about_calls_that_layers_repeat(monkeypatch):
    def body(module):
        for number in range(20):
            module.register_buffer(f"b{number}", torch.ones(200, 300).roll(1, 0))

    asked = []
    ask = shapes._results
    monkeypatch.setattr(shapes, "_results", lambda *call: asked.append(call) or ask(*call))
    monkeypatch.setattr(shapes, "_told", {})
    assert_alike(*both(body))
    assert len(asked) == 1


def test_torch_is_asked_again_about_operators_of_others():
    """Whose shapes may depend on anything."""
    dtypes = [torch.float32]

    @torch.library.custom_op("weightlift_tests::table", mutates_args=())
    def made(like: torch.Tensor) -> torch.Tensor:
        return torch.full((300, 300), 1 / 3, dtype=dtypes[-1])

    @made.register_fake
    def _(like):
        return like.new_empty(300, 300, dtype=dtypes[-1])

    for dtype in (torch.float32, torch.float64):
        dtypes.append(dtype)
        assert_alike(*both(lambda module: made(torch.zeros(300, 300))))


def test_of_calls_with_very_many_results_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(shapes, "_told", {})
    both(lambda module: torch.cat(torch.split_with_sizes_copy(torch.zeros(3000, 7), [1] * 3000)))
    assert not any(len(found or ()) > 64 for found in shapes._told.values())
    monkeypatch.setattr(shapes, "_MOST_TOLD", 3)
    for size in range(130, 140):
        assert_alike(*both(lambda module: torch.ones(size, 300).roll(1, 0)))  # noqa: B023 - is called at once
    assert len(shapes._told) <= 3


def table(module):
    """Of two vectors, as positions have it."""
    angles = torch.arange(2000).float()[:, None] * torch.exp(torch.arange(64).float() / -9.0)[None]
    made = torch.cat([angles.sin(), angles.cos()], dim=1)
    made[1] = 0
    if hasattr(module, "table"):
        module.table.copy_(made * 2)
    else:
        module.register_buffer("table", made)


def test_a_table_of_two_vectors_waits_like_everything_of_its_size(monkeypatch):
    def body(module):
        table(module)
        table(module)
        small = torch.arange(10)[:, None] * torch.arange(8)  # computed at once, to the same end
        module.register_buffer("small", small)

    computed = []
    run = Recorder._run

    def noting(*args):
        computed.append(run(*args))
        return computed[-1]

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "_run", noting)
        deferred = wl.defer(lambda: Built(body))
    sizes = [made.numel() for made in computed if isinstance(made, torch.Tensor)]
    assert 80 in sizes and max(sizes) < 10_000
    assert_alike(Built(body), deferred.materialize())

"""A wanted tap that did not fire as it should, or whose value is not what the module returned, raises and says why."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.capture.nets import Layer, Mixed, Net, hooks_on, same, states, x
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import weightlift as wl


def test_nothing_ran() -> None:
    with pytest.raises(wl.CaptureError, match="no forward of the model ran"), wl.capture(Net(), hidden="layers.*"):
        pass
    with wl.capture(Net(), hidden=wl.Output("layers.*", expect="maybe")) as got:
        pass
    assert got["hidden"] == ()


def test_a_layer_was_replaced_meanwhile() -> None:
    net = Net()
    with pytest.raises(wl.CaptureError, match=r"layers\.1.*another Layer stands"), wl.capture(net, hidden="layers.*"):
        net.layers[1] = Layer()
        net(x())
    with pytest.raises(wl.CaptureError, match="none in 1 of 2 forwards"), wl.capture(net, hidden="layers.*"):
        net(x())
        net.layers[1] = Layer()
        net(x())
    assert hooks_on(net) == 0


def test_a_layer_on_a_worker_thread() -> None:
    class OnThread(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = []
            thread = threading.Thread(target=lambda: result.append(self.layers[1](x)))
            thread.start()
            thread.join(60)
            return result[0]

    net = OnThread()
    with pytest.raises(wl.CaptureError, match=r"another thread.*copy_context"), wl.capture(net, hidden="layers.1"):
        net(x())


def test_a_skipped_layer_can_be_allowed() -> None:
    class Skips(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)

    net = Skips()
    with pytest.raises(wl.CaptureError, match="expect='some'"), wl.capture(net, hidden="layers.*"):
        net(x())
    with wl.capture(net, hidden=wl.Output("layers.*", expect="some")) as got:
        net(x())
    assert list(got.named("hidden")) == ["layers.0"]


def test_a_module_that_is_never_called_needs_another_hint() -> None:
    """``nn.MultiheadAttention`` takes the weights of ``out_proj`` and does not call it: 'some' would not help."""
    net = nn.MultiheadAttention(8, 2)
    text = "reads its weights or calls another method of it than forward, give expect='maybe'"
    with pytest.raises(wl.CaptureError, match=text), wl.capture(net, hidden="out_proj"):
        net(x(), x(), x())
    with wl.capture(net, hidden=wl.Output("out_proj", expect="maybe")) as got:
        net(x(), x(), x())
    assert got["hidden"] == ()


def test_a_list_of_modules_is_never_called() -> None:
    net = Net()
    text = r"a ModuleList is never called itself: 'layers\.\*' means what it holds"
    for select in ("layers", ["layers", "layers.*"]):
        with pytest.raises(wl.CaptureError, match=text), wl.capture(net, hidden=select):
            net(x())


def test_sub_models_called_directly_count() -> None:
    net = Net()
    with wl.capture(net, hidden="layers.*") as got:
        for layer in net.layers:
            layer(x())
    assert len(got["hidden"]) == 3


def test_a_value_that_was_written_to() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    value = torch.randn(2, 4)
    with torch.no_grad():
        with pytest.raises(wl.CaptureError, match="clone=True"), wl.capture(net, hidden="0"):
            net(value)
        with pytest.raises(wl.CaptureError, match="longer the value that was taken"), wl.capture(net, x=wl.Input("1")):
            net(value)
        with wl.capture(net, hidden=wl.Output("0", clone=True)) as got:
            net(value)
        assert torch.equal(got["hidden"][0], net[0](value))
    with torch.inference_mode(), wl.capture(net, hidden="1") as got:
        net(value)
    assert len(got["hidden"]) == 1


def test_an_element_that_does_not_exist() -> None:
    net = Mixed()
    taps = {
        "a": wl.Output("table", index="other"),
        "b": wl.Output("table", index=2),
        "c": wl.Output("data", index="nothing"),
        "d": wl.Output("often", index=0),
        "e": wl.Input("often", index="mask"),
        "f": wl.Input("often", index=1),
    }
    with pytest.raises(wl.CaptureError) as caught, wl.capture(net, **taps):
        net(x())
    text = str(caught.value)
    for part in ("value, extra", "2 elements", "Answer", "no positions", "1 positional argument"):
        assert part in text, part


def test_a_call_that_was_not_made() -> None:
    net = Mixed()
    told = "expected calls numbered 3; found 3 calls, numbered from 0"
    with pytest.raises(wl.CaptureError, match=told), wl.capture(net, late=wl.Output("often", calls=[3])):
        net(x())
    with wl.capture(net, late=wl.Output("often", calls=[3], expect="maybe")) as got:
        net(x())
    assert got["late"] == ()


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(partial(layer, scale=0.5), x, use_reentrant=self.reentrant)
        return self.head(x)


def test_a_recomputation_is_not_recorded() -> None:
    net, value = Checkpointed(), x().requires_grad_()
    with wl.capture(net, hidden="layers.*") as got:
        net(value).sum().backward()
    assert same(got["hidden"], states(net, value))
    assert all(tensor.requires_grad for tensor in got["hidden"])
    with pytest.raises(wl.CaptureError, match="backward pass, as a recomputation"):
        with set_checkpoint_early_stop(False):
            out = net(value)
        with wl.capture(net, hidden="layers.*"):
            out.sum().backward()


class Guided(Checkpointed):
    """Takes a gradient while it runs, as guidance does, so that its layers run once more before it ends."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad(), set_checkpoint_early_stop(False):
            value = value.detach().requires_grad_()
            out = super().forward(value)
            (slope,) = torch.autograd.grad(out.sum(), value)
        return out + slope


@pytest.mark.parametrize("grad", [True, False])
def test_a_recomputation_within_the_forward_is_not_recorded(grad: bool) -> None:
    net, value = Guided(), x()
    with torch.set_grad_enabled(grad), wl.capture(net, hidden="layers.*") as got:
        net(value)
    assert same(got["hidden"], states(net, value))


class Records(nn.Module):
    """Has what its layers gave in its own forward, which is recomputed as a whole."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.own = own

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if not self.own:
            value, hidden = self.flagged(value, output_hidden=True)
        else:
            with wl.capture(self, hidden=["first", "second"]) as got:
                value = self.second(self.first(value).tanh())
            hidden = got["hidden"]
        return (value + sum(hidden)).exp().exp()

    @wl.records(hidden=["first", "second"])
    def flagged(self, value: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(value).tanh())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_within_what_is_recomputed_records_again(own: bool, reentrant: bool) -> None:
    """It was told that nothing ran, in the user's backward."""
    net, value = Records(own), torch.randn(2, 8, requires_grad=True)
    plain = torch.autograd.grad(net(value).sum(), [value, *net.parameters()])
    checkpoint(net, value, use_reentrant=reentrant).sum().backward()
    assert same(plain, [tensor.grad for tensor in (value, *net.parameters())])


def test_a_block_within_a_backward_pass() -> None:
    net, value = Net(), x().requires_grad_()
    seen: list[int] = []

    def probe(gradient: torch.Tensor) -> None:
        with torch.enable_grad(), wl.capture(net, hidden="layers.*") as got:
            checkpoint(net, value, use_reentrant=False).sum().backward()
        seen.append(len(got["hidden"]))

    doubled = value * 2
    doubled.register_hook(probe)
    doubled.sum().backward()
    assert seen == [3]


class Doubles(nn.Module):
    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.writes = writes

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.layer(value * 2)
        return value.add_(1) if self.writes else value + 1


@pytest.mark.parametrize("tap", [wl.Output("layer"), wl.Output("layer", expect="some"), wl.Input("layer")])
@pytest.mark.parametrize("around", [False, True], ids=["whole", "within"])
@pytest.mark.parametrize("how", [torch.vmap, torch.func.grad])
def test_writes_to_what_vmap_and_grad_wrap(tap: wl.Output, around: bool, how: Any) -> None:
    """The tensors that a model sees there count no writes themselves, or not those from outside."""

    class Around(nn.Module):
        def __init__(self, *, writes: bool) -> None:
            super().__init__()
            self.inner = Doubles(writes=writes)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return how(lambda row: self.inner(row).sum())(value)

    tap = dataclasses.replace(tap, select="inner.layer" if around else "layer")
    for writes in (False, True):
        told = pytest.raises(wl.CaptureError, match="written to") if writes else contextlib.nullcontext()
        net: nn.Module = Around(writes=writes) if around else Doubles(writes=writes)
        with told, wl.capture(net, seen=tap):
            _ = net(torch.ones(2)) if around else how(lambda row, net=net: net(row).sum())(torch.ones(2))


def test_a_write_to_what_vmap_returned() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Softplus())
    with wl.capture(net, seen="1"):
        _ = torch.vmap(net)(x()) + 1
    with pytest.raises(wl.CaptureError, match="written to"), torch.no_grad(), wl.capture(net, seen="1"):
        torch.vmap(net)(x()).add_(1)


def test_reentrant_checkpointing_detaches() -> None:
    net, value = Checkpointed(), x().requires_grad_()
    net.reentrant = True
    with pytest.raises(wl.CaptureError, match="reentrant checkpointing"), wl.capture(net, hidden="layers.*"):
        net(value)
    with wl.capture(net, hidden=wl.Output("layers.*", detach=True)) as got:
        net(value).sum().backward()
    assert same(got["hidden"], states(net, value))
    with torch.no_grad(), wl.capture(net, hidden="layers.*") as got:
        net(value)
    assert len(got["hidden"]) == 3


def test_reentrant_checkpointing_is_noticed_where_grad_is_switched_on_inside() -> None:
    net, value = Checkpointed(), x().requires_grad_()
    net.reentrant = True
    with pytest.raises(wl.CaptureError, match="reentrant"), torch.no_grad(), wl.capture(net, hidden="layers.*"):
        net(value)
        with torch.enable_grad():
            net(value)


class Ungraded(Checkpointed):
    """Switches autograd off, and perhaps on again within."""

    def __init__(self, *, on_again: bool) -> None:
        super().__init__()
        self.on_again = on_again
        self.reentrant = True

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.set_grad_enabled(self.on_again):
            return super().forward(value)


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_cut_off_where_grad_is_off() -> None:
    net, value = Checkpointed(), x()
    net.reentrant = True
    edited = wl.Output("layers.1", replace=torch.neg)
    with wl.capture(net, hidden="layers.*", edited=edited) as got, torch.no_grad():
        net(value)
    assert len(got["hidden"]) == 3
    with pytest.raises(wl.CaptureError, match="cut off"), wl.capture(net, hidden="layers.*"):
        net(value)
    value.requires_grad_()
    net = Ungraded(on_again=False)
    with wl.capture(net, hidden="layers.0"):
        net(value)
    net = Ungraded(on_again=True)
    with pytest.raises(wl.CaptureError, match="cut off"), wl.capture(net, hidden="layers.0"), torch.no_grad():
        net(value)


def test_edits_within_checkpointing_are_refused() -> None:
    net, value = Checkpointed(), x().requires_grad_()
    edited = wl.Output("layers.1", replace=torch.neg)
    with pytest.raises(wl.CaptureError, match="edited within"), wl.capture(net, hidden=edited):
        net(value)


def test_stop_and_the_last_call_contradict_each_other() -> None:
    taps = {"a": wl.Output("layers.0", stop=True), "b": wl.Output("head", calls=[-1])}
    with pytest.raises(wl.CaptureError, match="negative calls of tap 'b'"), wl.capture(Net(), **taps):
        pass


def test_an_error_of_the_block_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), wl.capture(Net(), hidden="layers.*"):
        1 / 0


class Grows(nn.Module):
    """Makes a layer in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Layer()])

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            self.parts.append(Layer())
        for part in self.parts:
            value = part(value)
        return value


def chosen(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, Layer)


@pytest.mark.parametrize("select", ["parts.*", "**.out", Layer, chosen, ["parts.0", "parts.*"]])
def test_a_module_that_came_while_the_capture_was_open(select: object) -> None:
    net = Grows()
    for expect in ("every", "maybe"):
        net.parts = net.parts[:1]
        capture = wl.capture(net, seen=wl.Output(select, expect=expect))  # type: ignore[arg-type]
        with pytest.raises(wl.CaptureError, match=r"parts\.1.*'seen' missed a module"), capture:
            net(x())
        with capture as got:
            net(x())
        assert len(got["seen"]) == 2
    with wl.capture(net, seen=select):
        net.other = nn.Identity()  # which nobody wants
        net(x())
    with wl.capture(net, seen=wl.Output("parts.0", expect="some")):
        net.parts.append(Layer())
        net(x())


class Held:
    """No container that a tap's options could follow."""

    def __init__(self, tensor: object) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    "make", [Held, lambda value: (value, [Held(value)]), lambda value: {value}, lambda value: Held([Held(value)])]
)
@pytest.mark.parametrize("options", [{"detach": True}, {"clone": True}, {"dtype": torch.float16}, {"tokens": -1}])
def test_options_that_do_not_reach_into_an_object(make: Callable[..., object], options: dict[str, Any]) -> None:
    class Gives(nn.Module):
        def forward(self, value: torch.Tensor) -> object:
            return make(value)

    net = nn.Sequential(Gives())
    with pytest.raises(wl.CaptureError, match="change nothing within"), wl.capture(net, x=wl.Output("0", **options)):
        net(x().requires_grad_())
    _, got = torch.compile(wl.recorder(net, x=wl.Output("0", **options)), backend="eager")(x().requires_grad_())
    with pytest.raises(wl.CaptureError, match="change nothing within"):
        assert got["x"]
    with wl.capture(net, x="0", tensor=wl.Output("0", index=lambda value: x(), **options)) as got:
        net(x())
    assert len(got["x"]) == len(got["tensor"]) == 1


@pytest.mark.parametrize("options", [{"detach": True}, {"dtype": torch.float32}, {"device": "cpu"}, {"clone": False}])
def test_options_that_have_nothing_to_change_within_an_object(options: dict[str, Any]) -> None:
    class Gives(nn.Module):
        def forward(self, value: torch.Tensor) -> object:
            return value * 2, Held([value.detach(), value > 0])

    net, tap = nn.Sequential(Gives()), wl.Output("0", **options)
    with wl.capture(net, both=tap) as got:
        out, held = net(x().requires_grad_())
    assert same(got["both"][0][:1], [out]) and got["both"][0][1] is held
    assert got["both"][0][0].requires_grad != ("detach" in options)
    _, got = torch.compile(wl.recorder(net, both=tap), backend="eager")(x())
    assert len(got["both"]) == 1


@pytest.mark.parametrize("options", [{"detach": True}, {"clone": True}, {"dtype": torch.float16}, {"device": "meta"}])
def test_what_is_told_of_an_object_names_the_elements_that_have_none(options: dict[str, Any]) -> None:
    class Gives(nn.Module):
        def forward(self, value: torch.Tensor) -> object:
            return {"logits": value * 2, "held": (Held(value * 3),), "states": [value * 4], "note": "none"}

    net, value = nn.Sequential(Gives()), x().requires_grad_()
    told = "change nothing within a Held.*take an element, index='logits' or index='states',"
    with pytest.raises(wl.CaptureError, match=told), wl.capture(net, out=wl.Output("0", **options)):
        net(value)
    _, got = torch.compile(wl.recorder(net, out=wl.Output("0", **options)), backend="eager")(value)
    with pytest.raises(wl.CaptureError, match=told):
        assert got["out"]
    inner = wl.capture(net, out=wl.Output("0", index="held", **options))
    with pytest.raises(wl.CaptureError, match="take an element, index=…"), inner:
        net(value)


class Around(nn.Module):
    """Runs a model within, perhaps without autograd, or in a region of its own."""

    def __init__(self, net: nn.Module, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.run = net, run
        self.first = nn.Linear(8, 8)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.run(self.net, self.first(value).detach())


def ungraded(net: nn.Module, value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(value)


def reentrant_net() -> Checkpointed:
    net = Checkpointed()
    net.reentrant = True
    return net


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_cut_off_in_a_forward_that_began_without_grad_within_another() -> None:
    """A frozen part of a model that trains. The outer forward had begun with autograd, which was taken for it."""
    net = Around(reentrant_net(), ungraded)
    with wl.capture(net, first="first"), wl.capture(net.net, hidden="layers.*") as got:
        net(x())
    assert len(got["hidden"]) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", [lambda net, value: net(value), ungraded])
def test_a_region_around_a_forward_cuts_off_what_that_began_without_grad(
    inner: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> None:
    def run(net: nn.Module, value: torch.Tensor) -> torch.Tensor:
        return checkpoint(partial(inner, net), value, use_reentrant=True)

    net = Around(reentrant_net(), run)
    outer = wl.capture(net, first="first")
    with outer, pytest.raises(wl.CaptureError, match="cut off"), wl.capture(net.net, hidden="layers.*"):
        net(x())
    with wl.capture(net, first="first"), torch.no_grad(), wl.capture(net.net, hidden="layers.*") as got:
        net(x())
    assert len(got["hidden"]) == 3


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_cut_off_where_nothing_needs_a_gradient() -> None:
    net = Around(reentrant_net(), ungraded).requires_grad_(False)
    for run in (lambda: net(x()), lambda: ungraded(net.net, x()), lambda: net.net(x())):
        with wl.capture(net, hidden="net.layers.*"):
            run()
    told = pytest.raises(wl.CaptureError, match="cut off")
    with told, wl.capture(net, hidden="net.layers.*"):  # the input needs one
        net.net(x().requires_grad_())
    net.net.head.requires_grad_()
    with told, wl.capture(net, hidden="net.layers.*"):
        net.net(x())

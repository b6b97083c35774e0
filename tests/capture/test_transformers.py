"""The same tensors as Transformers' own flags give, and the ten ways in which those fail."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import gc
import pickle
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.capture.architectures import ARCHITECTURES, Architecture, build, expected
from tests.capture.nets import hooks_on, same
from tests.capture.test_capture_threads import run_threads
from tests.capture.test_compiled import compiling_elsewhere
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.utils import output_capturing

import weightlift as wl
from weightlift.integrations.transformers.collector import SafeCollector

pytestmark = [
    pytest.mark.timeout(500),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("nothing_compiled"),
]

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99,
}  # fmt: skip
DAILY = {
    "LlamaForCausalLM", "MixtralForCausalLM", "BertModel", "T5ForConditionalGeneration", "ViTModel",
    "WhisperForConditionalGeneration", "LlavaForConditionalGeneration",
}  # fmt: skip


def llama(*, lm: bool = False, attention: str = "eager") -> nn.Module:
    config = LlamaConfig(**SIZES)
    config._attn_implementation = attention
    return (LlamaForCausalLM if lm else LlamaModel)(config).eval()


def ids(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.model, marks=() if case.model in DAILY else pytest.mark.full)
        for case in ARCHITECTURES
    ],
)
@torch.no_grad()
def test_equal_to_transformers(case: Architecture) -> None:
    torch.manual_seed(0)
    theirs, inputs = build(case), case.inputs()
    torch.manual_seed(0)
    ours = build(case)
    flags = {f"output_{flag}": True for flag in case.flags if flag != "cross_attentions"}
    wanted = expected(case, theirs(**inputs, **flags, return_dict=True))
    for _ in range(2):
        with wl.capture(ours, *wanted) as got:
            ours(**inputs)
        for name, values in wanted.items():
            assert same(got[name], values), name
    assert hooks_on(ours) == 0
    _, got = wl.recorder(ours, *wanted)(**inputs)
    assert all(same(got[name], values) for name, values in wanted.items())


@torch.no_grad()
def test_names_layers_and_options() -> None:
    model, inputs = llama(lm=True), ids()
    full = model(inputs, output_hidden_states=True).hidden_states
    with wl.capture(
        model,
        "model.attentions",
        all="model.layers.*",
        ends=wl.Declared("hidden_states", layers=(0, -1)),
        last=wl.Declared("hidden_states", tokens=-1, dtype=torch.float64),
    ) as got:
        model(inputs)
    assert same(got["ends"], [full[0], full[-1]])
    assert same(got["all"][:-1], full[1:-1]), "the last one is normalised in the declared states"
    assert same(got["last"], [state[:, -1].double() for state in full])
    assert len(got["model.attentions"]) == 4
    assert list(got.named("ends")) == ["model.layers.0:input", "model.layers.3"]
    with pytest.raises(wl.CaptureError, match="did you mean 'hidden_states'"), wl.capture(model, "hiden_states"):
        pass
    for name in ("model.layers.*", "lm_head"):
        text = f'a name of yours: hidden="{re.escape(name)}"'
        with pytest.raises(wl.CaptureError, match=text), wl.capture(model, name):
            pass


def test_a_class_that_declares_nothing() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    model = MambaForCausalLM(MambaConfig(**sizes))
    told = "MambaForCausalLM declares nothing that it can record — select modules"
    with pytest.raises(wl.CaptureError, match=told), wl.capture(model, "hidden_states"):
        pass


class Around(nn.Module):
    """A wrapper, as ``DistributedDataParallel`` and ``PeftModel`` are."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return [model(*args, **kwargs) for model in self.inner][-1]


@torch.no_grad()
def test_what_a_model_within_a_wrapper_declares() -> None:
    model, inputs = Around(llama(lm=True)), ids()
    with wl.capture(model, "hidden_states", last=wl.Declared("attentions", layers=[-1])) as got:
        out = model(inputs, output_hidden_states=True, output_attentions=True)
    assert same(got["hidden_states"], out.hidden_states) and same(got["last"], out.attentions[-1:])
    record = wl.recorder(model, "hidden_states")
    for call in (record, torch.compile(record, backend="eager")):
        assert same(call(inputs, use_cache=False)[1]["hidden_states"], out.hidden_states)
    two = Around(llama(), llama(lm=True))
    text = r"several sub-models.*'inner\.0\.hidden_states', 'inner\.1\.model\.hidden_states'"
    with pytest.raises(wl.CaptureError, match=text), wl.capture(two, "hidden_states"):
        pass
    with wl.capture(two, "inner.1.model.hidden_states") as got:
        out = two(inputs, output_hidden_states=True)
    assert same(got["inner.1.model.hidden_states"], out.hidden_states)


@torch.no_grad()
def test_modules_beside_what_the_model_itself_declares() -> None:
    model, other = llama(), ids(1)
    with wl.capture(model, "hidden_states", layers="layers.*") as got:
        model(ids())
        model(other)
    for name, count in (("hidden_states", 5), ("layers", 4)):
        assert [len(values) for values in got.forwards(name)] == [count, count]
    with (
        pytest.raises(wl.CaptureError, match=r"layers\.1.*none in 1 of 2 forwards"),
        wl.capture(model, "attentions", layers="layers.*"),
    ):
        model(other)
        model.layers[1] = LlamaDecoderLayer(model.config, 1).eval()
        model(other)


@torch.no_grad()
def test_layers_that_are_not_there() -> None:
    model, inputs = llama(), ids()
    there = wl.Declared("hidden_states", layers=[-5, 4])
    wanted = wl.Declared("hidden_states", layers=[0, 99, -6])
    message = r"no such layers.*expected layers of -5 to 4; found 99, -6"
    with pytest.raises(wl.CaptureError, match=message) as caught, wl.capture(model, there=there, states=wanted):
        model(inputs)
        model(inputs)
    assert len(caught.value.problems) == 1
    record = wl.recorder(model, states=wanted)
    with pytest.raises(wl.CaptureError, match=message):
        record(inputs)
    _, got = torch.compile(record, backend="eager")(inputs, use_cache=False)
    with pytest.raises(wl.CaptureError, match=message):
        got["states"]
    with wl.capture(model, states=wl.Declared("hidden_states", layers=[0, 99], expect="maybe")) as got:
        model(inputs)
    assert len(got["states"]) == 1
    with pytest.raises(wl.CaptureError, match="sequence of whole numbers"):
        wl.Declared("hidden_states", layers=[])
    with pytest.raises(TypeError, match="calls"):
        wl.Declared("hidden_states", calls=[0])


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@torch.no_grad()
def test_declared_outputs_within_layers_compiled_one_by_one(how: str) -> None:
    model, reference, inputs = llama(lm=True), llama(lm=True), ids()
    reference.load_state_dict(model.state_dict())
    theirs = reference(inputs, output_hidden_states=True, output_attentions=True)
    layers = model.model.layers
    for number, layer in enumerate(layers):
        if how == "wrapped":
            layers[number] = torch.compile(layer, backend="eager")
        else:
            layer.compile(backend="eager")
    model.model.norm.compile(backend="eager")
    inner = wl.Output("model.layers.*.mlp")
    record = wl.recorder(
        model, "hidden_states", "attentions", ends=wl.Declared("attentions", layers=[0, -1]), mlp=inner
    )
    for _ in range(2):
        out, got = record(inputs, use_cache=False)
        assert torch.allclose(out.logits, theirs.logits, atol=1e-5)
        for name in ("hidden_states", "attentions"):
            assert len(got[name]) == len(getattr(theirs, name))
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got[name], getattr(theirs, name)))
        assert list(got.named("ends")) == ["model.layers.0.self_attn", "model.layers.3.self_attn"]
        assert list(got.named("mlp")) == [f"model.layers.{number}.mlp" for number in range(4)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "layers share what is compiled"


@torch.no_grad()
def test_declared_outputs_of_a_sub_model_that_was_compiled() -> None:
    model, inputs = llama(lm=True), ids()
    theirs = model(inputs, output_hidden_states=True, output_attentions=True)
    model.model.compile(backend="eager")
    last = wl.Declared("hidden_states", layers=[-1], tokens=-1)
    record = wl.recorder(model, "hidden_states", "attentions", last=last, mlp="model.layers.1.mlp")
    _, got = record(inputs, use_cache=False)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(getattr(theirs, name))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got[name], getattr(theirs, name)))
    assert torch.allclose(got["last"][0], theirs.hidden_states[-1][:, -1], atol=1e-5)
    assert list(got.named("attentions")) == [f"model.layers.{number}.self_attn" for number in range(4)]
    with pytest.raises(wl.CaptureError, match="inside compiled code"), wl.capture(model, "hidden_states"):
        model(inputs)


def test_attention_that_gives_no_weights() -> None:
    model = llama(attention="sdpa")
    with pytest.raises(wl.CaptureError, match="attn_implementation='eager'"), wl.capture(model, "attentions"):
        model(ids())


@torch.no_grad()
def test_generate() -> None:
    model, inputs = llama(lm=True), ids(1)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(inputs, **options, output_hidden_states=True, return_dict_in_generate=True).hidden_states
    with wl.capture(model, "hidden_states") as got:
        model.generate(inputs, **options)
    assert len(got.forwards("hidden_states")) == len(theirs)
    assert all(same(mine, other) for mine, other in zip(got.forwards("hidden_states"), theirs))
    with wl.capture(model, first=wl.Output("model.layers.*", calls=[0]), last=wl.Output("lm_head", calls=(-1,))) as got:
        model.generate(inputs, **options)
    assert len(got["first"]) == 4 and len(got["last"]) == 1


@torch.no_grad()
def test_encoder_decoder_generation() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    with wl.capture(model, "encoder_hidden_states", "hidden_states", blocks="decoder.block.*") as got:
        model.generate(ids(1), max_new_tokens=4, min_new_tokens=4)
    assert len(got["encoder_hidden_states"]) == 3
    assert len(got.forwards("hidden_states")) == 4
    assert len(got["blocks"]) == 8


def test_gradients_and_checkpointing() -> None:
    model, inputs = llama(), ids()
    model.train()
    with wl.capture(model, "hidden_states") as got:
        model(inputs)
    got["hidden_states"][2].sum().backward()
    gradient = model.layers[1].mlp.up_proj.weight.grad.clone()
    assert gradient.any() and model.layers[3].mlp.up_proj.weight.grad is None
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with wl.capture(model, "hidden_states") as got:
        model(inputs, use_cache=False)
        got["hidden_states"][2].sum().backward()
    assert len(got["hidden_states"]) == 5
    assert torch.equal(model.layers[1].mlp.up_proj.weight.grad, gradient)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inner = wl.Output(LlamaAttention, index=0)
    with pytest.raises(wl.CaptureError, match="reentrant checkpointing"), wl.capture(model, inner=inner):
        model(inputs_embeds=torch.randn(1, 4, 32, requires_grad=True), use_cache=False)


@torch.no_grad()
def test_a_compiled_recorder_of_declared_outputs() -> None:
    model, inputs = llama(lm=True), ids()
    wanted = model(inputs, output_hidden_states=True, output_attentions=True)
    fast = torch.compile(wl.recorder(model, "hidden_states", "attentions"), backend="eager", fullgraph=True)
    out, got = fast(inputs, use_cache=False)
    assert torch.allclose(out.logits, wanted.logits, atol=1e-5)
    for name in ("hidden_states", "attentions"):
        mine, theirs = got[name], getattr(wanted, name)
        assert len(mine) == len(theirs)
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(mine, theirs))


# The ten failures of Transformers' own capture (numbers as in docs/capture.md), right here.


def requests_while_compiling(each: int, own_flag: bool = False) -> tuple[int, int]:
    """Captures in 8 threads while another compiles. Returns how many were wrong, and the number of compilations."""
    models = [llama() for _ in range(4)]
    wrong: list[object] = []

    def work(number: int) -> None:
        model = models[number % 4]
        embeds = torch.full((1, 3, 32), float(number + 1))
        with torch.no_grad():
            for turn in range(each):
                value = embeds + turn / each
                if own_flag:
                    states = model(inputs_embeds=value, output_hidden_states=True).hidden_states
                else:
                    with wl.capture(model, "hidden_states") as got:
                        model(inputs_embeds=value)
                    states = got["hidden_states"]
                if len(states) != 5 or not torch.equal(states[0], value):
                    wrong.append(number)

    with compiling_elsewhere() as done:
        run_threads(work)
    return len(wrong), done[0]


def test_1_no_tensor_of_another_request() -> None:
    wrong, compilations = requests_while_compiling(15)
    assert wrong == 0 and compilations > 0


@pytest.mark.full
def test_1_two_thousand_requests() -> None:
    wrong, compilations = requests_while_compiling(260)
    print(f"2,080 captures in 8 threads, {compilations} compilations meanwhile: {wrong} wrong")
    assert wrong == 0 and compilations > 0


@contextlib.contextmanager
def safe_collector() -> Iterator[None]:
    """What ``install()`` does, undone again."""
    before = output_capturing._active_collector
    wl.install()
    try:
        assert isinstance(output_capturing._active_collector, SafeCollector)
        yield
    finally:
        wl.uninstall()
    assert output_capturing._active_collector is before


def test_a_forward_that_began_before_install_ends_well() -> None:
    token = output_capturing._active_collector.set({})
    with safe_collector():
        output_capturing._active_collector.reset(token)
    assert output_capturing._active_collector.get() is None


def test_1_transformers_own_flag_with_the_safe_collector() -> None:
    with safe_collector():
        wrong, compilations = requests_while_compiling(15, own_flag=True)
        assert wrong == 0 and compilations > 0
        model, value = llama(), ids()
        wanted = model(value, output_hidden_states=True).hidden_states
        fast = torch.compile(model, backend="eager")
        for _ in range(2):
            got = fast(value, output_hidden_states=True, use_cache=False).hidden_states
            assert len(got) == 5 and all(torch.allclose(one, two, atol=1e-5) for one, two in zip(got, wanted))
        assert len(model(value, output_hidden_states=True).hidden_states) == 5
        assert model(value).hidden_states is None


@torch.no_grad()
def test_2_3_layers_compiled_with_fullgraph_are_not_poisoned() -> None:
    model, value = llama(), ids()
    wanted = model(value, output_hidden_states=True).hidden_states
    model = llama_like(model)
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    record = wl.recorder(model, hidden="layers.*")
    for _ in range(2):
        model(value, use_cache=False)
        assert all(
            torch.allclose(one, two, atol=1e-5)
            for one, two in zip(record(value, use_cache=False)[1]["hidden"][:-1], wanted[1:-1])
        )
    model(value, use_cache=False)


def llama_like(model: nn.Module) -> nn.Module:
    copied = llama()
    copied.load_state_dict(model.state_dict())
    return copied


def toggling_in_threads(each: int) -> None:
    model, reference = llama(), llama()
    reference.load_state_dict(model.state_dict())
    plain = torch.compile(reference, backend="eager")
    record = torch.compile(wl.recorder(reference, "hidden_states"), backend="eager")
    values = [torch.full((2, 6), 3 + number) for number in range(8)]
    with torch.no_grad():
        plain(ids(), use_cache=False), record(ids(), use_cache=False)
        # Not in the threads: Transformers' own flag is not safe while anything compiles, our hooks included.
        expected = [model(value, output_hidden_states=True, use_cache=False).hidden_states for value in values]

    def work(number: int) -> None:
        value, states = values[number], expected[number]
        with torch.no_grad():
            for turn in range(each):
                if (turn + number) % 3 == 0:
                    out = plain(value, use_cache=False)
                    assert torch.allclose(out.last_hidden_state, states[-1], atol=1e-5)
                    continue
                if (turn + number) % 3 == 1:
                    _, got = record(value, use_cache=False)
                else:
                    with wl.capture(reference, "hidden_states") as got:
                        reference(value, use_cache=False)
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got["hidden_states"], states, strict=True))

    run_threads(work)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_4_toggling_from_threads_compiles_nothing() -> None:
    toggling_in_threads(12)


@pytest.mark.full
def test_4_thousands_of_toggles_from_threads() -> None:
    toggling_in_threads(500)


@pytest.mark.full
@torch.no_grad()
def test_5_more_selections_than_dynamo_keeps_variants() -> None:
    model, value = llama(), ids()
    full = llama_like(model)(value, output_hidden_states=True).hidden_states
    selections = [(0,), (1,), (2,), (3,), (4,), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (0, -1)]
    for layers in selections:
        record = torch.compile(wl.recorder(model, state=wl.Declared("hidden_states", layers=layers)), backend="eager")
        for _ in range(2):
            got = record(value, use_cache=False)[1]["state"]
            assert len(got) == len(layers)
            assert all(torch.allclose(mine, full[layer], atol=1e-5) for mine, layer in zip(got, layers))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(selections)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_6_the_model_pickles_after_a_capture() -> None:
    model = llama()
    with wl.capture(model, "hidden_states"):
        model(ids())
        pickle.dumps(model)
    pickle.dumps(model)


@torch.no_grad()
def test_7_replaced_layers_shared_layers_and_sub_models() -> None:
    model, value = llama(), ids()
    for _ in range(2):
        with wl.capture(model, "hidden_states") as got:
            model(value)
        assert len(got["hidden_states"]) == 5
        model.layers[1] = LlamaDecoderLayer(model.config, 1).eval()
    other = llama()
    other.layers = model.layers
    for net in (model, other, model):
        with wl.capture(net, "hidden_states") as got:
            net(value)
        assert len(got["hidden_states"]) == 5
    whole = llama(lm=True)
    for net in (whole.model, whole, whole.model):
        with wl.capture(net, "hidden_states") as got:
            net(value)
        assert len(got["hidden_states"]) == 5


@torch.no_grad()
def test_7_a_part_of_a_layer_is_replaced() -> None:
    model, value = llama(), ids()
    for _ in range(2):
        with wl.capture(model, "attentions", "hidden_states") as got:
            model(value, use_cache=False)
        assert list(got.named("attentions")) == [f"layers.{n}.self_attn" for n in range(4)]
        assert len(got["hidden_states"]) == 5
        model.layers[1].self_attn = copy.deepcopy(model.layers[2].self_attn)
    with wl.capture(model, "hidden_states") as got:
        model(value, use_cache=False)
    model.layers.append(LlamaDecoderLayer(model.config, 4).eval())
    model.config.num_hidden_layers = 5
    with wl.capture(model, "hidden_states") as got:
        model(value, use_cache=False)
    assert len(got["hidden_states"]) == 6


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_a_context_copied_within_a_forward_holds_no_declared_output(fails: bool) -> None:
    model, value = llama(), ids()
    contexts: list[contextvars.Context] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def note(module: nn.Module, args: object, out: torch.Tensor) -> None:
        seen.append(weakref.ref(out))
        if not contexts:
            contexts.append(contextvars.copy_context())
            if fails:
                raise ValueError("as asked for")

    model.layers[1].register_forward_hook(note)
    with wl.capture(model, wl.Declared("hidden_states", expect="maybe")) as got:
        with contextlib.suppress(ValueError):
            model(value)
        model(value)
        contexts[0].run(model.layers[1], *_layer_input(model, value))
    with wl.capture(model, "hidden_states") as other:
        contexts[0].run(model.layers[1], *_layer_input(model, value))
        model(value)
    assert len(got["hidden_states"]) == (5 if fails else 10) and len(other["hidden_states"]) == 5
    del got, other
    gc.collect()
    assert len(seen) == 5 and not any(reference() is not None for reference in seen)


def _layer_input(model: nn.Module, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    hidden = model.embed_tokens(value)
    return hidden, None, None, None, False, model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])


@torch.no_grad()
def test_8_another_models_forward_adds_nothing() -> None:
    one, other, value = llama(), llama(), ids()
    with wl.capture(other, "hidden_states"):
        other(value)
    one.layers[1].register_forward_hook(lambda *_: other(value) and None)
    with wl.capture(one, "hidden_states", layers="layers.*") as got:
        one(value)
    assert len(got["hidden_states"]) == 5 and len(got["layers"]) == 4


@torch.no_grad()
def test_9_layers_on_a_worker_thread_are_reported() -> None:
    model = llama()
    layer = model.layers[2]

    class OnThread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: object, **kwargs: object) -> object:
            result = []
            thread = threading.Thread(target=lambda: result.append(self.layer(*args, **kwargs)))
            thread.start()
            thread.join(60)
            return result[0]

    model.layers[2] = OnThread()
    with pytest.raises(wl.CaptureError, match="another thread or context"), wl.capture(model, tap=LlamaDecoderLayer):
        model(ids())
    with pytest.raises(wl.CaptureError, match="another thread or context"), wl.capture(model, "hidden_states"):
        model(ids())


@torch.no_grad()
def test_10_a_choice_of_layers_is_a_choice() -> None:
    import numpy

    model, value = llama(), ids()
    full = model(value, output_hidden_states=True).hidden_states
    with wl.capture(model, zero=wl.Declared("hidden_states", layers=[numpy.int64(0)])) as got:
        model(value)
    assert same(got["zero"], full[:1])
    with wl.capture(model, weights=wl.Output(LlamaAttention, index=1, calls=[0])) as got:
        model(value)
    assert len(got["weights"]) == 4


@pytest.mark.parametrize("kind", ["capture", "recorder", "compiled"])
@pytest.mark.parametrize("layer", range(4))
@torch.no_grad()
def test_what_is_declared_of_an_edited_layer_is_what_the_model_goes_on_with(layer: int, kind: str) -> None:
    model, tokens = llama(), ids()
    taps = {"steered": wl.Output(f"layers.{layer}", replace=lambda hidden: hidden + 1)}
    with wl.capture(model, **taps, inputs=wl.Input("layers.*"), end="norm") as want:
        model(tokens)
    if kind == "capture":
        with wl.capture(model, "hidden_states", **taps) as got:
            model(tokens)
    else:
        record = wl.recorder(model, "hidden_states", **taps)
        _, got = (torch.compile(record, backend="eager") if kind == "compiled" else record)(tokens)
    assert same(got["hidden_states"], [*want["inputs"], *want["end"]])
    assert same(got["steered"], want["steered"])


def test_options_on_an_output_with_a_cache() -> None:
    """What an option would change within the cache can't be done; nothing is said where there is nothing to change."""
    model, tokens = llama(lm=True), ids()
    with torch.no_grad(), wl.capture(model, out=wl.Output("", detach=True, dtype=torch.float32)) as got:
        out = model(tokens)
    assert type(got["out"][0]) is type(out) and torch.equal(got["out"][0].logits, out.logits)
    assert got["out"][0].past_key_values is out.past_key_values
    for options in ({"detach": True}, {"clone": True}, {"dtype": torch.float16}, {"device": "meta"}):
        told = r"within a DynamicCache.*take an element, index='logits', or"
        with pytest.raises(wl.CaptureError, match=told), wl.capture(model, out=wl.Output("", **options)):
            model(tokens)
        with wl.capture(model, logits=wl.Output("", index="logits", **options)) as got:
            model(tokens)
        assert len(got["logits"]) == 1
        with wl.capture(model, out=wl.Output("", **options)):
            model(tokens, use_cache=False)

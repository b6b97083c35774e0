"""``from_pretrained`` on two ranks with the variables of accelerate's efficient loading set."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.distributed.models import assert_same_state, fsdp, losses, mesh
from tests.parity.compare import native_only
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.utils import _sync_module_states
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import weightlift as wl

RANK = int(os.environ.get("RANK", "0"))
FOLDER = Path(os.environ.get("SCENARIO_FOLDER", "."))
SMALL = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)


@contextlib.contextmanager
def efficient():
    """As accelerate's launcher sets them."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    os.environ.update(dict.fromkeys(names, "true"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def saved(name, cls, config, change=lambda state: None):
    folder = FOLDER / name
    if RANK == 0:
        torch.manual_seed(0)
        cls(config).save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    dist.barrier()
    return folder


def loaded(cls, folder, **options):
    """The model of this rank, and the one that a single process loads."""
    torch.manual_seed(5)
    reference = wl.from_pretrained(cls, folder, **options)
    with efficient(), native_only():
        return wl.from_pretrained(cls, folder, **options), reference


def assert_buffers(model, reference):
    expected = dict(reference.named_buffers())
    assert all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())


def only_the_first_rank_has_weights():
    folder = saved("llama", LlamaForCausalLM, LLAMA)
    for dtype in (torch.float32, torch.bfloat16):
        model, reference = loaded(LlamaForCausalLM, folder, dtype=dtype)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.training
        assert {name: p.dtype for name, p in model.named_parameters()} == {
            name: p.dtype for name, p in reference.named_parameters()
        }
        assert_buffers(model, reference)
        assert all(bool(parameter.any()) == (RANK == 0) for parameter in model.parameters())
        if RANK == 0:
            assert_same_state(model, reference)
        assert_same_state(DistributedDataParallel(model).module, reference)


def the_other_rank_pays_nothing():
    config = LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8
    )
    folder = saved("wide", LlamaForCausalLM, config)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 250e6
    with efficient(), native_only():
        wl.from_pretrained(LlamaForCausalLM, saved("warm", LlamaForCausalLM, LLAMA), dtype=torch.bfloat16)
        before = _resident_bytes()
        model = wl.from_pretrained(LlamaForCausalLM, folder, dtype=torch.bfloat16)
    grown = _resident_bytes() - before
    if RANK == 0:
        assert grown > 0.45 * size
    else:
        assert grown < 0.05 * size / 2, grown
    del model


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fsdp1_fills_the_other_rank():
    folder = saved("fsdp1", LlamaForCausalLM, LLAMA, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    model, reference = loaded(LlamaForCausalLM, folder)
    # What sync_module_states does; FSDP1 itself refuses to do it on a CPU.
    _sync_module_states(model, dist.group.WORLD, 1 << 28, 0, params_and_buffers_to_ignore=())
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.summon_full_params(wrapped):
        assert_same_state(wrapped.module, reference)


def fsdp2_is_filled_from_the_first_rank():
    folder = saved("fsdp2", LlamaForCausalLM, LLAMA, lambda state: state.pop("model.layers.0.self_attn.o_proj.weight"))
    model, reference = loaded(LlamaForCausalLM, folder, dtype=torch.float32)
    state = model.state_dict() if RANK == 0 else {}
    fsdp(mesh(2))(model)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert_same_state(model, reference)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def merged_experts():
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    model, reference = loaded(MixtralForCausalLM, saved("mixtral", MixtralForCausalLM, config))
    assert_buffers(model, reference)
    assert_same_state(DistributedDataParallel(model).module, reference)


def ties_that_the_checkpoint_gives_up():
    """Both names, with different values: every rank has two tensors then, or their shapes would not agree."""

    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1

    model, reference = loaded(LlamaForCausalLM, saved("untied", LlamaForCausalLM, LLAMA, change))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_same_state(DistributedDataParallel(model).module, reference)


def an_error_is_one_on_every_rank():
    def change(state):
        state["bert.embeddings.LayerNorm.bias"] = torch.zeros(3)

    folder = saved("misfit", BertForMaskedLM, BertConfig(**SMALL), change)
    with efficient(), pytest.raises(wl.PlanError, match="LayerNorm"):
        wl.from_pretrained(BertForMaskedLM, folder)
    with efficient():
        _, info = wl.from_pretrained(BertForMaskedLM, folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name for name, _, _ in info["mismatched_keys"]] == ["bert.embeddings.LayerNorm.bias"]


def the_drop_in_does_the_same():
    folder = saved("installed", LlamaForCausalLM, LLAMA)
    wl.install()
    try:
        with efficient(), native_only():
            model = LlamaForCausalLM.from_pretrained(folder)
    finally:
        wl.uninstall()
    assert bool(model.model.norm.weight.any()) == (RANK == 0)


SCENARIOS = {
    run.__name__: run
    for run in (
        only_the_first_rank_has_weights,
        the_other_rank_pays_nothing,
        fsdp1_fills_the_other_rank,
        fsdp2_is_filled_from_the_first_rank,
        merged_experts,
        ties_that_the_checkpoint_gives_up,
        an_error_is_one_on_every_rank,
        the_drop_in_does_the_same,
    )
}

"""Pre-quantised models on two ranks: packed integers of compressed-tensors, and torchao's tensors by Transformers."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from tests.distributed.models import assert_same_state, checkpoint_of, fsdp, mesh
from tests.distributed.scenarios_pretrained import FOLDER, RANK, efficient
from torch.distributed.utils import _sync_module_states
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import weightlift as wl

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
TOKENS = torch.arange(8)[None]


def packed():
    """A Llama as compressed-tensors builds it for a checkpoint of packed four-bit integers."""
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = LlamaForCausalLM(copy.deepcopy(LLAMA))
    groups = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, groups)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.detach().abs().amax(1, keepdim=True) / 7)
            compress_module(module)
    return model


def compressed_tensors_are_sharded_and_sent():
    state = checkpoint_of(packed)
    assert state["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    path = FOLDER / "packed.pt"
    if RANK == 0:
        torch.save(state, path)
    dist.barrier()
    reference = wl.load(packed, path)
    mine = path if RANK == 0 else "/nowhere"
    for found, source in ((path, None), (mine, 0)):
        model = wl.load(packed, found, parallelize=fsdp(mesh(2)), source_rank=source)
        assert model.model.layers[0].mlp.up_proj.weight_packed.to_local().shape == (64, 8)
        assert_same_state(model, reference)
    model = wl.load(packed, mine, source_rank=0)
    assert bool(model.model.layers[0].mlp.up_proj.weight_packed.any()) == (RANK == 0)
    _sync_module_states(model, dist.group.WORLD, 1 << 28, 0, params_and_buffers_to_ignore=())
    assert_same_state(model, reference)


def torchaos_tensors_under_efficient_loading():
    """Transformers loads these itself: its own loader has to come through with the variables set."""
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if RANK == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(copy.deepcopy(LLAMA)).save_pretrained(FOLDER / "plain")
        config = TorchAoConfig(Int8WeightOnlyConfig())
        LlamaForCausalLM.from_pretrained(FOLDER / "plain", quantization_config=config).save_pretrained(FOLDER / "ao")
    dist.barrier()
    reference = wl.from_pretrained(AutoModelForCausalLM, FOLDER / "ao")
    with efficient():
        model = wl.from_pretrained(AutoModelForCausalLM, FOLDER / "ao")
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    if RANK == 0:
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, Int8Tensor)
        assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)


SCENARIOS = {
    run.__name__: run for run in (compressed_tensors_are_sharded_and_sent, torchaos_tensors_under_efficient_loading)
}

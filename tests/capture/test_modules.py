"""Modules of other libraries and of torch itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.capture.nets import hooks_on, same
from torch import nn

import weightlift as wl

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[2]


def test_nn_transformer() -> None:
    net = nn.Transformer(16, 2, 2, 2, 32, batch_first=True).train()
    with wl.capture(net, encoder="encoder.layers.*", decoder=nn.TransformerDecoderLayer, memory="encoder.norm") as got:
        out = net(torch.randn(2, 5, 16), torch.randn(2, 3, 16))
    assert [len(got[name]) for name in got] == [2, 2, 1]
    assert torch.equal(net.decoder.norm(got["decoder"][-1]), out)
    assert got["memory"][0].shape == (2, 5, 16)
    assert hooks_on(net) == 0


def test_a_diffusers_unet() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    ).eval()  # fmt: skip
    inputs = torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.randn(1, 4, 8)
    with torch.no_grad():
        with wl.capture(
            unet,
            down=wl.Output("down_blocks.*", index=0),
            skips=wl.Output("down_blocks.0", index=1),
            middle="mid_block",
            attention="**.attn2",
            text=wl.Input("**.attn2", index="encoder_hidden_states"),
        ) as got:
            out = unet(*inputs).sample
        assert len(got["down"]) == 2 and isinstance(got["skips"][0], tuple)
        assert len(got["attention"]) == len(got["text"]) > 3
        assert all(text is inputs[2] for text in got["text"])
        record = wl.recorder(unet, middle="mid_block", attention="**.attn2")
        sample, again = record(*inputs)
        fast, compiled = torch.compile(record, backend="eager")(*inputs)
    assert torch.equal(sample.sample, out) and torch.allclose(fast.sample, out, atol=1e-5)
    assert same(again["attention"], got["attention"]) and same(again["middle"], got["middle"])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(compiled["attention"], got["attention"]))
    assert hooks_on(unet) == 0


SHARDED = """
import torch, torch.distributed as dist, weightlift as wl
from tests.distributed.ending import leave
from torch import nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
torch.manual_seed(0)
net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
value = torch.randn(2, 8)
with wl.capture(net, hidden="*") as plain:
    net(value)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
for layer in net:
    fully_shard(layer, mesh=mesh)
fully_shard(net, mesh=mesh)
for _ in range(2):
    with wl.capture(net, hidden="*", inputs=wl.Input("*")) as got:
        out = net(value)
    assert all(torch.allclose(a, b) for a, b in zip(got["hidden"], plain["hidden"])) and len(got["hidden"]) == 3
    got["hidden"][1].sum().backward()
    assert net[0].weight.grad is not None
print("sharded: right")
leave()
"""


def test_fsdp2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARDED.format(file=tmp_path / "store")],
        cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded: right" in done.stdout


def test_a_model_with_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    for layer in net:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hooks.add_hook_to_module(net, hooks.AlignDevicesHook(io_same_device=True))
    value = torch.randn(2, 8)
    with wl.capture(net, hidden="*") as got:
        out = net(value)
    assert got["hidden"][-1] is out or torch.equal(got["hidden"][-1], out)
    again, recorded = torch.compile(wl.recorder(net, hidden="*"), backend="eager")(value)
    assert torch.allclose(again, out, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(recorded["hidden"], got["hidden"]))


def test_importing_weightlift_imports_no_compiler_and_no_library() -> None:
    code = "import sys, weightlift as wl; print([m for m in ('torch._dynamo', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

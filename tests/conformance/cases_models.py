"""Whole hand-written models, with the initialisation patterns of the libraries people copy from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from .cases import case, holds, near


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc, self.c_proj2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        mask = torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32)
        self.register_buffer("bias", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.attn(self.ln_1(x)).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // 4)).masked_fill(self.bias[:, :, :t, :t] == 0, -1e4)
        x = x + self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.c_proj2(F.gelu(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    """nanoGPT: apply() with isinstance checks, residual projections scaled by depth, the head tied."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(128, 64), nn.Embedding(32, 64)
        self.h = nn.ModuleList([Block(64) for _ in range(3)])
        self.ln_f, self.lm_head = nn.LayerNorm(64), nn.Linear(64, 128, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * 3))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.05)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def _gpt(m: Any) -> None:
    near(m.h[0].c_proj.weight.std(), 0.02 / math.sqrt(6), "std scaled by depth", 1e-3)
    holds(m.wte.weight is m.lm_head.weight, "the head is not tied")


@case(inputs=lambda: (torch.arange(12).view(2, 6),), check=_gpt)
def nano_gpt() -> nn.Module:
    return GPT()


class Bert(nn.Module):
    """BERT's habits: position ids, padding row zeroed after normal_, `.data` everywhere, a decoder bias tied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(128, 64, padding_idx=0)
        self.positions = nn.Embedding(32, 64)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)
        self.decoder = nn.Linear(64, 128)
        self.bias = nn.Parameter(torch.zeros(128))
        self.register_buffer("position_ids", torch.arange(32).expand((1, -1)), persistent=False)
        self.apply(self._init_weights)
        self.decoder.weight = self.words.weight
        self.decoder.bias = self.bias

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if getattr(module, "padding_idx", None) is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(self.position_ids[:, : ids.shape[1]])
        return self.decoder(self.layers(x))


@case(inputs=lambda: (torch.arange(12).view(2, 6),), check=lambda m: holds((m.words.weight[0] == 0).all(), "padding"))
def bert() -> nn.Module:
    return Bert()


class Vit(nn.Module):
    """timm: trunc_normal_ everywhere, a drop-path schedule, fix_init_weight, layer scale, an xavier patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, stride=8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 64) * 0.02)
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
        self.blocks = nn.ModuleList([Block(64) for _ in range(3)])
        self.gammas = nn.ParameterList([nn.Parameter(1e-5 * torch.ones(64)) for _ in range(3)])
        self.head = nn.Linear(64, 10)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        w = self.patch.weight.data
        nn.init.xavier_uniform_(w.view([w.shape[0], -1]))
        for depth, block in enumerate(self.blocks):
            block.c_proj.weight.data.div_(math.sqrt(2.0 * (depth + 1)))
        self.head.weight.data.mul_(0.001)
        self.head.bias.data.mul_(0.001)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block, gamma in zip(self.blocks, self.gammas, strict=True):
            x = x + gamma * block(x)
        return self.head(x[:, 0])


def _vit(m: Any) -> None:
    near(m.blocks[2].c_proj.weight.std(), 0.02 / math.sqrt(6), "divided by depth", 1e-3)
    near(m.head.weight.std(), 0.02 * 0.001, "the head is scaled", 1e-5)


@case(inputs=lambda: (torch.rand(2, 3, 32, 32),), check=_vit)
def vision_transformer() -> nn.Module:
    return Vit()


class Swin(nn.Module):
    """Relative position index and bias tables, logit scales, a mask made by loops over slices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(13 * 13, 8))
        nn.init.trunc_normal_(self.table, std=0.02)
        coords = torch.flatten(torch.stack(torch.meshgrid([torch.arange(7), torch.arange(7)], indexing="ij")), 1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += 6
        relative[:, :, 1] += 6
        relative[:, :, 0] *= 13
        self.register_buffer("index", relative.sum(-1))
        image = torch.zeros((1, 14, 14, 1))
        count = 0
        for h in (slice(0, -7), slice(-7, -3), slice(-3, None)):
            for w in (slice(0, -7), slice(-7, -3), slice(-3, None)):
                image[:, h, w, :] = count
                count += 1
        windows = image.view(1, 2, 7, 2, 7, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        self.register_buffer("mask", mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0), persistent=False)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((8, 1, 1))))
        self.temperature = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table[self.index.view(-1)].view(49, 49, 8).permute(2, 0, 1)
        return x @ (bias + self.mask[0]).exp() * self.logit_scale.exp() * self.temperature


@case(inputs=lambda: (torch.rand(8, 3, 49),))
def swin_attention() -> nn.Module:
    return Swin()


class Mamba(nn.Module):
    """S4D-real A_log, the inverse softplus of a log-uniform dt, flags on parameters, HiPPO."""

    def __init__(self) -> None:
        super().__init__()
        A = torch.arange(1, 17, dtype=torch.float32).repeat(64, 1).contiguous()
        self.A_log = nn.Parameter(torch.log(A))
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.ones(64))
        self.dt_proj = nn.Linear(8, 2048)
        nn.init.uniform_(self.dt_proj.weight, -(8**-0.5), 8**-0.5)
        dt = torch.exp(torch.rand(2048) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.dt_proj.bias._no_reinit = True
        p = torch.sqrt(1 + 2 * torch.arange(16.0))
        hippo = torch.tril(p[:, None] * p[None]) - torch.diag(torch.arange(16.0))
        self.register_buffer("hippo", -hippo)
        self.w = nn.Parameter(torch.view_as_real(torch.linalg.eigvals(torch.tensor(hippo.tolist()).double())).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softplus(self.dt_proj(x)).sum(-1, keepdim=True) + self.A_log.exp().sum() + self.hippo.sum()


def _mamba(m: Any) -> None:
    dt = F.softplus(m.dt_proj.bias.detach())
    holds(dt.min() > 9e-5 and dt.max() < 0.11, f"dt between {float(dt.min())} and {float(dt.max())}")


@case(inputs=lambda: (torch.rand(2, 8),), check=_mamba)
def mamba_mixer() -> nn.Module:
    return Mamba()


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False))
        self.bn, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 10)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        nn.init.constant_(self.bn.weight, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(self.net(x)).mean((2, 3)))


@case(inputs=lambda: (torch.rand(1, 3, 9, 9),))
def resnet() -> nn.Module:
    return Resnet()


class Experts(nn.Module):
    """Fused experts, a router that is normalised, LoRA pairs, an orthogonal recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(4, 64, 128))
        self.down = nn.Parameter(torch.empty(4, 64, 64))
        for e in range(4):
            nn.init.kaiming_uniform_(self.gate_up[e], a=math.sqrt(5))
            nn.init.normal_(self.down.data[e], std=0.02 * (e + 1))
        self.router = nn.Parameter(F.normalize(torch.randn(4, 64), dim=-1))
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(8, 64) / 8), nn.Parameter(torch.zeros(64, 8))
        self.recurrent = nn.Parameter(torch.cat([nn.init.orthogonal_(torch.empty(32, 32)) for _ in range(4)]))
        self.bias = nn.Parameter(torch.cat([torch.zeros(32), torch.ones(32), torch.zeros(64)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.einsum("bd,edf->bef", x, self.gate_up)[..., :64]
        return torch.einsum("bef,efd,be->bd", up, self.down, x @ self.router.T) + x @ self.lora_a.T @ self.lora_b.T


@case(inputs=lambda: (torch.rand(2, 64),))
def fused_experts() -> nn.Module:
    return Experts()

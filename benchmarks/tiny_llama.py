"""A small Llama-style character model that trains itself on tiny Shakespeare, and outliers planted in it.

    model, calib, eval_fn, example_inputs, info = tiny_llama.load()  # like workloads.load

The first call trains for a few minutes and caches the weights beside this file; `python benchmarks/tiny_llama.py` does
that ahead of time. Calibration, evaluation and metric are those of the workload shakespeare_gpt.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysq.latency import threads

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
TRAINING_THREADS = 1  # sums in one order, so equal weights; two are slower where others compute too
LIKE = "shakespeare_gpt"  # the workload whose text, batches and metric are used
sys.path.insert(0, str(HERE / "workloads"))


@dataclass(frozen=True)
class Settings:
    """What the weights depend on, and so the name of the cached file.

    Attributes:
        width: of the residual stream.
        layers: number of blocks.
        heads: of the queries.
        kv_heads: of keys and values; divides `heads`.
        hidden: width of the gated MLP.
        vocab: characters in the text.
        context: characters that the model sees.
        batch: windows per training step.
        steps: of training.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        seed: of the weights, the windows and the outliers.
    """

    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 3
    hidden: int = 512
    vocab: int = 65
    context: int = 128
    batch: int = 8
    steps: int = 1000
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0

    @property
    def path(self) -> Path:
        """Where the trained weights are cached."""
        digest = hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:12]
        return CACHE / f"tiny_llama_{digest}.pt"


@dataclass(frozen=True)
class Outliers:
    """How many of the channels grow, and by which factors.

    Chosen so that int8 without smoothing fails: simulated with minmax ranges it loses 4.6 % relative, and 12.1 % in the
    7 bits of CPUs without VNNI; without outliers 0.0 % and 0.1 %.

    Attributes:
        share: of the channels of each tensor, at least one.
        factors: drawn between these two.
        value_factors: those of v_proj. Smaller, for its result is also an operand of the product with the attention
            weights, which smoothing a linear layer does not relieve: 20 to 60 cost 1.4 % there, whatever alpha is.
    """

    share: float = 0.01
    factors: tuple[float, float] = (20.0, 60.0)
    value_factors: tuple[float, float] = (4.0, 9.0)


SETTINGS, OUTLIERS = Settings(), Outliers()


class RMSNorm(nn.Module):
    """The formula of transformers' LlamaRMSNorm, op by op."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square of the last axis."""
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x.to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    """Return the last axis with its halves swapped, the first negated."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; its products are torch.matmul, which int8 kernels take."""

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = s.heads, s.kv_heads, s.width // s.heads
        self.q_proj = nn.Linear(s.width, s.heads * self.size, bias=False)
        self.k_proj = nn.Linear(s.width, s.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(s.width, s.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(s.heads * self.size, s.width, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        angle = torch.outer(torch.arange(s.context), frequency).repeat(1, 2)  # (context, size)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        ahead = torch.ones(s.context, s.context, dtype=torch.bool).triu(1)
        self.register_buffer("mask", ahead, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (batch, time, width) over the time that has passed."""
        batch, time, _ = x.shape
        q = self.rotated(self.q_proj(x).view(batch, time, self.heads, self.size).transpose(1, 2))
        k = self.rotated(self.k_proj(x).view(batch, time, self.kv_heads, self.size).transpose(1, 2))
        v = self.v_proj(x).view(batch, time, self.kv_heads, self.size).transpose(1, 2)
        scores = torch.matmul(q, self.repeated(k).transpose(2, 3)) * self.size**-0.5
        scores = scores.masked_fill(self.mask[:time, :time], -1e4)
        y = torch.matmul(torch.softmax(scores, dim=-1), self.repeated(v))
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))
        return out

    def rotated(self, x: Tensor) -> Tensor:
        """Return queries or keys turned by their positions."""
        time = x.shape[2]
        return x * self.cos[:time] + rotate_half(x) * self.sin[:time]

    def repeated(self, x: Tensor) -> Tensor:
        """Return keys or values once for each query head that reads them."""
        batch, _, time, size = x.shape
        copies = self.heads // self.kv_heads
        return x[:, :, None].expand(batch, self.kv_heads, copies, time, size).reshape(batch, self.heads, time, size)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.width, s.hidden, bias=False)
        self.up_proj = nn.Linear(s.width, s.hidden, bias=False)
        self.down_proj = nn.Linear(s.hidden, s.width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map each position by itself."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.width)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.width)
        self.mlp = GatedMLP(s)

    def forward(self, x: Tensor) -> Tensor:
        """Add what attention and MLP find to the residual stream."""
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class TinyLlama(nn.Module):
    """Characters to the logits of the next one."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.width)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.width)
        self.lm_head = nn.Linear(s.width, s.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.04)

    def forward(
        self,
        ids: Tensor,  # (batch, time), int64
    ) -> Tensor:
        """Return logits, (batch, time, vocab)."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.lm_head(self.norm(x))
        return out


def train(s: Settings) -> TinyLlama:
    """Return a model trained on random windows of the text; equal settings give equal weights on one machine."""
    generator = torch.Generator().manual_seed(s.seed)
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)
        model = TinyLlama(s)
    with np.load(HERE / "workloads" / "shakespeare.npz") as arrays:
        text = torch.from_numpy(arrays["train"]).long()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.learning_rate, total_steps=s.steps, pct_start=0.1)
    for step in range(1, s.steps + 1):
        starts = torch.randint(len(text) - s.context, (s.batch, 1), generator=generator)
        window = text[starts + torch.arange(s.context + 1)]  # (batch, context + 1)
        loss = functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"tiny_llama: step {step} of {s.steps}, loss {loss.item():.3f}", flush=True)
    return model.requires_grad_(False).eval()


def trained(s: Settings) -> tuple[TinyLlama, float]:
    """Return the trained model and its score, from the cache if they are there."""
    import workloads

    if not s.path.exists():
        with threads(TRAINING_THREADS):
            model = train(s)
        content = {"weights": model.state_dict(), "fp32": workloads.make_eval(LIKE)(model)}
        CACHE.mkdir(exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")
        with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as file:
            torch.save(content, file)
        os.replace(file.name, s.path)  # whoever reads at the same time sees all of it or nothing
    content = torch.load(s.path, weights_only=True)
    model = TinyLlama(s)
    model.load_state_dict(content["weights"])
    return model.requires_grad_(False).eval(), content["fp32"]


def plant(model: TinyLlama, s: Settings, outliers: Outliers) -> None:
    """Scale a few channels up where they are written and down where they are read: the model computes what it did.

    Channels of a norm are read by the linears behind it, as SmoothQuant knows them. Those of up_proj and v_proj pass
    through a product before down_proj and o_proj read them, and v_proj's are read by several query heads.
    """
    generator = torch.Generator().manual_seed(s.seed)

    def chosen(width: int) -> Tensor:
        return torch.randperm(width, generator=generator)[: max(1, round(outliers.share * width))]

    def grown(width: int, channels: Tensor, factors: tuple[float, float]) -> Tensor:
        result = torch.ones(width)
        result[channels] = torch.empty(len(channels)).uniform_(*factors, generator=generator)
        return result

    def move(writer: Tensor, readers: list[nn.Linear], up: Tensor, down: Tensor) -> None:
        writer *= up if writer.ndim == 1 else up[:, None]
        for reader in readers:
            reader.weight /= down

    stream = chosen(s.width)  # the same channels in every norm, as in large language models
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention, mlp = layer.self_attn, layer.mlp
        up = grown(s.width, stream, outliers.factors)
        move(layer.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj], up, up)
        up = grown(s.width, stream, outliers.factors)
        move(layer.post_attention_layernorm.weight, [mlp.gate_proj, mlp.up_proj], up, up)
        up = grown(s.hidden, chosen(s.hidden), outliers.factors)
        move(mlp.up_proj.weight, [mlp.down_proj], up, up)
        values = attention.v_proj.out_features
        up = grown(values, chosen(values), outliers.value_factors)
        copied = up.view(s.kv_heads, -1).repeat_interleave(s.heads // s.kv_heads, dim=0).flatten()
        move(attention.v_proj.weight, [attention.o_proj], up, copied)
    up = grown(s.width, stream, outliers.factors)
    move(model.norm.weight, [model.lm_head], up, up)


def load(
    settings: Settings = SETTINGS, outliers: Outliers | None = OUTLIERS
) -> tuple[TinyLlama, list[tuple[Tensor, ...]], Callable[..., float], tuple[Tensor, ...], dict[str, Any]]:
    """Return (model, calib, eval_fn, example_inputs, info), as `workloads.load` does.

    Args:
        settings: of the model and its training.
        outliers: what is planted; None for nothing.
    """
    import workloads

    model, fp32 = trained(settings)
    if outliers is not None:
        plant(model, settings, outliers)
    calib = [x for x, _ in workloads.eval_batches(LIKE, "train")]
    example = next(workloads.eval_batches(LIKE))[0]
    info = {
        "name": "tiny_llama",
        "kind": "transformer",
        "metric": "top1",
        "fp32": fp32,
        "latency_inputs": tuple(x[:1].clone() for x in example),
        "params": sum(p.numel() for p in model.parameters()),
        "n_eval_batches": sum(1 for _ in workloads.eval_batches(LIKE)),
    }
    return model, calib, workloads.make_eval(LIKE), example, info


if __name__ == "__main__":
    known = load()[-1]
    print(f"tiny_llama: {known['params']} parameters, next-character top-1 {known['fp32']:.4f}")

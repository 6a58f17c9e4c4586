"""The demo network in PyTorch: a small decoder with a mixture of experts in every block.

It is the "qwen3moe" form: RMS norms before attention and experts, an RMS norm on each head's
queries and keys, rotary positions that turn the two halves of a head, a softmax router whose
chosen weights are scaled to sum to one, SwiGLU experts, and the embedding reused as the output.
It must not know texts, files or the optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Config", "StoryNet"]


@dataclass(frozen=True)
class Config:
    """Sizes of the network, named as in Hugging Face configurations."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    dropout: float = 0.1


def _locked_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drop whole channels of x [batch, tokens, channels], the same ones at all its tokens.

    Cheaper than a draw per value on a CPU, and as good a regulariser for repeated small data.
    """
    if not training or rate == 0.0:
        return x
    keep = 1.0 - rate
    mask = torch.empty(x.shape[0], 1, x.shape[2], device=x.device).bernoulli_(keep) / keep
    return x * mask.to(x.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, tokens, head_dim] by its positions, halves paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        width = c.num_attention_heads * c.head_dim
        kv = c.num_key_value_heads * c.head_dim
        self.q = nn.Linear(c.hidden_size, width, bias=False)
        self.k = nn.Linear(c.hidden_size, kv, bias=False)
        self.v = nn.Linear(c.hidden_size, kv, bias=False)
        self.o = nn.Linear(width, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(b, t, -1, self.c.head_dim)

        q = _rope(self.q_norm(heads(self.q(x)).float()).transpose(1, 2), cos, sin)
        k = _rope(self.k_norm(heads(self.k(x)).float()).transpose(1, 2), cos, sin)
        v = heads(self.v(x)).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
        )
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class _Experts(nn.Module):
    """Router and experts; weights [experts, out, in] as GGUF stores them.

    After a forward pass `balance` holds the load-balance loss (1 when even), `router_z` the mean
    squared log-sum-exp of the router's scores and `usage` [experts] the share of the choices.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.k, self.n = c.num_experts_per_tok, c.num_experts
        h, m = c.hidden_size, c.moe_intermediate_size
        self.router = nn.Linear(h, self.n, bias=False)
        self.gate = nn.Parameter(torch.randn(self.n, m, h) * h**-0.5)
        self.up = nn.Parameter(torch.randn(self.n, m, h) * h**-0.5)
        self.down = nn.Parameter(torch.randn(self.n, h, m) * m**-0.5)
        self.balance = self.router_z = torch.zeros(())
        self.usage = torch.zeros(self.n)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(flat.float(), self.router.weight)
        probabilities = scores.softmax(-1)
        weight, chosen = probabilities.topk(self.k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        order = chosen.reshape(-1).argsort()
        counts = torch.bincount(chosen.reshape(-1), minlength=self.n)
        self.usage = counts / counts.sum()
        self.balance = self.n * (self.usage.detach() * probabilities.mean(0)).sum()
        self.router_z = scores.logsumexp(-1).square().mean()
        token = order // self.k
        parts = []
        # Unbound, since the gradient of an index would be a zero array as large as all experts.
        experts = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
        for xs, (gate, up, down) in zip(flat[token].split(counts.tolist()), experts, strict=True):
            parts.append(F.linear(F.silu(F.linear(xs, gate)) * F.linear(xs, up), down))
        out = torch.cat(parts) * weight.reshape(-1)[order, None].to(parts[0].dtype)
        return torch.zeros_like(flat, dtype=out.dtype).index_add_(0, token, out).view(x.shape)


class _Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.rate = c.dropout
        self.attn_norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.attn = _Attention(c)
        self.ffn_norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.experts = _Experts(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + _locked_dropout(self.attn(self.attn_norm(x), cos, sin), self.rate, self.training)
        return x + _locked_dropout(self.experts(self.ffn_norm(x)), self.rate, self.training)


class StoryNet(nn.Module):
    """Token ids [batch, tokens] in, hidden states or logits out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        nn.init.normal_(self.embed.weight, std=0.02)
        for block in self.blocks:
            for w in (block.attn.o.weight, block.experts.down):
                with torch.no_grad():
                    w.mul_((2 * c.num_hidden_layers) ** -0.5)
        angle = torch.outer(
            torch.arange(c.max_position_embeddings).float(),
            c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim),
        )
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the normed states [batch, tokens, hidden] of `ids`."""
        t = ids.shape[1]
        x = _locked_dropout(self.embed(ids), self.config.dropout / 2, self.training)
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t])
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [batch, tokens, vocabulary] of `ids` [batch, tokens]."""
        return F.linear(self.hidden(ids), self.embed.weight)

    def losses(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the summed negative log-likelihood of rows `ids` [b, t + 1] under `weights`."""
        kept = weights.reshape(-1) > 0
        states = self.hidden(ids[:, :-1]).reshape(-1, self.config.hidden_size)[kept]
        logits = F.linear(states, self.embed.weight).float()
        losses = F.cross_entropy(logits, ids[:, 1:].reshape(-1)[kept], reduction="none")
        return losses @ weights.reshape(-1)[kept]

    def router_losses(self) -> tuple[Tensor, Tensor]:
        """Return the layers' mean (load-balance loss, router z loss) of the last pass."""
        experts = [block.experts for block in self.blocks]
        return (
            torch.stack([e.balance for e in experts]).mean(),
            torch.stack([e.router_z for e in experts]).mean(),
        )

    def usage(self) -> Tensor:
        """Return each layer's share of choices per expert [layers, experts], of the last pass."""
        return torch.stack([block.experts.usage for block in self.blocks])

"""Decode step and prefill of a Mixtral in small, in PyTorch: a plain loop with a static cache, and Hugging Face's.

The plain model is written as its user would at best: one product for queries, keys and values, caches written in place,
scaled_dot_product_attention over the places in use, experts fed in the fastest of three ways (`WAYS`).
"""

import torch
from torch import nn
from torch.nn import functional

WAYS = ("each", "grouped_mm", "gather_bmm")


class Experts(nn.Module):
    """SwiGLU experts, K of E for each row: rows [N, D] -> [N, D]. One expert is a dense feed-forward."""

    def __init__(self, width: int, hidden: int, experts: int, choices: int, way: str):
        super().__init__()
        self.choices, self.experts, self.work = choices, experts, getattr(self, way)
        self.router = nn.Linear(width, experts, bias=False)
        self.w_in = nn.Parameter(torch.randn(experts, width, 2 * hidden) * 0.02)  # gate beside input
        self.w_out = nn.Parameter(torch.randn(experts, hidden, width) * 0.02)

    def forward(self, rows):
        if self.experts == 1:
            return self.bend(rows @ self.w_in[0]) @ self.w_out[0]
        best, index = self.router(rows).topk(self.choices, -1)  # [N, K]
        return self.work(rows, best.softmax(-1), index)

    def bend(self, hidden):
        gate, hidden = hidden.chunk(2, -1)
        return functional.silu(gate) * hidden

    def each(self, rows, gates, index):
        """Expert by expert, views of the weights."""
        if len(rows) == 1:
            parts = zip(index[0].tolist(), gates[0])
            return sum(gate * (self.bend(rows @ self.w_in[one]) @ self.w_out[one]) for one, gate in parts)
        out = torch.zeros_like(rows)
        for one in index.unique().tolist():
            place, choice = torch.where(index == one)
            part = self.bend(rows[place] @ self.w_in[one]) @ self.w_out[one]
            out.index_add_(0, place, part * gates[place, choice, None])
        return out

    def grouped_mm(self, rows, gates, index):
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=self.router.out_features).cumsum(0).to(torch.int32)
        hidden = self.bend(functional.grouped_mm(rows[order // self.choices], self.w_in, offs=ends))
        out = functional.grouped_mm(hidden, self.w_out, offs=ends) * gates.reshape(-1)[order, None]
        return torch.zeros_like(rows).index_add_(0, order // self.choices, out)

    def gather_bmm(self, rows, gates, index):
        flat = index.reshape(-1)
        taken = rows.repeat_interleave(self.choices, 0)[:, None]  # [N * K, 1, D]
        out = torch.bmm(self.bend(torch.bmm(taken, self.w_in[flat])), self.w_out[flat])
        return (out.view(len(rows), self.choices, -1) * gates[..., None]).sum(1)


class Block(nn.Module):
    """A block: RMSNorm, rotary attention with a static cache, SwiGLU experts."""

    def __init__(self, sizes: dict, batch: int, length: int, way: str):
        super().__init__()
        width, self.heads = sizes["width"], sizes["heads"]
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.experts = Experts(width, sizes["hidden"], sizes["experts"], sizes["choices"], way)
        self.keys = torch.zeros(batch, self.heads, length, width // self.heads)
        self.values = torch.zeros_like(self.keys)

    def forward(self, x, first: int, cos, sin):
        """Rows x [B, S, D] at the places from `first` on; cos and sin [S, h] of those places."""
        batch, count, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = (part * cos + self.swapped(part) * sin for part in (query, key))
        end = first + count
        self.keys[:, :, first:end], self.values[:, :, first:end] = key, value
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        mixed = functional.scaled_dot_product_attention(query, keys, values, is_causal=count > 1)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return x + self.experts(self.norm2(x).view(-1, width)).view(x.shape)

    @staticmethod
    def swapped(part):
        first, second = part.chunk(2, -1)
        return torch.cat((-second, first), -1)


class Plain(nn.Module):
    """The model: tokens [B, S] at the places from `first` on -> logits [B, V] after the last of them."""

    def __init__(self, sizes: dict, vocabulary: int, batch: int, length: int, way: str):
        super().__init__()
        width, size = sizes["width"], sizes["width"] // sizes["heads"]
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(sizes, batch, length, way) for _ in range(sizes["layers"]))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, vocabulary, bias=False)
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens, first: int):
        x, end = self.tokens(tokens), first + tokens.shape[1]
        for block in self.blocks:
            x = block(x, first, self.cos[first:end], self.sin[first:end])
        return self.head(self.norm(x[:, -1]))


def plain_call(sizes: dict, vocabulary: int, batch: int, length: int, place: int, way: str):
    """Returns a function: one decode step at `place`; where that is 0, the prefill of `length` tokens."""
    threads()
    model = Plain(sizes, vocabulary, batch, length, way)
    tokens = torch.randint(vocabulary, (batch, 1 if place else length))
    return without_gradient(lambda: model(tokens, place).numpy())


def hugging_face_call(sizes: dict, vocabulary: int, batch: int, length: int, place: int):
    """Returns the same of Hugging Face's Mixtral with its static cache."""
    from transformers import MixtralConfig, MixtralForCausalLM, StaticCache

    threads()
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=sizes["width"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        num_local_experts=sizes["experts"],
        num_experts_per_tok=sizes["choices"],
        max_position_embeddings=length,
    )
    config._experts_implementation = "grouped_mm"  # of transformers 5; older ones have one way
    model = MixtralForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=length)
    tokens = torch.randint(vocabulary, (batch, 1 if place else length))
    places = torch.arange(place, place + tokens.shape[1])
    given = {"past_key_values": cache, "cache_position": places, "logits_to_keep": 1}
    return without_gradient(lambda: model(tokens, **given).logits.numpy())


def threads() -> None:
    """Lets PyTorch use all cores of this process."""
    import os

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def without_gradient(run):
    """Returns a function that runs without the record of gradients."""

    def call():
        with torch.inference_mode():
            return run()

    return call

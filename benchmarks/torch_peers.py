"""The same work in PyTorch, written as its users would at best: layer, training step and decode loop, float32 on CPU.

Experts are fed in three ways: `sort_mm` sorts choices and multiplies expert by expert, `grouped_mm` hands the sorted
rows to one operator, `gather_bmm` fills slots of limited capacity as Switchyard does.
"""

import math
import os

import numpy as np
import torch
from torch import nn
from torch.nn import functional

WAYS = ("sort_mm", "grouped_mm", "gather_bmm")


def set_threads() -> None:
    """Lets PyTorch use all cores."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)


class MoE(nn.Module):
    """A conditional layer of two matrices: rows [N, D] -> [N, D], with the balance loss of Switch as `loss`."""

    def __init__(self, width: int, experts: int, choices: int, way: str, activation=functional.relu, factor=1.25):
        super().__init__()
        self.experts, self.choices, self.factor, self.activation = experts, choices, factor, activation
        self.router = nn.Linear(width, experts, bias=False)
        self.w_in = nn.Parameter(torch.randn(experts, width, 4 * width) * 0.02)
        self.w_out = nn.Parameter(torch.randn(experts, 4 * width, width) * 0.02)
        self.work = getattr(self, way)

    def forward(self, rows):
        probabilities = functional.softmax(self.router(rows), -1)
        gates, index = probabilities.topk(self.choices, -1)  # [N, K]
        if self.choices > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        load = torch.bincount(index.reshape(-1), minlength=self.experts) / index.numel()
        self.loss = self.experts * (load * probabilities.mean(0)).sum()
        return self.work(rows, gates, index.reshape(-1))

    def sorted_rows(self, rows, index):
        """Rows in the order of their experts, the order, and how many each expert has."""
        order = torch.argsort(index, stable=True)
        return rows[order // self.choices], order, torch.bincount(index, minlength=self.experts)

    def to_rows(self, out, order, gates):
        """Weighted outputs of sorted choices, back at their rows."""
        out = out * gates.reshape(-1)[order][:, None]
        return torch.zeros_like(out[: gates.shape[0]]).index_add_(0, order // self.choices, out)

    def sort_mm(self, rows, gates, index):
        taken, order, count = self.sorted_rows(rows, index)
        parts = taken.split(count.tolist())
        out = [self.activation(part @ w_in) @ w_out for part, w_in, w_out in zip(parts, self.w_in, self.w_out)]
        return self.to_rows(torch.cat(out), order, gates)

    def grouped_mm(self, rows, gates, index):
        taken, order, count = self.sorted_rows(rows, index)
        ends = count.cumsum(0).to(torch.int32)
        hidden = self.activation(functional.grouped_mm(taken, self.w_in, offs=ends))
        return self.to_rows(functional.grouped_mm(hidden, self.w_out, offs=ends), order, gates)

    def gather_bmm(self, rows, gates, index):
        slots = min(len(rows), math.ceil(len(index) * self.factor / self.experts))
        _, order, count = self.sorted_rows(rows, index)
        first = (count.cumsum(0) - count)[index[order]]
        place = torch.arange(len(order)) - first
        kept = place < slots
        target, source = (index[order] * slots + place)[kept], order[kept]
        taken = rows.new_zeros(self.experts * slots, rows.shape[1]).index_copy(0, target, rows[source // self.choices])
        hidden = self.activation(torch.bmm(taken.view(self.experts, slots, -1), self.w_in))
        out = torch.bmm(hidden, self.w_out).view(-1, rows.shape[1])[target] * gates.reshape(-1)[source][:, None]
        return torch.zeros_like(rows).index_add_(0, source // self.choices, out)


def layer_call(rows: int, width: int, experts: int, choices: int, way: str):
    """Returns a function: one forward and backward pass of the layer, of rows and weights."""
    set_threads()
    layer = MoE(width, experts, choices, way)
    x = torch.randn(rows, width, requires_grad=True)

    def call():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        (layer(x).sum() + layer.loss).backward()

    return call


class Block(nn.Module):
    """A block of a Transformer: pre-norm, causal attention, a dense or conditional feed-forward."""

    def __init__(self, width: int, heads: int, experts: int, way: str):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.moe = MoE(width, experts, 1, way, self.gelu) if experts > 1 else None
        if self.moe is None:
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    @staticmethod
    def gelu(x):
        return functional.gelu(x, approximate="tanh")

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x, normed = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width)), None
        normed = self.norm2(x)
        if self.moe is not None:
            return x + self.moe(normed.view(-1, width)).view(x.shape)
        return x + self.down(self.gelu(self.up(normed)))


class Model(nn.Module):
    """A decoder with learned positions and a tied head."""

    def __init__(self, sizes: dict, vocabulary: int, experts: int, way: str):
        super().__init__()
        width = sizes["hidden_size"]
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(sizes["seq_length"], width)
        blocks = [Block(width, sizes["num_heads"], experts, way) for _ in range(sizes["num_layers"])]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.blocks(self.tokens(tokens) + self.places.weight)
        return self.norm(x) @ self.tokens.weight.T

    def routing_loss(self):
        """The weighted sum of the layers' balance losses."""
        return 0.01 * sum(block.moe.loss for block in self.blocks if block.moe is not None)


def train_call(sizes: dict, vocabulary: int, experts: int, way: str, arrays, rate: float, compiled: bool):
    """Returns a function: one training step with the fused AdamW and a clipped gradient."""
    set_threads()
    model = Model(sizes, vocabulary, experts, way)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, labels = (torch.from_numpy(part.astype(np.int64)) for part in arrays)

    def call():
        loss = functional.cross_entropy(forward(tokens).view(-1, vocabulary), labels.view(-1)) + model.routing_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return call

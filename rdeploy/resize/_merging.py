"""Token merging with a fixed schedule, as modules: the blocks of a plain vision transformer go in, one that merges comes out.

Bipartite soft matching (ToMe, arXiv 2210.09461) with the number of merged tokens of each block fixed beforehand, so that every
shape in the exported graph is static. Scatter with reduction is refused or silently wrong in TensorRT: selecting, compacting
and averaging are products with one-hot matrices, built of TopK, ArgMax and Equal. Kept tokens keep their order, so that two
runtimes whose similarities differ in the last bit still hand the same tokens to the next block. A block merges at most
`MOST` tokens: bfloat16 tells them and all that stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rdeploy.resize import _transformers_vit

MOST = 255
"""bfloat16 holds whole numbers up to 256, and what is more is rounded to 256 or more."""


class MergingBlocks(nn.Module):  # type: ignore[misc]
    """Run transformer blocks, merging `schedule[i]` of the (N, prefix + patches, width) tokens inside block i.

    The prefix (class token, registers) is never merged. With `restore` every patch gets its merged token back at the end, so
    that pooling weighs by size and dense outputs keep their grid.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], schedule: Sequence[int], *, prefix: int, patches: int, restore: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.prefix = prefix
        self.merges = nn.ModuleList()
        left = patches
        for count in schedule:
            self.merges.append(Merge(left, count) if count else nn.Identity())
            left -= count
        like = next(p for p in blocks[0].parameters() if p.is_floating_point())
        if restore:
            self.register_buffer("origin", torch.eye(patches, dtype=like.dtype))
        self.to(device=like.device, dtype=like.dtype)
        self.train(blocks[0].training)

    def forward(self, tokens: torch.Tensor, *context: Any, **named: Any) -> torch.Tensor:
        """Return the tokens after the last block. `context` is what a network gives its blocks besides (no mask of any)."""
        size: torch.Tensor | None = None
        origin: torch.Tensor | None = getattr(self, "origin", None)
        for block, merge in zip(self.blocks, self.merges):
            if not isinstance(merge, Merge) and size is None:
                tokens = block(tokens, *context, **named)
                continue
            attended, keys = attend(block, tokens, None if size is None else self._bias(size))
            tokens = tokens + attended
            if isinstance(merge, Merge):
                tokens, size, origin = self._merged(merge, tokens, keys, size, origin)
            tokens = tokens + perceive(block, tokens)
        if origin is not None and size is not None:
            rest = origin @ tokens[:, self.prefix :]
            tokens = torch.cat([tokens[:, : self.prefix], rest], dim=1)
        return tokens

    def _bias(self, size: torch.Tensor) -> torch.Tensor:
        """Return what a key's logit gains by standing for `size` tokens: proportional attention."""
        return functional.pad(size.log().squeeze(-1), (self.prefix, 0))[:, None, None, :]

    def _merged(
        self,
        merge: Merge,
        tokens: torch.Tensor,
        keys: torch.Tensor,
        size: torch.Tensor | None,
        origin: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        rest = tokens[:, self.prefix :]
        size = torch.ones_like(rest[:, :, :1]) if size is None else size
        plan = merge.plan(keys[:, self.prefix :])
        total = merge.sum(size, plan)
        mean = merge.sum(rest * size, plan) / total
        if origin is not None:
            origin = merge.follow(origin, plan)
        return torch.cat([tokens[:, : self.prefix], mean], dim=1), total, origin


class Merge(nn.Module):  # type: ignore[misc]
    """Merge `count` of `tokens` tokens into their most similar neighbours of the other half."""

    def __init__(self, tokens: int, count: int) -> None:
        super().__init__()
        even, odd = -(-tokens // 2), tokens // 2
        if not 0 < count < even or count > MOST:
            raise ValueError(f"of {tokens} tokens 1 to {min(MOST, even - 1)} can be merged at once, not {count}")
        self.count, self.kept = count, even - count
        self.register_buffer("even", torch.arange(even))
        self.register_buffer("odd", torch.arange(odd)[:, None])
        # before[i, j] counts token j among those before i; offset[row, i] is how far token i moves to reach a row.
        self.register_buffer("before", torch.tril(torch.ones(even, even), diagonal=-1))
        self.register_buffer("offset", (torch.arange(even) - torch.arange(self.kept)[:, None]).float())

    def plan(self, keys: torch.Tensor) -> torch.Tensor:
        """Return, for keys (N, tokens, d), the one-hot matrix (N, kept + odd, even) of where each even token goes."""
        keys = keys / keys.norm(dim=-1, keepdim=True)
        scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
        picked = scores.amax(dim=-1).topk(self.count, dim=-1).indices
        merged = (picked[:, :, None] == self.even).to(keys.dtype).sum(dim=1)[:, None, :]
        target = (scores.argmax(dim=-1)[:, None, :] == self.odd).to(keys.dtype) * merged
        gone = (self.before @ merged.transpose(1, 2)).transpose(1, 2)
        kept = (gone == self.offset).to(keys.dtype) * (1 - merged)
        return torch.cat([kept, target], dim=1)

    def sum(self, values: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        """Return, for values (..., tokens, d), those of the kept tokens and the sums of the merged ones."""
        moved = plan @ values[..., ::2, :]
        return torch.cat([moved[:, : self.kept], moved[:, self.kept :] + values[..., 1::2, :]], dim=1)

    def follow(self, origin: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        """Return, for the one-hot matrix (..., patches, tokens) of where each patch is, where it is now.

        A constant stays the left factor: as the right one it would look like a layer's weights and be quantized.
        """
        moved = origin[..., ::2] @ plan.transpose(1, 2)
        return torch.cat([moved[..., : self.kept], moved[..., self.kept :] + origin[..., 1::2]], dim=-1)


def attend(block: Any, tokens: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a block's attention output, (N, tokens, width), and its keys, averaged over the heads."""
    if _transformers_vit.is_layer(block):
        return _transformers_vit.attend(block, tokens, _softmax, bias)
    if hasattr(block, "self_attention"):
        return _attend_torchvision(block, tokens, bias)
    return _attend_timm(block, tokens, bias)


def perceive(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the output of a block's MLP branch."""
    if _transformers_vit.is_layer(block):
        return _transformers_vit.perceive(block, tokens)
    if hasattr(block, "self_attention"):
        return block.mlp(block.ln_2(tokens))  # type: ignore[no-any-return]
    return block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))  # type: ignore[no-any-return]


def _attend_timm(block: Any, tokens: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    attention, normed = block.attn, block.norm1(tokens)
    count = normed.shape[1]
    split = attention.qkv(normed).reshape(-1, count, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = split.unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    mixed = _softmax(queries * attention.scale, keys, bias, attention.attn_drop) @ values
    mixed = attention.norm(mixed.transpose(1, 2).reshape(-1, count, attention.num_heads * attention.head_dim))
    if attention.gate is not None:
        mixed = mixed * attention.gate(normed).sigmoid()
    return block.drop_path1(block.ls1(attention.proj_drop(attention.proj(mixed)))), keys.mean(dim=1)


def _attend_torchvision(
    block: Any, tokens: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    attention, normed = block.self_attention, block.ln_1(tokens)
    count, heads, each = normed.shape[1], attention.num_heads, attention.head_dim
    joined = functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = joined.reshape(-1, count, 3, heads, each).permute(2, 0, 3, 1, 4).unbind(0)
    weights = _softmax(queries * each**-0.5, keys, bias, nn.Dropout(attention.dropout).train(attention.training))
    mixed = (weights @ values).transpose(1, 2).reshape(-1, count, heads * each)
    return block.dropout(attention.out_proj(mixed)), keys.mean(dim=1)


def _softmax(queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | None, dropout: Any) -> torch.Tensor:
    logits = queries @ keys.transpose(-2, -1)
    return dropout((logits if bias is None else logits + bias).softmax(dim=-1))  # type: ignore[no-any-return]

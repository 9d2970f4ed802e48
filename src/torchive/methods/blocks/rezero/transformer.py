"""Transformer layers without norms, called as PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class _Layer(nn.Module):
    """Attention and feed-forward parts and one alpha, or one for each branch."""

    replaces: type[nn.Module]  # PyTorch's layer
    branches: int

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 8,
        hidden: int = 2048,
        drop: float = 0.1,
        act: Literal["relu", "gelu"] = "relu",
        batch_first: bool = False,
        share: bool = True,
        start: float = 0.0,
    ) -> None:
        super().__init__()
        if min(channels, num_heads, hidden) < 1 or channels % num_heads:
            given = f"{channels}, {num_heads} and {hidden}"
            raise ValueError(f"expected num_heads that divide channels, and hidden >= 1, got {given}")
        if act not in ACTS:
            raise ValueError(f"act must be relu or gelu, got {act!r}")
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout=drop, batch_first=batch_first)
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.channels, self.drop, self.act = channels, nn.Dropout(drop), act
        self.alpha = nn.Parameter(torch.full((1 if share else self.branches,), float(start)))
        if self.branches == 3:
            self.multihead_attn = nn.MultiheadAttention(channels, num_heads, dropout=drop, batch_first=batch_first)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int | None = None, **options: Any) -> Self:
        """Take over the shape and weights of PyTorch's layer; its norms are left out.

        Raises:
            TypeError: ``old`` is not PyTorch's layer of this kind.
            ValueError: its activation is neither ReLU nor GELU.
        """
        if not isinstance(old, cls.replaces):
            raise TypeError(f"expected a torch.nn.{cls.replaces.__name__}, got {type(old).__name__}")
        new = cls(**_shape_of(old), **options)
        state = {k: v for k, v in old.state_dict().items() if not k.startswith("norm")}
        new.load_state_dict(state | {"alpha": new.alpha.detach()})
        return new.train(old.training)

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """alpha has no weight decay."""
        return {"alpha": {"weight_decay": 0.0}}

    def _gated(self, x: Tensor, f: Tensor, part: int) -> Tensor:
        """x + alpha f, with dropout of f in training."""
        return torch.addcmul(x, self.drop(f), self.alpha[part % len(self.alpha)].to(f.dtype))

    def _feed(self, x: Tensor) -> Tensor:
        return self.linear2(self.drop(ACTS[self.act](self.linear1(x))))

    def _check(self, x: Tensor) -> None:
        if x.ndim not in (2, 3) or x.shape[-1] != self.channels:
            raise ValueError(f"expected (N, L, {self.channels}), (L, N, ..) or (L, ..), got shape {tuple(x.shape)}")


class _NoFusedForm:
    """What ``torch.nn.TransformerEncoder`` finds in the place of a norm: it then leaves its fused form alone."""

    def __init__(self) -> None:
        self.weight = self.bias = self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


class ReZeroEncoderLayer(_Layer):
    """x + alpha SelfAttn(x), then x + alpha FFN(x): (L, N, C) to the same shape, or (N, L, C) with ``batch_first``.

    It takes ``torch.nn.TransformerEncoderLayer``'s place, also inside ``torch.nn.TransformerEncoder`` with norm None.

    Args:
        channels: C.
        num_heads: attention heads; they divide C.
        hidden: width of the feed-forward part.
        drop: dropout of the attention's weights, of the hidden layer and of both branches.
        act: "relu" or "gelu".
        batch_first: whether the batch is the first axis.
        share: whether both branches have one alpha, as in the paper.
        start: alpha before training.

    Raises:
        ValueError: heads that do not divide C, or an unknown ``act``; in ``forward``, another shape.
    """

    replaces, branches = nn.TransformerEncoderLayer, 2
    norm1 = norm2 = _NoFusedForm()

    @staticmethod
    def accepts(old: nn.Module) -> bool:
        """Whether ``old`` is PyTorch's own layer."""
        return type(old) is nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self._check(src)
        f = _attend(self.self_attn, src, src, src_mask, src_key_padding_mask, is_causal)
        x = self._gated(src, f, 0)
        return self._gated(x, self._feed(x), 1)  # as src


class ReZeroDecoderLayer(_Layer):
    """Three gated branches: self-attention, attention to ``memory``, feed-forward; shapes as of the encoder's layer.

    It takes ``torch.nn.TransformerDecoderLayer``'s place. Arguments as of ``ReZeroEncoderLayer``.

    Args:
        channels: C.
        num_heads: attention heads; they divide C.
        hidden: width of the feed-forward part.
        drop: dropout of the attention's weights, of the hidden layer and of the branches.
        act: "relu" or "gelu".
        batch_first: whether the batch is the first axis.
        share: whether the branches have one alpha.
        start: alpha before training.

    Raises:
        ValueError: as the encoder's layer.
    """

    replaces, branches = nn.TransformerDecoderLayer, 3

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        self._check(tgt)
        x = self._gated(tgt, _attend(self.self_attn, tgt, tgt, tgt_mask, tgt_key_padding_mask, tgt_is_causal), 0)
        f = _attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        x = self._gated(x, f, 1)
        return self._gated(x, self._feed(x), 2)  # as tgt


def _attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    causal: bool,
) -> Tensor:
    # dropout on a CPU has no fused form, and without masks the form that gives the weights is the faster one
    dropping = query.device.type == "cpu" and attention.training and attention.dropout > 0
    plain = dropping and mask is None and padding is None
    found, _ = attention(
        query,
        memory,
        memory,
        attn_mask=mask,
        key_padding_mask=padding,
        need_weights=plain,
        average_attn_weights=False,
        is_causal=causal,
    )
    return found


def _shape_of(old: Any) -> dict[str, Any]:
    act = old.activation
    name = "relu" if act is F.relu or isinstance(act, nn.ReLU) else "gelu"
    if name == "gelu" and not (act is F.gelu or isinstance(act, nn.GELU)):
        raise ValueError(f"the activation must be relu or gelu, got {act!r}")
    return {
        "channels": old.self_attn.embed_dim,
        "num_heads": old.self_attn.num_heads,
        "hidden": old.linear1.out_features,
        "drop": old.dropout1.p,
        "act": name,
        "batch_first": old.self_attn.batch_first,
    }

"""SAM's image encoder made faster in place: its attention with relative positions by our ops, without padded windows.

SAM's attention adds to the score of query (h, w) and key (h', w') the bias q·R_h[h − h'] + q·R_w[w − w'], over
the whole grid in a few blocks and inside windows in the others. Windows that leave the grid see keys of padding,
whose input is 0 and whose key and value are therefore the layer's bias: no token of padding is projected here.

Source: segment_anything/modeling/image_encoder.py; ViTDet, arXiv 2203.16527; rel-pos, arXiv 2112.01526."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .hosts import account, check_weights, full_name, head_count, known_base, plain_linear
from .ops.rel_pos_attention import rel_pos_attention
from .ops.rel_terms import rel_terms
from .ops.window_attention import window_attention

# Blocks with SAM's windows and attention with relative positions, by module: block and attention.
_SAM = {
    "segment_anything.modeling.image_encoder": ("Block", "Attention"),
    "aftersam.model._segment_anything.image_encoder": ("Block", "Attention"),  # the same file, without the predictor
    "timm.models.vision_transformer_sam": ("Block", "Attention"),
    **{
        f"transformers.models.{m}.modeling_{m}": (f"{name}VisionLayer", f"{name}VisionAttention")
        for m, name in (
            ("sam", "Sam"), ("sam_hq", "SamHQ"), ("got_ocr2", "GotOcr2"), ("slanext", "SLANeXt"),
            ("pp_formulanet", "PPFormulaNet"), ("deepseek_ocr2", "DeepseekOcr2Sam"),
            ("unlimited_ocr", "UnlimitedOcrSam"),
        )
    },
}  # fmt: skip
_SAM_BLOCKS = {f"{module}.{block}" for module, (block, _) in _SAM.items()}
_SAM_ATTENTIONS = {
    f"{module}.{attention}"
    for module, (_, eager) in _SAM.items()
    for attention in (eager, eager.replace("VisionAttention", "VisionSdpaAttention"))
}


class SamAttention(nn.Module):
    """SAM's attention with relative positions: over a grid (h, w), or inside windows where `window` is given.

    It has segment_anything's parameter names. `qkv` is any layer that computes each token by itself, and whose value
    at 0 is its `bias`; tables for another grid are interpolated, as SAM does."""

    def __init__(
        self, qkv: nn.Module, proj: nn.Module, rel_pos_h: nn.Parameter, rel_pos_w: nn.Parameter,
        *, num_heads: int, window: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = qkv
        self.proj = proj
        self.rel_pos_h = rel_pos_h  # (2·rows − 1, D)
        self.rel_pos_w = rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """x (T, h, w, C) -> the same."""
        height, width = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (T, h, w, 3, M, D)
        rel_h, rel_w = (
            rel.to(qkv.dtype)
            for rel in rel_terms(
                qkv[..., 0, :, :],
                _resized(self.rel_pos_h, self.window or height),
                _resized(self.rel_pos_w, self.window or width),
                windowed=bool(self.window),
            )
        )
        if self.window:
            bias = (
                qkv.new_zeros(qkv.shape[3:].numel()) if self.qkv.bias is None else self.qkv.bias.to(qkv.dtype)
            )
            x = window_attention(qkv, bias, rel_h, rel_w, window=self.window)
        else:
            q, k, v = qkv.flatten(1, 2).unbind(2)  # (T, P, M, D)
            x = rel_pos_attention(q, k, v, rel_h, rel_w, grid=(height, width))
            x = x.unflatten(1, (height, width))
        y: Tensor = self.proj(x.flatten(-2))
        return y


class _PairAttention(SamAttention):
    """`SamAttention` as transformers calls it and unpacks its result."""

    def forward(  # type: ignore[override]  # narrower than nn.Module's
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, None]:
        if output_attentions:
            raise ValueError("output_attentions is set, but this attention never holds its weights")
        return super().forward(hidden_states), None


def accelerate_sam(model: nn.Module) -> nn.Module:
    """Make every SAM encoder in `model` faster, in place, and return `model`: same weights, names and results.

    Takes the encoders of segment_anything (also inside its Sam), timm and transformers (SamVisionModel, SamModel and
    the encoders with the same layers, such as SamHQ's, GOT-OCR's and DeepSeek-OCR's). Their attention runs by
    `rel_pos_attention` and `window_attention`: no padded tokens, no scores in memory; gradients, autocast,
    torch.compile and the state dict stay. Attention weights are no longer returned (output_attentions).
    Raises ValueError, naming what is in the way, and changes nothing, for hooks, adapters or other layers in an
    attention, dropout, blocks without relative positions, and a model without SAM's blocks."""
    made = []
    for name, block in _blocks(model):
        if isinstance(block.attn, SamAttention):
            continue
        try:
            heads = _heads(block.attn)
        except ValueError as error:
            raise ValueError(f"accelerate_sam: {name}.attn: {error}") from error
        kind = _PairAttention if type(block.attn).__module__.startswith("transformers.") else SamAttention
        old = block.attn
        new = kind(old.qkv, old.proj, old.rel_pos_h, old.rel_pos_w, num_heads=heads, window=block.window_size)
        made.append((block, new.train(old.training)))
    for block, attention in made:
        block.attn = attention
        block.window_size = 0  # the attention cuts its own windows
    return model


def _blocks(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and block of every SAM block in `model`. Raises ValueError for one with another forward, or for none."""
    name = "a block with SAM's windows"
    blocks = [
        (n, m)
        for n, m in model.named_modules()
        if any(full_name(base) in _SAM_BLOCKS for base in type(m).__mro__)
    ]
    for _, block in blocks:
        known_base(block, _SAM_BLOCKS, name)
        if "forward" in vars(block):
            raise ValueError(
                f"{full_name(type(block))} has a forward of its own in this instance, which is not known"
            )
    if not blocks:
        raise ValueError(
            f"accelerate_sam: {type(model).__name__} holds no block of SAM's image encoder that is known"
        )
    return blocks


def _heads(attention: nn.Module) -> int:
    """The heads of SAM's attention with relative positions. Raises ValueError, naming it, for anything beside."""
    known_base(attention, _SAM_ATTENTIONS, "SAM's attention with relative positions")
    kind = type(attention).__name__
    if not getattr(attention, "use_rel_pos", False):
        raise ValueError(f"{kind} has no relative positions (use_rel_pos is False)")
    qkv, out = (plain_linear(attention, name) for name in ("qkv", "proj"))
    heads = head_count(attention)
    check_weights(kind, [qkv], out, heads)
    own = {"qkv", "proj", "rel_pos_h", "rel_pos_w", "use_rel_pos"}
    skipped = account(attention, own, sizes=(out[0].shape[0], heads))
    if skipped:
        raise ValueError(f"{kind} has dropout, {skipped}, which this op does not")
    return heads


def _resized(table: Tensor, keys: int) -> Tensor:
    """table (E, D) interpolated to (2·keys − 1, D), as SAM does."""
    if table.shape[0] == 2 * keys - 1:
        return table
    resized: Tensor = F.interpolate(table.t()[None], size=2 * keys - 1, mode="linear")
    return resized[0].t()

"""Layers that several parts of the model share: fast linear layers and norms, the convolutional stem, SAM's neck."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from axial_fusion.checks import ordinary
from axial_fusion.cpu import compiled
from axial_fusion.ops.dense_linear import dense_linear
from axial_fusion.ops.row_norm import row_norm

PIXEL_MEAN = (123.675, 116.28, 103.53)  # SAM's, of RGB in 0...255
PIXEL_STD = (58.395, 57.12, 57.375)


class SliceFeatures(NamedTuple):
    """Features of T slices: `embedding` (T, C, h, w) and `skips` ((T, c, H/s, W/s), ...), finest first."""

    embedding: Tensor
    skips: tuple[Tensor, ...]


def normalise(hu: Tensor, windows: Sequence[tuple[float, float]], *, unit: bool = False) -> Tensor:
    """hu (..., H, W) -> image (..., 3, H, W): three HU windows as SAM's normalised RGB; one window is repeated.

    `unit` leaves the channels in [0, 1]."""
    if len(windows) not in (1, 3):
        raise ValueError(f"windows has {len(windows)} HU ranges, but must have 1 or 3")
    windows = list(windows) * (3 // len(windows))
    channels = [((hu - low) / (high - low)).clamp(0, 1) for low, high in windows]
    if unit:
        return torch.stack(channels, dim=-3)
    # (255 x - mean) / std, one multiply-add a channel
    scaled = [
        x * (255 / std) - mean / std for x, mean, std in zip(channels, PIXEL_MEAN, PIXEL_STD, strict=True)
    ]
    return torch.stack(scaled, dim=-3)


class MLP(nn.Module):
    """SAM's MLPBlock, by its names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lin1 = DenseLinear(dim, 4 * dim)
        self.lin2 = DenseLinear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class DenseLinear(nn.Linear):
    """nn.Linear computed by the fastest library product."""

    def forward(self, x: Tensor) -> Tensor:
        return dense_linear(x, self.weight, self.bias)


class RowNorm(nn.LayerNorm):
    """nn.LayerNorm, on a GPU in one pass over the rows. The result has the dtype of the product that follows."""

    def forward(self, x: Tensor) -> Tensor:
        return row_norm(x, self.weight, self.bias, eps=self.eps)


class ConvStem(nn.Module):
    """Convolutions at strides 1, 2 and 4. The features of each stride are a skip for the decoder.

    GroupNorm takes the statistics of each slice by itself, so that a slice has the same features alone and in a
    batch. Stride 1 has few channels: memory traffic takes the time there, not arithmetic."""

    def __init__(self, in_channels: int, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.skip_channels = channels
        fine, *coarser = channels
        levels: list[nn.Module] = [ConvBlock(in_channels, fine)]
        for before, after in zip(channels, coarser, strict=False):
            levels.append(nn.Sequential(ConvBlock(before, after, stride=2), ResidualBlock(after)))
        self.levels = nn.ModuleList(levels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (T, in, H, W) -> ((T, c, H/s, W/s) for s = 1, 2, 4)."""
        skips = []
        x = images
        for level in self.levels:
            x = level(x)
            skips.append(x)
        return tuple(skips)


class ConvBlock(nn.Sequential):
    """3×3 convolution, GroupNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            GroupNorm(max(out_channels // 8, 1), out_channels, relu=True),
        )
        nn.init.kaiming_normal_(self[0].weight, nonlinearity="relu")


class ResidualBlock(nn.Module):
    """x + norm(conv(block(x))), then ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = ConvBlock(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = GroupNorm(max(channels // 8, 1), channels, relu=True)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(self.block(x)), x)
        return y


class DoubleSize(nn.ConvTranspose2d):
    """Transposed 2×2 convolution of stride 2: on a CPU, where channels lie last, products forward and backward."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or not _lies_last(x):
            return super().forward(x, output_size)
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2·2·out, in)
        assert self.bias is not None
        y = dense_linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4))  # (T, h, w, 2·2·out)
        y = y.unflatten(3, (2, 2, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (T, 2h, 2w, out)
        return y.permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, plus what is added to it, through a ReLU where there is one.

    On a GPU moments are taken by many blocks: torch's kernel has one for each slice and group. On a CPU, where channels
    lie last, all of it is one compiled kernel: torch's backward is slow there."""

    def __init__(self, num_groups: int, num_channels: int, *, relu: bool = False) -> None:
        super().__init__(num_groups, num_channels)
        self.relu = relu

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if self._compiled(x, added):
            y: Tensor = CompiledGroupNorm.apply(
                x, added, self.weight, self.bias, self.num_groups, self.eps, self.relu
            )
            return y
        y = self._norm(x)
        y = y if added is None else added + y
        return y.relu_() if self.relu else y

    def _compiled(self, x: Tensor, added: Tensor | None) -> bool:
        return (
            _lies_last(x)
            and x.dtype in compiled.DTYPES
            and (added is None or (added.dtype == x.dtype and ordinary(added)))
            and compiled.missing() is None
        )

    def _norm(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda" or not (x.dtype == torch.float32 or torch.is_autocast_enabled("cuda")):
            return super().forward(x)
        with without_autocast(x.device):  # which casts what a norm takes to fp32
            x, weight, bias = x.float(), self.weight.float(), self.bias.float()
            y: Tensor = SpreadGroupNorm.apply(x, weight, bias, self.num_groups, self.eps)
        return y


class CompiledGroupNorm(torch.autograd.Function):
    """Group norm of x (T, C, h, w), channels last, on a CPU, with what is added to it and a ReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        relu: bool,
    ) -> Tensor:
        if added is not None:
            added = added.contiguous(memory_format=torch.channels_last)
        wide = weight.float().contiguous()
        y, mean, rstd = compiled.norm_forward(x, added, wide, bias.float().contiguous(), groups, eps, relu)
        ctx.save_for_backward(x, y if relu else None, mean, rstd, weight)
        ctx.options = relu, added is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mean, rstd, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dadded, dweight, dbias = compiled.norm_backward(
            dy, x, y, mean, rstd, weight.float().contiguous(), *ctx.options
        )
        return dx, dadded, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


class SpreadGroupNorm(torch.autograd.Function):
    """Group norm of x (T, C, h, w): moments by torch's reduction over all blocks, torch's own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()  # the backward reads both as they lie in memory
        var, mean = torch.var_mean(x.view(len(x), groups, -1), dim=2, correction=0)  # (T, groups)
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, mean, rstd, weight)
        scale = (weight.view(groups, -1) * rstd[..., None]).flatten(1)  # (T, C)
        shift = bias - mean.repeat_interleave(x.shape[1] // groups, dim=1) * scale
        return torch.addcmul(shift[..., None, None], x, scale[..., None, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        images, channels, height, width = x.shape
        sizes = images, channels, height * width, mean.shape[1]
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x, mean, rstd, weight, *sizes, wanted
        )
        return *grads, None, None


def _lies_last(x: Tensor) -> bool:
    """Whether x (T, C, h, w) lies on a CPU with its channels last, and nothing traces or transforms it."""
    return (
        x.device.type == "cpu"
        and ordinary(x)
        and not torch.jit.is_tracing()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (T, C, h, w), as SAM's and with its names, in one pass."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def put_channels_last(model: nn.Module, *, trained: bool = False) -> None:
    """Let the convolutions of a model on a CPU have their channels last, in place: oneDNN copies others before it runs.

    Weights change their strides alone, and what a convolution gives lies as its weights do. A model that is to be
    `trained` stays as it is where group norm is not compiled, because the backward of torch's is slow then."""
    if trained and compiled.missing() is not None:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def build_neck(dim: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context without autocast.

    It leaves no trace in an exported graph where autocast is off already, or on the meta device, which has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)

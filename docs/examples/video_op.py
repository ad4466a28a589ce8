"""The op in a video model: a patch attends to its place in all frames, then to the patches of its frame.

    python docs/examples/video_op.py

Trains a tiny model to tell squares that move right from squares that move left, which no single frame shows."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axial_fusion import AxialFusionAttention


class VideoModel(nn.Module):
    """Clips (B, frames, 1, 32, 32) -> logits (B, 2)."""

    def __init__(self, attention: Literal["both", "slice"], dim: int = 32, frames: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 8, 8)
        self.time = nn.Parameter(torch.zeros(frames, 1, 1, dim))
        nn.init.normal_(self.time)
        self.attention = AxialFusionAttention(dim, num_heads=4, attention=attention)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 2))

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.patches(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])  # (B, frames, C, 4, 4)
        tokens = self.attention(tokens.movedim(2, -1) + self.time)  # (B, frames, 4, 4, C)
        return self.mlp(tokens).mean((1, 2, 3))


def clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares that start anywhere and move by 3 pixels a frame, from one edge on to the other; 1 is to the right."""
    made, right = torch.zeros(count, 6, 1, 32, 32), torch.randint(2, (count,), generator=generator)
    for clip, direction in zip(made, (2 * right - 1).tolist(), strict=True):
        row, column = torch.randint(24, (2,), generator=generator).tolist()
        clip[:, 0, row : row + 8, :8] = 1
        for frame in range(6):
            clip[frame] = clip[frame].roll(column + 3 * direction * frame, dims=-1)
    return made, right


def main(steps: int = 200, attention: Literal["both", "slice"] = "both") -> float:
    """Accuracy on clips that the training has not seen; `attention` "slice" leaves attention across frames out."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), VideoModel(attention)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        x, y = clips(32, generator)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = clips(200, generator)
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    print(f"accuracy {main():.2f}; without attention across frames {main(attention='slice'):.2f}")

"""AFTer-SAM: SAM's encoder on each slice, attention across a slice group, SAM's decoder for every class.

Source: the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from aftersam.model.fusion import AxialFusionTransformer
from aftersam.model.image_encoder import ImageEncoder
from aftersam.model.layers import SliceFeatures, normalise
from aftersam.model.mask_decoder import MaskDecoder, of_classes
from aftersam.model.tiny_vit import TinyViT


class AfterSAM(nn.Module):
    """Composes an encoder (slices -> features), a fusion (groups of features) and a decoder (-> logits).

    `fusion` None is the 2D model. `stem` gives skips beside an encoder that has none of its own. An encoder with
    `stem_slices` s above 1 sees s adjacent slices: (H, W) of `hu` is then (s, H, W), the slice itself in the middle.
    The steps `encode`, `fuse` and `decode` are public: the encoder and the decoder are 2D, so that
    inference encodes each slice once, however many groups it belongs to."""

    def __init__(
        self,
        encoder: ImageEncoder | TinyViT,
        fusion: AxialFusionTransformer | None,
        decoder: MaskDecoder,
        *,
        hu_windows: tuple[tuple[float, float], ...],
        normalisation: Literal["sam", "unit"] = "sam",
        stem: nn.Module | None = None,
        stem_slices: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.fusion = fusion
        self.decoder = decoder
        self.stem = stem
        self.stem_slices = stem_slices
        self.hu_windows = hu_windows
        self.normalisation = normalisation

    def forward(
        self,
        hu: Tensor,
        *,
        query_index: Sequence[int] | None = None,
        labels: Tensor | None = None,
        embedding: Tensor | None = None,
        coarse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hu (B, N, H, W) in Hounsfield units -> logits (B, N, K+1, H/s, W/s), s the output stride.

        With `query_index` the last fusion block and the decoder compute those slices alone: (B, Nq, K+1, H/s, W/s).
        `labels` (B, N, H, W) are for a prompted decoder. `embedding` (B, N, C, h, w) is the encoder's output for
        this `hu`, computed before; it is for encoders without skips. `coarse` also returns the decoder's coarse
        logits."""
        groups, slices = hu.shape[:2]
        stored = None if embedding is None else SliceFeatures(embedding.flatten(0, 1), ())
        features = self.encode(hu.flatten(0, 1), stored)
        embedding = self.fuse(features.embedding.unflatten(0, (groups, slices)), query_index=query_index)
        skips = features.skips
        if query_index is not None:
            index = torch.as_tensor(query_index, device=hu.device)
            skips = tuple(s.unflatten(0, (groups, slices))[:, index].flatten(0, 1) for s in skips)
            labels = None if labels is None else labels[:, index]
        labels = None if labels is None else labels.flatten(0, 1)
        embedding = embedding.flatten(0, 1)
        if not coarse:
            return self._classes(self.decode(embedding, skips, labels), groups)
        fine, rough = self.decoder(embedding, skips, labels, coarse=True)
        return self._classes(fine, groups), self._classes(rough, groups)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute the encoder's and the fusion's blocks in the backward instead of keeping their activations."""
        self.encoder.activation_checkpointing = on
        if self.fusion is not None:
            self.fusion.activation_checkpointing = on

    def image(self, hu: Tensor) -> Tensor:
        """The encoder's input from Hounsfield units: hu (T, H, W) -> (T, 3, H, W).

        With a stem of s > 1 slices, each slice comes with its neighbours: hu (T, s, H, W) -> (T, 3·s, H, W).
        Raises ValueError if `hu` has another shape."""
        near = () if self.stem_slices == 1 else (self.stem_slices,)
        if tuple(hu.shape[1:-2]) != near:
            form = ", ".join(("T", *map(str, near), "H", "W"))
            raise ValueError(
                f"hu of slices is {tuple(hu.shape)}, but a stem of {self.stem_slices} needs ({form})"
            )
        image = normalise(hu, self.hu_windows, unit=self.normalisation == "unit")
        return image if self.stem_slices == 1 else image.flatten(1, 2)

    def encode(self, hu: Tensor, stored: SliceFeatures | None = None) -> SliceFeatures:
        """hu (T, H, W) in Hounsfield units -> embedding (T, C, h, w) and the decoder's skips.

        `stored` is the encoder's output for this `hu`, computed before. A stem beside the encoder is computed
        anyway: its weights may have changed."""
        if stored is not None and self.stem is None:
            return stored
        image = self.image(hu)
        features = self.encoder(image) if stored is None else stored
        return features if self.stem is None else SliceFeatures(features.embedding, self.stem(image))

    def fuse(self, embedding: Tensor, *, query_index: Sequence[int] | None = None) -> Tensor:
        """embedding (B, N, C, h, w) -> (B, N or Nq, C, h, w)."""
        if self.fusion is not None:
            fused: Tensor = self.fusion(embedding, query_index=query_index)
            return fused
        if query_index is None:
            return embedding
        return embedding[:, torch.as_tensor(query_index, device=embedding.device)]

    def decode(
        self, embedding: Tensor, skips: tuple[Tensor, ...] = (), labels: Tensor | None = None
    ) -> Tensor:
        """embedding (T, C, h, w), skips and, if prompted, labels of the same slices -> logits (T, K+1, H/s, W/s).

        Where there are more class tokens than classes, there is one logit for each token: see `of_classes`."""
        logits: Tensor = self.decoder(embedding, skips, labels)
        return logits

    def _classes(self, logits: Tensor, groups: int) -> Tensor:
        by_group: Tensor = of_classes(logits, self.decoder.num_classes).unflatten(0, (groups, -1))
        return by_group


class SliceEncoder(nn.Module):
    """The 2D half of `model`, from slices to features, with plain tensors in and out for export."""

    def __init__(self, model: AfterSAM) -> None:
        super().__init__()
        self.model = model

    def forward(self, hu: Tensor) -> tuple[Tensor, ...]:
        """hu (T, S, S) in Hounsfield units -> embedding (T, C, h, w), and the skips."""
        embedding, skips = self.model.encode(hu)
        return embedding, *skips


class GroupDecoder(nn.Module):
    """The other half of `model`: fusion of groups, then the decoder on the slice at `centre` of each group."""

    def __init__(self, model: AfterSAM, centre: int) -> None:
        super().__init__()
        self.model = model
        self.centre = centre

    def forward(self, embedding: Tensor, *skips: Tensor) -> Tensor:
        """embedding (B, N, C, h, w), skips of the centre slices (B, ...) -> their logits (B, K+1, S/s, S/s)."""
        fused = self.model.fuse(embedding, query_index=(self.centre,))
        return of_classes(self.model.decode(fused.flatten(0, 1), skips), self.model.decoder.num_classes)

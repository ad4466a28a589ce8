"""One optimiser step: the loss of slice groups, gradients over batches and processes, clipping, the update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from aftersam.config import Config, TrainConfig
from aftersam.model.aftersam import AfterSAM
from aftersam.training.graphs import RecordedGradients
from aftersam.training.losses import Loss, segmentation_loss
from aftersam.training.sharding import whole_copy

AVERAGE = "average"  # a weight's moving average among its moments
Batch = dict[str, Any]  # what SliceGroups gives, stacked


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """An optimiser of the parameters of `model` that require gradients."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        fused=not config.shard,  # one pass over all weights: a quarter of the time on a CPU
    )


@torch.no_grad()
def add_to_average(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Move the average of every weight that `optimizer` has stepped by `share` of the way to the weight.

    It lies among the weight's moments, where checkpoints and shards find it."""
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    for p in stepped:
        if AVERAGE not in optimizer.state[p]:
            optimizer.state[p][AVERAGE] = p.detach().clone()
    if stepped:
        torch._foreach_lerp_([optimizer.state[p][AVERAGE] for p in stepped], stepped, share)


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give every weight that has an average its value, until the end of the block."""
    own = {p: p.detach().clone() for p, state in optimizer.state.items() if AVERAGE in state}
    take_average(optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in own.items():
                weight.copy_(value)


@torch.no_grad()
def take_average(optimizer: torch.optim.Optimizer) -> None:
    """Give every weight that has an average its value."""
    for weight, state in optimizer.state.items():
        if AVERAGE in state:
            weight.copy_(state[AVERAGE])


class Learner:
    """A model and its optimiser as `accelerator` has prepared them."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, config: Config
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.config = config
        self.gradients: Callable[[Sequence[Batch]], Tensor] = self._gradients
        if _capturable(accelerator, config.train):
            trained = [p for p in model.parameters() if p.requires_grad]
            self.gradients = RecordedGradients(self._gradients, trained, accelerator.device)

    def step(
        self, batches: Sequence[Batch], *, rate: float, number: int, average: float = 0.0
    ) -> dict[str, float]:
        """Step `number` of the run, on batches of groups: {"loss", "dice", "ce"}, means over batches and processes.

        Then moves the average of the weights by the share `average` towards the new weights.

        Raises FloatingPointError where the loss is not finite, before any weight changes, and MemoryError where the
        device has too little memory."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad()
        try:
            means = self.gradients(batches)
            mean: list[float] = self.accelerator.reduce(means, "mean").tolist()
            if not math.isfinite(mean[0]):
                cases = [case for batch in batches for case in batch["case"]]
                raise FloatingPointError(
                    f"the loss is {mean[0]} at step {number} on {', '.join(cases)}; "
                    f"last.safetensors keeps the last good state; a lower --learning-rate or --precision fp32 may help"
                )
            self.optimizer.step()
            if average:
                add_to_average(self.optimizer, average)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                "the device ran out of memory; use --activation-checkpointing, or a smaller --batch-size, "
                f"--image-size or --num-slices ({str(error).splitlines()[0]})"
            ) from None
        return dict(zip(("loss", "dice", "ce"), mean, strict=True))

    @contextlib.contextmanager
    def kept_model(self) -> Iterator[AfterSAM]:
        """The model as it is validated and kept: whole, with the moving average of every weight that has one.

        Until the end of the block the model under training has the averages too. Where weights are sharded this gives a
        copy, and every process must enter the block."""
        model: AfterSAM = self.accelerator.unwrap_model(self.model)
        with averaged(self.optimizer):
            if self.config.train.shard:
                copy = whole_copy(model, self.config.model, model.decoder.num_classes)
                model = copy.to(self.accelerator.device)
            yield model

    def _gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Compute the clipped gradients of all batches. Returns their mean loss, Dice term and cross-entropy, (3,)."""
        losses = []
        for i, batch in enumerate(batches):
            waits = i + 1 < len(batches)  # processes exchange gradients once a step
            with self.accelerator.no_sync(self.model) if waits else contextlib.nullcontext():
                loss = group_loss(
                    self.model,
                    on_device(batch, self.accelerator.device),
                    self.config,
                    autocast=self.accelerator.autocast,
                )
                self.accelerator.backward(loss.total / len(batches))
            losses.append(torch.stack([loss.total, loss.dice, loss.ce]).detach())
        if self.config.train.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        return torch.stack(losses).mean(0)


def _capturable(accelerator: Accelerator, config: TrainConfig) -> bool:
    """Whether a CUDA graph can hold the gradients of a step: nothing waits for the host or for another process."""
    return (
        accelerator.device.type == "cuda"
        and accelerator.num_processes == 1
        and accelerator.scaler is None
        and not config.activation_checkpointing
    )


def group_loss(
    model: nn.Module,
    batch: Batch,
    config: Config,
    *,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Loss:
    """The loss of one batch of groups, the forward inside `autocast`. Deep supervision changes its total only."""
    train, labels = config.train, batch["labels"]
    centre = (config.model.num_slices // 2,)
    query_index = centre if train.supervision == "centre" else None
    deep = train.deep_supervision
    with autocast():
        logits = model(
            batch["hu"],
            query_index=query_index,
            labels=labels,
            embedding=batch.get("embedding"),
            coarse=deep > 0,
        )
    truth = labels if query_index is None else labels[:, list(centre)]
    loss, *coarse = (
        segmentation_loss(
            some,
            truth,
            dice=train.dice,
            ce_foreground_weight=train.ce_foreground_weight,
            ce_hardest=train.ce_hardest,
        )
        for some in (logits if deep else [logits])
    )
    return loss._replace(total=loss.total + sum(deep * extra.total for extra in coarse))


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }

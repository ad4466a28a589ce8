"""A 2D transformer becomes a 3D one: an axial half in front of every block that is chosen.

    x' = x + FC(Attn_N(LN(x)))    across the N slices at each position; FC is zero at the start
    y  = block(x')                the host's block, unchanged: masks, positions, windows, scales

The half is a child of its block, `block.axial`, called from a forward pre-hook.    Source: AFTer-SAM, section 3.4."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .across_slices import AcrossSlices, SliceGroups, groups_of
from .adapters import LoRAInPlace, add_lora, added_parameters, remove_lora
from .blocks import Block, attention_names, count_prefix_tokens, find_blocks, takes_video

# Libraries whose image models take (B, C, H, W) and never (B, N, C, H, W).
_LIBRARIES = frozenset(
    {"diffusers", "monai", "segment_anything", "timm", "torch", "torchvision", "transformers"}
)


class LiftedBlock(NamedTuple):
    """One lifted block: its name, and the parameters that were added and train."""

    block: str
    kind: str
    parameters: int  # that were added and train


class LiftTable(list[LiftedBlock]):
    """The blocks that were changed; prints as a table."""

    def __str__(self) -> str:
        rows = [("block", "kind", "parameters"), *((b or "(model)", k, f"{p:,}") for b, k, p in self)]
        rows.append(("total", "", f"{sum(row.parameters for row in self):,}"))
        name, kind, count = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{b:<{name}}  {k:<{kind}}  {p:>{count}}" for b, k, p in rows)


def lift(
    model: nn.Module,
    *,
    num_slices: int,
    where: Literal["all"] | int | str | Sequence[int | str] = "all",
    num_heads: int | None = None,
    prefix: Literal["across", "alone"] | int = "across",
    rank: int = 0,
    alpha: float | None = None,
) -> LiftTable:
    """Make a 2D transformer attend across slices, in place, and return what was changed.

    The model takes (B·N, ...) as before, with the N = `num_slices` slices of a group one after the other; image models
    of known libraries take (B, N, C, H, W) too and then return (B, N, ...). A chosen block gets an axial half on its
    tokens. The half starts with the block's own q, k, v weights, where they are known, and a zero output projection:
    the lifted model starts equal to the 2D model on every slice, to the bit.

    `where`      "all" blocks, every k-th (k - 1, 2k - 1, ...), or names and indices of blocks
    `num_heads`  of the axial halves; None takes each block's own
    `prefix`     class and register tokens attend "across" slices like every position, or are left "alone"; a number
                 leaves as many leading tokens alone
    `rank`       above 0 freezes the host and trains LoRA of this rank: on q and v of all its blocks, and on q, v and
                 the output projection of the axial halves; alpha None means alpha = rank

    Raises ValueError where no block is known, a named one is not there, or the model is lifted already."""
    blocks = _blocks_to_lift(model, num_slices, rank)
    groups = SliceGroups(num_slices)
    halves = {}
    for name in _choose(list(blocks), where):
        alone = _tokens_alone(model, name, prefix)
        halves[name] = AcrossSlices(name, blocks[name], groups, num_heads=num_heads, alone=alone)
    if rank:
        groups.frozen = [name for name, p in model.named_parameters() if p.requires_grad]
        model.requires_grad_(False)
        for half in halves.values():
            half.reduce(rank, alpha)
    table = LiftTable()
    for name, block in blocks.items():
        if rank or name in halves:
            added = _change(block, halves.get(name), groups, (rank, alpha))
            kinds = " + ".join(["axial"] * (name in halves) + ["LoRA"] * (rank > 0))
            table.append(LiftedBlock(name, f"{type(block.module).__name__}: {kinds}", added))
    _attach(model, groups)
    return table


def unlift(model: nn.Module) -> None:
    """Undo `lift`: the 2D model with its own weights, hooks and names again."""
    groups = groups_of(model)
    for handle in groups.handles:
        handle.remove()
    for module in list(model.modules()):
        if isinstance(module, LoRAInPlace):
            remove_lora(module)
        if isinstance(getattr(module, "axial", None), AcrossSlices):
            del module.axial
    for name in groups.frozen:
        model.get_parameter(name).requires_grad_(True)
    for name in groups.nested:
        model.get_submodule(name).use_nested_tensor = True  # type: ignore[assignment]  # an attribute, not a module
    del model.slice_groups


def set_num_slices(model: nn.Module, num_slices: int) -> None:
    """Let a lifted model take groups of another number of slices; its weights do not depend on it."""
    _check_num_slices(num_slices)
    groups_of(model).num_slices = num_slices


def _before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook of a block: replace its tokens by the axial half's output."""
    axial: Any = block.axial
    tokens = args[0] if args else kwargs.get(axial.argument)
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"lift: {axial.name!r} got {type(tokens).__name__} for {axial.argument!r}, but needs one tensor of tokens"
        )
    new = axial(tokens)
    return (
        tuple(new if value is tokens else value for value in args),
        {key: new if value is tokens else value for key, value in kwargs.items()},
    )


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of the model: note the batch, and reshape (B, N, ...) to (B·N, ...)."""
    groups: Any = model.slice_groups
    groups.rows, groups.batch = (), None
    tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
    first = next(tensors, None)
    if first is None or first.dim() < 3:
        return None
    batch, n = first.shape[0], groups.num_slices
    if first.shape[1] != n:
        groups.rows = (batch,)
        return None
    groups.rows = (batch, batch * n)
    if first.dim() != groups.image_dims + 1:
        return None
    groups.batch = batch

    def join(value: Any) -> Any:
        grouped = isinstance(value, Tensor) and value.shape[:2] == (batch, n)
        return value.flatten(0, 1) if grouped else value

    return tuple(map(join, args)), {key: join(value) for key, value in kwargs.items()}


def _after_model(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook, run after errors too: forget the batch, and reshape (B·N, ...) to (B, N, ...)."""
    groups: Any = model.slice_groups
    batch, groups.rows, groups.batch = groups.batch, (), None
    if batch is None:
        return None
    n = groups.num_slices

    def part(value: Any) -> Any:
        joined = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch * n
        return value.unflatten(0, (batch, n)) if joined else value

    return pytree.tree_map(part, output)


def _change(
    block: Block, half: AcrossSlices | None, groups: SliceGroups, lora: tuple[int, float | None]
) -> int:
    """Add the axial half to a block and LoRA to its attention; returns how many trainable parameters were added."""
    added: list[nn.Parameter] = []
    if lora[0] and block.projections is not None:
        for adapted in add_lora(block.projections, *lora):
            added += added_parameters(adapted).values()
    if half is not None:
        added += [p for p in half.parameters() if p.requires_grad]
        block.module.axial = half
        groups.handles.append(block.module.register_forward_pre_hook(_before_block, with_kwargs=True))
    return sum(p.numel() for p in added)


def _attach(model: nn.Module, groups: SliceGroups) -> None:
    """Attach the slice groups to the model, and the hooks that note the batch unless it arranges frames itself."""
    model.slice_groups = groups  # type: ignore[assignment]  # an attribute, not a module
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            groups.nested.append(name)
            module.use_nested_tensor = False
    if takes_video(model):
        return
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if first is not None and type(model).__module__.split(".")[0] in _LIBRARIES:
        groups.image_dims = 2 + len(first.kernel_size)
    groups.handles.append(model.register_forward_pre_hook(_before_model, prepend=True, with_kwargs=True))
    groups.handles.append(model.register_forward_hook(_after_model, always_call=True))


def _blocks_to_lift(model: nn.Module, num_slices: int, rank: int) -> dict[str, Block]:
    """The blocks of a model, or ValueError where something is in the way."""
    _check_num_slices(num_slices)
    if rank < 0:
        raise ValueError(f"lift: rank is {rank}, but must be 0 or more")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "slice_groups", None), SliceGroups) or hasattr(module, "axial"):
            raise ValueError(f"lift: {name or type(model).__name__!r} is lifted already; unlift it first")
        if type(module).__name__ == "PatchDropout" and getattr(module, "prob", False):
            raise ValueError(
                f"lift: {name!r} drops other patches in every slice, so that positions no longer agree; "
                "make the model with patch_drop_rate=0"
            )
    blocks = find_blocks(model)
    if not blocks:
        attentions = attention_names(model)
        inside = f"; it has the attentions {', '.join(attentions[:3])}" if attentions else ""
        raise ValueError(f"lift: no block of {type(model).__name__} has one attention and a norm{inside}")
    for name, block in blocks.items():
        if rank and block.projections is None:
            raise ValueError(
                f"lift: rank is {rank}, but q and v of {name!r} ({type(block.module).__name__}) are not known; "
                "rank=0 lifts without LoRA"
            )
    return blocks


def _choose(names: list[str], where: int | str | Sequence[int | str]) -> list[str]:
    """The names that `where` means, in the model's order."""
    if where == "all":
        return names
    if isinstance(where, int):
        if not 1 <= where <= len(names):
            raise ValueError(
                f"lift: where is {where}, but must be 1 to {len(names)}, the number of blocks in the model"
            )
        return names[where - 1 :: where]
    wanted = set()
    for item in [where] if isinstance(where, str) else where:
        if isinstance(item, int) and -len(names) <= item < len(names):
            wanted.add(names[item])
        elif item in names:
            wanted.add(str(item))
        else:
            near = difflib.get_close_matches(str(item), names, n=1) or names[:1]
            raise ValueError(
                f"lift: where names {item!r}, which is not a block of the model; did you mean {near[0]!r}?"
            )
    if not wanted:
        raise ValueError("lift: where is empty; name at least one block")
    return [name for name in names if name in wanted]


def _tokens_alone(model: nn.Module, block: str, prefix: str | int) -> int:
    """How many leading tokens the axial half of a block leaves alone."""
    if prefix == "across":
        return 0
    if isinstance(prefix, int):
        return prefix
    if prefix != "alone":
        raise ValueError(f"lift: prefix is {prefix!r}, but must be 'across', 'alone' or a number of tokens")
    count = count_prefix_tokens(model, block)
    if not count:
        raise ValueError(
            f"lift: prefix is 'alone', but no class or register tokens were found for {block!r}; "
            "give their number, or prefix='across'"
        )
    return count


def _check_num_slices(num_slices: int) -> None:
    if num_slices < 1:
        raise ValueError(f"num_slices is {num_slices}, but must be 1 or more")

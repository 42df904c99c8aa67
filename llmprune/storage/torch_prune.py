"""Names of torch.nn.utils.prune: a pruned `weight` is stored as the product of `weight_orig` and `weight_mask`."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmprune.errors import CheckpointError

ORIGINAL, MASK = "_orig", "_mask"


def masked_keys(keys: Iterable[str]) -> list[str]:
    """The plain keys of tensors that are stored as an original and a mask, sorted.

    Raises:
        CheckpointError: a tensor is there as it is as well.
    """
    known = set(keys)
    plain = (key.removesuffix(ORIGINAL) for key in known if key.endswith(ORIGINAL))
    found = sorted(key for key in plain if f"{key}{MASK}" in known)
    if twice := [key for key in found if key in known]:
        raise CheckpointError(
            f"there are {twice[0]} and {twice[0]}{ORIGINAL} with a mask",
            expected="one of them: torch.nn.utils.prune puts the two in place of the first",
            fix="save the state dict of the pruned model again",
        )
    return found


def merged(key: str, original: Tensor, mask: Tensor) -> Tensor:
    """The pruned tensor: the original, and exactly zero where the mask is.

    Args:
        key: plain, for errors.
        original: any shape and dtype; where it is pruned it may have any value, infinite ones too.
        mask: of the same shape, zeros and ones.

    Raises:
        CheckpointError: the mask has another shape, or other values.
    """
    if mask.shape != original.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise CheckpointError(
            f"{key}{MASK} is no mask of {key}{ORIGINAL}",
            expected="zeros and ones, in the shape of the original",
            fix="save the state dict again, with its masks as torch.nn.utils.prune made them",
        )
    return torch.where(mask == 0, torch.zeros((), dtype=original.dtype, device=original.device), original)


def merge_masks(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict of a model that torch.nn.utils.prune has pruned into weights and masks.

    Args:
        state: with `..._orig` and `..._mask`; other tensors are handed on.

    Returns:
        The state dict with plain names, for `load_state_dict` of a model that is not pruned; and plain name -> bool in
        its shape, True for pruned, as `llmprune.keep_zeros` takes them.

    Raises:
        CheckpointError: an original is not accompanied by a mask that fits it.

    Example:
        >>> weights, masks = merge_masks({"w_orig": torch.ones(2), "w_mask": torch.tensor([0.0, 1.0])})
        >>> weights["w"].tolist(), masks["w"].tolist()
        ([0.0, 1.0], [True, False])
    """
    plain = masked_keys(state)
    taken = {f"{key}{end}" for key in plain for end in (ORIGINAL, MASK)}
    weights = {key: tensor for key, tensor in state.items() if key not in taken}
    for key in plain:
        weights[key] = merged(key, state[f"{key}{ORIGINAL}"], state[f"{key}{MASK}"])
    return weights, {key: state[f"{key}{MASK}"] == 0 for key in plain}

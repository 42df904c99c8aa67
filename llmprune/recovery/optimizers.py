"""Optimizers that would bring pruned weights back, and why.

With the gradients of pruned weights masked, an optimizer that treats each weight by itself leaves them at zero: its
moments stay zero there, and weight decay multiplies. SGD, Adam and their relatives do, and so do Lion, APOLLO and
Adafactor, whose factors only scale the gradient. One that multiplies the matrix of gradients by another mixes its
weights, so that the update is not zero where the gradient is. Masking afterwards would keep the zeros, but what remains
of such an update is no longer the optimizer's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from llmprune.errors import RecoveryError

# The beginning of a class's or a Trainer option's name, in lower case -> what it does to a masked gradient.
_MIXING = {
    "muon": "it orthogonalises the update of a whole matrix",
    "galore": "it projects gradients onto a space of low rank, and the update back",
    "shampoo": "it multiplies gradients by preconditioners from both sides",
    "distributedshampoo": "it multiplies gradients by preconditioners from both sides",
    "soap": "it runs Adam in the rotated space of Shampoo's preconditioners",
}

# The same for those that a training of ours does not offer, although they keep zeros in one that fits them.
_UNFITTING = {
    "apollo": "it needs optim_target_modules, which there is no option for",
    "lomo": "it steps inside the backward pass, before gradients are complete and clipped",
    "adalomo": "it steps inside the backward pass, before gradients are complete and clipped",
    "schedulefree": "it has other weights for training than those that are scored and saved",
}

_EXPECTED = "an optimizer that treats each weight by itself: SGD, Adam, AdamW, Adafactor, Lion and their relatives"


def require_offered(name: str) -> None:
    """Refuse what a training of ours cannot use as its optimizer.

    Args:
        name: of transformers' `optim`.

    Raises:
        RecoveryError: it would bring pruned weights back, does not fit, or is unknown; says why.
    """
    require_known(name)
    plain = name.lower().replace("_", "")
    if reason := next((reason for start, reason in _UNFITTING.items() if plain.startswith(start)), ""):
        raise RecoveryError(f"the optimizer {name} is not offered: {reason}", expected=_EXPECTED, fix="use AdamW")
    names = [kind.value for kind in OptimizerNames]
    if name not in names:
        refused = (*_MIXING, *_UNFITTING)
        offered = [other for other in names if not other.replace("_", "").startswith(refused)]
        near = [other for other in offered if name and other.startswith(name)] or get_close_matches(name, offered, 1)
        raise RecoveryError(
            f"transformers has no optimizer {name!r}",
            expected="a name of its `optim`, such as adamw_torch_fused, sgd or adafactor",
            fix=f"did you mean {near[0]}?" if near else "use adamw_torch",
        )


@contextmanager
def constructing(name: str) -> Iterator[None]:
    """Raise a `RecoveryError` for whatever goes wrong inside, where an optimizer is constructed."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        raise RecoveryError(
            f"the optimizer {name} cannot be constructed: {error}",
            expected="an optimizer whose package is installed, and that knows this device",
            fix="install what it needs, or use adamw_torch",
        ) from error


def require_keeping(optimizer: Optimizer) -> None:
    """Refuse optimizers that are known to bring pruned weights back.

    Raises:
        RecoveryError: says why.
    """
    for kind in type(optimizer).__mro__:
        require_known(kind.__name__)


def require_known(name: str) -> None:
    """Refuse the name of an optimizer, or of an option of transformers' `optim`, as `require_keeping` does."""
    plain = name.lower().replace("_", "")
    if reason := next((reason for start, reason in _MIXING.items() if plain.startswith(start)), ""):
        raise RecoveryError(
            f"the optimizer {name} would bring pruned weights back: {reason}", expected=_EXPECTED, fix="use AdamW"
        )


def revived_by(optimizer: Optimizer, count: int, *, had_state: bool, by_hand: bool = False) -> RecoveryError:
    """The error for an optimizer whose step has moved pruned weights.

    Args:
        optimizer: as it is after the step.
        count: how many weights it has moved.
        had_state: whether it had taken steps before the zeros were kept.
        by_hand: whether gradients of pruned weights are not zero, as they are when a backward pass has made them.
    """
    kind = type(optimizer).__name__
    if by_hand:
        return RecoveryError(
            f"{kind} moved {count} pruned weights, which are zero again: their gradients were not zero, so that they "
            "have been set or changed after the backward pass",
            expected="gradients as backward() leaves them, clipped or scaled at most",
            fix="multiply what you add to a gradient by ~keeping.masks[NAME], or put it into the loss",
        )
    if had_state:
        return RecoveryError(
            f"{kind} moved {count} pruned weights, which are zero again: its state dates from before they were masked",
            expected="an optimizer that has seen masked gradients only",
            fix="make a new optimizer after pruning, or begin keep_zeros before its first step",
        )
    return RecoveryError(
        f"{kind} moved {count} pruned weights, which are zero again, although their gradients and moments are zero: it "
        "seems to mix the weights of a matrix, or adds something to each",
        expected=_EXPECTED,
        fix="use AdamW",
    )

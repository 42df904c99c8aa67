"""A linear layer with a packed matrix: allocated from its layout alone, loaded like any other, saved as it was."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.errors import NumericsError
from llmprune.serving.forms import Choice, Form, Served, choose_form
from llmprune.storage.formats import Layout

if TYPE_CHECKING:
    from llmprune.serving.fusion import Fusion

# Tokens in the self-test: decode, and prefill with either library.
_TEST_TOKENS = (5, 80, 300)

# In multiples of the dtype's epsilon: the error of rounding the result. A float32 sum in a different order adds about
# the root of the number of its terms, in multiples of float32's.
_TEST_TOLERANCE = 4


class SparseLinear(nn.Module):
    """y = x W^T + bias, for W [out, in] in a packed layout.

    A new layer expects the tensors of its layout (from `load_state_dict`, or transformers' loader); `settle` then
    converts them to the form that the device multiplies fastest. Its state dict holds the layout's tensors either way.

    Args:
        layout: of W.
        bias: whether there is one.
        dtype: of the values.
        device: where to allocate; "meta" allocates nothing.

    Attributes:
        choice: the form, and why others were not chosen; None until the layer has settled.
        fusion: computes the matmul together with the layers that read the same input; None: the layer computes its own.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.out_features, self.in_features = layout.shape
        self.choice: Choice | None = None
        self.served: Served = "auto"
        self.fusion: Fusion | None = None
        self._place = 0
        self._hold(
            {
                name: torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
                for name, spec in layout.tensors().items()
            }
        )
        self.register_parameter("bias", None)
        if bias:
            self.bias = _fixed(torch.empty(layout.shape[0], dtype=dtype, device=device))

    @property
    def form(self) -> Form | None:
        """The form in which the layer multiplies; None until it has settled."""
        return self.choice.form if self.choice else None

    @property
    def held(self) -> dict[str, Tensor]:
        """The tensors in which the layer holds W, by name: the layout's or those of its form."""
        return {name: tensor for name, tensor in self._parameters.items() if name != "bias" and tensor is not None}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return next(tensor.dtype for tensor in self.held.values() if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        return next(iter(self.held.values())).device

    def settle(self, served: Served = "auto") -> Choice:
        """Convert the loaded tensors to the form that serves them.

        Args:
            served: as for `choose_form`.

        Raises:
            FormatError: they do not match the layout; only checked if the form unpacks them.
        """
        stored = self.stored()
        choice = choose_form(self.layout, self.device, self.dtype, served)
        self._hold(choice.form.build(self.layout, stored))
        self.choice, self.served, self.fusion = choice, served, None
        return choice

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the layout, as they are on disk."""
        held = {name: tensor.detach() for name, tensor in self.held.items()}
        return self.form.restore(self.layout, held) if self.form else held

    def unpack(self) -> Tensor:
        """The dense matrix [out, in]."""
        held = self.held
        return held["weight"].detach() if self.form and "weight" in held else self.layout.unpack(self.stored())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in]."""
        if torch.is_autocast_enabled(x.device.type):
            # As in an ordinary linear layer, the result is in autocast's dtype.
            return self._multiply(x.to(self.dtype)).to(torch.get_autocast_dtype(x.device.type))
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.form is None:
            return F.linear(x, self.unpack(), self.bias)
        if self.fusion is not None:
            return self.fusion.multiply(x, self._place)
        return self.form.multiply(self.layout, self.held, x, self.bias)

    def join(self, fusion: "Fusion", place: int, held: dict[str, Tensor]) -> None:
        """Let a fusion compute this layer's matmul; `held` are its parts of the fused tensors."""
        self.fusion, self._place = fusion, place
        self._hold(held)

    @torch.no_grad()
    def test(self, name: str) -> None:
        """Compare the layer with the dense matmul on random activations.

        A miscompiled kernel gives wrong results without an error, so each layer is tested once.

        Args:
            name: of the layer, for the message.

        Raises:
            NumericsError: they differ by more than rounding.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        dense = self.unpack().float()
        for tokens in _TEST_TOKENS:
            x = torch.randn(tokens, self.in_features, generator=generator, device=self.device).to(self.dtype)
            wanted = F.linear(x.float(), dense, None if self.bias is None else self.bias.float())
            found = self._multiply(x).float()
            summed = self.in_features**0.5 * torch.finfo(torch.float32).eps
            tolerance = _TEST_TOLERANCE * torch.finfo(self.dtype).eps + summed
            # Relative to the largest output: individual ones may cancel until only rounding is left.
            error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
            if not error <= tolerance:
                raise NumericsError(
                    f"{name}: the {self.form.name if self.form else 'packed'} matmul of {tokens} tokens is wrong: "
                    f"relative error {error:.3g}",
                    expected=f"at most {tolerance:.3g} compared with the dense matmul",
                    fix='load it with served="dense", and report the versions of torch, triton and the driver',
                )

    def extra_repr(self) -> str:
        form = self.form.name if self.form else "not settled"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.layout.name}, {form}"

    def __getattr__(self, name: str) -> Any:
        # Some models read `weight.dtype` of their layers; PEFT and inspection need the matrix itself.
        if name == "weight" and self.__dict__.get("choice") is not None and "weight" not in self._parameters:
            return self.unpack()
        return super().__getattr__(name)

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        for name in self.held:
            del self._parameters[name]
        for name, tensor in tensors.items():
            self._parameters[name] = _fixed(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        # torch passes a function without its purpose: an empty tensor shows whether it casts or moves.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if self.choice is None or (probe.dtype, probe.device) == (self.dtype, self.device):
            addresses = self._addresses()
            super()._apply(fn, recurse)
            if self._addresses() != addresses:
                self.fusion = None  # copies are no longer parts of the fused tensors
            return self
        # Held forms cannot be cast as numbers, and another device may multiply another form faster.
        self._unsettle()
        super()._apply(fn, recurse)
        if self.device.type != "meta":
            self.settle(self.served)
            if self.form and self.form.tested and self_tests_wanted():
                self.test("a moved layer")
        return self

    def _unsettle(self) -> None:
        """Go back to holding the layout's tensors."""
        stored = self.stored()
        self.choice = self.fusion = None
        self._hold(stored)

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters() if not parameter.is_meta]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.stored().items()})
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        settled = self.choice
        if settled is not None:
            # The layout's tensors are loaded, and converted to the same form as before.
            self._unsettle()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if settled is not None:
            self._hold(settled.form.build(self.layout, self.stored()))
            self.choice = settled


def self_tests_wanted() -> bool:
    """Whether layers are tested against dense matmuls; the environment variable `LLMPRUNE_SELFTEST=0` disables it."""
    return os.environ.get("LLMPRUNE_SELFTEST", "1") != "0"


def _fixed(tensor: Tensor) -> nn.Parameter:
    # A parameter, since transformers loads, counts and places parameters; packed integers have no gradient.
    return nn.Parameter(tensor, requires_grad=False)

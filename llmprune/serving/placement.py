"""Where a model's layers go: all to one device, or to several by a device map of accelerate."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.utils import is_accelerate_available

from llmprune.devices import resolve_device
from llmprune.errors import DeviceError

DeviceMap = str | Mapping[str, int | str | torch.device]

# How accelerate itself shares layers out; it also takes a device for everything.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def require_placement(device: str, device_map: DeviceMap | None) -> torch.device:
    """Check where a model is to go.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        device_map: as `from_pretrained` takes it; None: everything goes to `device`.

    Returns:
        The device on which most of it is computed.

    Raises:
        DeviceError: there is no such device or strategy, both are given, or accelerate is not installed.
    """
    if device_map is None:
        return resolve_device(device)
    if device != "auto":
        raise DeviceError(
            f"device {device!r} and device_map {device_map!r}",
            expected="one of them: a device for the whole model, or a device map that shares it out",
            fix="remove one of them",
        )
    if not is_accelerate_available():
        raise DeviceError(
            f"device_map {device_map!r} without the package accelerate, which shares a model out",
            expected="accelerate in the environment of llmprune",
            fix="pip install accelerate, or give a device in place of the device map",
        )
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        try:
            return resolve_device(device_map)
        except DeviceError as error:
            raise DeviceError(
                f"device_map {device_map!r}: {error.what}",
                expected=f"{', '.join(STRATEGIES)}, or a device of this machine such as cpu or cuda:0",
                fix="with several GPUs, auto fills them all",
            ) from error
    return resolve_device("auto")


def map_for(target: torch.device, device_map: DeviceMap | None) -> DeviceMap:
    """The device map for `from_pretrained`; `target` is what `require_placement` returned."""
    single = device_map is None or (isinstance(device_map, str) and device_map not in STRATEGIES)
    return {"": target} if device_map is None or single else device_map


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the input of a model goes: beside its embeddings, or where accelerate computes them if it offloads them."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)

"""Where a model is computed, and in which precision."""

import torch

from deca_node.errors import DeviceError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(text: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` takes the first of CUDA, MPS and CPU that is there.

    Raises:
        DeviceError: the device asked for is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if text == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(text)
    if device.type == "cuda":
        count = torch.cuda.device_count() if cuda else 0
        missing = f"this machine has {count} CUDA devices" if (device.index or 0) >= count else ""
    else:
        missing = "this machine has no MPS device" if device.type == "mps" and not mps else ""
    if missing:
        raise DeviceError(f'device {text!r}: {missing}; set node.device = "cpu" or "auto"')
    return device


def wide_device(device: torch.device) -> torch.device:
    """Where float64 can be had of a device's tensors: of MPS, which has none, on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def pick_dtype(text: str, device: torch.device) -> str:
    """The name of the dtype for ``bf16|fp16|fp32|auto``: auto is bf16 on CUDA, else fp32."""
    if text != "auto":
        return text
    return "bf16" if device.type == "cuda" else "fp32"

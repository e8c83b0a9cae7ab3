"""Choose a device, and find out what it computes natively."""

from __future__ import annotations

import torch

CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # torch.cpu.get_capabilities, x86 and Arm


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The given device. None: the first of cuda, mps and cpu that is available."""
    if device is not None:
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device={device!r} is not available here: pass device='cpu', or None for the best"
                f" device of this machine. torch says: {reason}"
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively, not by conversion to float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(_cpu_capabilities().get(name) for name in CPU_BFLOAT16)


def has_amx(device: torch.device) -> bool:
    """Whether a device is a CPU that multiplies tiles of bfloat16 matrices (AMX)."""
    return device.type == "cpu" and bool(_cpu_capabilities().get("amx_bf16"))


def _cpu_capabilities() -> dict[str, bool]:
    """What the CPU computes; empty with an older torch, which does not report it."""
    return getattr(torch.cpu, "get_capabilities", dict)()

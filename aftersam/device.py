"""Chooses devices and precisions by name, such as auto, and gives the autocast for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re

import torch

from aftersam.errors import counted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device called `name`. auto is the GPU of this process where there is one, else the CPU.

    Raises ValueError on an unknown name, and on a GPU that does not exist."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun sets the variable: one GPU for each process
    if name == "auto":
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:1")
    device = torch.device(gpu if name == "cuda" else name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but torch {torch.__version__} sees no GPU; use cpu")
    if device.index >= torch.cuda.device_count():
        gpus = counted(torch.cuda.device_count(), "GPU")
        raise ValueError(f"device is {name}, but torch sees {gpus}, counted from 0")
    return device


def precision_for(wanted: str, device: str) -> str:
    """fp32, bf16 or fp16. For auto: the fastest that `device` of this machine computes natively."""
    if wanted != "auto":
        return wanted
    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def dtype_for(wanted: str, device: str) -> torch.dtype:
    """The dtype of `precision_for`."""
    return DTYPES[precision_for(wanted, device)]


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let glibc's malloc keep what this process frees, for its next tensors; else do nothing.

    By itself it returns the free end of its heap to the system, and pays a page fault for every 4 KiB that it gets
    again. Blocks from 32 MiB, such as whole scans, are returned all the same."""
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 25)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Autocast to `dtype`, or no autocast for fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)

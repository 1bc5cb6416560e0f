"""Versions and devices: what is there, and whether PyTorch can use it."""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import rnnlm
from doctor_checks.verdict import Verdict, right, wrong
from rnnlm.machine import cores

PACKAGES = ("torch", "accelerate", "numba", "triton", "liger-kernel")
NO_GPU = "PyTorch sees no GPU here"


def check(options: Namespace) -> Iterator[Verdict]:
    """Two lines: versions, devices."""
    yield versions(Path("/dev/nvidia0").exists(), torch.cuda.is_available())
    if torch.cuda.is_available():
        yield gpus()
    elif options.device == "cuda":
        yield wrong("devices", f"{NO_GPU}; leave out --device=cuda, or see to the driver (nvidia-smi)")
    else:
        yield right("devices", f"a CPU with {cores()} core(s) for this process ({platform.machine()}), no GPU")


def versions(has_gpu: bool, is_available: bool) -> Verdict:
    """What is installed; wrong where there is a GPU that PyTorch cannot use."""
    found = [f"Python {platform.python_version()}", f"rnnlm {rnnlm.__version__}"]
    found += [*(f"{name} {_version(name)}" for name in PACKAGES), f"CUDA {torch.version.cuda or 'none'}"]
    if is_available:
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found += [f"cuDNN {cudnn}", f"NCCL {'.'.join(map(str, nccl))}"]

    text = ", ".join(found)
    if has_gpu and not is_available:
        way_out = "install the build of PyTorch for the CUDA version that nvidia-smi prints"
        return wrong("versions", f"there is a GPU, but this PyTorch cannot use it ({text}); {way_out}")
    return right("versions", text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def gpus() -> Verdict:
    """All GPUs; wrong where PyTorch has no kernels for one of them."""
    found, without = [], []
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(f"{name} ({capability[0]}.{capability[1]}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free)")
        if not is_built_for(capability, torch.cuda.get_arch_list()):
            without.append(name)

    if without:
        built = " ".join(torch.cuda.get_arch_list())
        return wrong("devices", f"PyTorch has no kernels for {', '.join(without)}, only {built}; install another build")
    return right("devices", ", ".join(found))


def is_built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether kernels compiled for these, as sm_80 or compute_90, run on a GPU of this compute capability.

    Binaries run on later minor versions of the same major one, and what is compiled at load on all later ones (CUDA C++
    Programming Guide, 3.1).
    """
    for each in architectures:
        kind, _, digits = each.partition("_")
        number = digits.rstrip("af")
        if not number.isdecimal():
            continue
        built = divmod(int(number), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False

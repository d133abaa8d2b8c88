"""Says what an image can do; exit status 1 where its torch has no kernels for the GPU that $KERNELS names, as in sm_70.

KERNELS=sm_70 python scripts/docker/check.py
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision

from data import native
from vip import apex_kernels


def main() -> None:
    # torch.cuda.get_arch_list() is empty where there is no GPU, as in a build.
    kernels = (torch._C._cuda_getArchFlags() or "").split() if torch.version.cuda else []
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, for {', '.join(kernels) or 'the CPU'}")
    for name, modules in (("optimizers", apex_kernels.OPTIMIZERS), ("layer norm", apex_kernels.LAYER_NORM)):
        try:
            apex_kernels.require(name, modules, "torch's own")
            print(f"apex's {name}: with kernels")
        except ValueError as error:
            print(f"apex's {error}")
    print(f"decoder: {native.reason() or 'native'}")
    wanted = os.environ.get("KERNELS")
    if wanted and wanted not in kernels:
        raise SystemExit(f"KERNELS={wanted}: this torch is compiled for {', '.join(kernels)}; choose another BASE")


if __name__ == "__main__":
    main()

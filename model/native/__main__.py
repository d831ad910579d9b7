"""Compile the kernels for all targets of this machine type, into the folder of the sources."""

import platform

from dinat.model.native import HERE, TARGETS, compile_for

for target in TARGETS.get(platform.machine(), ()):
    print(compile_for(target, HERE))

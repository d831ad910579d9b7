"""Compile for every kind of processor of this machine's family, beside the sources."""

import platform

from dinat.model.native import HERE, KINDS, compile_for

for kind in KINDS.get(platform.machine(), ()):
    print(compile_for(kind, HERE))

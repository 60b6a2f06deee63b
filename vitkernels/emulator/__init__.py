"""An emulated GPU: what Triton compiles, executed on a CPU and looked at instruction by instruction.

It knows Triton and PTX, and nothing of this library's kernels.

    devices.py        the GPUs that can be emulated, and how much each does at most
    launch.py         a driver for Triton: launches of a thread that emulates go to the emulator
    execute.py        one kernel over its grid: what it computed, what it did wrong, what it counted
    ptx.py            reads PTX; flow.py, encode.py and instructions.py write it as the engine takes it
    descriptors.py    tensor maps, which a GPU's driver makes
    pipes.py          which part of a multiprocessor executes an instruction
    lists.py          the names that engine and Python share, read from engine/lists.h
    build.py          compiles the engine, engine/*, at its first use

Nothing of Triton is imported here: ``devices`` is all that a process takes in that emulates nothing.
"""

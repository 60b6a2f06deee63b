"""An emulated GPU: it executes the PTX that Triton compiles on a CPU, and checks and counts each instruction.

It knows Triton and PTX, but nothing about this library's kernels.

    devices.py        the GPUs that can be emulated, and how much each does at most
    launch.py         a driver for Triton that sends the launches of an emulating thread to the emulator
    execute.py        runs one kernel over its grid, and returns its findings and counts
    ptx.py            reads PTX; flow.py, encode.py and instructions.py encode it for the engine
    descriptors.py    tensor maps, which on a GPU the CUDA driver makes
    pipes.py          which part of a multiprocessor executes an instruction
    lists.py          the names that the engine and Python share, read from engine/lists.h
    build.py          compiles the engine, engine/*, at its first use

This file imports nothing: a process that does not emulate imports ``devices`` alone, and no Triton.
"""

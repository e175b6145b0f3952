"""CUDA kernels, run in the emulator."""

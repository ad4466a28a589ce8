"""GPUs that counts are turned into time for: one a compute capability, at the highest clock that its maker names.

Sources. NVIDIA's A100, H100 and RTX Blackwell architecture whitepapers and the DGX B200 data sheet: multiprocessors,
clocks, memory, and dense products a second, here divided by multiprocessors and clock. CUDA C++ Programming Guide:
threads, blocks, registers and shared memory ("Technical Specifications per Compute Capability"), fp32 and exp2
("Arithmetic Instructions"), one instruction a cycle and quarter ("Hardware Multithreading")."""

from __future__ import annotations

from typing import NamedTuple

QUARTERS = 4  # of a multiprocessor: each issues one instruction of a warp a cycle, and owns a quarter of the registers
REGISTERS = 65_536  # 32 bits each, of a multiprocessor
SHARED_BYTES_PER_CYCLE = 128
EXP_PER_CYCLE = 16  # exp2, log2, reciprocals: MUFU instructions of a thread


class Machine(NamedTuple):
    """Numbers of one multiprocessor, except for the first four."""

    name: str
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float
    half_flops: int
    """Of dense fp16 and bf16 products with fp32 sums, a cycle."""
    tf32_flops: int
    fp64_flops: int
    """Of fp64 matrix products, a cycle."""
    fp32_per_cycle: int
    """fp32 additions, products or multiply-adds of a thread."""
    threads: int
    blocks: int
    shared_bytes: int
    shared_block_bytes: int
    tensor_columns: int = 0
    """Columns of tensor memory (Blackwell of data centres)."""


KIB = 1024
MACHINES = {
    80: Machine("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, 2048, 1024, 128, 64, 2048, 32, 164 * KIB, 163 * KIB),
    90: Machine("H100 SXM", 132, 1.98e9, 3.35e12, 4096, 2048, 256, 128, 2048, 32, 228 * KIB, 227 * KIB),
    100: Machine("B200", 148, 1.965e9, 8.0e12, 8192, 4096, 128, 128, 2048, 32, 228 * KIB, 227 * KIB, 512),
    120: Machine("RTX 5090", 170, 2.407e9, 1.792e12, 512, 256, 4, 128, 1536, 24, 100 * KIB, 99 * KIB),
}


def resident_blocks(machine: Machine, warps: int, registers: int, shared: int, columns: int = 0) -> int:
    """Blocks that a multiprocessor holds at once, as cuda_occupancy.h counts them; 0 where one does not fit.

    A warp's registers are a multiple of 256 and lie in one quarter. A block's shared memory is a multiple of 128
    bytes, of which CUDA takes 1 KiB. `columns` are those of tensor memory."""
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    of_block = -(-(shared + KIB) // 128) * 128
    if shared > machine.shared_block_bytes or of_warp * -(-warps // QUARTERS) * QUARTERS > REGISTERS:
        return 0
    limits = [
        machine.blocks,
        machine.threads // (32 * warps),
        REGISTERS // QUARTERS // of_warp * QUARTERS // warps,
        machine.shared_bytes // of_block,
    ]
    if columns:
        limits.append(machine.tensor_columns // columns)
    return min(limits)

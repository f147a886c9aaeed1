"""Which passes of a CUDA graph are measured: the device says so, since no host takes part."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["period", "phase"])
def flag_kernel(n_passes_ptr, due_ptr, period, phase):
    """Set the flag that all other kernels of a pass read first.

    Args:
        n_passes_ptr: int64 (1,), passes before this one.
        due_ptr: int64 (1,): 1 where this pass is to be measured, else 0.
        period: passes from one that is due to the next.
        phase: passes before the first one that is due, below the period.
    """
    tl.store(due_ptr, (tl.load(n_passes_ptr) % period == phase).to(tl.int64))

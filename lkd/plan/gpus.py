"""GPUs by their datasheets."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """What the vendor states. Rates of matrix units are dense: half of what is advertised with sparsity.

    Attributes:
        name: As the vendor calls it.
        bfloat16: TFLOP/s of matrix units in bfloat16.
        tensorfloat32: The same in TensorFloat-32, which convolutions of float32 tensors use by default.
        bandwidth: Of its memory, GB/s.
        memory: GB.
    """

    name: str
    bfloat16: float
    tensorfloat32: float
    bandwidth: float
    memory: float

    def rate(self, precision: str) -> float:
        """FLOP/s for tensors of this type."""
        return 1e12 * (self.bfloat16 if precision == "bfloat16" else self.tensorfloat32)


GPUS = {
    "h100_sxm": Gpu("H100 SXM 80 GB", 989.4, 494.7, 3350, 80),
    "a100_sxm_80gb": Gpu("A100 SXM 80 GB", 312, 156, 2039, 80),
    "l40s": Gpu("L40S", 362, 183, 864, 48),
    "rtx_4090": Gpu("GeForce RTX 4090", 165.2, 82.6, 1008, 24),
}

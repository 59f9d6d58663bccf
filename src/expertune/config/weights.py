"""The sections `quantization`, `kernels` and `distributed`: how frozen weights are held and multiplied."""

from typing import Literal

from pydantic import Field

from expertune.config.sections import AutoOrSize, AutoZeroOrSize, Section, parse_size


class QuantizationConfig(Section):
    """How the frozen weights are held.

    Attributes:
        scheme: `nf4`, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, section 3). `auto` is the same, but that
            experts which the checkpoint holds in MXFP4 stay as they are; `nf4` dequantizes and quantizes these again.
        double_quantization: absmax values are themselves held in 8 bits (QLoRA, section 3, "Double Quantization").
        fit: how a block's scale is chosen when 16-bit weights are quantized: `absmax` by the largest magnitude, as
            bitsandbytes does; `mse` by the least squared error, in the same layout; `calibrated` by the same, each
            input feature weighted by its mean square in a sample of the training examples.
        calibration_tokens: tokens of that sample, which `lora.init: qera` takes too.
        layers: bits of the decoder's linears, 4 or 16, by `attention`, a projection's name, or a regular expression
            over the end of a module's name on disk; the first that fits decides. Experts are always in 4 bits.
        block_size: weights that share one absmax value.
        compute_dtype: dtype of the matrix products; `auto` is bfloat16 where the device multiplies it natively. On a
            CPU that does not, bfloat16 and float16 make products of 4-bit weights in integers, faster than float32.
    """

    scheme: Literal["auto", "nf4"] = "auto"
    double_quantization: bool = True
    fit: Literal["absmax", "mse", "calibrated"] = "absmax"
    calibration_tokens: int = Field(default=8192, ge=256)
    layers: dict[str, Literal[4, 16]] = {}
    block_size: Literal[64] = 64
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class KernelsConfig(Section):
    """How products of 4-bit weights run.

    Attributes:
        route: `fused` dequantizes inside the GEMM, `dequant_gemm` dequantizes first and multiplies the result;
            `auto` takes the faster by tokens per expert, against a crossover that is measured once per machine.
        working_set: most bytes that an expert layer takes between its products, whatever the batch is; `auto` is
            512MiB on a CPU and 2GiB on a GPU.
        keep: most bytes of gate and up that expert layers keep from forward for backward, which otherwise computes them
            again; `0` keeps none, `auto` is by the plan, at most half of the memory that the run would leave free.
    """

    route: Literal["auto", "fused", "dequant_gemm"] = "auto"
    working_set: AutoOrSize = "auto"
    keep: AutoZeroOrSize = "auto"

    @property
    def working_set_bytes(self) -> int | None:
        """The size in bytes; None where the device decides."""
        return None if self.working_set == "auto" else parse_size(self.working_set)

    @property
    def keep_bytes(self) -> int | None:
        """The size in bytes; None where the plan decides."""
        if self.keep == "auto":
            return None
        return 0 if self.keep == 0 else parse_size(self.keep)


class DistributedConfig(Section):
    """How the experts of a run on several processes are held; one process holds all of them anyway.

    Attributes:
        experts: `replicate`: each process holds all of them. `shard`: each holds a slice of every layer's frozen bytes,
            and a layer is gathered for its use. `parallel`: they are shared out, with their adapters and optimizer
            states, and tokens travel. `auto`: the plan chooses.
        expert_parallel_size: with `parallel`, how many processes share them out; null means all. The processes are a
            multiple of it.
    """

    experts: Literal["auto", "replicate", "shard", "parallel"] = "auto"
    expert_parallel_size: int | None = Field(default=None, ge=1)

"""The NF4 codec gives bitsandbytes' bytes, keeps its error bound, and refuses what 4 bits cannot hold."""

from pathlib import Path
from types import ModuleType

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from expertune.kernels import nf4
from expertune.kernels.nf4 import BLOCK_SIZE, Nf4Bytes, Nf4Stack, quantize_matrix, reference

ASSET = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral" / "model.safetensors"
CODEBOOK = torch.tensor(reference.NF4_CODEBOOK)
LARGEST_GAP = float(CODEBOOK.diff().max())


def real_rows(layer: int, expert: int, projection: str) -> Tensor:
    """A few rows of a trained expert of the embedded model, bfloat16."""
    with safe_open(ASSET, framework="pt") as file:
        return file.get_tensor(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight")[:48]


def one_huge_outlier() -> Tensor:
    matrix = torch.randn(20, 128)
    matrix[3, 70] = 1e30
    return matrix


def zero_block_among_others() -> Tensor:
    matrix = torch.randn(6, 192)
    matrix[2, 64:128] = 0
    return matrix


def codebook_midpoints() -> Tensor:
    """Every midpoint of two neighboring codebook values, in blocks whose absmax is a power of two."""
    row = torch.zeros(BLOCK_SIZE)
    row[:15] = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2
    row[-1] = 1.0
    return torch.stack([row, -row, row * 2, row / 1024])


def beside_codebook_midpoints() -> Tensor:
    """The numbers next to every midpoint, above and below it."""
    middle = codebook_midpoints()
    most, least = torch.full_like(middle, 2.0), torch.full_like(middle, -2.0)
    return torch.cat([middle.nextafter(most), middle.nextafter(least)])


MATRICES = {
    "normal, float32": lambda: torch.randn(33, 192),
    "normal, bfloat16": lambda: torch.randn(33, 192, dtype=torch.bfloat16),
    "normal, float16": lambda: torch.randn(33, 192, dtype=torch.float16),
    "one block": lambda: torch.randn(1, 64),
    "more than one nested block, the last one short": lambda: torch.randn(5, 64 * 103),
    "more than one tile, the last one short": lambda: torch.randn(1100, 1024, dtype=torch.bfloat16),
    "trained w1": lambda: real_rows(0, 3, "w1"),
    "trained w2": lambda: real_rows(1, 0, "w2"),
    "trained w3": lambda: real_rows(3, 7, "w3"),
    "all zeros": lambda: torch.zeros(4, 128),
    "negative zeros": lambda: -torch.zeros(4, 128),
    "a zero block among others": zero_block_among_others,
    "one huge outlier": one_huge_outlier,
    "denormals of float32": lambda: torch.randn(4, 128) * 1e-41,
    "smallest denormals of bfloat16": lambda: torch.full((2, 64), 1e-40, dtype=torch.bfloat16),
    "largest values of float16": lambda: torch.full((2, 64), 65504.0, dtype=torch.float16),
    "constant": lambda: torch.full((7, 128), 0.3),
    "negative constant": lambda: torch.full((7, 128), -0.3, dtype=torch.bfloat16),
    "codebook midpoints": codebook_midpoints,
    "numbers beside codebook midpoints": beside_codebook_midpoints,
    "columns of a transposed view": lambda: torch.randn(128, 40).t()[:, :64],
}


def one_matrix(packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Nf4Bytes:
    """What `quantize_matrix` returned, as a stack of one."""
    return Nf4Bytes(packed[None], absmax[None], nested_absmax[None], offset)


def dequantize_whole(codec: ModuleType, weight: Nf4Bytes, dtype: torch.dtype) -> Tensor:
    out = torch.full((weight.out_features, weight.in_features), float("nan"), dtype=dtype)
    return codec.dequantize(weight, 0, out, slice(0, weight.out_features), slice(0, weight.in_features))


@pytest.fixture(params=MATRICES, ids=str)
def matrix(request: pytest.FixtureRequest) -> Tensor:
    return MATRICES[request.param]()


def bitsandbytes_state(matrix: Tensor, double_quantization: bool) -> tuple[Tensor, bnb_functional.QuantState]:
    """What bitsandbytes' own frozen parameter holds for a matrix."""
    parameter = bnb.nn.Params4bit(
        matrix.clone(), requires_grad=False, compress_statistics=double_quantization, quant_type="nf4", blocksize=64
    ).to("cpu")
    return parameter.data, parameter.quant_state


def test_bytes_and_scales_are_those_of_a_bitsandbytes_parameter(matrix: Tensor) -> None:
    packed, absmax, nested_absmax, offset = quantize_matrix(matrix)
    their_packed, state = bitsandbytes_state(matrix.contiguous(), double_quantization=True)
    assert torch.equal(packed.flatten(), their_packed.flatten())
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(offset, state.offset.reshape(1))


def test_bytes_and_scales_are_those_of_bitsandbytes_without_double_quantization(matrix: Tensor) -> None:
    packed, absmax, nested_absmax, offset = quantize_matrix(matrix, double_quantization=False)
    their_packed, state = bitsandbytes_state(matrix.contiguous(), double_quantization=False)
    assert torch.equal(packed.flatten(), their_packed.flatten())
    assert torch.equal(absmax, state.absmax)
    assert nested_absmax.numel() == offset.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stack_dequantizes_to_what_bitsandbytes_dequantizes(matrix: Tensor, dtype: torch.dtype) -> None:
    stack = Nf4Stack(1, *matrix.shape)
    stack.write(0, matrix)
    packed, state = bitsandbytes_state(matrix.contiguous(), double_quantization=True)
    state.dtype = dtype
    assert torch.equal(stack.dequantize(0, dtype), bnb_functional.dequantize_4bit(packed, state))


def test_codebook_values_pack_into_ascending_nibbles() -> None:
    row = CODEBOOK.repeat(4)[None] * 2.5
    packed, absmax, _, _ = quantize_matrix(row, double_quantization=False)
    assert packed.tolist() == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4]
    assert absmax.tolist() == [2.5]
    weight = one_matrix(packed, absmax, torch.empty(0), torch.empty(0))
    assert torch.equal(dequantize_whole(nf4, weight, torch.float32), row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_plain_dequantization_gives_the_same_bits(
    matrix: Tensor, double_quantization: bool, dtype: torch.dtype
) -> None:
    weight = one_matrix(*quantize_matrix(matrix, double_quantization))
    assert torch.equal(nf4.dequantize_absmax(weight, 0), reference.dequantize_absmax(weight, 0))
    assert torch.equal(dequantize_whole(nf4, weight, dtype), dequantize_whole(reference, weight, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_part_of_a_matrix_dequantizes_as_in_the_whole(dtype: torch.dtype) -> None:
    stack, _ = written_stack()
    whole = stack.dequantize(1, dtype)
    wide = torch.zeros(3, 200, dtype=dtype)
    part = nf4.dequantize(stack.bytes, 1, wide[:, 8:72], slice(2, 5), slice(64, 128))
    assert torch.equal(part, whole[2:5, 64:])
    assert not wide[:, :8].any()
    assert not wide[:, 72:].any()


def test_part_that_cuts_a_block_is_refused_with_its_columns() -> None:
    stack, _ = written_stack()
    with pytest.raises(ValueError, match="whole blocks of 64, got 32:128"):
        nf4.dequantize(stack.bytes, 0, torch.empty(6, 96), columns=slice(32, 128))


def test_output_of_another_shape_is_refused_with_both_shapes() -> None:
    stack, _ = written_stack()
    with pytest.raises(ValueError, match=r"out must be \(6, 128\) .* got \(6, 64\)"):
        nf4.dequantize(stack.bytes, 0, torch.empty(6, 64))


# Below the smallest normal number 1/absmax overflows, and each codec has its own way out.
@pytest.mark.parametrize("name", [name for name in MATRICES if "denormals" not in name])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_plain_quantizer_differs_by_one_step_at_most_and_only_at_ties(name: str, double_quantization: bool) -> None:
    matrix = MATRICES[name]()
    packed, absmax, nested_absmax, offset = quantize_matrix(matrix, double_quantization)
    plain_packed, plain_absmax, plain_nested, plain_offset = reference.quantize_matrix(matrix, double_quantization)
    steps = nibbles(packed) - nibbles(plain_packed)
    assert steps.abs().max() <= 1
    # Where the code differs, the weight lies on a midpoint to the last bit: both neighbors are equally near.
    blocks = matrix.float().reshape(-1, BLOCK_SIZE)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    distances = (scaled[..., None] - CODEBOOK).abs().sort(dim=-1).values
    ties = (distances[..., 1] - distances[..., 0] < 1e-6).view_as(steps)
    assert not (steps != 0)[~ties].any()
    torch.testing.assert_close(plain_nested, nested_absmax, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain_offset, offset, rtol=1e-6, atol=0)
    if double_quantization:
        # Under a nested scale of zero every code dequantizes to the mean.
        matters = nested_absmax.repeat_interleave(nf4.NESTED_BLOCK_SIZE)[: len(absmax)] > 0
        assert not ((absmax.int() - plain_absmax.int()).abs() > 1)[matters].any()
    else:
        assert torch.equal(absmax, plain_absmax)


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1).int()


@st.composite
def random_matrices(draw: st.DrawFn) -> Tensor:
    rows, blocks = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale = 10.0 ** draw(st.integers(-3, 3))
    spread = draw(st.floats(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrix = torch.randn(rows, blocks * BLOCK_SIZE, generator=generator)
    per_block = torch.randn(rows, blocks, 1, generator=generator).mul(spread).exp()
    largest = torch.finfo(dtype).max  # a matrix that is not finite is refused, which others test
    return (matrix.view(rows, blocks, -1) * per_block).flatten(1).mul(scale).clamp(-largest, largest).to(dtype)


@given(random_matrices())
def test_a_dequantized_weight_is_within_half_the_largest_gap_of_its_block(matrix: Tensor) -> None:
    packed, absmax, *none = quantize_matrix(matrix, double_quantization=False)
    dequantized = dequantize_whole(nf4, one_matrix(packed, absmax, *none), torch.float32)
    error = (dequantized - matrix.float()).view(-1, BLOCK_SIZE).abs().amax(dim=1)
    assert (error <= absmax * (LARGEST_GAP / 2 + 1e-6)).all()


@given(random_matrices())
def test_double_quantization_adds_at_most_half_a_step_of_its_own_map(matrix: Tensor) -> None:
    _, exact, _, _ = quantize_matrix(matrix, double_quantization=False)
    packed, absmax, nested_absmax, offset = quantize_matrix(matrix)
    weight = one_matrix(packed, absmax, nested_absmax, offset)
    error = (nf4.dequantize_absmax(weight, 0).flatten() - exact).abs()
    half_step = float(reference.dynamic_codebook(torch.device("cpu")).diff().max()) / 2
    largest = nested_absmax.repeat_interleave(nf4.NESTED_BLOCK_SIZE)[: len(error)]
    assert (error <= largest * half_step + 1e-5 * exact).all()


@given(random_matrices())
def test_dequantized_weights_quantize_to_the_same_codes_again(matrix: Tensor) -> None:
    packed, absmax, *none = quantize_matrix(matrix, double_quantization=False)
    dequantized = dequantize_whole(nf4, one_matrix(packed, absmax, *none), torch.float32)
    again, absmax_again, _, _ = quantize_matrix(dequantized, double_quantization=False)
    assert torch.equal(again, packed)
    assert torch.equal(absmax_again, absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_counted_in_the_refusal(bad: float, dtype: torch.dtype) -> None:
    matrix = torch.randn(4, 64).to(dtype)
    matrix[1, 3] = matrix[2, 5] = bad
    with pytest.raises(ValueError, match=r"2 of 256 weights are NaN or infinite"):
        quantize_matrix(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=["of CPUs", "of GPUs", "bytes of 255"])
def test_scale_that_is_nan_gives_no_number_whatever_its_bits(bits: int, dtype: torch.dtype) -> None:
    packed, absmax, *none = quantize_matrix(torch.randn(2, 128), double_quantization=False)
    absmax.view(torch.int32)[2] = bits
    found = dequantize_whole(nf4, one_matrix(packed, absmax, *none), dtype)
    assert found[1, :64].isnan().all()
    assert found[0].isfinite().all()
    assert found[1, 64:].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 63), (4, 96), (64,), (2, 4, 64), (0, 64), (4, 0)])
def test_shapes_that_cannot_be_cut_into_blocks_are_refused_with_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got \(" + ", ".join(map(str, shape))):
        quantize_matrix(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_dtypes_that_the_codec_does_not_take_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        quantize_matrix(torch.ones(2, 64).to(dtype))


def test_quantizing_leaves_the_source_matrix_alone() -> None:
    matrix = torch.randn(4, 128)
    before = matrix.clone()
    quantize_matrix(matrix)
    assert torch.equal(matrix, before)


def written_stack(double_quantization: bool = True) -> tuple[Nf4Stack, list[Tensor]]:
    matrices = [torch.randn(6, 128) for _ in range(3)]
    stack = Nf4Stack(3, 6, 128, double_quantization)
    for index, matrix in enumerate(matrices):
        stack.write(index, matrix)
    return stack, matrices


@pytest.mark.parametrize("double_quantization", [True, False])
def test_each_matrix_of_a_stack_dequantizes_as_if_it_were_alone(double_quantization: bool) -> None:
    stack, matrices = written_stack(double_quantization)
    for index, matrix in enumerate(matrices):
        alone = Nf4Stack(1, 6, 128, double_quantization)
        alone.write(0, matrix)
        assert torch.equal(stack.dequantize(index, torch.float32), alone.dequantize(0, torch.float32))
        assert torch.equal(nf4.dequantize_absmax(stack.bytes, index), nf4.dequantize_absmax(alone.bytes, 0))


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_casting_the_model_changes_neither_bytes_nor_scales(cast: object, double_quantization: bool) -> None:
    stack, _ = written_stack(double_quantization)
    model = nn.Sequential(stack, nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    cast(model)  # type: ignore[operator]
    for name, tensor in stack.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_moving_a_stack_moves_all_of_it() -> None:
    stack, _ = written_stack()
    stack.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in stack.state_dict().values()} == {"meta"}
    assert {tensor.dtype for tensor in stack.state_dict().values()} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("double_quantization", [True, False])
def test_state_dict_round_trip_gives_the_same_weights(double_quantization: bool) -> None:
    stack, _ = written_stack(double_quantization)
    copy = Nf4Stack(3, 6, 128, double_quantization)
    copy.load_state_dict(stack.state_dict())
    for index in range(3):
        assert torch.equal(copy.dequantize(index, torch.float32), stack.dequantize(index, torch.float32))


def test_nothing_of_a_stack_is_trainable() -> None:
    stack, _ = written_stack()
    assert not any(parameter.requires_grad for parameter in stack.parameters())


# 0.5 bytes per weight, one byte of absmax per 64 weights (4 without double quantization), and per matrix 4 bytes of
# nested absmax per 256 blocks and 4 of offset: 4.127 bits per weight at Mixtral's sizes.
@pytest.mark.parametrize(
    ("double_quantization", "expected"),
    [(True, 8 * (14336 * 4096 // 2 + 14336 * 64 + 4 * 3584 + 4)), (False, 8 * (14336 * 4096 // 2 + 4 * 14336 * 64))],
)
def test_nbytes_of_mixtrals_experts_follow_from_the_layout(double_quantization: bool, expected: int) -> None:
    assert Nf4Stack(8, 14336, 4096, double_quantization, device="meta").nbytes == expected


def test_matrix_of_another_shape_is_refused_with_both_shapes() -> None:
    stack, _ = written_stack()
    with pytest.raises(ValueError, match=r"expected shape \(6, 128\), got \(128, 6\)"):
        stack.write(0, torch.randn(128, 6))


def test_stack_whose_columns_are_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64, got 96"):
        Nf4Stack(1, 4, 96)


def test_printed_stack_shows_shape_and_scheme() -> None:
    assert "3 x [6, 128], nf4, double quantization" in repr(written_stack()[0])

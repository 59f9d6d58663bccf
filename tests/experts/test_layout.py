"""One expert's tensors between the family's layout and the one here, both ways."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec
from tests.experts.families import from_matrices

E, D, N = 3, 4, 5
LAYOUTS = [(transposed, concatenated) for transposed in (False, True) for concatenated in (False, True)]


def spec_of(transposed: bool, concatenated: bool, has_gate: bool = True) -> ExpertsSpec:
    return ExpertsSpec(
        *(E, D, N, has_gate), has_bias=True, is_transposed=transposed, is_concatenated=concatenated or not has_gate
    )


def products(spec: ExpertsSpec, live: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x times one expert's slice, as the family's own forward does it."""
    return x @ live + bias if spec.is_transposed else F.linear(x, live, bias)


@pytest.mark.parametrize(("transposed", "concatenated"), LAYOUTS)
def test_matrices_and_biases_give_gate_and_up_of_the_family(transposed: bool, concatenated: bool) -> None:
    spec = spec_of(transposed, concatenated)
    live, bias, x = torch.randn(spec.stack_shape("gate_up_proj")), torch.randn(E, 2 * N), torch.randn(7, D)
    fused = products(spec, live[1], bias[1], x)
    gate, up = fused.chunk(2, dim=-1) if concatenated else (fused[:, ::2], fused[:, 1::2])
    gate_bias, up_bias = layout.to_bias(spec, "gate_up_proj", bias)[1].chunk(2)
    first, second = layout.to_matrices(spec, "gate_up_proj", live[1])
    torch.testing.assert_close(F.linear(x, first, gate_bias), gate)
    torch.testing.assert_close(F.linear(x, second, up_bias), up)
    torch.testing.assert_close(layout.to_activation(spec, torch.cat([gate, up], dim=1)), fused)


@pytest.mark.parametrize(("transposed", "concatenated"), LAYOUTS)
def test_down_is_one_matrix(transposed: bool, concatenated: bool) -> None:
    spec = spec_of(transposed, concatenated)
    live, bias, x = torch.randn(spec.stack_shape("down_proj")), torch.randn(E, D), torch.randn(7, N)
    (matrix,) = layout.to_matrices(spec, "down_proj", live[2])
    arranged = layout.to_bias(spec, "down_proj", bias)
    torch.testing.assert_close(F.linear(x, matrix, arranged[2]), products(spec, live[2], bias[2], x))


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize(("transposed", "concatenated"), LAYOUTS)
def test_the_way_back_gives_the_familys_tensors_bit_for_bit(
    transposed: bool, concatenated: bool, has_gate: bool
) -> None:
    spec = spec_of(transposed, concatenated, has_gate)
    for weight in spec.weight_names:
        live = torch.randn(spec.stack_shape(weight))
        back = from_matrices(spec, weight, layout.to_matrices(spec, weight, live[0]))
        assert torch.equal(back, live[0])
        shape = [spec.shape(projection) for projection in layout.fused_projections(spec, weight)]
        assert [tuple(matrix.shape) for matrix in layout.to_matrices(spec, weight, live[0])] == shape
        bias = torch.randn(E, sum(rows for rows, _ in shape))
        parts = layout.to_bias(spec, weight, bias).T.chunk(len(shape))
        assert torch.equal(layout.join_rows(spec, weight, parts).T, bias)

"""Which modules are RMS norms is found by trying them; an answer's few tokens take them in one call."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from expertune.generation import norms
from expertune.generation.norms import Form, form_of, norms_in_one_call
from expertune.kernels import native

DTYPES = [torch.float32, torch.bfloat16]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def with_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        module.weight.normal_()
    return module.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "form"),
    [
        (MixtralRMSNorm(64, 1e-5), Form(1e-5, 0.0)),
        (GptOssRMSNorm(64, 1e-6), Form(1e-6, 0.0)),
        (GemmaRMSNorm(64, 1e-6), Form(1e-6, 1.0)),
        (Qwen3NextRMSNormGated(64, 1e-6), None),
        (nn.LayerNorm(64, bias=False), None),
        (nn.LayerNorm(64), None),
        (Scale(), None),
        (nn.Embedding(4, 64), None),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_module_is_taken_for_what_it_computes(module: nn.Module, form: Form | None, dtype: torch.dtype) -> None:
    norms._FORMS.pop(module, None)
    assert form_of(with_weights(module, dtype)) == form


def test_nothing_is_told_from_weights_of_zero() -> None:
    module = MixtralRMSNorm(64)
    nn.init.zeros_(module.weight)
    assert form_of(module) is None


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_are_normed_in_one_call_and_many_by_the_family(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = nn.Sequential(with_weights(MixtralRMSNorm(64), dtype)), []
    call = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda *given: calls.append(given) or call(*given))
    few, many = torch.randn(2, 1, 64).to(dtype), torch.randn(1, 65, 64).to(dtype)
    with torch.no_grad():
        expected, of_many = model(few), model(many)
        with norms_in_one_call(model):
            found = model(few)
            assert len(calls) == 1
            assert torch.equal(model(many), of_many)
    with norms_in_one_call(model):
        assert model(few).requires_grad  # what may want a gradient
    assert len(calls) == 1
    assert torch.allclose(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert "forward" not in model[0].__dict__

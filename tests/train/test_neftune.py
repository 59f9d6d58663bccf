"""Noise on the input embeddings: within alpha / sqrt(L * D) of each sequence by itself, in training alone."""

import math

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from expertune.train.neftune import noisy_embeddings, sequence_lengths

D = 64


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, hidden_size=D, intermediate_size=64, **sizes))


def noise_of(model: MixtralForCausalLM, alpha: float, **inputs: Tensor) -> Tensor:
    """What is added to the embeddings of a batch."""
    seen: list[Tensor] = []
    with noisy_embeddings(model, alpha):
        hook = model.model.embed_tokens.register_forward_hook(lambda _, __, output: seen.append(output))
        model(**inputs)
        hook.remove()
    return (seen[0] - model.model.embed_tokens.weight[inputs["input_ids"]]).detach()


def test_noise_is_uniform_within_the_bound_of_each_sequence_whatever_its_neighbors_are(
    model: MixtralForCausalLM,
) -> None:
    lengths, alpha = (4, 100), 5.0
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    ids = torch.randint(32, (1, sum(lengths)))
    found = noise_of(model.train(), alpha, input_ids=ids, position_ids=positions)
    for part, length in zip(found[0].split(lengths), lengths, strict=True):
        bound = alpha / math.sqrt(length * D)
        assert float(part.abs().max()) <= bound * (1 + 1e-5)
        assert float(part.abs().max()) > 0.97 * bound
        # Of a uniform distribution the mean is zero, and the standard deviation the bound over the root of three.
        assert abs(float(part.mean())) < 0.1 * bound
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_padding_is_no_part_of_a_sequence(model: MixtralForCausalLM) -> None:
    mask = torch.tensor([[0] * 12 + [1] * 4, [1] * 16])
    lengths = sequence_lengths(mask.shape, attention_mask=mask)
    assert lengths[:, -1].tolist() == [4, 16]
    positions = torch.tensor([[0] * 12 + [0, 1, 2, 3], list(range(16))])  # as padded batches have them
    assert sequence_lengths(mask.shape, positions, mask)[:, -1].tolist() == [4, 16]


def test_evaluation_and_what_comes_after_training_have_no_noise(model: MixtralForCausalLM) -> None:
    ids, state = torch.randint(32, (1, 8)), torch.get_rng_state()
    assert not noise_of(model.eval(), 5.0, input_ids=ids).any()
    assert torch.equal(torch.get_rng_state(), state)
    assert noise_of(model.train(), 5.0, input_ids=ids).any()
    assert not model.model.embed_tokens._forward_hooks
    assert not model._forward_pre_hooks


def test_same_state_of_the_generator_gives_the_same_noise(model: MixtralForCausalLM) -> None:
    ids = torch.randint(32, (1, 8))
    one, other = (torch.manual_seed(seed) and noise_of(model.train(), 5.0, input_ids=ids) for seed in (3, 3))
    assert torch.equal(one, other)

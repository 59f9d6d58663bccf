"""The loss without the logits against the model's own: value, gradients, normalization, and when it steps back."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from expertune import finetune
from expertune.config import parse_config
from expertune.evaluation.scoring import evaluation_loss
from expertune.layers import dense_linear
from expertune.objectives import chunked_loss
from expertune.objectives.chunked_loss import LanguageModelLoss
from expertune.run.record import RunRecord
from tests.tiny_models import FAMILIES as STRUCTURES
from tests.tiny_models import VOCABULARY, tiny_config

# granitemoe divides its logits, cohere2_moe multiplies them, gemma4_text caps them.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {},
    "olmoe": {},
    "phimoe": {},
    "granitemoe": {"logits_scaling": 6.0},
    "cohere2_moe": {"logit_scale": 0.3, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {
        "final_logit_softcapping": 3.0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def adapted(
    family: str = "mixtral", dropout: float = 0.0, targets: tuple[str, ...] = ("q_proj", "lm_head"), **changes: Any
) -> PeftModel:
    """A tiny model of a family whose factors all have the size of trained ones."""
    torch.manual_seed(0)
    make = partial(tiny_config, family) if family in STRUCTURES else partial(AutoConfig.for_model, family, **SIZES)
    base = AutoModelForCausalLM.from_config(make(**(FAMILIES[family] | changes)))
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=list(targets))
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def batch(num_rows: int = 2, length: int = 11, **more: Any) -> dict[str, Any]:
    """Rows whose first third has no label."""
    ids = torch.randint(3, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False, **more}


def padded() -> dict[str, Any]:
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :5] = 0
    inputs["labels"][0, :5] = -100
    return inputs | {"attention_mask": mask}


def padding_free() -> dict[str, Any]:
    inputs = batch(1, 12)
    inputs["labels"][0, 5] = -100  # the first token of the second row
    return inputs | {"position_ids": torch.tensor([[*range(5), *range(7)]])}


def one_label() -> dict[str, Any]:
    inputs = batch()
    inputs["labels"].fill_(-100)[1, 7] = 5
    return inputs


BATCHES = {"rows": batch, "padded": padded, "padding-free": padding_free, "one label": one_label}


def loss_and_gradients(
    model: PeftModel, inputs: dict[str, Any], loss: LanguageModelLoss | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)  # of dropout
    model.zero_grad()
    with loss.in_chunks(inputs) if loss else nullcontext():
        value = model(**inputs).loss
    value.backward()
    return value.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_same(model: PeftModel, inputs: dict[str, Any]) -> None:
    """Equal to the model's own path, by a path that makes no logits."""
    said: list[str] = []
    loss = LanguageModelLoss(model, notify=said.append)
    own, own_gradients = loss_and_gradients(model, inputs)
    value, gradients = loss_and_gradients(model, inputs, loss)
    assert said == []
    torch.testing.assert_close(value, own, rtol=1e-6, atol=0)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        largest = own_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, own_gradients[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family: str, shape: str) -> None:
    assert_same(adapted(family).train(), BATCHES[shape]())


@pytest.mark.parametrize("num_items", [5, torch.tensor(5)])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_loss_is_divided_by_the_items_of_the_whole_step(family: str, num_items: int | Tensor) -> None:
    assert_same(adapted(family), batch() | {"num_items_in_batch": num_items})


def test_head_without_an_adapter_of_its_own() -> None:
    assert_same(adapted(targets=("q_proj",)), batch())


def test_head_alone_is_adapted() -> None:
    assert_same(adapted(targets=("lm_head",)), batch())


def test_tied_embeddings() -> None:
    assert_same(adapted(targets=("q_proj",), tie_word_embeddings=True), batch())


def test_dropout_on_the_head_drops_what_the_models_own_path_would() -> None:
    assert_same(adapted(dropout=0.4).train(), batch())


def test_several_active_adapters_add_up_and_none_is_the_base_model() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=5, lora_alpha=1, target_modules=["lm_head"]))
    nn.init.normal_(model.get_base_model().lm_head.lora_B["other"].weight)
    model.base_model.set_adapter(["default", "other"])
    assert_same(model, batch())
    inputs = batch()
    with model.disable_adapter(), torch.no_grad():
        own = model(**inputs).loss
        with LanguageModelLoss(model).in_chunks(inputs):
            torch.testing.assert_close(model(**inputs).loss, own, rtol=1e-6, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = adapted().train()
    _, plain = loss_and_gradients(model, batch(), LanguageModelLoss(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    _, checkpointed = loss_and_gradients(model, batch(), LanguageModelLoss(model))
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8)


def test_auxiliary_loss_of_the_router_is_added_by_the_model() -> None:
    model = adapted(output_router_logits=True, router_aux_loss_coef=0.5, targets=("q_proj", "v_proj", "lm_head"))
    assert_same(model, batch())
    inputs = batch()
    with LanguageModelLoss(model).in_chunks(inputs):
        with_it = model(**inputs).loss
        model.get_base_model().config.output_router_logits = False
        assert model(**inputs).loss < with_it - 0.1


def test_two_runs_give_identical_bytes() -> None:
    model = adapted(dropout=0.3).train()
    first, first_gradients = loss_and_gradients(model, batch(), LanguageModelLoss(model))
    second, second_gradients = loss_and_gradients(model, batch(), LanguageModelLoss(model))
    assert torch.equal(first, second)
    assert all(torch.equal(gradient, second_gradients[name]) for name, gradient in first_gradients.items())


def test_comparison_leaves_mode_gradients_and_random_numbers_alone() -> None:
    model = adapted(dropout=0.3).train()
    state = torch.get_rng_state()
    with LanguageModelLoss(model).in_chunks(batch()):
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(model.get_base_model().lm_head)
    assert "_loss_function" not in vars(model.get_base_model())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_agree_within_their_rounding(dtype: torch.dtype) -> None:
    model, said = adapted("granitemoe").to(dtype), []
    inputs = batch()
    with torch.no_grad():
        own = model(**inputs).loss
        with LanguageModelLoss(model, notify=said.append).in_chunks(inputs):
            torch.testing.assert_close(model(**inputs).loss, own, rtol=1e-2, atol=0, check_dtype=False)
    assert said == []


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operator made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_all_tokens_and_all_of_the_vocabulary_is_made() -> None:
    model = adapted(vocab_size=5000)
    loss, inputs = LanguageModelLoss(model), batch(4, 60)
    with loss.in_chunks(inputs):  # compares
        pass
    inputs["labels"][:, :-3] = -100
    with Largest() as own:
        model(**inputs)
    with Largest() as in_chunks, loss.in_chunks(inputs):
        model(**inputs).loss.backward()
    assert own.numel >= 4 * 60 * 5000
    # What is left of the size of the vocabulary: the weight itself, 12 rows of logits, B and its gradient.
    assert in_chunks.numel <= 5000 * 64


# --- when the model's own path is taken ------------------------------------------------------------------------------


@contextmanager
def own_path_after(model: nn.Module, reason: str) -> Iterator[LanguageModelLoss]:
    """The loss falls back once, says why, and is then the model's own."""
    said: list[str] = []
    loss = LanguageModelLoss(model, notify=said.append)
    yield loss
    inputs = batch()
    with torch.no_grad():
        own = model(**inputs)
        for _ in range(2):
            with loss.in_chunks(inputs):
                output = model(**inputs)
            assert torch.equal(output.loss, own.loss)
            assert torch.equal(output.logits, own.logits)
    assert len(said) == 1
    assert reason in said[0]


def change_logits(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let a model do something of its own between head and loss."""
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: change(output))


def test_scale_of_the_logits_by_any_name_is_found() -> None:
    model = adapted()
    change_logits(model, lambda logits: logits * 0.31)
    assert_same(model, batch())


def test_cap_of_the_logits_by_any_name_is_found_even_where_logits_are_small() -> None:
    model = adapted(initializer_range=0.001)
    change_logits(model, lambda logits: 20 * torch.tanh(logits * 1.7 / 20))
    assert_same(model, batch())


def test_loss_that_is_not_finite_with_the_experts_passed_by_is_compared_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, passed = adapted(), []

    @contextmanager
    def overflows(_: nn.Module) -> Iterator[None]:
        block = model.get_base_model().model.layers[0]
        hook = block.register_forward_hook(lambda module, inputs, output: output * torch.inf)
        passed.append(block)
        yield
        hook.remove()

    monkeypatch.setattr(chunked_loss, "experts_passed_by", overflows)
    assert_same(model, batch())
    assert passed


def test_other_functions_of_the_logits_are_left_to_the_model() -> None:
    model = adapted()
    change_logits(model, lambda logits: logits.sign() * logits.abs().sqrt())
    with own_path_after(model, "more to its logits than scale and cap them"):
        pass


def test_logits_that_are_cut_are_left_to_the_model() -> None:
    model = adapted()
    base = model.get_base_model()
    base.lm_head.register_forward_hook(lambda module, inputs, output: output[..., : VOCABULARY - 5])
    base.vocab_size = VOCABULARY - 5
    with own_path_after(model, f"over {VOCABULARY - 5} of the head's {VOCABULARY} logits"):
        pass


def test_losses_that_disagree_leave_the_loss_to_the_model() -> None:
    model = adapted()
    # A bias that the head's weight knows nothing of; it does not show on the values at the head's place.
    bias = torch.randn(VOCABULARY)
    change_logits(model, lambda logits: logits + bias if logits.shape[-1] > 1 else logits)
    with own_path_after(model, "on a first sample, and is "):
        pass


def test_another_loss_function_is_left_to_the_model() -> None:
    model = adapted()

    def mine(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return logits.square().mean()

    model.get_base_model().loss_function = mine
    with own_path_after(model, "loss function is not the one"):
        pass
    assert model.get_base_model().loss_function is mine


def test_head_that_is_trained_itself_is_left_to_the_model() -> None:
    model = adapted(targets=("q_proj",))
    model.get_base_model().lm_head.weight.requires_grad_()
    with own_path_after(model, "the output head itself is trained"):
        pass


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_16_bit_head_that_is_multiplied_without_16_bit_floats_stays_in_chunks_and_as_it_was(
    targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_linear, "gemm_dtype", lambda dtype, device: torch.float32)
    model, said = adapted(targets=targets).to(torch.bfloat16), []
    head = model.get_base_model().get_output_embeddings()
    linear = getattr(head, "base_layer", head)
    dense_linear.use_dense_linear(linear)
    loss, inputs = LanguageModelLoss(model, notify=said.append), batch()
    own = model(**inputs).loss.item()
    for _ in range(2):
        with loss.in_chunks(inputs):
            assert model(**inputs).loss.item() == pytest.approx(own, rel=0.01)
    assert said == []
    assert dense_linear.is_dense_linear(linear)
    assert "forward" not in vars(head) or head is linear


def test_merged_adapter_is_left_to_the_model() -> None:
    model = adapted()
    model.merge_adapter()
    with own_path_after(model, "merged"):
        pass


def test_mode_full_is_the_models_own_path_and_says_nothing() -> None:
    model, said = adapted(), []
    inputs = batch()
    with LanguageModelLoss(model, "full", said.append).in_chunks(inputs):
        assert model(**inputs).logits.shape[-1] == VOCABULARY
    assert said == []


# --- in a run --------------------------------------------------------------------------------------------------------


def run(values: dict[str, Any], **changes: Any) -> RunRecord:
    return finetune(parse_config(values | changes)).record


def test_run_has_the_losses_of_one_that_takes_all_logits(run_values: dict[str, Any], whole_run: Path) -> None:
    records = [RunRecord.load(whole_run), run(run_values, loss="full")]
    assert "loss" not in records[0]["config"]  # which means auto
    assert not any("logits" in note for note in records[0]["train"]["notes"])
    for part in ("train", "eval"):
        for (_, one), (_, other) in zip(records[0][part]["loss"], records[1][part]["loss"], strict=True):
            assert one == pytest.approx(other, rel=2e-5)


def test_smoothed_labels_take_all_logits_and_the_record_says_so_once(run_values: dict[str, Any]) -> None:
    training = run_values["training"] | {"label_smoothing_factor": 0.1, "max_steps": 2}
    notes = run(run_values, training=training)["train"]["notes"]
    assert sum("label_smoothing_factor" in note for note in notes) == 1


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_evaluation_loss_is_that_of_the_logits_without_the_routers_share(family: str) -> None:
    model = adapted(family, output_router_logits=True)
    rows = [{name: batch(1, length)[name] for name in ("input_ids", "labels")} for length in (5, 9)]
    full = evaluation_loss(model, rows, lambda features: dict(features[0]), 1)
    in_chunks = evaluation_loss(model, rows, lambda features: dict(features[0]), 1, LanguageModelLoss(model).summed)
    assert in_chunks == pytest.approx(full, rel=1e-6)

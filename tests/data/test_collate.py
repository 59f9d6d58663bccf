import pytest
import torch
from transformers import DataCollatorWithFlattening, MixtralConfig, MixtralForCausalLM

from expertune.config import DataConfig
from expertune.data import (
    IGNORE_INDEX,
    LeftPaddingCollator,
    PaddingFreeCollator,
    TokenizedExample,
    make_collator,
    pack_examples,
)
from expertune.errors import DataError
from expertune.layers.varlen_attention import SEQUENCE_BOUNDS

FIRST = {"input_ids": [1, 11, 12, 2], "labels": [IGNORE_INDEX, 11, 12, 2], "example_ids": [4]}
SECOND = {"input_ids": [1, 21, 2], "labels": [1, 21, 2], "example_ids": [7]}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def mixtral(request):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        attn_implementation=request.param,
    )
    return MixtralForCausalLM(config).eval()


def random_features(*lengths):
    generator = torch.Generator().manual_seed(0)
    features = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        features.append({"input_ids": ids, "labels": ids, "example_ids": [index]})
    return features


def alone(model, feature):
    with torch.no_grad():
        return model(input_ids=torch.tensor([feature["input_ids"]]), use_cache=False).logits[0]


def test_padding_free_batch_is_one_sequence_whose_positions_restart():
    batch = PaddingFreeCollator()([FIRST, SECOND])
    assert batch["input_ids"].tolist() == [[1, 11, 12, 2, 1, 21, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 11, 12, 2, IGNORE_INDEX, 21, 2]]
    assert "attention_mask" not in batch
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))


def test_padding_free_batch_says_where_its_sequences_begin():
    packed = {**SECOND, "input_ids": [1, 21, 2, 1, 9], "labels": [1, 21, 2, 1, 9], "position_ids": [0, 1, 2, 0, 1]}
    batch = PaddingFreeCollator()([FIRST, packed, SECOND])
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    pack_apart = [{"input_ids": ids} for ids in (FIRST["input_ids"], [1, 21, 2], [1, 9], SECOND["input_ids"])]
    expected = theirs(pack_apart)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].dtype == expected[name].dtype == torch.int32
        assert batch[name].tolist() == expected[name].tolist() == [0, 4, 7, 9, 12]
    for name in ("max_length_q", "max_length_k"):
        assert type(batch[name]) is type(expected[name]) is int
        assert batch[name] == expected[name] == 4


def test_padded_batch_has_no_sequence_bounds():
    assert not set(SEQUENCE_BOUNDS) & LeftPaddingCollator(max_length=6, pad_token_id=2)([FIRST, SECOND]).keys()


def test_left_padding_fills_to_the_length_and_trains_the_true_eos():
    eos_and_pad = 2
    batch = LeftPaddingCollator(max_length=6, pad_token_id=eos_and_pad)([FIRST, SECOND])
    assert batch["input_ids"].tolist() == [[2, 2, 1, 11, 12, 2], [2, 2, 2, 1, 21, 2]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 1, 2]]
    ignored = [IGNORE_INDEX] * 3
    assert batch["labels"].tolist() == [[*ignored, 11, 12, eos_and_pad], [*ignored, 1, 21, eos_and_pad]]


def test_left_padding_refuses_a_longer_sequence():
    with pytest.raises(DataError, match="an example has 4 tokens, more than the 3"):
        LeftPaddingCollator(max_length=3, pad_token_id=0)([FIRST, SECOND])


@pytest.mark.parametrize("packing", ["padding-free", "packed", "padded"])
def test_sequence_numbers_pass_only_where_asked(packing, tiny_tokenizer):
    data = DataConfig(train="rows.jsonl", packing=packing, max_length=8)
    assert "example_ids" not in make_collator(data, tiny_tokenizer)([FIRST, SECOND])
    assert make_collator(data, tiny_tokenizer, keep_example_ids=True)([FIRST, SECOND])["example_ids"] == [4, 7]


def test_padding_is_eos_where_the_tokenizer_has_no_padding(mixtral_tokenizer, tiny_tokenizer):
    data = DataConfig(train="rows.jsonl", packing="padded")
    assert make_collator(data, mixtral_tokenizer).pad_token_id == mixtral_tokenizer.eos_token_id
    assert make_collator(data, tiny_tokenizer).pad_token_id == tiny_tokenizer.pad_token_id


def test_attention_does_not_cross_the_sequences_of_a_padding_free_batch(mixtral):
    features = random_features(7, 12, 1, 5)
    with torch.no_grad():
        together = mixtral(**PaddingFreeCollator()(features)).logits[0]
    start = 0
    for feature in features:
        stop = start + len(feature["input_ids"])
        torch.testing.assert_close(together[start:stop], alone(mixtral, feature), atol=1e-5, rtol=0)
        start = stop


def test_attention_does_not_cross_the_sequences_of_a_pack(mixtral):
    examples = [TokenizedExample(f["input_ids"], f["labels"], "", "", "", 0) for f in random_features(7, 12, 5)]
    (pack,) = pack_examples(examples, 32)
    with torch.no_grad():
        together = mixtral(**PaddingFreeCollator()([pack, *random_features(3)])).logits[0]
    torch.testing.assert_close(together[7:19], alone(mixtral, random_features(7, 12)[1]), atol=1e-5, rtol=0)


def test_loss_and_gradients_are_those_of_the_sequences_apart_under_gradient_checkpointing(mixtral):
    features = random_features(7, 12)
    tokens = sum(len(feature["labels"]) - 1 for feature in features)
    parameter = mixtral.model.layers[0].self_attn.q_proj.weight
    mixtral.train()
    # transformers before 5.21 has the older name only.
    getattr(mixtral, "activation_checkpointing_enable", mixtral.gradient_checkpointing_enable)()
    try:
        losses = [mixtral(**PaddingFreeCollator()([f]), num_items_in_batch=tokens).loss for f in features]
        (apart,) = torch.autograd.grad(sum(losses), parameter)
        loss = mixtral(**PaddingFreeCollator()(features), num_items_in_batch=tokens).loss
        (together,) = torch.autograd.grad(loss, parameter)
    finally:
        getattr(mixtral, "activation_checkpointing_disable", mixtral.gradient_checkpointing_disable)()
        mixtral.eval()
    torch.testing.assert_close(loss, sum(losses), atol=1e-5, rtol=0)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("collator", [PaddingFreeCollator(True), LeftPaddingCollator(16, 2, True)])
def test_batch_of_no_sequences_has_no_tokens(collator):
    batch = collator([])
    assert {name: value.tolist() for name, value in batch.items() if name != "example_ids"} == {
        "input_ids": [[]],
        "labels": [[]],
    }
    assert batch["example_ids"] == []


def test_left_padded_sequences_have_the_logits_of_each_sequence_alone(mixtral):
    features = random_features(7, 12)
    batch = LeftPaddingCollator(max_length=16, pad_token_id=2)(features)
    with torch.no_grad():
        logits = mixtral(**batch).logits
    for index, feature in enumerate(features):
        padded = logits[index, 16 - len(feature["input_ids"]) :]
        torch.testing.assert_close(padded, alone(mixtral, feature), atol=1e-5, rtol=0)

"""What config and headers are allowed to say, and how each fault is told."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from expertune import load_config
from expertune.checkpoint.load import fingerprint_of
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertune.planning import make_plan

from .conftest import FILES, TINY_MIXTRAL


def rewrite(folder, change):
    """Save the checkpoint again with its tensors changed in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_whole_checkpoint_is_checked_and_its_size_known(run_of):
    plan = make_plan(run_of(TINY_MIXTRAL))
    assert plan.notes == ()
    assert plan.disk.download_bytes == 2 * plan.parameters.total


def test_plan_shows_itself_in_a_line_and_as_its_tables_in_a_notebook(run_of):
    plan = make_plan(run_of(TINY_MIXTRAL))
    assert re.fullmatch(r"Plan\('.*/tiny-mixtral', peak [\d.]+ [GM]B of 80\.00 GB, fits\)", repr(plan))
    shown = plan._repr_html_()
    assert '<td class="">frozen weights</td><td class="number">' in shown
    assert re.search(r'<p class="good strong">fits: [\d.]+ GB of 80\.00 GB stay free</p>', shown)


def test_a_config_alone_is_enough_and_the_plan_says_so(run_of):
    plan = make_plan(run_of("qwen3-30b-a3b"))
    assert plan.disk.download_bytes is None
    assert plan.notes == ("no weights to look at; the counts rest on config.json alone",)


def test_an_index_without_shards_is_checked_by_its_names(run_of):
    plan = make_plan(run_of("mixtral-8x7b-v0.1"))
    assert plan.disk.download_bytes == 93_405_585_408
    assert "names in the index alone" in plan.notes[0]


def test_an_index_that_lacks_an_expert_is_refused(run_of, tmp_path):
    (tmp_path / "config.json").write_bytes((FILES / "mixtral-8x7b-v0.1" / "config.json").read_bytes())
    index = json.loads((FILES / "mixtral-8x7b-v0.1" / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.7.block_sparse_moe.experts.3.w2.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks: model\.layers\.7\.block_sparse_moe\.experts\.3\.w2\.weight$"):
        make_plan(run_of(tmp_path))


def test_a_folder_without_config_is_named(run_of, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file; is .* a model folder\?"):
        make_plan(run_of(tmp_path))


def test_a_missing_folder_is_not_looked_up_on_the_hub(run_of):
    with pytest.raises(ConfigError, match="no such folder"):
        make_plan(run_of("./nowhere"))


def test_a_truncated_shard_is_named(run_of, tiny_mixtral):
    shard = tiny_mixtral / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        make_plan(run_of(tiny_mixtral))


def test_a_missing_expert_is_named_as_on_disk(run_of, tiny_mixtral):
    key = next(key for key in load_file(tiny_mixtral / "model.safetensors") if "experts.3" in key)
    rewrite(tiny_mixtral, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        make_plan(run_of(tiny_mixtral))


def test_a_missing_norm_is_named(run_of, tiny_mixtral):
    rewrite(tiny_mixtral, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks: model\.norm\.weight"):
        make_plan(run_of(tiny_mixtral))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(run_of, tiny_mixtral):
    config = json.loads((tiny_mixtral / "config.json").read_text())
    (tiny_mixtral / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with pytest.raises(CheckpointError, match=r"w[123]\.weight has shape .*192.*, the config asks for .*256"):
        make_plan(run_of(tiny_mixtral))


def test_an_expert_beyond_the_config_is_refused(run_of, tiny_mixtral):
    config = json.loads((tiny_mixtral / "config.json").read_text())
    (tiny_mixtral / "config.json").write_text(json.dumps({**config, "num_local_experts": 4}))
    with pytest.raises(CheckpointError, match=r"belongs to expert [4-7], but the config has 4"):
        make_plan(run_of(tiny_mixtral))


def test_more_experts_for_each_token_than_there_are_are_refused(run_of, tiny_mixtral):
    config = json.loads((tiny_mixtral / "config.json").read_text())
    (tiny_mixtral / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 99}))
    with pytest.raises(CheckpointError, match=r"config\.json: num_experts_per_tok .* is 99, but model\.layers\.0\."):
        make_plan(run_of(tiny_mixtral))


def test_a_tensor_without_a_place_is_noted(run_of, tiny_mixtral):
    rewrite(tiny_mixtral, lambda tensors: tensors.update(extra=tensors["model.norm.weight"].clone()))
    assert make_plan(run_of(tiny_mixtral)).notes == ("tensors that the model has no place for are left out: extra",)


def test_a_dense_model_is_refused(run_of, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedModelError, match="no experts"):
        make_plan(run_of(tmp_path))


def test_a_quantized_checkpoint_is_refused(run_of):
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(fp8\)"):
        make_plan(run_of("deepseek-r1"))


def test_plan_names_the_run_file_of_a_wrong_training_key(run_of, tmp_path):
    run_file = tmp_path / "run.yaml"
    values = run_of("deepseek-r1").model_dump(mode="json", exclude_unset=True)
    run_file.write_text(json.dumps(values | {"training": {"optim": "adamm"}}))
    with pytest.raises(ConfigError, match=r"run\.yaml: training\.optim: .*; did you mean adamw_torch\?"):
        make_plan(load_config(run_file))
    run_file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"^override 'training\.optim=adamm': training\.optim: "):
        make_plan(load_config(run_file, ["training.optim=adamm"]))
    assert load_config(run_file) == run_of("deepseek-r1")


# --- an adapter to start from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (None, ConfigError, "no such folder; give the folder of an adapter"),
        ([], CheckpointError, r"no adapter_config\.json here; is it an adapter folder"),
        (["adapter_config.json"], CheckpointError, r"no adapter_model\.safetensors here \(pickled"),
        (["adapter/adapter_config.json"], ConfigError, r"a run directory; its adapter is .*first.adapter"),
    ],
)
def test_plan_names_an_adapter_to_start_from_that_is_not_there(run_of, tmp_path, files, error, message):
    folder = tmp_path / "first"
    for name in files or ():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    if files == []:
        folder.mkdir()
    with pytest.raises(error, match=rf"lora\.init_from: .*{message}"):
        make_plan(run_of("deepseek-r1", lora={"init_from": str(folder)}))


def save_adapter(folder, config, leaf="q_proj", metadata=None):
    """One of TINY_MIXTRAL's attention, with the ranks 2 and 6."""
    folder.mkdir(exist_ok=True)
    factors = {
        f"base_model.model.model.layers.{layer}.self_attn.{leaf}.lora_{factor}.weight": torch.ones(shape)
        for layer, rank in enumerate([2, 6, 6, 6])
        for factor, shape in (("A", (rank, 256)), ("B", (256, rank)))
    }
    save_file(factors, folder / "adapter_model.safetensors", metadata)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PATTERN = {"layers.0.self_attn.q_proj": 2}
OF_QUERIES = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["q_proj"], "rank_pattern": PATTERN}


def test_plan_has_the_ranks_and_the_targets_of_the_adapter_that_a_run_starts_from(run_of, tmp_path):
    save_adapter(tmp_path, OF_QUERIES)
    started = make_plan(run_of(TINY_MIXTRAL, lora={"init_from": str(tmp_path)}, memory_budget="1MB"))
    lora = {"r": 6, "targets": ["q_proj"], "rank_pattern": PATTERN}
    named = make_plan(run_of(TINY_MIXTRAL, lora=lora, kernels={"keep": 0}))  # as with too little memory
    assert started.parameters == named.parameters
    assert started.parameters.trainable == (2 + 6 + 6 + 6) * 2 * 256
    assert started.memory == named.memory
    assert started.disk == named.disk
    assert "lora.r" not in str(started.to_json()["what_to_change"])
    with pytest.raises(ConfigError, match=r"lora\.r is 8, but the adapter at .* has 6; remove the key to take"):
        make_plan(run_of(TINY_MIXTRAL, lora={"init_from": str(tmp_path), "r": 8}))
    save_adapter(tmp_path, json.loads(json.dumps(OF_QUERIES).replace("q_proj", "qkv")), "qkv")
    with pytest.raises(CheckpointError, match=r"no adapter of this model: lora\.targets: no module is called 'qkv'"):
        make_plan(run_of(TINY_MIXTRAL, lora={"init_from": str(tmp_path)}))


@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], ["v_proj"], ["attention"], ["q_proj", "experts"]])
def test_plan_refuses_other_targets_than_those_of_the_adapter_that_a_run_starts_from(run_of, tmp_path, targets):
    folder = str(save_adapter(tmp_path, OF_QUERIES))
    refusal = f"lora.targets is {targets}, but the adapter at {folder} has ['q_proj']; remove the key"
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        make_plan(run_of(TINY_MIXTRAL, lora={"init_from": folder, "targets": targets}))
    make_plan(run_of(TINY_MIXTRAL, lora={"init_from": folder, "targets": ["q_proj"]}))


def test_plan_refuses_an_adapter_of_another_base_unless_that_is_wanted(run_of, tiny_mixtral, tmp_path):
    base = json.dumps(fingerprint_of(tiny_mixtral).to_json())
    lora = {"init_from": str(save_adapter(tmp_path / "adapter", OF_QUERIES, metadata={"expertune.base": base}))}
    make_plan(run_of(tiny_mixtral, lora=lora))
    other_weights = r"was trained on another base model than .*: other weights \(embeddings\)"
    rewrite(tiny_mixtral, lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    with pytest.raises(CheckpointError, match=other_weights):
        make_plan(run_of(tiny_mixtral, lora=lora))
    (tiny_mixtral / "model.safetensors").unlink()  # of which a plan needs nothing
    make_plan(run_of(tiny_mixtral, lora=lora))
    config = json.loads((tiny_mixtral / "config.json").read_text())
    (tiny_mixtral / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"another base model than .*: rms_norm_eps was .* and is 0\.5"):
        make_plan(run_of(tiny_mixtral, lora=lora))
    make_plan(run_of(tiny_mixtral, lora=lora | {"init_from_other_base": True}))


# --- the hub --------------------------------------------------------------------------------------------------------


def test_an_unknown_hub_model_without_a_connection_is_one_clear_error(run_of):
    with pytest.raises(ConfigError, match=r"nobody/no-such-moe: no folder .* Give the path of a local copy"):
        make_plan(run_of("nobody/no-such-moe"))


def test_a_name_that_is_neither_folder_nor_hub_id_is_told(run_of):
    with pytest.raises(ConfigError, match="neither a folder here nor a hub id"):
        make_plan(run_of("a/b/c"))


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, which serves the tiny checkpoint's config and headers; records what it was asked for."""
    import huggingface_hub

    asked = []

    def snapshot_download(model, revision=None, allow_patterns=None):
        asked.append((model, revision, tuple(allow_patterns)))
        return str(TINY_MIXTRAL)

    def get_safetensors_metadata(model, revision=None):
        tensors = {
            key: SimpleNamespace(shape=list(tensor.shape), data_offsets=(0, tensor.nbytes))
            for key, tensor in load_file(TINY_MIXTRAL / "model.safetensors").items()
        }
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    return asked


def test_of_a_hub_model_only_config_index_and_headers_are_fetched(run_of, hub):
    plan = make_plan(run_of("owner/tiny-mixtral", revision="abc"))
    assert hub == [("owner/tiny-mixtral", "abc", ("config.json", "model.safetensors.index.json"))]
    assert plan.notes == ()
    assert plan.disk.download_bytes == 2 * plan.parameters.total


def test_code_is_fetched_only_where_the_caller_trusts_it(run_of, hub):
    make_plan(run_of("owner/tiny-mixtral"), trust_remote_code=True)
    assert "*.py" in hub[0][2]


def test_a_cached_config_is_enough_without_a_connection(run_of, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client = HfApi(endpoint="http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", client.get_safetensors_metadata)
    assert "config.json alone" in make_plan(run_of("owner/tiny-mixtral")).notes[0]


def test_a_repository_of_pickles_is_refused(run_of, hub, monkeypatch):
    from huggingface_hub.errors import NotASafetensorsRepoError

    def pickles(model, revision=None):
        raise NotASafetensorsRepoError("no safetensors")

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", pickles)
    with pytest.raises(CheckpointError, match="pickles are never loaded"):
        make_plan(run_of("owner/tiny-mixtral"))

"""NF4 folders in `AutoModelForCausalLM.from_pretrained`: a quantizer of transformers' own kind.

Experts and linears are swapped on the meta device, and transformers' own loader then reads every tensor into its place:
the folder has the live model's names. Imported while transformers is being imported (see
`expertune.registration`), so that everything heavy is imported where it is used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertune.checkpoint.formats.nf4_folder import METHOD, STATE_SUFFIX
from expertune.checkpoint.model_folder import FOLDER_MARK
from expertune.checkpoint.reader import read_header
from expertune.checkpoint.writer import PADDING
from expertune.kernels.nf4 import BLOCK_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from expertune.checkpoint.load import LoadedModel

# What bitsandbytes saves of a 4-bit linear, below the name of the module.
_SERIALIZED = [
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
]

# A family may call a linear `..._weight` or `weights_...`: only whole parts at a name's end count. transformers looks
# for these patterns anywhere in a name; 5.20 takes the first that it finds, 5.23 and 5.24 mind where words end.
_AFTER_A_DOT, _AT_THE_END = r"(?<=\.)", "$"


# Dtypes of the 16-bit rest.
_HALVES = ("torch.bfloat16", "torch.float16")


class Nf4FolderConfig(QuantizationConfigMixin):
    """The `quantization_config` of an NF4 folder's config.json.

    Args:
        scheme: of the experts: `nf4` or `mxfp4`.
        double_quantization: whether scales are held in 8 bits.
        block_size: weights that share one scale.
    """

    def __init__(
        self, scheme: str = "nf4", double_quantization: bool = True, block_size: int = BLOCK_SIZE, **kwargs: Any
    ) -> None:
        self.quant_method = METHOD
        self.scheme, self.double_quantization, self.block_size = scheme, double_quantization, block_size


class Nf4FolderQuantizer(HfQuantizer):
    """Builds the model that an NF4 folder's tensors fit into; reads nothing itself."""

    requires_calibration = False
    # Whether transformers has put adapters on the model, which its save_pretrained then writes in place of the weights.
    has_adapters = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a model that is not quantized yet, which is `expertune quantize`'s work, and one that is spread out.

        Raises:
            ValueError: the model is a 16-bit one, or a part of it is to be left on disk.
        """
        if not self.pre_quantized:
            raise ValueError("transformers can load NF4 folders only; `expertune quantize MODEL OUT` writes one")
        places = kwargs.get("device_map")
        left = [name for name, place in places.items() if place == "disk"] if isinstance(places, dict) else []
        if left:
            raise ValueError(
                f"device_map leaves {left[0] or 'the model'} on disk: an NF4 folder is loaded whole onto one device "
                '(device_map="cpu", or {"": 0} for the first GPU). To keep experts on disk, train and answer with '
                "`placement: disk` in a run file"
            )

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter's packed shape is not the model's."""
        from expertune.layers.nf4_linear import Nf4Linear

        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(name), Nf4Linear)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The model's dtype for floats of the 16-bit rest; scales of packed weights, whose place is uint8, stay."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype).removeprefix("torch.").upper()
        is_float = name.startswith(("F", "BF"))
        return dtype if is_float and dtype is not None and dtype.is_floating_point else None

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from expertune.checkpoint.load import swap_experts
        from expertune.checkpoint.names import read_names
        from expertune.checkpoint.nf4_linears import empty_linear
        from expertune.checkpoint.recipe import Recipe, linears_to_quantize

        config = self.quantization_config
        self.names = read_names(model)
        files = kwargs.get("checkpoint_files")
        self.folder = _verified_folder(model, files) if files else None
        stored = _linears_in(files, model) if files else set(linears_to_quantize(model))
        swap_experts(model, Recipe(config.scheme, config.double_quantization), "meta")
        self.dtype = dtype = kwargs.get("dtype") or model.dtype
        for name in stored:
            model.set_submodule(name, empty_linear(model.get_submodule(name), dtype))
        for name in self.names.specs:
            # Some families initialize the experts from the block around them, by names that are gone.
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"^{PADDING}"}
        return model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from expertune.checkpoint.load import prepare_for_adapters
        from expertune.layers.dense_linear import use_dense_linear
        from expertune.layers.nf4_linear import Nf4Linear

        for module in model.modules():
            if isinstance(module, Nf4Linear):
                # Whatever the file's weights were before, products run in this dtype.
                module.weight.quant_state.dtype = module.compute_dtype
        for parameter in model.parameters():
            # transformers 5.20 leaves what has another name in the file, as without the head, in the dtype of the file.
            if str(parameter.dtype) in _HALVES and parameter.dtype != self.dtype:
                parameter.data = parameter.to(self.dtype)
        use_dense_linear(model)
        prepare_for_adapters(model, self.names)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """bitsandbytes' tensors of a linear make its one parameter."""
        from transformers.core_model_loading import WeightConverter
        from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

        names = {_AFTER_A_DOT + name + _AT_THE_END: name for name in _SERIALIZED}

        class Deserialize(Bnb4bitDeserialize):
            def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
                return super().convert({names[pattern]: value for pattern, value in input_dict.items()}, **kwargs)

        return [WeightConverter(list(names), "weight", [Deserialize(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Only these: the family's own lead from published names to live ones, which the folder already has."""
        return self.get_weight_conversions()

    def is_serializable(self, **kwargs: Any) -> bool:
        """False where there are adapters, which are then saved by themselves; else refused.

        Raises:
            ExportError: the base is to be saved; transformers asks only then, and would say less.
        """
        from expertune.checkpoint.load import refuse_to_save

        return False if self.has_adapters else refuse_to_save()

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


def _linears_in(files: list[str], model: "PreTrainedModel") -> set[str]:
    """Live names of the linears that the files hold in 4 bits; a model without its head has no prefix before them."""
    names = {
        key.removesuffix(STATE_SUFFIX)
        for file in files
        for key in read_header(Path(file))
        if key.endswith(STATE_SUFFIX)
    }
    live = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    return {name if name in live else name.removeprefix(prefix) for name in names}


def _verified_folder(model: "PreTrainedModel", files: list[str]) -> Path:
    """The folder that the files lie in, checked against its manifest.

    Raises:
        CheckpointError: files are missing or have changed; names them.
    """
    from expertune.checkpoint.verified import require_verified

    folder = Path(files[0]).parent
    # Of a hub model transformers fetches the weights alone, and the hub's client has compared their hashes.
    if (folder / FOLDER_MARK).is_file() or Path(model.config._name_or_path).is_dir():
        require_verified(folder)
    return folder


def register() -> None:
    """Add both to transformers' lists, once."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(Nf4FolderConfig)
        auto.register_quantizer(METHOD)(Nf4FolderQuantizer)


def as_loaded(model: "PreTrainedModel") -> "LoadedModel":
    """A model from `from_pretrained` as `expertune.adapt.attach.attach` takes it.

    Raises:
        ValueError: the model was not loaded from an NF4 folder.
    """
    from expertune.checkpoint.fingerprint import read_fingerprint
    from expertune.checkpoint.formats.nf4_folder import read_nf4_folder
    from expertune.checkpoint.held import held_by
    from expertune.checkpoint.load import LoadedModel
    from expertune.checkpoint.recipe import recipe_of_folder
    from expertune.config import QuantizationConfig

    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Nf4FolderQuantizer):
        raise ValueError("the model was not loaded by transformers from an NF4 folder")
    loaded = LoadedModel(model, quantizer.names)
    if quantizer.folder is not None and (quantizer.folder / FOLDER_MARK).is_file():
        stored = read_nf4_folder(quantizer.folder)
        loaded.source = stored.source
        recipe = recipe_of_folder(stored, model, loaded.names, QuantizationConfig())
        held = held_by(recipe, model, loaded.names, stored.calibration)
        loaded.fingerprint = read_fingerprint(stored.folder, stored.index.tensors, model, loaded.names, held)
    return loaded

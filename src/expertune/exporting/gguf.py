"""GGUF files for llama.cpp and what is built on it: an adapter, or base and adapter as one model.

llama.cpp's own converters write both (`engines/gguf_converter.py`). What reads an adapter multiplies by `lora_alpha`
over a tensor's rank and knows no other setting, so scales are folded into B. Stacks of experts are handed over under
their names in a GGUF file, which the converter takes as they are, for all families alike; everything else under its
name in the checkpoint, so that it is renamed and permuted as the base's tensors are.
"""

import json
import re
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal

import torch

from expertune.adapt.factors import PREFIX, Factors, dtype_in_file, fold, stacked
from expertune.adapt.files import write_adapter
from expertune.checkpoint.writer import Outgoing
from expertune.errors import ConfigError, ExportError
from expertune.exporting.dequantized import as_config
from expertune.exporting.engines import gguf_converter
from expertune.exporting.formats import Engine, Format, Options, Progress, make_format
from expertune.exporting.merged import write_dequantized
from expertune.exporting.programs import run_program
from expertune.exporting.source import ExportSource
from expertune.planning.table import size
from expertune.storage import write_json

EXTRA = "pip install 'expertune[gguf]'"
ADAPTER_FILE = "adapter.gguf"

# Bytes of a weight by the type of a file; of q8_0 34 for 32 weights.
_NBYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
_ADAPTER_TYPES = ("f32", "f16", "bf16")
# Mean differences that rounding makes, of what weights are multiplied by as well: a trained model's log-probabilities
# are spread wider than its base's, and differ several times as much.
_FLOORS = {"f32": 1e-3, "f16": 0.05, "bf16": 0.05, "q8_0": 0.15}
# Positions at which llama.cpp is asked: each is a request of its own.
_POSITIONS = 64


@dataclass(frozen=True)
class Converted:
    """What came of one command line of a converter.

    Attributes:
        error: why it was refused; None where it was not.
        knows_tokenizer: llama.cpp splits text as the model's tokenizer does, as far as the converter can tell.
    """

    error: str | None
    knows_tokenizer: bool


def convert(runs: Sequence[Sequence[str]], source: ExportSource) -> list[Converted]:
    """Run command lines of llama.cpp's converters in one process of their own.

    Raises:
        ExportError: the process failed as a whole.
    """
    with TemporaryDirectory(prefix="expertune-gguf-") as scratch:
        request = {"runs": runs, "trust_remote_code": source.base.trust_remote_code}
        path = Path(scratch) / "request.json"
        run_program("gguf_converter.py", request, path, "llama.cpp's converter", source.num_weights)
        found = json.loads(path.with_name("converted.json").read_text(encoding="utf-8"))
    return [Converted(each["error"], gguf_converter.UNKNOWN_TOKENIZER not in each["notes"]) for each in found]


class _Gguf:
    """What both formats share: the converter, and the runtime that verifies."""

    name: str
    resumes = False

    def __init__(self, kind: str, is_dequantized: bool = False) -> None:
        self.kind, self.is_dequantized = kind, is_dequantized
        self._base: Path | None = None

    @cached_property
    def _missing(self) -> str | None:
        """What installs what is not there."""
        wanted = (gguf_converter.PACKAGE, "sentencepiece", "xllamacpp")
        return EXTRA if any(find_spec(name) is None for name in wanted) else None

    def _require_converter(self) -> None:
        if gguf_converter.scripts_folder() is None or find_spec("sentencepiece") is None:
            raise ExportError(f"--to {self.name}: llama.cpp's converters are not installed; {EXTRA}")

    def _engine(self, source: ExportSource, folder: Path, base: Path, kind: str, exported: dict[str, Any]) -> Engine:
        """llama.cpp with the base in a file of this type, and with the export."""
        name = "llama.cpp"
        if reason := self._missing or source.why_too_large():
            return Engine(name, "llamacpp.py", {}, {}, missing=reason)
        try:
            file = self._base_file(source, folder, base, kind)
        except ExportError as error:
            return Engine(name, "llamacpp.py", {}, {}, missing=str(error))
        fixed = {
            "model": file,
            "vocabulary": source.model.get_output_embeddings().weight.shape[0],
            "plain": _plain_token(source),
        }
        # From 16-bit weights on, llama.cpp rounds what it multiplies them by as well.
        measure: Literal["max", "mean"] = "max" if kind == "f32" else "mean"
        return Engine(
            name,
            "llamacpp.py",
            fixed,
            fixed | exported,
            measure=measure,
            floor=_FLOORS[kind],
            positions=_POSITIONS,
        )

    def _base_file(self, source: ExportSource, folder: Path, base: Path, kind: str) -> str:
        """The base model as a GGUF file, written once, beside the export."""
        if self._base is None:
            needed = source.num_weights * _NBYTES[kind]
            free = shutil.disk_usage(folder.parent).free
            if needed > free:
                raise ExportError(f"the base as GGUF needs {size(int(needed))} of disk, and {size(free)} are free")
            scratch = Path(mkdtemp(prefix="expertune-base-", dir=folder.parent))
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
            if self.is_dequantized and not source.is_packed:
                base = scratch / "dequantized"
                base.mkdir()
                write_dequantized(source, base, lambda *_: None, is_adapted=False)
            _require_converted([_of_model(base, scratch / "base.gguf", kind, "base")], source)
            if scratch in base.parents:
                shutil.rmtree(base)
            self._base = scratch / "base.gguf"
        return str(self._base)


class GgufAdapter(_Gguf):
    """`gguf-adapter`: `adapter.gguf`."""

    name = "gguf-adapter"

    def require(self, source: ExportSource) -> None:
        """Refuse what llama.cpp has no adapter for; what else its converter does not take, it says itself in `write`.

        Raises:
            ExportError: the converter is missing, or the output head is not a tensor of its own.
        """
        self._require_converter()
        head, tied = source.model.get_output_embeddings(), source.model.config.get_text_config().tie_word_embeddings
        if tied and any(source.model.get_submodule(name) is head for name in source.factors.linears):
            raise ExportError(
                f"--to {self.name}: the adapter changes lm_head, which shares its weights with the embeddings, and "
                "llama.cpp has no adapter for one of them alone; export the merged model with --to gguf"
            )

    def nbytes(self, source: ExportSource) -> int:
        """The file, and what the converter makes it of."""
        held = [outgoing for _, outgoing in self._tensors(source)]
        weights = sum(torch.Size(outgoing.shape).numel() for outgoing in held)
        return sum(outgoing.nbytes for outgoing in held) + int(weights * _NBYTES[self.kind])

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write `adapter.gguf`.

        Raises:
            ExportError: llama.cpp's converter knows no such family, or no adapter on some of the targets.
        """
        groups: dict[str, list[Outgoing]] = {}
        for group, outgoing in self._tensors(source):
            groups.setdefault(group, []).append(outgoing)
        everything = [outgoing for tensors in groups.values() for outgoing in tensors]
        [whole] = self._convert(source, folder / ADAPTER_FILE, [everything])
        if whole.error is None:
            return
        each = self._convert(source, folder / "trial.gguf", list(groups.values()))
        refused = [group for group, found in zip(groups, each, strict=True) if found.error]
        if len(refused) in (0, len(groups)):
            raise ExportError(f"--to {self.name}: llama.cpp's converter does not take this model: {whole.error}")
        raise ExportError(
            f"--to {self.name}: llama.cpp's converter does not take an adapter on {', '.join(refused)} of this model "
            f"({whole.error}); export the merged model with --to gguf"
        )

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """llama.cpp, over the base in float32: nothing is rounded then."""
        return [self._engine(source, folder, base, "f32", {"adapter": str(folder / ADAPTER_FILE)})]

    def _convert(self, source: ExportSource, file: Path, adapters: Sequence[Sequence[Outgoing]]) -> list[Converted]:
        """Convert adapters of these tensors, one after the other, to the same file."""
        config = {"peft_type": "LORA", "r": source.max_rank, "lora_alpha": source.max_rank, "target_modules": []}
        with TemporaryDirectory(dir=file.parent) as scratch:
            base = source.base.folder
            if source.is_packed:  # of a base it reads the config alone, and knows few ways of packing
                base = Path(scratch) / "base"
                base.mkdir()
                write_json(base / "config.json", as_config(source, torch.bfloat16))
            runs = []
            for number, tensors in enumerate(adapters):
                # The folder's name becomes the name in the file.
                made = Path(scratch) / str(number) / _public_name(source)
                write_adapter(made, list(tensors), config)
                places = ["--base", str(base), "--outfile", str(file), str(made)]
                runs.append(["convert_lora_to_gguf.py", *places, "--outtype", self.kind])
            return convert(runs, source)

    def _tensors(self, source: ExportSource) -> Iterator[tuple[str, Outgoing]]:
        """What it belongs to, and the tensor."""
        for live, pair in source.factors.linears.items():
            name = source.names.on_disk(live)
            yield from ((name.rpartition(".")[2], each) for each in _pair(name, pair, source.max_rank))
        for module, projections in source.factors.experts.items():
            block = re.search(r"\.(\d+)\.", module)
            for projection, pairs in projections.items():
                name = f"blk.{block[1] if block else 0}.ffn_{projection}_exps"
                group = f"experts ({source.names.projection_names[projection]})"
                yield from ((group, each) for each in _pair(name, stacked(pairs), source.max_rank))


class GgufModel(_Gguf):
    """`gguf`: base and adapter as one model, `model-TYPE.gguf`."""

    name = "gguf"

    def __init__(self, kind: str, merged: Format, is_dequantized: bool) -> None:
        super().__init__(kind, is_dequantized)
        self.merged = merged

    def require(self, source: ExportSource) -> None:
        """Refuse what llama.cpp's converter does not take; a 16-bit base is put through it without writing.

        Raises:
            ExportError: it knows no such family or tokenizer.
        """
        self._require_converter()
        self.merged.require(source)
        if source.is_packed:
            return
        with TemporaryDirectory(prefix="expertune-gguf-") as scratch:
            command = _of_model(source.base.folder, Path(scratch) / "trial.gguf", self.kind, "trial")
            [found] = convert([[*command, "--dry-run"]], source)
        if found.error:
            raise ExportError(f"--to {self.name}: llama.cpp's converter does not take this model: {found.error}")
        if not found.knows_tokenizer:
            source.context.notify(
                "llama.cpp does not know how this model's tokenizer splits text, and the file names its default way: "
                "give the model token ids, or expect texts to be split otherwise than in training"
            )

    def nbytes(self, source: ExportSource) -> int:
        """The file, and the merged model that it is made of."""
        return self.merged.nbytes(source) + int(source.num_weights * _NBYTES[self.kind])

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Merge, convert, and remove what was merged."""
        with TemporaryDirectory(dir=folder) as scratch:
            self.merged.write(source, Path(scratch), progress)
            _require_converted([_of_model(Path(scratch), self._file(folder), self.kind, _public_name(source))], source)

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """llama.cpp, over the base in a file of the same type, which is rounded as the export is."""
        exported = {"model": str(self._file(folder)), "texts": _texts(source)}
        engine = self._engine(source, folder, base, self.kind, exported)
        [merged] = self.merged.engines(source, folder, base)
        return [replace(engine, rounded=merged.rounded, reference=merged.reference)]

    def _file(self, folder: Path) -> Path:
        return folder / f"model-{self.kind}.gguf"


def make(name: str, options: Options) -> Format:
    """The format of this name.

    Raises:
        ConfigError: there is no such type.
    """
    if name == GgufAdapter.name:
        return GgufAdapter(_checked(name, options.type or "f32", _ADAPTER_TYPES))
    kind = _checked(name, options.type or "bf16", tuple(_NBYTES))
    return GgufModel(kind, make_format("merged", Options(options.base)), options.base == "dequantized")


def _checked(name: str, kind: str, known: Sequence[str]) -> str:
    if kind in known:
        return kind
    smaller = (
        "; write f16 and give it to llama.cpp's own `llama-quantize`, which no package brings"
        if name == GgufModel.name
        else ""
    )
    raise ConfigError(f"--type {kind}: --to {name} writes {', '.join(known)}{smaller}")


def _public_name(source: ExportSource) -> str:
    """What the file is called in itself: others read it, so that the run's name and the base's folder are not in it."""
    revision, base = source.adapter.config.get("revision"), str(source.adapter.config.get("base_model_name_or_path"))
    return f"{base.split('/')[-1] if revision else source.model.config.model_type}-{source.adapter_name}"


def _of_model(folder: Path, file: Path, kind: str, name: str) -> list[str]:
    arguments = [str(folder), "--outfile", str(file), "--outtype", kind, "--model-name", name]
    return ["convert_hf_to_gguf.py", *arguments]


def _require_converted(runs: Sequence[Sequence[str]], source: ExportSource) -> None:
    for found in convert(runs, source):
        if found.error:
            raise ExportError(f"llama.cpp's converter: {found.error}")


def _pair(name: str, pair: Factors, alpha: int) -> Iterator[Outgoing]:
    """A and B [..., r, in] and [..., out, r]; the reader multiplies by alpha / r."""
    a, b, factor = pair.a, pair.b, pair.scale * pair.a.shape[-2] / alpha
    dtype = dtype_in_file(b.dtype, factor)
    yield Outgoing(f"{PREFIX}{name}.lora_A.weight", a.dtype, tuple(a.shape), lambda: a)
    yield Outgoing(f"{PREFIX}{name}.lora_B.weight", dtype, tuple(b.shape), lambda: fold(b, factor))


def _plain_token(source: ExportSource) -> int:
    """A token that is a letter."""
    ids = source.tokenizer.get_vocab().values()
    return next(each for each in sorted(ids) if re.fullmatch("[A-Za-z]", source.tokenizer.decode([each])))


def _texts(source: ExportSource) -> list[tuple[str, list[int]]]:
    """Texts of a few examples, with their token ids."""
    texts = [source.tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in source.examples[:8]]
    return [(text, source.tokenizer.encode(text, add_special_tokens=False)) for text in texts]

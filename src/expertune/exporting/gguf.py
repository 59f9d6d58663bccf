"""GGUF files for llama.cpp and what is built on it: an adapter, or base and adapter as one model.

llama.cpp's own converters write both (`engines/gguf_converter.py`). What reads an adapter multiplies by `lora_alpha`
over a tensor's rank and knows no other setting, so scales are folded into B. Stacks of experts are handed over under
their names in a GGUF file, which the converter takes as they are, for all families alike; everything else under its
name in the checkpoint, so that it is renamed and permuted as the base's tensors are.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal

import torch

from expertune.adapt.factors import PREFIX, Factors, stacked
from expertune.adapt.files import write_adapter
from expertune.adapt.scales import dtype_in_file, fold
from expertune.checkpoint.json_file import read_config
from expertune.checkpoint.quantize import config_dtype
from expertune.checkpoint.writer import Outgoing
from expertune.errors import ExportError
from expertune.exporting.dequantized import as_config
from expertune.exporting.engines import gguf_converter
from expertune.exporting.formats import Engine, Format, Options, Progress, Verdict, make_format
from expertune.exporting.gguf_convert import Converted, command_of_model, convert, require_converted
from expertune.exporting.merged import small_files, write_dequantized
from expertune.exporting.programs import ProgramError, run_program
from expertune.exporting.source import ExportSource
from expertune.storage import SCRATCH, write_json

EXTRA = "pip install 'expertune[gguf]'"
ADAPTER_FILE = "adapter.gguf"

# Bytes of a weight by the type of a file; of q8_0 34 for 32 weights.
_NBYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# Mean differences that rounding makes, of what weights are multiplied by as well: a trained model's log-probabilities
# are spread wider than its base's, and differ several times as much.
_FLOORS = {"f32": 1e-3, "f16": 0.05, "bf16": 0.05, "q8_0": 0.15}
# What a tensor of a file may lack of the adapter, half of which or more is missing where something is wrong; where the
# adapter does not change it, of two steps of its type, of which rounding is a quarter at most.
_LACKING = 0.25
# Positions at which llama.cpp is asked: each is a request of its own.
_POSITIONS = 64


_UNKNOWN_TOKENIZER = (
    "llama.cpp does not know how this model's tokenizer splits text, and the file names its default way: give the "
    "model token ids, or expect texts to be split otherwise than in training"
)


class _Gguf(Format):
    """What both formats share: the converter, and the runtime that verifies."""

    def __init__(self, kind: str, is_dequantized: bool = False) -> None:
        self.kind, self.is_dequantized = kind, is_dequantized
        self._bases: dict[tuple[str, torch.dtype | None], Path] = {}

    @cached_property
    def _missing(self) -> str | None:
        """What installs what is not there."""
        wanted = (gguf_converter.PACKAGE, "sentencepiece", "xllamacpp")
        return EXTRA if any(find_spec(name) is None for name in wanted) else None

    def nbytes_to_verify(self, source: ExportSource) -> int:
        """The base as GGUF files, and what they are made of."""
        values = 4 if self.is_dequantized else 0
        return int(source.num_weights * (values + sum(_NBYTES[kind] for kind in self._base_kinds(source))))

    def _base_kinds(self, source: ExportSource) -> list[str]:
        """Types that the base is needed in."""
        return [] if self._missing or source.why_too_large() else [self.kind]

    def _require_converter(self) -> None:
        if gguf_converter.scripts_folder() is None or find_spec("sentencepiece") is None:
            raise ExportError(f"--to {self.name}: llama.cpp's converters are not installed; {EXTRA}")

    def _engine(self, source: ExportSource, folder: Path, base: Path, kind: str, exported: dict[str, Any]) -> Engine:
        """llama.cpp with the base in a file of this type, and with the export."""
        name, plain = "llama.cpp", _plain_token(source)
        reason = self._missing or source.why_too_large()
        if plain is None:
            reason = "no token of this model is a single letter, with which llama.cpp's server has to be asked"
        if reason or plain is None:
            return Engine(name, "llamacpp.py", {}, {}, missing=reason)
        try:
            file = self._base_file(source, folder, base, kind)
        except ExportError as error:
            return Engine(name, "llamacpp.py", {}, {}, missing=str(error))
        vocabulary = source.model.get_output_embeddings().weight.shape[0]
        fixed = {"model": str(file), "vocabulary": vocabulary, "plain": plain}
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

    def _base_file(
        self, source: ExportSource, folder: Path, base: Path, kind: str, dtype: torch.dtype | None = None
    ) -> Path:
        """The base model as a GGUF file, made once of values of a dtype, beside the export for a while."""
        if (kind, dtype) not in self._bases:
            scratch = Path(mkdtemp(prefix=SCRATCH, dir=folder))
            file, values = scratch / "base.gguf", scratch / "dequantized"
            if self.is_dequantized:
                values.mkdir()
                write_dequantized(source, values, lambda *_: None, is_adapted=False, dtype=dtype)
            command = command_of_model(values if self.is_dequantized else base, file, kind, "base")
            require_converted([command], source)
            shutil.rmtree(values, ignore_errors=True)
            self._bases[kind, dtype] = file
        return self._bases[kind, dtype]


class GgufAdapter(_Gguf):
    """`gguf-adapter`: `adapter.gguf`."""

    name = "gguf-adapter"

    def require(self, source: ExportSource) -> None:
        """Refuse what llama.cpp has no adapter for: its converter is given a little of each target, and writes nothing.

        Raises:
            ExportError: the converter is missing, it knows no such family, or no adapter on some of the targets; or the
                output head is not a tensor of its own.
        """
        self._require_converter()
        config = source.model.config.get_text_config()
        head, tied = source.model.get_output_embeddings(), getattr(config, "tie_word_embeddings", False)
        if tied and any(source.model.get_submodule(name) is head for name in source.factors.linears):
            raise ExportError(
                f"--to {self.name}: the adapter changes lm_head, which shares its weights with the embeddings, and "
                "llama.cpp has no adapter for one of them alone; export the merged model with --to gguf"
            )
        with TemporaryDirectory(prefix="expertune-gguf-") as scratch:
            self._try(source, Path(scratch) / ADAPTER_FILE)

    def nbytes(self, source: ExportSource) -> int:
        """The file, and what the converter makes it of."""
        held = self.tensors(source)
        weights = sum(torch.Size(outgoing.shape).numel() for outgoing in held)
        return sum(outgoing.nbytes for outgoing in held) + int(weights * _NBYTES[self.kind])

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write `adapter.gguf`.

        Raises:
            ExportError: llama.cpp's converter knows no such family, or no adapter on some of the targets.
        """
        [found] = self.convert(source, folder / ADAPTER_FILE, [self.tensors(source)])
        if found.error:
            raise ExportError(f"--to {self.name}: llama.cpp's converter does not take this adapter: {found.error}")

    def _try(self, source: ExportSource, file: Path) -> None:
        groups: dict[str, list[Outgoing]] = {}
        for group, outgoing in self._tensors(source, slice(1)):
            if len(pair := groups.setdefault(group, [])) < 2:
                pair.append(outgoing)
        everything = [outgoing for pair in groups.values() for outgoing in pair]
        whole, *each = self.convert(source, file, [everything, *groups.values()], "--dry-run")
        if whole.error is None:
            return
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

    def convert(
        self, source: ExportSource, file: Path, adapters: Sequence[Sequence[Outgoing]], *options: str
    ) -> list[Converted]:
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
                runs.append(["convert_lora_to_gguf.py", *places, "--outtype", self.kind, *options])
            return convert(runs, source)

    def tensors(self, source: ExportSource) -> list[Outgoing]:
        """All of the adapter, as the converter takes it."""
        return [outgoing for _, outgoing in self._tensors(source)]

    def _tensors(self, source: ExportSource, ranks: slice = slice(None)) -> Iterator[tuple[str, Outgoing]]:
        """What it belongs to, and the tensor; with some of the ranks."""

        def part(pair: Factors) -> Factors:
            return Factors(pair.a[ranks], pair.b[:, ranks], pair.scale)

        for live, pair in source.factors.linears.items():
            name = source.names.on_disk(live)
            yield from ((name.rpartition(".")[2], each) for each in _pair(name, part(pair), source.max_rank))
        for module, projections in source.factors.experts.items():
            block = re.search(r"\.(\d+)\.", module)
            for projection, pairs in projections.items():
                name = f"blk.{block[1] if block else 0}.ffn_{projection}_exps"
                group = f"experts ({source.names.projection_names[projection]})"
                yield from (
                    (group, each) for each in _pair(name, stacked([part(pair) for pair in pairs]), source.max_rank)
                )


class GgufModel(_Gguf):
    """`gguf`: base and adapter as one model, `model-TYPE.gguf`."""

    name = "gguf"

    def __init__(self, kind: str, merged: Format, is_dequantized: bool) -> None:
        super().__init__(kind, is_dequantized)
        self.merged = merged

    def require(self, source: ExportSource) -> None:
        """Refuse what llama.cpp's converter does not take; of a base in 4 bits it is given the vocabulary alone.

        Raises:
            ExportError: it knows no such family or tokenizer.
        """
        self._require_converter()
        self.merged.require(source)
        with TemporaryDirectory(prefix="expertune-gguf-") as scratch:
            folder, options = source.base.folder, ["--dry-run"]
            if source.is_packed:  # its tensors are none that it reads
                folder, options = Path(scratch) / "base", ["--vocab-only"]
                folder.mkdir()
                for name in small_files(source):
                    if not name.endswith(".index.json"):
                        shutil.copyfile(source.base.folder / name, folder / name)
                write_json(folder / "config.json", as_config(source, torch.bfloat16))
            [found] = convert(
                [[*command_of_model(folder, Path(scratch) / "trial.gguf", self.kind, "trial"), *options]], source
            )
        if found.error:
            raise ExportError(f"--to {self.name}: llama.cpp's converter does not take this model: {found.error}")
        if not found.knows_tokenizer:
            self.notes = [_UNKNOWN_TOKENIZER]
            source.context.notify(_UNKNOWN_TOKENIZER)

    def nbytes(self, source: ExportSource) -> int:
        """The file, and the merged model that it is made of."""
        return self.merged.nbytes(source) + int(source.num_weights * _NBYTES[self.kind])

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Merge, convert, and remove what was merged."""
        with TemporaryDirectory(dir=folder) as scratch:
            self.merged.write(source, Path(scratch), progress)
            require_converted(
                [command_of_model(Path(scratch), self._file(folder), self.kind, _public_name(source))], source
            )

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """llama.cpp, over the base in a file of the same type, rounded as the export is; and the file's own tensors."""
        exported = {"model": str(self._file(folder)), "texts": _texts(source)}
        engine = self._engine(source, folder, base, self.kind, exported)
        [merged] = self.merged.engines(source, folder, base)
        compared = {"folder": str(folder), "base": str(base)}
        file = Engine("tensors of the file", "gguf_tensors.py", {}, compared, verdict=self._verdict)
        return [replace(engine, rounded=merged.rounded, reference=merged.reference), file]

    def _base_kinds(self, source: ExportSource) -> list[str]:
        """Also one that has all of the base's values as they are."""
        kinds, exact = super()._base_kinds(source), self._exact(source)[0]
        return [*kinds, *([exact] if self.is_dequantized or exact not in kinds else [])]

    def _exact(self, source: ExportSource) -> tuple[str, torch.dtype | None]:
        """Type and dtype that all of the base's values are in."""
        if self.is_dequantized:
            return "f32", torch.float32
        return "f32" if self.kind == "f32" else _TYPES[self._rounded(source)], None

    def _rounded(self, source: ExportSource) -> torch.dtype:
        """The dtype of a merged weight, before it gets the file's type."""
        if self.is_dequantized:
            return config_dtype(read_config(source.base.folder))
        return Counter(entry.dtype for entry in source.index.tensors.values()).most_common(1)[0][0]

    def _verdict(self, source: ExportSource, engine: Engine) -> Verdict:
        """Compare each tensor of the file with base and adapter: a wrong expert is found, whether routed to or not."""
        folder, scripts = Path(engine.exported["folder"]), gguf_converter.scripts_folder()
        adapter = GgufAdapter("f32")
        with TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            path, file = Path(scratch) / "request.json", Path(scratch) / ADAPTER_FILE
            try:
                base = self._base_file(source, folder, Path(engine.exported["base"]), *self._exact(source))
                [found] = adapter.convert(source, file, [adapter.tensors(source)])
                if found.error:
                    return Verdict(engine.name, "not verified", f"llama.cpp's converter, of the adapter: {found.error}")
                request = {
                    "gguf": f"{scripts}/gguf-py",
                    "merged": str(self._file(folder)),
                    "base": str(base),
                    "adapter": str(file),
                    "rounded": _TYPES[self._rounded(source)],
                    "allowed": _LACKING,
                }
                run_program("gguf_tensors.py", request, path, "reading the file", source.num_weights)
            except (ExportError, ProgramError) as error:
                return Verdict(engine.name, "not verified", str(error))
            compared = json.loads(path.with_name("compared.json").read_text(encoding="utf-8"))
        if why := compared.get("damaged"):
            return Verdict(engine.name, "failed", f"{self._file(folder).name} cannot be read: {why}")
        if unplaced := compared["unplaced"]:
            reason = f"the file has no tensors of these names, which the adapter changes: {_some(unplaced)}"
            return Verdict(engine.name, "not verified", reason)
        figures = {"relative_tolerance": _LACKING, "relative_difference": compared["largest"]}
        figures["matrices"] = compared["matrices"]
        if not (wrong := compared["wrong"]):
            return Verdict(engine.name, "verified", None, figures)
        groups = [name if expert is None else f"expert {expert} of {name}" for name, expert in wrong]
        reason = f"{len(wrong)} of {compared['matrices']} matrices are not base and adapter: {_some(groups)}"
        return Verdict(engine.name, "failed", reason, figures, groups)

    def _file(self, folder: Path) -> Path:
        return folder / f"model-{self.kind}.gguf"


def make(name: str, options: Options) -> Format:
    """The format of this name."""
    if name == GgufAdapter.name:
        return GgufAdapter(options.type or "f32")
    merged, is_dequantized = make_format("merged", Options(options.base)), options.base == "dequantized"
    return GgufModel(options.type or "bf16", merged, is_dequantized)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _public_name(source: ExportSource) -> str:
    """What the file is called in itself: others read it, so that the run's name and the base's folder are not in it."""
    revision, base = source.adapter.config.get("revision"), str(source.adapter.config.get("base_model_name_or_path"))
    return f"{base.split('/')[-1] if revision else source.model.config.model_type}-{source.adapter_name}"


def _pair(name: str, pair: Factors, alpha: int) -> Iterator[Outgoing]:
    """A and B [..., r, in] and [..., out, r]; the reader multiplies by alpha / r."""
    a, b, factor = pair.a, pair.b, pair.scale * pair.a.shape[-2] / alpha
    dtype = dtype_in_file(b.dtype, factor)
    yield Outgoing(f"{PREFIX}{name}.lora_A.weight", a.dtype, tuple(a.shape), lambda: a)
    yield Outgoing(f"{PREFIX}{name}.lora_B.weight", dtype, tuple(b.shape), lambda: fold(b, factor))


def _plain_token(source: ExportSource) -> int | None:
    """A token that is a letter; None where there is none."""
    ids = sorted(source.tokenizer.get_vocab().values())
    return next((each for each in ids if re.fullmatch("[A-Za-z]", source.tokenizer.decode([each]))), None)


def _texts(source: ExportSource) -> list[tuple[str, list[int]]]:
    """Texts of a few examples, with their token ids."""
    texts = [source.tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in source.examples[:8]]
    return [(text, source.tokenizer.encode(text, add_special_tokens=False)) for text in texts]

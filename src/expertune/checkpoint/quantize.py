"""Write an NF4 folder from a checkpoint of any size: a decoder layer at a time, one source tensor at a time.

Layers are written in the order that keeps few shards open, each file beside itself and then renamed; what is finished
is noted, so that a run that was killed resumes. The bytes are those that loading the source gives: the same code
places them (`expertune.checkpoint.loader.Loader`).

A thread reads and hashes the shards that are open, and tensors are read behind it; another one flushes what is written
to disk. A file is noted when it is on disk, with the hashes of its shards or what they are known again by until then
(`expertune.checkpoint.noted`).
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn

from expertune.checkpoint.contents import Weight, layer_tensors, rest_tensors
from expertune.checkpoint.formats.nf4_folder import (
    FORMAT_VERSION,
    GUIDE,
    METHOD,
    Nf4Folder,
    is_nf4_folder,
    read_manifest,
    read_nf4_folder,
    write_manifest,
)
from expertune.checkpoint.guide import guide
from expertune.checkpoint.hub import CODE, SMALL_FILES, ModelSource, fetch_model
from expertune.checkpoint.jobs import Job, estimate_bytes, few_shards_at_once, make_jobs
from expertune.checkpoint.json_file import read_config
from expertune.checkpoint.linears import decoder_layers
from expertune.checkpoint.load import swap_experts
from expertune.checkpoint.loader import FLOATS, Loader
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.model_folder import FOLDER_MARK, PROGRESS_MARK
from expertune.checkpoint.moments import Moments
from expertune.checkpoint.names import read_names
from expertune.checkpoint.noted import Notes, file_record, require_same_work
from expertune.checkpoint.reader import INDEX_NAME, read_header
from expertune.checkpoint.recipe import read_recipe
from expertune.checkpoint.shards import HashedShard, HubShards, LocalShards, OpenShards, Shards
from expertune.checkpoint.writer import write_beside
from expertune.config import QuantizationConfig
from expertune.distributed.processes import require_one_process
from expertune.errors import CheckpointError, ExpertuneError
from expertune.storage import BESIDE, hash_file, write_json, write_text

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
# The file that is being worked on, bytes written so far, bytes in all.
Progress = Callable[[str, int, int], None]

# Shards of a hub model, while they are needed.
_DOWNLOADS = ".source"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SourceOptions(TypedDict, total=False):
    """How the model is found and read.

    Keys:
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python that ships with the model.
        shards: where its tensors lie; None means what the model's name says.
        calibration: the file of a run, for `quantization.fit: calibrated`.
    """

    revision: str | None
    trust_remote_code: bool
    shards: Shards | None
    calibration: str | Path | None


def quantize(
    model: str,
    out: str | Path,
    quantization: QuantizationConfig | None = None,
    dtype: Dtype = "auto",
    progress: Progress | None = None,
    **source_options: Unpack[SourceOptions],
) -> Nf4Folder:
    """Write the NF4 folder of a model, or resume one that was interrupted.

    Args:
        model: folder, or hub id: its shards are then fetched one by one and deleted after use.
        out: the folder to write; it may not hold anything else.
        quantization: how weights are quantized; what is quantized already stays as it is.
        dtype: of what stays unquantized; `auto` keeps each tensor's own.
        progress: called before and after each file.
        **source_options: how the model is found and read; see `SourceOptions`.

    Raises:
        CheckpointError: the source is damaged or incomplete; `out` holds something else or another source's work, or
            cannot be written; the disk is full (says how many bytes are needed; run again after making room).
        ConfigError, UnsupportedModelError: see `expertune.checkpoint.load.load_model`; one of several processes.
    """
    require_one_process()
    out = Path(out)
    revision, trusted = source_options.get("revision"), source_options.get("trust_remote_code", False)
    source = fetch_model(model, revision, trusted, weights=False)
    if is_nf4_folder(source.folder):
        raise CheckpointError(f"{model}: already an NF4 folder; give the checkpoint that it was made of")
    if source.folder.resolve() == out.resolve():
        raise CheckpointError(f"{out}: the model itself lies here; choose another folder to write")
    _require_room_for_ours(out)
    shards = source_options.get("shards") or _find_shards(model, source, out)
    name = model if source.revision else str(source.folder.resolve())
    asked, calibration = quantization or QuantizationConfig(), source_options.get("calibration")
    work = _Work.plan(name, source, out, shards, (asked, None if calibration is None else Path(calibration)), dtype)
    was_there, is_fresh = out.exists(), not is_nf4_folder(out)
    try:
        if not work.is_finished():
            work.run(progress)
    except ExpertuneError as error:
        if work.files:
            files = "1 finished file is" if len(work.files) == 1 else f"{len(work.files)} finished files are"
            kept = f"{files} kept in {out}, and the same command resumes from there"
            raise type(error)(f"{error}. {kept}") from None
        if is_fresh:
            # A source that cannot be read leaves nothing behind; what is finished is kept for the same command.
            (out / PROGRESS_MARK).unlink(missing_ok=True)
            if out.is_dir() and not was_there and not any(out.iterdir()):
                out.rmdir()
        raise
    except OSError as error:
        raise _cannot_write(out, error, work.bytes_left()) from None
    return read_nf4_folder(out)


def _require_room_for_ours(out: Path) -> None:
    """Refuse a file, and a folder with anything in it that this module has not started."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: a file; choose a folder to write")
    if out.is_dir() and not is_nf4_folder(out) and any(path.name != _DOWNLOADS for path in out.iterdir()):
        raise CheckpointError(f"{out}: holds something else; choose a new or an empty folder")


def _find_shards(model: str, source: ModelSource, out: Path) -> Shards:
    if source.revision is None:
        return LocalShards(source.folder)
    return HubShards(model, source.revision, source.folder, out / _DOWNLOADS)


def _cannot_write(out: Path, error: OSError, needed: int) -> CheckpointError:
    if error.errno in _FULL:
        return CheckpointError(
            f"{out}: the disk is full; {needed} bytes more are needed ({_gigabytes(needed)}). What is finished is "
            "kept: make room, and the same command resumes"
        )
    return CheckpointError(f"{error.filename or out}: cannot be written or read ({error.strerror or error})")


@dataclass
class _Work:
    """Everything that one call works on; `notes` is what is on the disk about it."""

    out: Path
    source: ModelSource
    shards: Shards
    loader: Loader
    dtype: Dtype
    identity: dict[str, Any]
    jobs: list[Job]
    sizes: dict[str, int]
    # None before `is_finished` has looked at the folder.
    notes: Notes | None = None
    # The shards that have been opened; files that are not noted yet.
    hashed: dict[str, HashedShard] = field(default_factory=dict)
    written: dict[str, Future[None]] = field(default_factory=dict)

    @classmethod
    def plan(
        cls,
        name: str,
        source: ModelSource,
        out: Path,
        shards: Shards,
        asked: tuple[QuantizationConfig, Path | None],
        dtype: Dtype,
    ) -> "_Work":
        """What is to be done, from the config and the names of the tensors alone."""
        (quantization, calibration), values = asked, read_config(source.folder)
        compute = FLOATS[dtype] if dtype != "auto" else config_dtype(values)
        model = build_meta_model(source.folder, compute, source.trust_remote_code)
        names = read_names(model)
        recipe = read_recipe(model, names, shards.weight_map, quantization, source.folder)
        layers = [layer for layer, _ in decoder_layers(model, names.specs)]
        jobs = make_jobs(layers, names, recipe.pieces)
        swap_experts(model, recipe, "meta")
        sizes = {job.file: estimate_bytes(model, job, layers, recipe) for job in jobs}
        recipe = replace(recipe, importance=Moments.load(calibration) if calibration else None)
        loader = Loader(model, names, recipe, compute, torch.device("cpu"), preserves_dtypes=dtype == "auto")
        held = recipe.to_json() | ({"calibration_sha256": hash_file(calibration).sha256} if calibration else {})
        weight_map = json.dumps(sorted(shards.weight_map.items()))
        identity = {
            "model": name,
            "revision": source.revision,
            "config_sha256": hash_file(source.folder / "config.json").sha256,
            "tensors_sha256": hashlib.sha256(weight_map.encode()).hexdigest(),
            "quantization": held,
            "dtype": dtype,
        }
        ordered = few_shards_at_once(jobs, shards.weight_map)
        return cls(out, source, shards, loader, dtype, identity, ordered, sizes)

    @property
    def files(self) -> dict[str, Any]:
        return self.notes.files if self.notes else {}

    def bytes_left(self) -> int:
        """About how many bytes are still to be written."""
        return sum(size for file, size in self.sizes.items() if file not in self.files and file not in self.written)

    def is_finished(self) -> bool:
        """Look at `out`: True where all work is done, False where there is some left; then it is ready to be done.

        Raises:
            CheckpointError: it holds another source's work, or has too little room.
        """
        out = self.out
        if (out / FOLDER_MARK).is_file():
            manifest = read_manifest(out)
            before = {**manifest["source"], "quantization": manifest["quantization"], "dtype": manifest.get("dtype")}
            require_same_work(out, self.identity, before)
            return True
        made_of = {job.file: job.shards(self.shards.weight_map) for job in self.jobs}
        self.notes = Notes(out, self.identity, self.shards, made_of)
        for beside in out.glob(f".*{BESIDE}"):
            beside.unlink()  # of a process that was killed
        needed = self.bytes_left()
        free = shutil.disk_usage(_existing(out)).free
        if needed > free:
            raise CheckpointError(
                f"{out}: {needed} bytes are needed ({_gigabytes(needed)}), and {_gigabytes(free)} are free; make room, "
                "or choose a folder on another disk"
            )
        self.notes.save()
        return False

    def run(self, progress: Progress | None) -> None:
        """Do all work that is left."""
        assert self.notes is not None
        try:
            # Both pools end, and with them what they have begun, whatever happens here.
            with ThreadPoolExecutor(1) as noting, ThreadPoolExecutor(1) as hashing:
                try:
                    self._write_all(progress, noting, hashing)
                    for noted in self.written.values():
                        noted.result()
                    for shard in sorted(self.notes.unhashed - self.hashed.keys()):  # of a call that was interrupted
                        self.hashed[shard] = HashedShard(self.shards.open(shard), hashing)
                    self.notes.settle(self.hashed, waits=True)
                except BaseException:
                    # The rest of a large shard would take minutes, for which neither Ctrl-C nor an error waits: what
                    # was made of it is noted, and it is hashed when the work is resumed.
                    for hashed in self.hashed.values():
                        hashed.stop()
                    raise
        except BaseException:
            with suppress(ExpertuneError, OSError):
                self.notes.settle(self.hashed)
            raise
        finally:
            self.written.clear()
        if progress:
            total = sum(self.sizes.values())
            progress(FOLDER_MARK, total, total)
        self._finish()

    def _write_all(self, progress: Progress | None, noting: ThreadPoolExecutor, hashing: ThreadPoolExecutor) -> None:
        total = sum(self.sizes.values())
        opened = OpenShards(self.shards, lambda shard, path: self.hashed.update({shard: HashedShard(path, hashing)}))
        left = [job for job in self.jobs if job.file not in self.files]
        while left:
            if progress:
                progress(left[0].file, total - self.bytes_left(), total)
            self._write(left.pop(0), opened, noting)
            for noted in [noted for noted in self.written.values() if noted.done()]:
                noted.result()
            wanted = {shard for job in left for shard in job.shards(self.shards.weight_map)}
            if self.shards.are_deleted:
                wait([hashed.record for hashed in self.hashed.values()])
            opened.keep_only(wanted)

    def _write(self, job: Job, opened: OpenShards, noting: ThreadPoolExecutor) -> None:
        weights = [(piece, {part: opened.entry(key) for part, key in piece.parts.items()}) for piece in job.pieces]
        weights.sort(key=lambda weight: min((entry.shard.name, entry.start) for entry in weight[1].values()))
        if job.layer is None:
            layers = tuple(each.layer for each in self.jobs if each.layer)
            outgoing, left_out = rest_tensors(self.loader, layers, self._follow(weights), self.source.folder)
        else:
            outgoing, left_out = layer_tensors(self.loader, job.layer, self._follow(weights), self.source.folder)
        record, finish = write_beside(self.out / job.file, outgoing)
        self.written[job.file] = noting.submit(self._note, job, record.to_json() | {"left_out": left_out}, finish)
        if job.layer is not None:
            layer = self.loader.model.get_submodule(job.layer)
            self.loader.model.set_submodule(job.layer, nn.Identity())
            # Modules and their parameters refer to each other: without this a layer would stay until it is collected.
            for module in layer.modules():
                module._parameters.clear()
                module._buffers.clear()

    def _follow(self, weights: list[Weight]) -> Iterator[Weight]:
        """The weights, each when its shards have been read so far."""
        for piece, entries in weights:
            for entry in entries.values():
                self.hashed[entry.shard.name].follow(entry.start + entry.nbytes)
            yield piece, entries

    def _note(self, job: Job, record: dict[str, Any], finish: Callable[[], None]) -> None:
        """Flush a file to the disk, and note it."""
        assert self.notes is not None
        finish()
        self.notes.add(job.file, record, {shard: self.hashed[shard] for shard in job.shards(self.shards.weight_map)})

    def _finish(self) -> None:
        """Everything beside the weights, and the manifest last."""
        assert self.notes is not None
        files = {file: file_record(record) for file, record in self.files.items()}
        weight_map: dict[str, str] = {}
        nbytes = 0
        for file in sorted(files):
            for entry in read_header(self.out / file).values():
                weight_map[entry.key] = file
                nbytes += entry.nbytes
        write_json(self.out / INDEX_NAME, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
        copied = _copy_small_files(self.source, self.out)
        write_text(self.out / "config.json", self._config())
        for name in [INDEX_NAME, "config.json", *copied]:
            files[name] = hash_file(self.out / name).to_json()
        identity = {key: value for key, value in self.identity.items() if key not in ("quantization", "dtype")}
        shards = self.notes.shards
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": {**identity, "shards": {key: file_record(shards[key]) for key in sorted(shards)}},
            "quantization": self.identity["quantization"],
            "dtype": self.dtype,
            "left_out": sorted(key for record in self.files.values() for key in record["left_out"]),
            "files": dict(sorted(files.items())),
        }
        self.shards.close()
        # Not in the manifest: people may write more into it.
        write_text(self.out / GUIDE, guide(manifest))
        write_manifest(self.out, manifest)
        self.notes.remove()

    def _config(self) -> str:
        values = read_config(self.source.folder)
        for section in [values, *(value for value in values.values() if isinstance(value, dict))]:
            section.pop("quantization_config", None)
        if self.dtype != "auto":
            values.pop("torch_dtype", None)
            values["dtype"] = self.dtype
        values["quantization_config"] = {"quant_method": METHOD, **self.identity["quantization"]}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that a config names for its model; bfloat16 where it names none of ours."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    named = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return FLOATS.get(str(named), torch.bfloat16)


def _copy_small_files(source: ModelSource, out: Path) -> list[str]:
    """Tokenizer, generation config and the like, as they are; names of what was copied."""
    patterns = SMALL_FILES + (CODE if source.trust_remote_code else [])
    names = sorted({path.name for pattern in patterns for path in source.folder.glob(pattern) if path.is_file()})
    names = [name for name in names if name != "config.json" and not name.endswith(".index.json")]
    for name in names:
        shutil.copyfile(source.folder / name, out / name)
    return names


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    with suppress(OSError):
        path = path.resolve()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.1f} MB"

"""Task files of lm-evaluation-harness: found by name, and read as data unless their code is asked for.

A task file can have Python run in more ways than its `!function`, which imports a module: a metric that the harness
does not know is loaded as a script by Hugging Face's `evaluate`, the builder `pandas` of `datasets` reads pickles,
`custom_generate` of transformers loads a script, and Jinja templates are in no sandbox. A folder of tasks that somebody
sent is refused where it names any of these, and templates are rendered in a sandbox. Read from lm-eval 0.4.13.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from expertune.errors import ConfigError, first_line, nearest, option

SHIPPED = Path(str(files("expertune") / "assets" / "tasks"))
"""Task files that come with Expertune."""

# Builders of `datasets` that read files; any other name is a folder or a dataset of the hub.
_FILE_BUILDERS = frozenset({"json", "csv", "parquet", "text", "arrow"})

# Those that may unpickle what they read.
_PICKLES = frozenset({"pandas", "webdataset"})

_INSTALL = "pip install 'expertune[eval]'"


class TaskFiles:
    """The tasks that are to be run, checked; nothing of theirs has been run or read from the network.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with task files; its tasks come before the harness's own of the same name.
        task_code: run the Python that the files of this folder name.
        download: fetch what a task needs from the hub.

    Raises:
        ConfigError: the harness is not installed, no such folder or task, a task names code or data of the hub without
            permission, or a data file is missing.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | Path | None = None,
        task_code: bool = False,
        download: bool = False,
    ) -> None:
        _require_harness()
        if not names:
            raise ConfigError("tasks: no task is named; give one, such as viggo")
        self._folder = _existing(include_path) if include_path is not None else None
        self._task_code, self._download = task_code, download
        self._names = list(dict.fromkeys(names))
        self._manager = self._index()
        for entry in self._entries():
            self._prepare(entry)

    @contextmanager
    def loaded(self) -> Iterator[dict[str, Any]]:
        """The tasks with their examples, as the harness's `TaskManager.load` gives them; of use inside of the block.

        Raises:
            ConfigError: a task cannot be prepared, or reaches for what it may not.
        """
        with _sandbox(self._task_code):
            try:
                loaded = self._manager.load(self._names)
            except Exception as error:  # of any library: files, data, templates
                shown = f"{type(error).__name__}: {first_line(error)}"
                raise ConfigError(f"tasks: {', '.join(self._names)} cannot be prepared ({shown})") from error
            for name, task in loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise ConfigError(f"task {name} runs the code that the model writes, which Expertune does not do")
                if getattr(task, "MULTIMODAL", False):
                    raise ConfigError(f"task {name} shows pictures or plays sounds; the model reads text alone")
            yield dict(loaded)

    def _index(self) -> Any:
        """The harness's index: of local folders alone where these have all that is asked for (it has 14,000 files)."""
        from lm_eval.tasks import TaskManager

        folders = [SHIPPED, *([self._folder] if self._folder else [])]
        local = TaskManager(include_path=folders, include_defaults=False)
        if not _missing(local.task_index, self._names):
            return local
        manager = TaskManager(include_path=folders)
        for name in _missing(manager.task_index, self._names):
            if name in self._names:
                meant = nearest(name, manager.all_tasks)
                rest = f"did you mean {meant}?" if meant else "`lm-eval ls tasks` lists those of the harness"
                raise ConfigError(f"tasks: no task is called {name}{self._unread()}; {rest}")
        return manager

    def _unread(self) -> str:
        """Files of the user's folder that the harness passes over, because they cannot be read."""
        broken = [f"{path.name} ({first_line(error)})" for path, error in _unreadable(self._folder)]
        return f" ({self._folder} holds files that cannot be read: {'; '.join(broken)})" if broken else ""

    def _entries(self) -> Iterator[Any]:
        """Entries of all tasks and groups that the names stand for."""
        index, seen, open_ = self._manager.task_index, set[str](), list(self._names)
        while open_:
            name = open_.pop()
            if name in seen or name not in index:
                continue
            seen.add(name)
            yield index[name]
            open_ += _members(index[name])

    def _prepare(self, entry: Any) -> None:
        """Check a task; paths of the user's and of the shipped files are read from where the file lies."""
        from lm_eval.tasks._yaml_loader import load_yaml

        path = entry.yaml_path
        if path is None:
            return
        own, shipped = _lies_in(path, self._folder), _lies_in(path, SHIPPED)
        if own and not self._task_code and (code := _names_code(path, entry.cfg or {})):
            raise ConfigError(f"{path}: {code}; read it first, and then give {option('task-code')} to let it run")
        if own or shipped:
            entry.cfg = _with_paths(load_yaml(path), path.parent, entry.name)
            entry.yaml_path = None  # the harness takes the content that is here
        if not self._download:
            _require_local(entry.cfg or {}, entry.name)


def _require_harness() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"tasks are scored by lm-evaluation-harness, which is not installed: {_INSTALL}") from error


def _existing(folder: str | Path) -> Path:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"include_path: {folder} is no folder; give the one that holds the task files")
    return path


def _lies_in(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.resolve().is_relative_to(folder)


def _members(entry: Any) -> list[str]:
    """Names of the tasks and groups that a group or a tag stands for."""
    of_group = entry.cfg.get("task") if entry.kind.name == "GROUP" else None
    members = of_group if isinstance(of_group, list) else []
    named = [each.get("group") or each.get("task") if isinstance(each, dict) else each for each in members]
    of_tag = sorted(entry.tags) if entry.kind.name == "TAG" else []
    return [str(name) for name in [*named, *of_tag]]


def _missing(index: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Names, and members of groups, that an index does not have."""
    missing, seen, open_ = [], set[str](), list(names)
    while open_:
        name = open_.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in index:
            open_ += _members(index[name])
        else:
            missing.append(name)
    return missing


def _unreadable(folder: Path | None) -> Iterator[tuple[Path, Exception]]:
    for path in sorted(folder.glob("**/*.yaml")) if folder else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            yield path, error


def _names_code(path: Path, config: Mapping[str, Any]) -> str | None:
    """What in a task file, or in one that it includes, makes the harness run Python; None where nothing does."""
    from lm_eval.api.registry import get_metric_aggregation, metric_registry

    get_metric_aggregation("acc")  # fills the registry of metrics
    for file in _with_included(path):
        if any(node.tag == "!function" for node in _nodes(file)):
            named = next(node for node in _nodes(file) if node.tag == "!function")
            where = "" if file == path else f" (by {file})"
            return f"it runs Python, `!function {named.value}`{where}"
    for mapping in _mappings(config):
        metrics = mapping.get("metric_list")
        for metric in metrics if isinstance(metrics, list) else ():
            name = metric.get("metric") if isinstance(metric, dict) else metric
            if name not in metric_registry or (isinstance(metric, dict) and metric.get("hf_evaluate")):
                return f"the metric {name} is none of the harness, which would load it as a Python script"
        if mapping.get("dataset_path") in _PICKLES:
            return f"dataset_path {mapping['dataset_path']} may read pickles, which run Python"
        if "custom_generate" in mapping:
            return f"custom_generate {mapping['custom_generate']} loads a Python script"
        if mapping.get("use_prompt"):
            return f"use_prompt {mapping['use_prompt']} takes its prompt from another library"
    return None


def _with_included(path: Path) -> list[Path]:
    """A task file and all files that it includes."""
    found, open_ = list[Path](), [path.resolve()]
    while open_:
        file = open_.pop()
        if file in found:
            continue
        found.append(file)
        for key, value in getattr(_root(file), "value", ()):
            if getattr(key, "value", None) == "include":
                each = value.value if isinstance(value, yaml.SequenceNode) else [value]
                open_ += [(file.parent / node.value).resolve() for node in each]
    return found


def _root(file: Path) -> Any:
    try:
        return yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read ({first_line(error)})") from None


def _nodes(file: Path) -> Iterator[Any]:
    open_, seen = [_root(file)], set[int]()
    while open_:
        node = open_.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.SequenceNode):
            open_ += node.value
        elif isinstance(node, yaml.MappingNode):
            open_ += [part for pair in node.value for part in pair]


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings of a task's content, whatever depth they are at."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mappings(part)


def _with_paths(config: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """A task's content with the paths of its data from its own folder, where they lie there.

    Raises:
        ConfigError: a data file is neither there nor in the working directory.
    """
    for mapping in _mappings(config):
        path = mapping.get("dataset_path")
        if isinstance(path, str) and (folder / path).is_dir():
            mapping["dataset_path"] = str(folder / path)
        arguments = mapping.get("dataset_kwargs")
        if isinstance(arguments, dict) and "data_files" in arguments:
            arguments["data_files"] = _map_files(arguments["data_files"], functools.partial(_placed, folder, name))
    return config


def _map_files(value: Any, change: Callable[[str], str]) -> Any:
    """`data_files` of a task, which are a file, a list of them, or either by split, with each file changed."""
    if isinstance(value, dict):
        return {key: _map_files(each, change) for key, each in value.items()}
    return [_map_files(each, change) for each in value] if isinstance(value, list) else change(str(value))


def _files(value: Any) -> Iterator[str]:
    """The files of `data_files`, whatever form it has."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        yield str(value)
    for part in parts or ():
        yield from _files(part)


def _placed(folder: Path, name: str, file: str) -> str:
    if "://" in file:
        return file
    for base in (folder, Path.cwd()):
        if any(base.glob(file)) if "*" in file and not Path(file).is_absolute() else (base / file).exists():
            return str((base / file).resolve()) if "*" not in file else str(base / file)
    raise ConfigError(f"task {name}: there is no data file {file}, neither in {folder} nor in the working directory")


def _require_local(config: Mapping[str, Any], name: str) -> None:
    """Refuse a task that would fetch something.

    Raises:
        ConfigError: it reads a dataset of the hub, or files of another machine.
    """
    for mapping in _mappings(config):
        path = mapping.get("dataset_path")
        if not isinstance(path, str):
            continue
        arguments = mapping.get("dataset_kwargs")
        files = list(_files(arguments.get("data_files"))) if isinstance(arguments, dict) else []
        remote = next((file for file in files if "://" in file), None)
        if remote or (path not in _FILE_BUILDERS and not Path(path).is_dir()):
            what = remote or f"the dataset {path} of the hub"
            raise ConfigError(f"task {name} reads {what}; give {option('download')} to fetch it")


@contextmanager
def _sandbox(task_code: bool) -> Iterator[None]:
    """Render the harness's templates in a sandbox, unless a task's code may run anyway."""
    import lm_eval.utils as utils

    own = utils.env
    if not task_code:
        boxed = SandboxedEnvironment(
            loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
        )
        boxed.filters.update(own.filters)
        utils.env = boxed
    try:
        yield
    finally:
        utils.env = own

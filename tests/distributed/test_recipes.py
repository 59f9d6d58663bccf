"""The recipes of examples/cluster start what they say, and the ways to start a run give one result."""

import ast
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import expertune
from expertune.cli import app
from expertune.distributed.processes import _TORCHRUN
from tests.distributed.test_replicated import TWO, write_place
from tests.processes import ROOT

FOLDER = ROOT / "examples" / "cluster"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
VALUES = {"NNODES": "2", "NODES": "2", "NUM_NODES": "2", "NODEID": "1", "NODE": "1", "NODE_RANK": "1"}
VALUES |= {"PROCESSES": "8", "NUM_GPUS_PER_NODE": "8", "HEAD": "10.0.0.1", "PORT": "29500", "RUN": "run.yaml"}
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def torchrun_of(name: str) -> Namespace:
    """The torchrun command of a recipe as torchrun itself reads it; variables have the values that a cluster could."""
    text = "\n".join(line for line in read(name).splitlines() if not line.lstrip().startswith("#"))
    (command,) = re.findall(r"\btorchrun ((?:.*\\\n)*.*-m expertune train .*)", text)
    command = command.replace("\\\n", " ").split("' torchrun")[0]
    command = re.sub(r"\$\{?(?:SLURM_|SKYPILOT_)?([A-Z_]+)(?::[^}]*)?\}?", lambda found: VALUES[found[1]], command)
    return get_args_parser().parse_args(shlex.split(command.replace('"$@"', "run.yaml lora.r=4 --resume")))


def options_of_train(words: list[str]) -> dict[str, object]:
    """What `expertune train` makes of its arguments."""
    name, *arguments = words
    assert name == "train"
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    with commands["train"].make_context("train", arguments) as context:
        return dict(context.params)


def test_readme_lists_every_recipe_and_no_other() -> None:
    listed = set(re.findall(r"^\| \[`(.+?)`\]\(\1\)", README, re.MULTILINE))
    assert listed == {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_read_by_bash_and_can_be_executed(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    "name", ["torchrun-one-machine.sh", "torchrun-several-machines.sh", "slurm.sh", "skypilot.yaml"]
)
def test_torchrun_takes_the_command_of_a_recipe_and_expertune_its_rest(name: str) -> None:
    run = torchrun_of(name)
    assert (run.module, run.training_script, run.nproc_per_node) == (True, "expertune", "8")
    options = options_of_train(run.training_script_args)
    assert options["run"] == Path("run.yaml")
    if name != "skypilot.yaml":  # whose arguments are one variable
        assert (options["overrides"], options["resume"]) == (["lora.r=4"], True)
    if name == "torchrun-one-machine.sh":
        assert run.standalone
    else:
        assert (run.nnodes, run.node_rank, run.master_addr, run.master_port) == ("2", 1, "10.0.0.1", 29500)


def test_trainjob_leaves_to_the_runtime_what_torchrun_reads_from_variables() -> None:
    spec = yaml.safe_load(read("kubeflow-trainjob.yaml"))["spec"]
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    trainer = spec["trainer"]
    shell, _, script, name = trainer["command"]
    assert subprocess.run([shell, "-n", "-c", script]).returncode == 0
    (command,) = re.findall(r'exec torchrun (.*) "\$@"$', script)
    run = get_args_parser().parse_args([*shlex.split(command), *trainer["args"]])
    assert (name, run.module, run.training_script) == ("torchrun", True, "expertune")
    assert options_of_train(run.training_script_args)["run"] == Path("run.yaml")
    assert not [each["name"] for each in trainer["env"] if each["name"].startswith("PET_") or each["name"] in _TORCHRUN]
    pod = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = pod["template"]["spec"]["containers"]
    volumes = {each["name"] for each in pod["template"]["spec"]["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


def test_accelerate_reads_its_configuration_and_starts_no_plugin() -> None:
    config = load_config_from_file(str(FOLDER / "accelerate.yaml"))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == ("MULTI_GPU", 1, 8)
    assert [config.fsdp_config, config.deepspeed_config, config.megatron_lm_config] == [{}, {}, {}]
    (command,) = re.findall(r"^#   accelerate launch (.*)$", read("accelerate.yaml"), re.MULTILINE)
    launch = launch_command_parser().parse_args(shlex.split(command))
    assert (launch.config_file, launch.module) == ("examples/cluster/accelerate.yaml", True)
    assert launch.training_script == "expertune"
    assert options_of_train(launch.training_script_args)["resume"] is False


def test_ray_script_uses_public_names_alone() -> None:
    tree = ast.parse(read("ray_train.py"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "expertune"
    }
    assert used == {"finetune"} <= set(expertune.__all__)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if str(name).startswith("expertune")]


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_files_that_recipes_name_are_in_the_repository(path: Path) -> None:
    named = set(re.findall(r"\bexamples/[\w./-]*\w", path.read_text(encoding="utf-8")))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_guide_names_the_variables_that_a_launcher_sets() -> None:
    guide = (ROOT / "docs" / "guides" / "several-devices.md").read_text(encoding="utf-8")
    assert [name for name in _TORCHRUN if f"`{name}`" not in guide] == []


# The recipes themselves, on two CPU processes of this machine.


ACCELERATE = ["accelerate", "launch", "--num_processes", "2", "--main_process_port", "29518"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("recipes") / "place")


def start(place: Path, recipe: str, name: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a recipe in a folder with a run file."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = {
        ".sh": [str(FOLDER / recipe)],
        ".py": [sys.executable, str(FOLDER / recipe)],
        ".yaml": [*ACCELERATE, "--config_file", str(FOLDER / recipe), "-m", "expertune", "train"],
    }
    return subprocess.Popen(
        [*program[Path(recipe).suffix], "run.yaml", f"output_dir={name}", *arguments],
        cwd=place,
        env=os.environ | {"PATH": path, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    """What it printed, after it has ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return out


def adapter(place: Path, name: str) -> bytes:
    return (place / name / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def one_machine(place: Path) -> bytes:
    """The adapter of two processes under torchrun."""
    assert end(start(place, "torchrun-one-machine.sh", "machine", *TWO, PROCESSES="2")) == "machine\n"
    return adapter(place, "machine")


@pytest.mark.slow
def test_two_machines_of_one_process_give_the_bytes_of_one_machine_of_two(place: Path, one_machine: bytes) -> None:
    where = {"HEAD": "localhost", "NODES": "2", "PROCESSES": "1", "PORT": "29517"}
    nodes = [start(place, "torchrun-several-machines.sh", "nodes", *TWO, NODE=node, **where) for node in ("0", "1")]
    assert [end(node) for node in nodes] == ["nodes\n", ""]
    assert adapter(place, "nodes") == one_machine


@pytest.mark.slow
def test_two_processes_of_accelerate_give_the_bytes_of_torchrun(place: Path, one_machine: bytes) -> None:
    assert end(start(place, "accelerate.yaml", "accelerate", *TWO)) == "accelerate\n"
    assert adapter(place, "accelerate") == one_machine


@pytest.mark.slow
def test_two_workers_of_ray_give_the_bytes_of_torchrun(place: Path, one_machine: bytes) -> None:
    pytest.importorskip("ray.train")
    end(start(place, "ray_train.py", "ray-run", *TWO, "--workers", "2", "--cpu"))
    assert adapter(place, "ray-run") == one_machine

"""The pages that describe the code are held to the code, by reading its source: nothing is imported."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "expertune"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# Folders whose content is data, not modules.
DATA_FOLDERS = {"assets", "data/templates", "notebook/templates", "report/templates"}


def blocks(kind: str) -> list[str]:
    """The fenced blocks of one kind on the page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def drawn_tree() -> list[str]:
    """Paths that the page's tree names, relative to the package; folders end in a slash."""
    paths, parents = [], []
    for line in blocks("tree")[0].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        paths.append("".join(parents))
    return paths


def real_modules() -> set[str]:
    """Modules of the package; a package's __init__ stands for its folder."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("__") and "assets" not in path.parts
    }


def real_rooms() -> set[str]:
    return {f"{path.parent.relative_to(PACKAGE).as_posix()}/" for path in PACKAGE.rglob("*/*.py")} - {"./"}


def test_every_file_and_room_in_the_tree_exists() -> None:
    missing = [path for path in drawn_tree() if not (PACKAGE / path).exists()]
    assert missing == []


def test_every_module_is_in_the_tree_once() -> None:
    drawn = [path for path in drawn_tree() if not path.endswith("/")]
    assert sorted(drawn) == sorted(real_modules())


def test_every_room_is_in_the_tree() -> None:
    drawn = {path for path in drawn_tree() if path.endswith("/")}
    assert drawn - {f"{folder}/" for folder in DATA_FOLDERS} == real_rooms()


def test_import_order_is_the_one_that_is_enforced() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    enforced = [layer.replace("expertune.", "") for layer in contract["layers"]]
    assert blocks("layers")[0].split("\n")[:-1] == enforced


def walked_names() -> list[str]:
    """Dotted names in the walks whose first part is a room or a module of the package."""
    first = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    names = re.findall(r"[A-Za-z_]\w*(?:\.\w+)+", "\n".join(blocks("walk")))
    return sorted({name for name in names if name.split(".")[0] in first})


def module_of(parts: list[str]) -> tuple[Path, list[str]]:
    """The module file that a dotted name starts with, and what is left of the name."""
    for count in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:count])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file, parts[count:]
    raise AssertionError(f"{'.'.join(parts)}: no such module")


def defined(body: list[ast.stmt], name: str) -> ast.stmt | None:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    return None


@pytest.mark.parametrize("name", walked_names())
def test_function_in_a_walk_is_where_the_page_says(name: str) -> None:
    file, rest = module_of(name.split("."))
    assert rest, f"{name} is a module; a walk names what is called in it"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for part in rest:
        node = defined(body, part)
        assert node is not None, f"{part} is not defined in {file.relative_to(ROOT)}"
        body = getattr(node, "body", [])


def test_the_walks_name_real_functions() -> None:
    # Guards the test above: an empty list of names would pass it.
    assert len(walked_names()) > 30


# A Triton kernel and a torch operator have a flat signature.
FLAT_BY_DECORATOR = ("triton.jit", "torch.library.custom_op", "_forward.register_fake")

# Each parameter of a command is an option.
_NAMED = re.search(r"for _command in \((.*)\):", (PACKAGE / "cli" / "__init__.py").read_text(encoding="utf-8"))
COMMANDS = set(_NAMED[1].split(", ")) if _NAMED else set()

# What launches a kernel, states its arithmetic or checks its arguments takes the tensors and sizes as a kernel does.
FLAT_IN_KERNELS = {
    "kernels/dropout.py: dropout",
    "kernels/expert_mlp/__init__.py: _check",
    "kernels/expert_mlp/__init__.py: expert_mlp",
    "kernels/expert_mlp/dequant_gemm.py: _add_inner",
    "kernels/expert_mlp/dequant_gemm.py: _after_backward",
    "kernels/expert_mlp/dequant_gemm.py: _down",
    "kernels/expert_mlp/dequant_gemm.py: _expert_backward",
    "kernels/expert_mlp/dequant_gemm.py: _gate_up",
    "kernels/expert_mlp/fused.py: _add_outer",
    "kernels/expert_mlp/fused.py: _multiply_gate_up",
    "kernels/expert_mlp/fused.py: _product",
    "kernels/expert_mlp/grouped.py: _grouped_gemm",
    "kernels/expert_mlp/grouped.py: _input_gradient",
    "kernels/expert_mlp/reference.py: expert_mlp",
    "kernels/expert_mlp/selfcheck.py: _definition",
    "kernels/gpu/grouped_gemm.py: grouped_gemm",
    "kernels/gpu/grouped_gemm.py: input_gradient",
    "kernels/gpu/low_rank.py: outer",
    "kernels/gpu/routing.py: gate_backward",
    "kernels/gpu/torch_gemm.py: grouped_gemm",
    "kernels/linear_cross_entropy/__init__.py: linear_cross_entropy",
    "kernels/linear_cross_entropy/chunked.py: forward",
    "kernels/linear_cross_entropy/per_token.py: linear_log_probs",
    "kernels/linear_cross_entropy/reference.py: linear_cross_entropy",
    "kernels/native/__init__.py: grouped_gemm",
    "kernels/native/__init__.py: outer",
    "kernels/native/cross_entropy.py: gradients",
}


def test_function_takes_at_most_six_parameters_save_for_kernels_and_commands() -> None:
    long = {
        f"{file.relative_to(PACKAGE).as_posix()}: {node.name}"
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and len([each for each in node.args.args + node.args.kwonlyargs if each.arg not in ("self", "cls")]) > 6
        and not any(ast.unparse(each).startswith(FLAT_BY_DECORATOR) for each in node.decorator_list)
        and not (file.parent.name == "cli" and node.name in COMMANDS)
    }
    assert long == FLAT_IN_KERNELS


def recorded_keys() -> set[tuple[str, str]]:
    """(section, key) of every `record.update(...)` in the corridor."""
    calls = [
        node
        for file in ("api.py", "run/inputs.py", "run/context.py")
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"
    ]
    return {
        (call.args[0].value, keyword.arg)
        for call in calls
        if call.args and isinstance(call.args[0], ast.Constant)
        for keyword in call.keywords
        if keyword.arg is not None
    }


def test_every_key_that_a_run_records_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "record.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    missing = [(s, key) for s, key in sorted(recorded_keys()) if f"| `{key}" not in sections.get(s, "")]
    assert missing == []
    assert recorded_keys()


def test_every_error_class_is_in_the_guide() -> None:
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    guide = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if f"`{name}`" not in guide] == []

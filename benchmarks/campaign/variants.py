"""Every way in which an expert layer can run on a device, by name, and which of them may be timed. Knows no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.campaign import schedule

if TYPE_CHECKING:
    from expertune.kernels.routes import KernelSettings

FUSED, TRITON, TORCH, SLOW = "fused", "dequant_gemm, triton", "dequant_gemm, torch, 8 GiB", "expert_by_expert"

# Values of `KernelSettings`. torch's grouped GEMM takes the weights of all experts at once, which the usual working set
# does not hold.
_USUAL = {"working_set_bytes": None, "gemm": "triton"}
_LARGE = {"route": "dequant_gemm", "working_set_bytes": 2**33}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {FUSED: {"route": "fused"}, "dequant_gemm": {"route": "dequant_gemm"}},
    "cuda": {
        FUSED: {"route": "fused"} | _USUAL,
        TRITON: {"route": "dequant_gemm"} | _USUAL,
        f"{TRITON}, 8 GiB": _LARGE | {"gemm": "triton"},
        TORCH: _LARGE | {"gemm": "torch"},
        SLOW: {"route": "expert_by_expert"} | _USUAL,
    },
}
DECODING = "correct decoding"


def group_of(variant: str) -> str:
    """The group that checks a variant."""
    return f"correct {variant}"


def gate(folder: Path, device: str) -> dict[str, dict[str, list[str]]]:
    """Variants that have passed all of their checks, and the others with what they failed or did not reach."""
    decoding = (schedule.read(schedule.path_of(folder, DECODING)) or {}).get("items", {})
    decodes = all(decoding.get(f"decode {name}", {}).get("passed") for name in ("mixtral", "qwen3"))
    found: dict[str, dict[str, list[str]]] = {"passed": {}, "failed": {}}
    for variant in VARIANTS[device]:
        values = schedule.read(schedule.path_of(folder, group_of(variant)))
        if values is None:
            continue
        items = values["items"]
        wrong = [check for check in ("layer", "repeat") if not items.get(check, {}).get("passed")]
        # A route that cannot be captured is not wrong; one that gives other bytes when captured is.
        wrong += ["graph"] if items.get("graph", {}).get("passed") is False else []
        wrong += [] if decodes or variant == SLOW else ["decode"]  # which decodes by plain torch
        found["failed" if wrong else "passed"][variant] = wrong
    return found


def passed_variants(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """The variants that may be timed."""
    passed = gate(folder, device)["passed"]
    return {name: settings for name, settings in VARIANTS[device].items() if name in passed}


def passed_settings(folder: Path, device: str) -> "tuple[KernelSettings, dict[str, Any]]":
    """Settings that choose among what passed and among nothing else, and a description of them.

    Raises:
        CorrectnessError: neither fast route passed.
    """
    from benchmarks.report import CorrectnessError
    from expertune.kernels.routes import KernelSettings

    passed = passed_variants(folder, device)
    fast = {settings["route"] for settings in passed.values()} & {"fused", "dequant_gemm"}
    if not fast:
        raise CorrectnessError("no route passed its check: no speed is reported")
    wanted = {settings["route"] for settings in VARIANTS[device].values()} - {"expert_by_expert"}
    chosen: dict[str, Any] = {"route": "auto" if fast == wanted else fast.pop()}
    gemms = {settings.get("gemm") for settings in passed.values() if settings["route"] == "dequant_gemm"}
    if device == "cuda" and len(gemms) == 1:
        chosen |= {"gemm": gemms.pop()}
    return KernelSettings(**chosen), chosen | {"passed": list(passed)}

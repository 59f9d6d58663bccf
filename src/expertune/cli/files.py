"""The commands that write a model or an adapter in another form, and verify it: quantize, export, verify."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import expertune
from expertune.cli.arguments import Adapter, BaseModel, Json, RunDir, TrustRemoteCode, Verbose, require_adapter
from expertune.exporting import FORMATS, require_export, require_known
from expertune.terminal import importing, log, print_json, stdout_for_results, working, writing


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id.")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")] = None,
    double_quantization: Annotated[
        bool | None,
        typer.Option(
            "--double-quantization/--no-double-quantization", help="Hold the scales in 8 bits (on by default)."
        ),
    ] = None,
    fit: Annotated[
        Literal["absmax", "mse", "calibrated"] | None,
        typer.Option(
            metavar="FIT",
            help="How scales are chosen: absmax, by the largest magnitude (the default); mse, by the least error; or "
            "calibrated, by the least error of what a run's inputs make of it.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For --fit calibrated: calibration.safetensors of a run.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BITS", help="Linears that stay in 16 bits, such as attention=16; may be given several times."
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(
            metavar="DTYPE",
            help="Of what stays unquantized: bfloat16, float16 or float32; auto keeps each tensor's own.",
        ),
    ] = "auto",
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only hash the files of an NF4 folder again.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write a model's 4-bit weights into a folder that loads at reading speed. Prints the folder.

    Shards of a hub model are fetched one by one and deleted after use. The same command resumes after an interruption.
    `expertune quantize --verify FOLDER` checks a folder.
    """
    if verify:
        _verify_nf4(Path(out or model))
        return
    if out is None:
        raise typer.BadParameter("give the folder to write", param_hint="OUT")
    bits = _bits(layers or []) or None
    try:
        with stdout_for_results(), writing("quantize") as progress:
            with importing():
                write_folder = expertune.quantize
            write_folder(
                model,
                out,
                double_quantization=double_quantization,
                fit=fit,
                calibration=calibration,
                layers=bits,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    except KeyboardInterrupt:
        log(f"expertune: interrupted; the same command resumes {out}")
        raise typer.Exit(130) from None
    print(out)


def _bits(given: list[str]) -> dict[str, int]:
    """`NAME=BITS` by name."""
    found = {}
    for each in given:
        name, _, bits = each.rpartition("=")
        if not name or bits not in ("4", "16"):
            raise typer.BadParameter(f"{each}: write it as NAME=16 or NAME=4", param_hint="--layers")
        found[name] = int(bits)
    return found


def _verify_nf4(folder: Path) -> None:
    with stdout_for_results(), working(f"hashing the files of {folder}"):
        from expertune.checkpoint.verified import verify
        from expertune.text import counted

        count = verify(folder)
    print(f"{folder}: {counted(count, 'file')} as written")


def export(
    run_dir: RunDir,
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"The form to write: {', '.join(FORMATS)}.")],
    adapter: Adapter = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write; RUN_DIR/exports/FORMAT by default.")
    ] = None,
    base: Annotated[
        Literal["source", "dequantized"],
        typer.Option(
            metavar="WEIGHTS",
            help="Of a merged model: source, the checkpoint's; or dequantized, those that the adapter was trained "
            "beside.",
        ),
    ] = "source",
    type_: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Numbers of a GGUF file: f32, f16, bf16 or q8_0.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the export in the engine that reads it, and compare.")
    ] = True,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Send it to this repository of the Hugging Face hub as well.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a repository that is made; by default the owner's choice."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's adapter, or base and adapter as one model, in the form that an engine reads. Prints the folder.

    Exit code 2 where the engine computes something else from it than it should.
    """
    require_known(to, base, type_)
    require_adapter(run_dir, adapter)
    with stdout_for_results(), writing("export") as progress:
        with importing():
            write_export = expertune.export
        exported = write_export(
            run_dir,
            to,
            adapter=adapter,
            out=out,
            base=base,
            type=type_,
            verify=verify,
            trust_remote_code=trust_remote_code,
            model=model,
            progress=progress,
            push_to_hub=push_to_hub,
            private=private,
        )
    if as_json:
        print_json(exported.to_json())
    else:
        print(exported.folder)
        if exported.url:
            print(exported.url)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `expertune export` has written.")],
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="The run that it is of, where it does not lie in that one's exports."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run an export again in the engines that read it, and compare. Prints what came of each.

    verification.json and the model card are written again. Exit code 2 where an engine computes something else from it
    than it should.
    """
    require_export(folder)
    with stdout_for_results(), working(f"verifying {folder}"):
        with importing():
            run_engines = expertune.verify
        found = run_engines(folder, run, trust_remote_code=trust_remote_code, model=model)
    if as_json:
        print_json(found.to_json())
        return
    from expertune.exporting.formats import Verdict

    assert found.verification is not None
    for engine in found.verification["engines"]:
        for line in Verdict(**engine).lines:
            print(line)

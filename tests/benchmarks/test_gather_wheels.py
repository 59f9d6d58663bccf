"""Wheels for a GPU machine without a network: pins, what is left out of wheels, and the limit. No network is used."""

import csv
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers import gather_wheels
from benchmarks.peers.gather_wheels import (
    PINS,
    STRIPPED,
    GatherError,
    Pin,
    choose,
    fit,
    main,
    read_installed,
    read_pins,
    rewrite_record,
    strip_wheel,
)

FILES = {
    "bitsandbytes/__init__.py": b"",
    "bitsandbytes/libbitsandbytes_cpu.so": b"cpu",
    "bitsandbytes/libbitsandbytes_cuda118.so": b"old" * 1000,
    "bitsandbytes/libbitsandbytes_cuda130.so": b"new",
    "bitsandbytes/libbitsandbytes_rocm72.so": b"other",
}
RECORD = "bitsandbytes-1.0.dist-info/RECORD"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr(RECORD, "".join(f"{name},sha256=x,{len(FILES[name])}\n" for name in FILES) + f"{RECORD},,\n")
    return path


def pins(*lines: str):
    return read_pins("\n".join(lines))[0]


def test_a_stripped_wheel_holds_just_what_its_record_lists(wheel: Path) -> None:
    before = wheel.stat().st_size
    removed = strip_wheel(wheel, *STRIPPED["bitsandbytes"])
    assert removed == ["bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_rocm72.so"]
    assert wheel.stat().st_size < before
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        listed = [row[0] for row in csv.reader(io.StringIO(archive.read(RECORD).decode()))]
        assert archive.read("bitsandbytes/libbitsandbytes_cuda130.so") == b"new"
    assert names == listed == [name for name in [*FILES, RECORD] if name not in removed]


def test_a_record_keeps_paths_with_commas_and_the_other_lines_as_they_are() -> None:
    record = '"a,b.py",sha256=x,1\nc.py,sha256=y,2\nd.so,sha256=z,3\n'
    assert rewrite_record(record, {"d.so"}) == '"a,b.py",sha256=x,1\nc.py,sha256=y,2\n'


def entry(file: str, mb: float, *peers: str) -> dict[str, Any]:
    return {"file": file, "bytes": int(mb * 1e6), "peers": peers}


def test_peers_are_left_out_the_last_first_until_the_rest_fits() -> None:
    ours, both, a, b = entry("o", 20, "all"), entry("x", 10, "a", "b"), entry("y", 5, "a"), entry("z", 1, "b")
    again = entry("x", 10, "b")  # the same file for the other folder
    everything = [ours, both, again, a, b]
    assert fit(everything, ["a", "b"], 36e6) == (everything, ["a", "b"])
    assert fit(everything, ["a", "b"], 35e6) == ([ours, both, a], ["a"])
    assert fit(everything, ["b", "a"], 35e6) == ([ours, both, again, b], ["b"])
    assert fit(everything, ["a", "b"], 34e6) == ([ours], [])


def test_where_expertunes_own_do_not_fit_the_largest_are_named() -> None:
    own = [entry("small.whl", 20, "all"), entry("huge.whl", 50, "ours"), entry("peer.whl", 60, "a")]
    message = r"70\.0 MB of wheels without any peer, 60 MB allowed; the largest: huge\.whl \(50\.0 MB\), small"
    with pytest.raises(GatherError, match=message):
        fit(own, ["a"], 60e6)


def test_a_pin_says_its_folder_peers_and_what_else_will_do() -> None:
    text = "Foo_Bar==1.2  # pinned | a, b | >=1.1 | why\n\n# a remark\n# left out: x, y | a | too large"
    [pin], [left_out] = read_pins(text)
    assert (pin.name, pin.version, pin.folder, pin.peers) == ("foo-bar", "1.2", "pinned", ("a", "b"))
    assert pin.is_met_by("1.1")
    assert not pin.is_met_by("1.0")
    assert not pin.is_met_by(None)
    assert (left_out.names, left_out.peers, left_out.reason) == (("x", "y"), ("a",), "too large")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a==1  # current | all | any | why", "A==2  # current | all | any | why"], "line 2: a is in current already"),
        (["a>=1  # current | all | any | why"], "line 1: expected NAME==VERSION"),
        (["a==1"], "line 1: expected NAME==VERSION"),
        (["a==1  # current | all | why"], "line 1: expected 4 fields"),
        (["a==1  # elsewhere | all | any | why"], "line 1: the folder is 'elsewhere'"),
    ],
)
def test_a_line_that_is_no_pin_or_comes_twice_is_refused_with_its_number(lines: list[str], message: str) -> None:
    with pytest.raises(GatherError, match=message):
        pins(*lines)


def test_what_the_machine_has_is_not_gathered() -> None:
    known = pins(
        "same==1  # current | all | exact | why",
        "other==2  # current | all | exact | why",
        "ranged==3  # current | all | >=2 | why",
        "unknown==4  # current | all | any | why",
        "stranger==5  # current | b | exact | why",
    )
    installed = read_installed("same==1\nother==1\nranged==2.5\nunknown\n# a remark\n-e git+elsewhere\n")
    assert installed == {"same": "1", "other": "1", "ranged": "2.5", "unknown": None}
    assert [pin.name for pin in choose(known, installed, ["a"])] == ["other"]
    assert [pin.name for pin in choose(known, installed, ["a", "b"])] == ["other", "stranger"]


def test_a_pinned_package_comes_along_where_current_would_hide_the_machines_own() -> None:
    both = pins("hub==2  # current | all | exact | why", "hub==1  # pinned | a | >=1,<2 | why")
    assert [pin.version for pin in choose(both, {"hub": "1"}, ["a"])] == ["2", "1"]
    assert [pin.version for pin in choose(both[1:], {"hub": "1"}, ["a"])] == []


def test_the_projects_own_pins_are_in_order() -> None:
    known, left_out = read_pins(PINS.read_text(encoding="utf-8"))
    by_folder = {(pin.name, pin.folder): pin.version for pin in known}
    assert by_folder["transformers", "current"] != by_folder["transformers", "pinned"]
    assert {"grouped-nf4-gemm", "experts4bit-qlora", "unsloth", "unsloth-zoo", "axolotl"} <= {p.name for p in known}
    assert not {name for entry in left_out for name in entry.names} & {pin.name for pin in known}


def gathered(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """The manifest of wheels of 10 kB each, 1 MB for Unsloth's, which no network has given."""

    def download(pins: Iterable[Pin], folder: Path, python: str) -> None:
        for pin in pins:
            with zipfile.ZipFile(folder / f"{pin.name.replace('-', '_')}-{pin.version}-py3-none-any.whl", "w") as file:
                file.writestr("content", b"x" * (1_000_000 if pin.name == "unsloth" else 10_000))

    monkeypatch.setattr(gather_wheels, "download", download)
    monkeypatch.setattr(gather_wheels, "strip_wheel", lambda *arguments: [])
    assert main([str(out), *options]) == 0
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def test_expertunes_own_packages_come_along_whatever_peers_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = gathered(tmp_path / "wheels", monkeypatch, "--peers", "grouped_nf4_gemm")
    names = {wheel["name"] for wheel in manifest["wheels"]}
    assert {"peft", "typer", "datasets", "transformers", "grouped-nf4-gemm"} <= names
    assert not {"experts4bit-qlora", "unsloth"} & names


def test_a_folder_has_the_wheels_of_those_peers_alone_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "wheels"
    everything = gathered(tmp_path / "all", monkeypatch)
    assert everything["peers"] == ["grouped_nf4_gemm", "experts4bit", "unsloth", "axolotl"]
    manifest = gathered(out, monkeypatch, "--most-mb", "1")
    assert manifest["peers"] == ["grouped_nf4_gemm", "experts4bit"]
    assert manifest["peers_left_out"] == ["unsloth", "axolotl"]
    found = {path.name: path.stat().st_size for path in out.glob("*.whl")}
    assert found.keys() == {wheel["file"] for wheel in manifest["wheels"]}
    assert sum(found.values()) == manifest["total_bytes"] <= 1_000_000
    current, pinned = ((out / f"requirements-{name}.txt").read_text().split() for name in ("current", "pinned"))
    assert "experts4bit-qlora==0.58.1" in current
    assert not pinned


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert main([str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

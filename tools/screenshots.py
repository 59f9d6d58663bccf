"""Take a picture of a run's page, or of the page that compares several runs, with headless Chromium.

    python tools/screenshots.py RUN_DIR --out docs/images/report.png
    python tools/screenshots.py RUN_DIR RUN_DIR ... --out docs/images/compare.png [--width 1600] [--height 900] [--dark]

The page is made from the records as `expertune report` and `expertune compare` make it. `--at experts` shows the page
from that section on, and `--print` writes a PDF of the page as it is printed.
"""

import argparse
import shutil
import subprocess
import tempfile
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from expertune import RunRecord
from expertune.report.compare import compare, write_comparison
from expertune.report.page import render_page
from expertune.storage import write_whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    arguments = parsed_arguments()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_page(arguments.runs, page)
        picture = printed(page) if arguments.print else photographed(page, arguments)
    with write_whole(arguments.out) as file:
        file.write(picture)
    print(f"{arguments.out}: {len(picture) / 1e3:,.0f} kB")


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--width", type=int, default=1200, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--at", default="", metavar="SECTION", help="of the page, as its navigation names it")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--print", action="store_true")
    return parser.parse_args()


def write_page(runs: list[Path], page: Path) -> None:
    records = [(str(run), RunRecord.load(run).values) for run in runs]
    if len(records) > 1:
        write_comparison(compare(records), page)
    else:
        (name, record) = records[0]
        page.write_text(render_page(record, name), encoding="utf-8")


def photographed(page: Path, arguments: argparse.Namespace) -> bytes:
    """The page in a frame: a window of its own would be at least 500 pixels wide."""
    width, height = arguments.width, arguments.height
    frame = page.with_name("frame.html")
    style = f"width:{width}px;height:{height}px;border:0;display:block"
    go = f'frames[0].document.getElementById("{arguments.at}").scrollIntoView({{behavior: "instant"}})'
    script = f"<script>onload = () => {go}</script>" if arguments.at else ""
    content = escape(page.read_text(encoding="utf-8"))
    frame.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe srcdoc="{content}" style="{style}">'
        f"</iframe>{script}",
        encoding="utf-8",
    )
    png = frame.with_suffix(".png")
    scheme = ["--blink-settings=preferredColorScheme=0"] if arguments.dark else []
    browse(frame, f"--screenshot={png}", f"--window-size={max(width, 500)},{height}", "--hide-scrollbars", *scheme)
    written = BytesIO()
    with Image.open(png) as image:
        palette = image.convert("RGB").crop((0, 0, width, height)).quantize(256, dither=Image.Dither.NONE)
        palette.save(written, "PNG", optimize=True)
    return written.getvalue()


def printed(page: Path) -> bytes:
    pdf = page.with_suffix(".pdf")
    browse(page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    return pdf.read_bytes()


def browse(page: Path, *options: str) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser here; one of {', '.join(BROWSERS)} has to be on the PATH")
    always = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    subprocess.run([browser, *always, *options, page.as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()

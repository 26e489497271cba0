"""Draw docs/page.png: the page of `ddad serve` with parts of the demo.

make demo && .venv/bin/ddad demo --out demo
python docs/page_picture.py demo docs/page.png
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SHOWN = ("good/004", "stain/003", "good/010", "chip/002", "plugged_hole/001", "good/012", "fibre/004", "scratch/001")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main(demo: Path, picture: Path) -> None:
    files = [next((demo / "parts" / "test").glob(f"{name}.*")) for name in SHOWN]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "part"
        shutil.copytree(demo / "model", model)
        command = [
            sys.executable,
            "-m",
            "ddad.cli",
            "serve",
            str(model),
            "--port",
            "0",
            "--history",
            f"{folder}/history",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                assert server.stdout
                url = server.stdout.readline().split(" on ")[1].split(". ")[0]
                with sync_playwright() as playwright:
                    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
                    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
                    page.goto(url)
                    page.set_input_files("#file", files)
                    page.locator("#gallery a").nth(len(files) - 1).wait_for(timeout=120_000)
                    page.wait_for_load_state("networkidle")
                    page.screenshot(path=picture)
                    browser.close()
                Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)
            finally:
                server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""The gallery and the worked example: complete, small, and about real records."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs/gallery"


def linked(page: Path) -> list[Path]:
    return [page.parent / t for t in re.findall(r"\]\(([^):#]+)\)", page.read_text("utf-8"))]


def test_every_scenario_has_its_report_page_and_picture() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import gallery; print(gallery.index(gallery.scenarios()), end='')"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (GALLERY / "README.md").read_text("utf-8")
    targets = linked(GALLERY / "README.md")
    assert {t.suffix for t in targets} == {".md", ".html", ".png"}
    assert all(t.exists() for t in targets)
    assert {t.name for t in targets} == {p.name for p in GALLERY.iterdir()} - {"README.md"}


def test_pages_are_small_and_name_the_commands_that_made_them() -> None:
    for page in GALLERY.glob("*.html"):
        assert page.stat().st_size < 1_000_000, page.name
        text = page.read_text("utf-8")
        assert f"--output docs/gallery/{page.name}" in text


def test_pictures_of_the_worked_example_exist() -> None:
    page = ROOT / "docs/worked_example.md"
    pictures = [t for t in linked(page) if t.suffix == ".png"]
    assert len(pictures) == page.read_text("utf-8").count("\n#### ")
    assert all(p.exists() for p in pictures)
    assert {p.name for p in pictures} == {p.name for p in (ROOT / "docs/img/worked").iterdir()}

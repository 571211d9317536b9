"""Puts the tables and the picture that ``wmkp compare`` wrote into README.md and docs/rules.md: no figure is typed."""

import re
import shutil
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent


def pages(comparison: Path = Path("comparison"), every_rule: Path = Path("comparison-all")) -> None:
    """Fills the pages' marked places.

    Args:
      comparison: what ``wmkp compare`` wrote.
      every_rule: what ``wmkp compare --rules all --out comparison-all`` wrote.
    """
    table, rules = ((path / "comparison.md").read_text() for path in (comparison, every_rule))
    for page, tables in (("README.md", {"table": table, "rules": rules}), ("docs/rules.md", {"rules": rules})):
        text = (ROOT / page).read_text()
        for name, content in tables.items():
            marked = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
            text, found = re.subn(marked, lambda m, c=content: f"{m[1]}{c}{m[2]}", text, flags=re.DOTALL)
            if found != 1:
                raise SystemExit(f"{page} must have one place marked <!-- {name} --> ... <!-- end of {name} -->")
        (ROOT / page).write_text(text)
    shutil.copy(comparison / "comparison.png", ROOT / "docs" / "comparison.png")


if __name__ == "__main__":
    tyro.cli(pages)

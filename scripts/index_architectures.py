"""Write ``costmodel/architectures/index.json`` from the bundled configs beside it.

Run after adding or renaming a config: ``python scripts/index_architectures.py``. A test fails when
the index is stale. ``names`` maps every lower-case spelling to a file stem: the hub id, its last
part, the stem itself, and the same for each entry of ``_lccost.names``.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "costmodel" / "architectures"


def index(folder: Path) -> dict[str, dict[str, str]]:
    """The index of a folder of configs; raises ``ValueError`` when two files claim one name."""
    names: dict[str, str] = {}
    models: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name == "index.json":
            continue
        own = json.loads(path.read_text("utf-8"))["_lccost"]
        models[path.stem] = own["hub_id"]
        spellings = {path.stem, own["hub_id"], *own["names"]}
        spellings |= {x.rsplit("/", 1)[-1] for x in spellings}
        for spelling in sorted(x.lower() for x in spellings):
            if names.setdefault(spelling, path.stem) != path.stem:
                raise ValueError(f"{spelling} names both {names[spelling]} and {path.stem}")
    return {"models": models, "names": dict(sorted(names.items()))}


if __name__ == "__main__":
    (FOLDER / "index.json").write_text(json.dumps(index(FOLDER), indent=0) + "\n", "utf-8")

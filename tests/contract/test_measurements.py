"""Records kept under ``measurements/DEVICE/`` are replayed: a new folder is found, not listed.

A folder holds records (any number of ``*.jsonl``) and the profile of its device, which the records
name; a profile that is bundled need not be there. What was observed and does not depend on time
must be what today's code predicts for the same key.
"""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from costmodel.errors import LccostError
from costmodel.hardware import load_hardware
from costmodel.registry import load_architecture
from lccost.joins import predict_record

ROOT = Path(__file__).resolve().parents[2] / "measurements"
#: Models that are not bundled, by the name records have for them.
MODELS = {"demo-decoder": resources.files("measure").joinpath("data/demo-decoder.json")}
#: Amounts that engines of this package hold and multiply exactly as predicted.
EXACT = (
    *("weights_bytes", "state_bytes", "state_host_bytes"),
    *("executed_prefill_flops", "executed_decode_flops"),
)
TIMED = ("ok", "noisy")


def folders(root):
    return sorted(p for p in root.iterdir() if p.is_dir())


def replay(folder):
    """Check every record of a folder; how many were timed."""
    files = sorted(folder.glob("*.jsonl"))
    assert files, f"{folder.name} has no records"
    timed = 0
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            row, where = json.loads(line), f"{file.name}:{number}"
            if row["status"] == "not_applicable":
                assert row["reason"], where
                continue
            assert row["environment"]["id"], where
            if row["status"] not in TIMED:
                assert row["message"], where
                continue
            timed += 1
            assert row["samples"]["tpot_s"], f"{where}: a measurement keeps its samples"
            assert row["predicted"]["model"] == row["model"], where
            own = folder / f"{row['gpu']}.toml"
            hardware = load_hardware(own if own.exists() else row["gpu"])
            model = load_architecture(str(MODELS.get(row["model"], row["model"])))
            predicted = predict_record(row, hardware, model)
            for name in EXACT if row["engine"] != "transformers" else ():
                if row[name] is not None:
                    assert row[name] == predicted[name], f"{where}: {name}"
            assert predicted["tpot_s"] > 0, where
    return timed


@pytest.mark.parametrize("folder", folders(ROOT), ids=lambda p: p.name)
def test_kept_records_are_what_is_predicted_today(folder):
    assert replay(folder) > 0


def test_a_new_folder_needs_no_code(tmp_path):
    """As ``scripts/gpu_run.sh`` leaves one: several files, a profile, points that failed."""
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    lines = (ROOT / "cpu-xeon-amx" / "records.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    shutil.copy(ROOT / "cpu-xeon-amx" / "xeon-amx.toml", folder / "profile.toml")
    for name, part, gpu in (("a", rows[:2], "profile"), ("b", rows[2:4], "h200-sxm")):
        text = "".join(json.dumps({**row, "gpu": gpu}) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)
    failed = {**rows[4], "status": "oom", "message": "out of memory", "samples": None}
    refused = {"status": "not_applicable", "reason": "no such cache", "environment": None}
    with (folder / "a.jsonl").open("a") as file:
        file.writelines(json.dumps(x) + "\n" for x in (failed, refused))
    assert folders(tmp_path) == [folder]
    assert replay(folder) == 4
    # and what does not agree is found
    (folder / "b.jsonl").write_text(json.dumps({**rows[0], "state_bytes": 1, "gpu": "profile"}))
    with pytest.raises(AssertionError, match=r"b\.jsonl:1: state_bytes"):
        replay(folder)
    (folder / "b.jsonl").write_text(json.dumps({**rows[0], "gpu": "nowhere"}))
    with pytest.raises(LccostError, match="nowhere"):
        replay(folder)

"""Does a table stay exact when runs are killed? The whole fault suite, counted.

`tests/test_faults*.py` strike runs at seeded moments and compare what the next run leaves with an undisturbed one; each
leaves a line. This file runs them in a pytest of its own and keeps the counts: by fault, by the phase in which it
struck, how many runs it took, how many tables differed.

    python -m benchmarks.faults                                      # whole
    python -m benchmarks.faults --log runs.jsonl -- -k "driver"      # a part, in a machine's spare minutes ...
    python -m benchmarks.faults --log runs.jsonl -- -k "not driver"  # ... and the rest: counts both
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.setting import HOME, environment, keep, say

ROOT = HOME.parent
SUITE = ("tests/test_faults.py", "tests/test_faults_cluster.py", "tests/test_faults_ray_data.py")
MORE = ("tests/test_nights.py", "tests/test_secrets.py", "tests/test_two_runs.py")
LOG_VARIABLE = "NIGHTLOOM_FAULTS_LOG"
"""The same as in tests/faults.py."""
LEAST = 60
"""Runs that must have been struck for the record to count."""


def run_suite(log: Path, chosen: list[str]) -> tuple[int, str]:
    """pytest's status and last line; it says more on stderr as it goes."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "--show-capture=no", "--tb=short"]
    run = subprocess.run(
        [*command, *SUITE, *MORE, *chosen],
        cwd=ROOT,
        env=os.environ | {LOG_VARIABLE: str(log)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    say(run.stdout)
    return run.returncode, run.stdout.strip().splitlines()[-1]


def count(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the lines of the log say together."""
    struck = [run for run in runs if run["phase"] is not None]
    faults: dict[str, Any] = {}
    for name in sorted({run["fault"] for run in runs}):
        some = [run for run in struck if run["fault"] == name]
        faults[name] = {
            "struck": len(some),
            "too_late": sum(run["fault"] == name for run in runs) - len(some),
            "phases": dict(Counter(run["phase"] for run in some).most_common()),
            "outcomes": dict(Counter(run["outcome"].partition(":")[0] for run in some).most_common()),
            "most_reruns": max((run["reruns"] for run in some), default=0),
            "median_s": sorted(run["seconds"] for run in some)[len(some) // 2] if some else None,
        }
    return {
        "struck": len(struck),
        "too_late": len(runs) - len(struck),
        "differences": sum(run["differences"] for run in runs),
        "versions_compared": sum(run["versions"] for run in runs),
        "reruns": sum(run["reruns"] for run in runs),
        "phases": dict(Counter(run["phase"] for run in struck).most_common()),
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HOME / "results")
    parser.add_argument("--log", type=Path, help="a file that keeps the lines of the parts of a suite")
    parser.add_argument("chosen", nargs="*", help="arguments of pytest")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "faults", "environment": environment()}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nightloom-faults-") as temporary:
        log = (arguments.log or Path(temporary) / "runs.jsonl").absolute()
        status, closing = run_suite(log, arguments.chosen)
        part = {"part": " ".join(arguments.chosen), "pytest": closing, "passed": status == 0}
        part |= {"seconds": round(time.monotonic() - begun), "commit": record["environment"]["commit"]}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(part) + "\n")
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    parts = [line for line in lines if "part" in line]
    runs = [line for line in lines if "part" not in line]
    status = int(not all(part["passed"] for part in parts))
    record |= {"parts": parts, "seconds": sum(part["seconds"] for part in parts), **count(runs), "runs": runs}
    # A failure is a record too, but not one that is taken for the state of things.
    enough = record["struck"] >= LEAST
    record["tag"] = "failed" if status else "" if enough else "part"
    say(f"kept in {keep(record, arguments.out)}")
    print(json.dumps({key: value for key, value in record.items() if key not in ("runs", "environment")}))
    if not enough:
        say(f"only {record['struck']} runs were struck; {LEAST} are wanted")
    return status or int(not enough)


if __name__ == "__main__":
    sys.exit(main())

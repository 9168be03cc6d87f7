"""Seconds of `make test`, of all tests or of those that an earlier commit had: what a growing suite is measured by.

    python benchmarks/suite.py [--commit COMMIT] [--json FILE]

With a commit: of today's tests, those whose function it had too, by name, with all parameters that they have today.
Lint and type check are included, as in CI; the environment is that of this Python. For an idle machine.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = "M3VIT_SUITE_NAMES"  # the file of the names to run, one a line
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Be pytest's plugin, in each of its processes: leave out what the commit had not."""
    names = set(Path(os.environ[NAMES]).read_text().split())
    left = [item for item in items if getattr(item, "originalname", item.name) not in names]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if getattr(item, "originalname", item.name) in names]


def tests_of(commit: str) -> set[str]:
    """Return the names of all functions that are tests in a commit."""
    command = ["git", "grep", "-hE", r"^\s*(async )?def test_", commit, "--", "tests"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"def (test_\w+)", found))


def main() -> None:
    import tempfile

    from _bench import arguments, machine, save, seconds

    parser = arguments(__doc__)
    parser.add_argument("--commit", help="whose tests")
    args = parser.parse_args()
    found, variables, counted = machine(), dict(os.environ), {}
    today = tests_of("HEAD")
    with tempfile.TemporaryDirectory() as folder:
        if args.commit:
            names, had = Path(folder) / "names.txt", tests_of(args.commit)
            names.write_text("\n".join(had))
            counted = {"had": len(had), "kept": len(had & today)}
            print(f"{args.commit} had {len(had)} test functions, of which {len(had & today)} are there today")
            variables |= {NAMES: str(names), "PYTEST_ADDOPTS": "-p benchmarks.suite"}  # from the folder it runs in
        command = ["make", "test", f"VENV={Path(sys.executable).parents[1]}"]
        said: list[str] = []
        took = seconds(
            lambda: said.append(subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True).stdout)
        )
    last = [line.strip("= ") for line in said[0].splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    print(f"{len(today)} test functions today; make test: {took:.0f} s; pytest: {last[-1] if last else 'nothing'}")
    save(args.json, {"machine": found, "today": len(today), **counted, "seconds": took, "pytest": last})


if __name__ == "__main__":
    main()

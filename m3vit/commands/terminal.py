"""What the commands share: the parser of arguments, progress, lines and tables of results."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

PLUGIN_HELP = (
    "--plugin MODULE, a module's name or a .py file, adds tasks, kinds, label sets, layouts and decoders; it may be "
    "given several times (docs/plugins.md)."
)


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake on one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def console(width: int | None = None, stderr: bool = False) -> Any:
    """Return a rich console on standard output or error."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Plain(width=width, stderr=stderr)


@contextmanager
def progress_bar(title: str, visible: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar; the yielded function takes (done, total, text beside the bar = "")."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    progress = Progress(*columns, console=console(stderr=True), disable=not visible)
    task: Any = None
    shown = False

    def update(done: int, total: int, text: str = "") -> None:
        nonlocal task, shown
        if task is None:
            task = progress.add_task(title, total=None, text="")
        progress.update(task, completed=done, total=total, text=text)
        # What is refused before anything is done shows no bar, but to who looks on.
        if not shown and (done or progress.console.is_terminal):
            shown = True
            progress.start()

    try:
        yield update
    finally:
        if shown:
            progress.stop()


def say(text: str) -> None:
    """Print a line of result."""
    print(text, flush=True)


def say_changed(names: Sequence[str], changes: Mapping[str, str] | None = None) -> None:
    """Say which files of a project were edited since its export, if any; `changes`: what changed in each."""
    if names:
        said = [f"{name} ({changes[name]})" if changes and changes.get(name) else name for name in names]
        say(f"changed since the export: {', '.join(said)}")


def print_scores(
    tasks: dict[str, Any],
    columns: Sequence[str],
    caption: str,
    all_metrics: bool = False,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Print the headline metric of each task, or all its metrics, a column for each predictor.

    `beside`: by task, a second metric, in the unit of the first.
    """
    from rich.table import Table

    from m3vit.tasks import TASKS

    table = Table(caption=caption)
    table.add_column("task")
    table.add_column("metric")
    for column in columns:
        table.add_column(column, justify="right")
    for task, scores in tasks.items():
        row = TASKS[task]
        found = [scores.get(column) for column in columns]
        arrow = "↑" if row.higher_is_better else "↓"
        names = {row.metric: f"{row.metric} ({row.unit}) {arrow}"}
        if second := (beside or {}).get(task):
            names[second] = f"{second} ({row.unit}) {arrow}"
        if all_metrics and isinstance(found[-1], dict):
            names |= {name: name for name in found[-1] if name not in names}
        for place, (metric, title) in enumerate(names.items()):
            values = [
                "-" if value is None else f"{value[metric] if isinstance(value, dict) else value:.3f}"
                for value in found
            ]
            table.add_row("" if place else task, title, *values)
    console(max(console().width, 100)).print(table)

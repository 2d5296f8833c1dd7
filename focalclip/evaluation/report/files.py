"""Which results a path on the command line stands for."""

import json
from pathlib import Path

from focalclip.errors import UserError


def find_results(a: str | Path, b: str | Path) -> tuple[Path, Path]:
    """The two JSON files; of run directories, those of the one benchmark that both were evaluated on.

    Raises:
        UserError: if there is none, or more than one choice.
    """
    choices = [result_files(source) for source in (a, b)]
    common = [name for name in choices[0] if name in choices[1]]
    if len(choices[0]) == len(choices[1]) == 1:
        return next(iter(choices[0].values())), next(iter(choices[1].values()))
    for i, j in ((0, 1), (1, 0)):
        if len(choices[i]) == 1 and (name := next(iter(choices[i]))) in choices[j]:
            return choices[0][name], choices[1][name]
    if len(common) == 1:
        return choices[0][common[0]], choices[1][common[0]]
    names = ", ".join(common) or "none in common"
    raise UserError(f"--compare {a} {b}: several results ({names}); name the files, such as {a}/eval/NAME.json")


def result_files(source: str | Path) -> dict[str, Path]:
    """The results that a path stands for, by name: the file itself, or the zero-shot ones in a run's ``eval``.

    Raises:
        UserError: if there is none.
    """
    source = Path(source)
    if source.is_file():
        return {source.stem: source}
    paths = sorted([*source.glob("eval/*.json"), *source.glob("*.json")])
    found = {path.stem: path for path in paths if _is_result(path)}
    if not found:
        raise UserError(f"{source}: neither a result's JSON nor a run directory with one in eval/; evaluate it first")
    return found


def _is_result(path: Path) -> bool:
    """Whether a file in a run's folder is a zero-shot result; probes and retrieval write theirs there too."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    tasks = content.get("tasks") if isinstance(content, dict) else None
    return isinstance(tasks, dict) and all("in_score" in task and "interval" in task for task in tasks.values())

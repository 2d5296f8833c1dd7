"""Which results a path on the command line stands for."""

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
    """The results that a path stands for, by name: the file itself, or those in a run directory's ``eval``.

    Raises:
        UserError: if there is none.
    """
    source = Path(source)
    if source.is_file():
        return {source.stem: source}
    found = {path.stem: path for path in sorted([*source.glob("eval/*.json"), *source.glob("*.json")])}
    if not found:
        raise UserError(f"{source}: neither a result's JSON nor a run directory with one in eval/; evaluate it first")
    return found

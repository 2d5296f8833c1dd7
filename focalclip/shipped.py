"""The configurations that come with focalclip; looking them up loads nothing heavy."""

from pathlib import Path


def config_dir() -> Path:
    """Folder of the shipped configurations: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in config_dir().glob("*.yaml"))

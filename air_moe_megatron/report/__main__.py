"""The command: ``python -m air_moe_megatron.report RUN_DIR... [--out FILE]``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = "air_moe_megatron.report"
_PACKAGES = ("jinja2", "markupsafe", "matplotlib", "numpy", "pandas")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and say where it is.

    Raises:
        SystemExit: with code 2 and one line, if a file or a package is missing or a file is invalid.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {_PROGRAM}", description="Explain training runs on one HTML page."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="folder with air_diagnostics.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in the first RUN_DIR")
    given = parser.parse_args(arguments)
    out = given.out or given.folders[0] / "report.html"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a tokenizer is built from local files or not at all
    try:
        size = write_page(given.folders, out)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{_PROGRAM}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PACKAGES:
            raise
        sys.stderr.write(
            f"{_PROGRAM}: error: the package {error.name} is missing; install it, or all that a run needs: "
            "pip install 'air_moe_megatron[train]'\n"
        )
        raise SystemExit(2) from None
    sys.stdout.write(f"{out} ({size / 1e6:.1f} MB)\n")


def write_page(folders: Sequence[Path], out: Path) -> int:
    """Read the runs and write their page, all or nothing.

    Args:
        folders: folders of the runs, each with the file that training wrote.
        out: file of the page; its folder is created if missing.
    Returns:
        number of bytes of the page.
    Raises:
        ValueError: if a file does not have the known format, or the runs do not fit on one page.
        OSError: if a file is missing or the page cannot be written.
    """
    from air_moe_megatron.report.page import render
    from air_moe_megatron.report.runs import LINES, SNAPSHOT, read_runs

    if out.is_dir():
        raise ValueError(f"--out ({out}) is a folder; give the name of a file in it")
    if out.name in (LINES, SNAPSHOT):
        raise ValueError(f"--out ({out}) is the name of a run's own file; give the page another one")
    runs = read_runs(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = render(runs).encode()
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(text)
    unfinished.replace(out)
    return len(text)


if __name__ == "__main__":
    main()

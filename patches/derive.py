"""Writes the patches of the other versions from that of 0.19: `make patches`, after every change of that one."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "core_v0.19.0.patch"

STARTS = {
    "core_v0.17.0": {"gpt_layer_specs.py": [622], "transformer_config.py": [651], "training.py": [1791, 3006, 3018]},
    "core_v0.18.0": {"gpt_layer_specs.py": [636], "transformer_config.py": [677], "training.py": [2182, 3521, 3533]},
}
"""Tag -> file -> the line of the file at which each of its hunks begins, without the patch."""

_CALL = "                forward_step_func, train_data_iterator, model, optimizer, opt_param_scheduler, config, "
_CALL += "forward_backward_func, iteration=iteration\n"
CONTEXT = {
    "core_v0.17.0": {
        "                p2p_communicator=p2p_communicator,\n": _CALL,
        "            if _maybe_raise_workload_exception is not None and iteration != start_iteration:\n": (
            "        if should_checkpoint:\n"
        ),
    },
    "core_v0.18.0": {"                p2p_communicator=p2p_communicator,\n": _CALL},
}
"""Tag -> a line around our lines in 0.19 -> the line that stands there."""

_HEADER = re.compile(r"@@ -\d+,(\d+) \+\d+,(\d+) @@(.*)")


def derive(source: str, tag: str) -> str:
    """The patch for a tag: the same lines, at the places of that tag."""
    written, starts, added = [], iter(()), 0
    for line in source.splitlines(keepends=True):
        header = _HEADER.match(line)
        if line.startswith("index "):
            continue
        if line.startswith("+++ "):
            starts, added = iter(STARTS[tag][line.strip().rpartition("/")[2]]), 0
        elif header:
            before, after, place = int(header[1]), int(header[2]), next(starts)
            line = f"@@ -{place},{before} +{place + added},{after} @@{header[3]}\n"
            added += after - before
        elif line[0] == " ":
            line = " " + CONTEXT[tag].get(line[1:], line[1:])
        written.append(line)
    return "".join(written)


if __name__ == "__main__":
    for tag in STARTS:
        (FOLDER / f"{tag}.patch").write_text(derive(SOURCE.read_text(encoding="utf-8"), tag), encoding="utf-8")

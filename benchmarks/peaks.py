"""Peak memory of a step beside weights and gradients, without and with a rebuild of the shortlists."""

import torch

from benchmarks.measure import MIB, measure_memory, peak_memory
from benchmarks.models import ROUTE, Sizes, prepare_step

COLUMNS = ("peak_mib", "peak_with_rebuild_mib")


def peak_columns(kind: str, sizes: Sizes, device: torch.device, pg_collection) -> dict[str, int | str]:
    """The peaks in MiB as columns of a row. On a CPU a process of its own measures each of them.

    Args:
        kind: as that of :func:`benchmarks.models.prepare_step`. Only AIR has lists; others' second peak is empty.
    """
    has_lists = kind in (ROUTE, "AIRMoELayer")
    peaks = [
        measure_memory(measure_peak, (kind, sizes, with_rebuild), device, pg_collection)
        for with_rebuild in ((False, True) if has_lists else (False,))
    ]
    mib = [round(peak / MIB) for peak in peaks]
    return dict(zip(COLUMNS, mib if has_lists else [*mib, ""], strict=True))


def measure_peak(kind: str, sizes: Sizes, with_rebuild: bool, device: torch.device, pg_collection) -> int:
    """Bytes that a step needs beside weights and gradients. Nothing may be measured before it in a CPU's process."""
    prepared = prepare_step(kind, sizes, pg_collection, device)
    for parameter in prepared.module.parameters():
        parameter.main_grad.fill_(0.0)  # so that its memory is already in use
    if prepared.air is not None:
        with torch.no_grad():
            prepared.air.route(prepared.hidden[:1])  # makes the first lists, which the measured step then has
    if not with_rebuild:
        return peak_memory(prepared.run, device)
    index, codebook = prepared.air.index, prepared.air.codebook
    index.refresh_interval = 2**62  # as in a young codebook: every update makes a rebuild due
    codebook.count_update()
    peak = peak_memory(prepared.run, device)
    index.commit()
    if int(index.built_at) != codebook.updates_on_host:
        raise AssertionError("the step has not rebuilt the lists")
    return peak

"""The state of AIR routers that a checkpoint may not hold."""

import enum

from air_moe_megatron.learned.index import REBUILDING


class MissingState(enum.StrEnum):
    """State that AIR routers have and a checkpoint does not hold, so it is not requested. ``NOTHING`` is falsy."""

    NOTHING = ""
    REBUILD = "rebuild"
    """An unfinished rebuild of the lists, as in older checkpoints of AIR: it begins anew."""
    LISTS = "lists"
    """The lists with their rebuild: they are made anew from the codebook."""
    CODEBOOK = "codebook"
    """The codebook and with it the lists, as in checkpoints of top-k: both are learned anew."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of the missing names in the state of a router."""
        return _PREFIXES[self]


_PREFIXES = {
    MissingState.NOTHING: (),
    MissingState.REBUILD: tuple(f"index.{name}" for name in REBUILDING),
    MissingState.LISTS: ("index.",),
    MissingState.CODEBOOK: ("codebook.", "index."),
}

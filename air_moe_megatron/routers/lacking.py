"""What a checkpoint may lack of the state of AIR routers."""

import enum

from air_moe_megatron.learned.index import REBUILDING


class Lacking(enum.StrEnum):
    """What AIR routers have and their checkpoint does not hold, so that it is not requested. Nothing is false."""

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
    Lacking.NOTHING: (),
    Lacking.REBUILD: tuple(f"index.{name}" for name in REBUILDING),
    Lacking.LISTS: ("index.",),
    Lacking.CODEBOOK: ("codebook.", "index."),
}

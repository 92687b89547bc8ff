"""The rivals of AIR, one file each, and what all routers share."""

"""A package of somebody else's: one of each kind of thing that Espalier takes, subclassing nothing of it."""

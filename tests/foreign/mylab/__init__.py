"""A foreign package with one plug-in of each kind; none subclasses a class of Espalier."""

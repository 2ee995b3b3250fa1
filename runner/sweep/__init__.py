"""A grid as data: points -> cells (frozen, fingerprinted) -> plan -> launcher."""

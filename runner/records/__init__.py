"""What stands on the disk: configs, cells, fingerprints, journals, checkpoints, failures."""

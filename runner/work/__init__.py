"""What a cell does: train, evaluate, make data, weigh a mixture. Each is a `Work` of `runner/records/contracts.py`."""

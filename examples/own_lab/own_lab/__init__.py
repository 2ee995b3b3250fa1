"""A model, a task, a data source and an evaluation from outside Espalier."""

"""Modules and their frozen configs. A model is one file here and one YAML in `conf/model/`."""

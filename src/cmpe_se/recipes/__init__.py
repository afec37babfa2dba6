"""Recipes: settings of :class:`cmpe_se.config.TrainingConfig` by name, as YAML files."""

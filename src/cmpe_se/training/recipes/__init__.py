"""Recipes: settings of :class:`cmpe_se.training.config.TrainingConfig` by name, as YAML files."""

"""Pipelines carried out: stages of a model, their schedule's actions in order, tensors between processes."""

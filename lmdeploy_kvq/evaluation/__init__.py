"""Measuring what cache formats do to a model: what ``lmdeploy-kvq eval`` runs, through what, and how it is shown."""

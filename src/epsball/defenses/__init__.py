"""Defenses: what makes a model harder to fool. `training` makes robust models; only an audit says how robust they are."""
